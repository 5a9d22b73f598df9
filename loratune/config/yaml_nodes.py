"""Parse YAML text into nodes with line and column.

The YAML read here is the part that people and programs agree on: mappings, lists, strings, numbers, true/false and
null. What YAML 1.1 reads in surprising ways is text (`yes`, `12:30`, `0x1F`), a number (`2e-4`) or a problem (`012`),
and what can hide content or explode (tags, merge keys, deep nesting, many aliases, huge files) is refused.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loratune.errors import Place, Problem, RecipeError, shorten
from loratune.system import files

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ALIASES = 64
MAX_NODES = 50_000

WHOLE = "recipe"  # place name of a recipe that is not from a file

Scalar = str | int | float | bool | None


@dataclass
class Node:
    """A value of the YAML text with its place.

    `key` is the place of the mapping key it belongs to, `raw` a scalar as it was typed.
    """

    value: Scalar | dict[str, Node] | list[Node]
    place: Place
    key: Place | None = None
    raw: str = ""

    def plain(self) -> Any:
        """Return the value as plain Python data."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def copy(self) -> Node:
        """Return a deep copy."""
        value = self.value
        if isinstance(value, dict):
            value = {key: node.copy() for key, node in value.items()}
        elif isinstance(value, list):
            value = [node.copy() for node in value]
        return Node(value, self.place, self.key, self.raw)

    def child(self, step: str | int) -> Node | None:
        """Return the child at a key or an index, or None."""
        if isinstance(self.value, dict):
            return self.value.get(step) if isinstance(step, str) else None
        if isinstance(self.value, list) and isinstance(step, int) and step < len(self.value):
            return self.value[step]
        return None

    def find(self, path: Sequence[str | int]) -> Node:
        """Follow `path` as far as possible; an index is ignored at a single value given instead of a list."""
        node: Node = self
        for step in path:
            if isinstance(step, int) and not isinstance(node.value, list):
                continue
            inner = node.child(step)
            if inner is None:
                break
            node = inner
        return node

    def given(self) -> str:
        """Return the value as shown in a message."""
        if isinstance(self.value, dict):
            return "a mapping" if self.value else "an empty mapping"
        if isinstance(self.value, list):
            return "a list" if self.value else "an empty list"
        if self.value is None:
            return "null"
        return f"`{shorten(self.raw)}`" if self.raw else "an empty string"


@dataclass
class Tree:
    """The root node of a recipe and the problems found while reading it."""

    root: Node
    source: str
    problems: list[Problem] = field(default_factory=list)

    def place(self, *path: str | int) -> Place:
        """Return the place of the value at `path`, or of its nearest ancestor."""
        return self.root.find(path).place


def parse(text: str | bytes, source: str) -> Tree:
    """Read YAML text into a tree of nodes.

    Args:
        text: the text, at most 1 MiB; bytes are read as UTF-8.
        source: the name shown in places, usually the file's path as it was given.

    Returns:
        The tree, with the problems that still let the rest be read (a duplicate key, a tag, `012`).

    Raises:
        RecipeError: when there is no tree: not YAML, not UTF-8, too big, too deep.
    """
    size = len(text)
    if size > MAX_BYTES:
        raise RecipeError(Problem(f"too big: {size:,} bytes, at most {MAX_BYTES:,}", Place(source)))
    if isinstance(text, bytes):
        try:
            return _Reader(text.decode("utf-8-sig"), source).read()
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            column = error.start - (text.rfind(b"\n", 0, error.start) + 1) + 1
            place = Place(source, line, column)
            raise RecipeError(
                Problem(f"not UTF-8: byte 0x{text[error.start]:02x}", place, "save it as UTF-8")
            ) from None
    return _Reader(text, source).read()


_SURROGATE = re.compile("[\ud800-\udfff]")


def _tag_name(tag: str) -> str:
    return shorten(tag.replace("tag:yaml.org,2002:", "!!"))


def _without_zeros(text: str) -> str:
    sign, digits = re.fullmatch(r"([-+]?)0+(?=[0-9])(.*)", text).groups()  # type: ignore[union-attr]
    return f"{sign}{digits}"


INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+(\.[0-9]*)?")
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None, "~": None, "": None}
_WORDS |= {word.title(): value for word, value in _WORDS.items()} | {
    word.upper(): value for word, value in _WORDS.items()
}


_CLOSING = {"[": "]", "{": "}"}
# PyYAML's message, ours (empty: the same), and the remedy.
_SYNTAX = (
    ("mapping values are not allowed", "a second `: ` in one line", "put quotes around a text that holds `: `"),
    ("expected `<document start>`", "text where a key is expected", "is a `: ` missing?"),
    ("could not find expected `:`", "a line without `key: value`", "is a `:` or the space after it missing?"),
    ("expected <block end>, but found", "this does not fit the lines above", "is it indented as they are?"),
    ("cannot start any token", "", "put quotes around the text"),
    ("expected alphabetic or numeric character", "a word that starts with `*` or `&`", "put quotes around the text"),
    ("sequence entries are not allowed", "a list item where none is allowed", "start the list on a new line"),
    ("unknown escape character", "", "in double quotes write \\\\ for a backslash, or use single quotes"),
)


class _Reader:
    """One pass over PyYAML's events, which have the places; nothing is built before it is checked."""

    def __init__(self, text: str, source: str):
        self.text, self.source, self.lines = text, source, text.splitlines()
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node] = {}
        self.weights: dict[str, int] = {}  # nodes below each anchor: an alias counts as many
        self.aliases = self.nodes = 0

    def place(self, mark: Any) -> Place:
        if mark is None:
            return Place(self.source, 1, 1)
        text = self.lines[mark.line] if mark.line < len(self.lines) else ""
        return Place(self.source, mark.line + 1, mark.column + 1, text)

    def read(self) -> Tree:
        try:
            self.loader = yaml.SafeLoader(self.text)
            self.event()  # stream start
            if isinstance(self.event(), yaml.StreamEndEvent):
                raise RecipeError(
                    Problem("the recipe is empty", Place(self.source), "`loratune init` writes a first one")
                )
            root = self.node(self.event(), 0)
            self.event()  # document end
            extra = self.event()
            if not isinstance(extra, yaml.StreamEndEvent):
                self.problems.append(
                    Problem("a second YAML document", self.place(extra.start_mark), "one recipe per file")
                )
        except yaml.reader.ReaderError as error:
            before = self.text[: error.position]
            place = Place(self.source, before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1)
            shown = f"U+{ord(error.character):04X}" if isinstance(error.character, str) else f"U+{error.character:04X}"
            raise RecipeError(Problem(f"YAML does not allow the character {shown}", place, "remove it")) from None
        except yaml.MarkedYAMLError as error:
            raise RecipeError(self.syntax(error)) from None
        except (ValueError, OverflowError):  # PyYAML on an escape beyond Unicode, or on a version of 5000 digits
            place = self.place(self.loader.get_mark())
            raise RecipeError(Problem("not YAML: an escape or a number out of range", place)) from None
        if not isinstance(root.value, dict):
            raise RecipeError(
                Problem(f"a recipe is a mapping of sections, given {root.given()}", root.place, "start with `model:`")
            )
        return Tree(root, self.source, self.problems)

    def event(self) -> yaml.Event:
        event: yaml.Event = self.loader.get_event()  # type: ignore[no-untyped-call]
        return event

    def syntax(self, error: yaml.MarkedYAMLError) -> Problem:
        what = str(error.problem or error.context or "not YAML").replace("'", "`")
        place = self.place(error.problem_mark or error.context_mark)
        begun = self.place(error.context_mark)
        before = place.text[: place.column]
        if "`\\t`" in what or ("\t" in before and not before.strip()):
            return Problem("not YAML: a tab where spaces are required", place, "indent with spaces")
        unclosed = "expected `,` or" in what and begun.line < place.line
        if unclosed or "end of stream" in what or "<stream end>" in what:
            opened = begun.text[begun.column - 1 : begun.column]
            closing = _CLOSING.get(opened, opened)
            return Problem(f"not YAML: `{opened}` is not closed", begun, f"a closing `{closing}` is missing")
        if "mapping values are not allowed" in what and not re.search(r":\s", before[:-1]):
            return Problem(
                "not YAML: a key where none is allowed",
                place,
                "does the line above lack a `: `, or is this one indented too far?",
            )
        if "expected <block end>" in what and before[:-1].strip():
            return Problem("not YAML: text after the end of a value", place, "put quotes around all of it")
        for found, message, hint in _SYNTAX:
            if found in what:
                return Problem(f"not YAML: {message or what}", place, hint)
        return Problem(f"not YAML: {what}", place)

    def node(self, event: yaml.Event, depth: int) -> Node:
        place = self.place(event.start_mark)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise RecipeError(Problem(f"more than {MAX_NODES:,} values", place))
        if depth > MAX_DEPTH:
            raise RecipeError(Problem(f"nested deeper than {MAX_DEPTH} levels", place))
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, place)
        assert isinstance(event, (yaml.ScalarEvent, yaml.SequenceStartEvent, yaml.MappingStartEvent))
        if event.tag is not None:
            self.problems.append(
                Problem(f"the tag `{_tag_name(event.tag)}` is not allowed", place, "a recipe holds plain values only")
            )
        before = self.nodes
        if isinstance(event, yaml.ScalarEvent):
            if _SURROGATE.search(event.value):
                self.problems.append(Problem("an escape for a lone surrogate", place, "write the character itself"))
                event.value = _SURROGATE.sub("?", event.value)
            node = Node(self.scalar(event, place), place, raw=event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(item := self.event(), yaml.SequenceEndEvent):
                items.append(self.node(item, depth + 1))
            node = Node(items, place)
        else:
            node = Node(self.mapping(depth), place)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
            self.weights[event.anchor] = self.nodes - before + 1
        return node

    def alias(self, event: yaml.AliasEvent, place: Place) -> Node:
        name = str(event.anchor)
        self.aliases += 1
        self.nodes += self.weights.get(name, 0)
        if self.aliases > MAX_ALIASES:
            raise RecipeError(Problem(f"more than {MAX_ALIASES} aliases", place, "write the values out"))
        if self.nodes > MAX_NODES:
            raise RecipeError(Problem(f"aliases that expand to more than {MAX_NODES:,} values", place))
        if name not in self.anchors:
            self.problems.append(Problem(f"unknown alias `*{shorten(name)}`", place))
            return Node(None, place)
        target = self.anchors[name]
        return Node(target.copy().value, place, raw=target.raw)  # a copy: `--set` changes one, not both

    def mapping(self, depth: int) -> dict[str, Node]:
        items: dict[str, Node] = {}
        while not isinstance(event := self.event(), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(self.event(), depth + 1)
            name = key.raw
            if not name or isinstance(event, yaml.AliasEvent):
                self.problems.append(Problem("a key must be a non-empty string", key.place))
                continue
            if name == "<<" and not (isinstance(event, yaml.ScalarEvent) and event.style):
                self.problems.append(Problem("merge keys (`<<`) are not supported", key.place, "write the keys out"))
                continue
            if name in items:
                first = items[name].key
                before = f", first on line {first.line}" if first and first.line < key.place.line else ""
                self.problems.append(Problem(f"`{shorten(name)}` is given twice{before}", key.place))
                continue
            value.key = key.place
            items[name] = value
        return items

    def scalar(self, event: yaml.ScalarEvent, place: Place) -> Scalar:
        text = event.value
        if not event.implicit[0]:  # quoted: always text
            return str(text)
        if text in _WORDS:
            return _WORDS[text]
        if _LEADING_ZERO.fullmatch(text):
            self.problems.append(
                Problem(
                    f"`{shorten(text)}` starts with 0, and YAML parsers disagree on its meaning",
                    place,
                    f"write {_without_zeros(text)} for the number or '{text}' for the string",
                )
            )
            return str(text)
        if len(text) > 300:
            return str(text)
        if INT.fullmatch(text):
            return int(text)
        if FLOAT.fullmatch(text):
            return float(text)
        return str(text)


class _Taker:
    """Convert plain Python data to nodes, with the limits of YAML text; the place of a value is its key."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.nodes = 0

    def node(self, value: Any, path: str, depth: int) -> Node:
        place = Place(path or WHOLE)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise RecipeError(Problem(f"more than {MAX_NODES:,} values", place))
        if depth > MAX_DEPTH:
            raise RecipeError(Problem(f"nested deeper than {MAX_DEPTH} levels", place))
        if isinstance(value, Mapping):
            return Node(self.mapping(value, path, depth), place)
        if isinstance(value, (list, tuple)):
            return Node([self.node(item, _below(path, index), depth + 1) for index, item in enumerate(value)], place)
        return self.scalar(value, place)

    def mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Node]:
        items: dict[str, Node] = {}
        for key, item in value.items():
            if not isinstance(key, str) or not key:
                self.problems.append(Problem("a key must be a non-empty string", Place(_below(path, key))))
                continue
            name = self.text(key, Place(_below(path, key)))
            items[name] = self.node(item, _below(path, key), depth + 1)
            items[name].key = Place(_below(path, key))
        return items

    def scalar(self, value: Any, place: Place) -> Node:
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            text = self.text(str(value), place)
            return Node(text, place, raw=text)
        if value is None or isinstance(value, bool):
            return Node(value, place, raw={None: "null", True: "true", False: "false"}[value])
        if isinstance(value, float) and not math.isfinite(value):  # YAML text can't have it either
            return Node(repr(float(value)), place, raw=repr(float(value)))
        if isinstance(value, (int, float)):
            number = int(value) if isinstance(value, int) else float(value)
            return Node(number, place, raw=repr(number))
        kind = shorten(type(value).__qualname__)
        hint = "a recipe holds mappings, lists, strings, numbers, true, false and null"
        self.problems.append(Problem(f"a value of the type `{kind}`", place, hint))
        return Node(None, place)

    def text(self, value: str, place: Place) -> str:
        if len(value) > MAX_BYTES:
            raise RecipeError(Problem(f"too big: {len(value):,} characters, at most {MAX_BYTES:,}", place))
        if _SURROGATE.search(value):
            self.problems.append(Problem("a string with a lone surrogate", place, "write the character itself"))
        return _SURROGATE.sub("?", value)


def _below(path: str, step: Any) -> str:
    name = shorten(_SURROGATE.sub("?", str(step)))
    return f"{path}.{name}" if path else name


def taken(data: Mapping[str, Any]) -> Tree:
    """Return plain data as a tree of nodes whose places are their keys, such as `optimizer.lr`.

    Args:
        data: mappings, lists, tuples, strings, paths, numbers, booleans and None.

    Returns:
        The tree, with a problem for each value of another type.

    Raises:
        RecipeError: when it is too deep or too big.
    """
    taker = _Taker()
    root = taker.node(data, "", 0)
    return Tree(root, WHOLE, taker.problems)


class _Dumper(yaml.SafeDumper):
    """Quote text that this reader would not read as text: PyYAML does not quote `1e5` and `08`."""

    def text(self, value: str) -> yaml.ScalarNode:
        other = value in _WORDS or any(p.fullmatch(value) for p in (_LEADING_ZERO, INT, FLOAT))
        style = "'" if other else None if value.isprintable() else '"'  # line ends are kept only as escapes
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _Dumper.text)


def write(data: Any) -> str:
    """Return plain data as YAML text that `parse` reads back to the same."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def read_text(path: Path) -> bytes:
    """Read a recipe file.

    Raises:
        RecipeError: when there is no such file or it can't be read.
    """
    try:
        with files.opened(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_BYTES:
                raise RecipeError(Problem(f"too big: {size:,} bytes, at most {MAX_BYTES:,}", Place(str(path))))
            return stream.read(MAX_BYTES + 1)  # it may have grown: `parse` checks that
    except IsADirectoryError:
        raise RecipeError(Problem("is a folder, not a recipe", Place(str(path)), "name the YAML file in it")) from None
    except FileNotFoundError:
        raise RecipeError(Problem("no such recipe", Place(str(path)), "`loratune init` writes a first one")) from None
    except OSError as error:
        raise RecipeError(Problem(f"can't be read: {error.strerror}", Place(str(path)))) from None
