"""YAML text to frozen pydantic models: every problem at once, each with its place.

The YAML read here is the part that people and programs agree on: mappings, lists, strings, numbers, true/false and
null. What YAML 1.1 reads in surprising ways is text (`yes`, `12:30`, `0x1F`), a number (`2e-4`) or a problem (`012`),
and what can hide or explode (tags, merge keys, deep nesting, many aliases, huge files) is refused.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, ValidationError
from pydantic import WithJsonSchema
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from loratune.errors import Place, Problem, RecipeError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ALIASES = 64
MAX_NODES = 50_000

Scalar = str | int | float | bool | None
M = TypeVar("M", bound="Section")


class Section(BaseModel):
    """A part of a recipe: frozen, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


# ---------------------------------------------------------------- text -> nodes


@dataclass
class Node:
    """A value of the YAML text with the place it stands at.

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

    def find(self, path: Sequence[str | int]) -> tuple[Node, int]:
        """Follow `path` as far as it goes; return the last node and how many steps led to it.

        pydantic puts the tag of a union into its paths (`method`, `lora`, `r`); such a step stays where it is.
        """
        node: Node = self
        for depth, step in enumerate(path):
            if isinstance(node.value, dict) and step in node.value:
                node = node.value[str(step)]
            elif isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
                node = node.value[step]
            elif not node._is_tag(step):
                return node, depth
        return node, len(path)

    def _is_tag(self, step: str | int) -> bool:
        tag = self.value["type"].value if isinstance(self.value, dict) and "type" in self.value else self.value
        return tag == step

    def given(self) -> str:
        """Name the value for a message."""
        if isinstance(self.value, dict):
            return "a mapping" if self.value else "an empty mapping"
        if isinstance(self.value, list):
            return "a list" if self.value else "an empty list"
        if self.value is None:
            return "nothing"
        return f"`{_shorten(self.raw)}`"


@dataclass
class Tree:
    """The root node of a recipe and the problems found while reading it."""

    root: Node
    source: str
    problems: list[Problem] = field(default_factory=list)

    def place(self, *path: str | int) -> Place:
        """Return the place of the value at `path`, or of the nearest thing above it."""
        return self.root.find(path)[0].place


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
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = text.count(b"\n", 0, error.start) + 1
            column = error.start - (text.rfind(b"\n", 0, error.start) + 1) + 1
            raise RecipeError(
                Problem(f"not UTF-8: byte 0x{text[error.start]:02x}", Place(source, line, column), "save it as UTF-8")
            ) from None
    return _Reader(text, source).read()


def _shorten(text: str, limit: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+(\.[0-9]*)?")
_WORDS: dict[str, Scalar] = {"true": True, "false": False, "null": None, "~": None, "": None}
_WORDS |= {word.title(): value for word, value in _WORDS.items()} | {
    word.upper(): value for word, value in _WORDS.items()
}


class _Reader:
    """One pass over PyYAML's events: they carry the places, and nothing is built before it is checked."""

    def __init__(self, text: str, source: str):
        self.text, self.source, self.lines = text, source, text.splitlines()
        self.problems: list[Problem] = []
        self.anchors: dict[str, Node] = {}
        self.weights: dict[str, int] = {}  # nodes below each anchor: an alias counts as many as it stands for
        self.aliases = self.nodes = 0

    def place(self, mark: yaml.Mark | None) -> Place:
        if mark is None:
            return Place(self.source, 1, 1)
        text = self.lines[mark.line] if mark.line < len(self.lines) else ""
        return Place(self.source, mark.line + 1, mark.column + 1, text)

    def read(self) -> Tree:
        try:
            self.events: Iterator[yaml.Event] = iter(yaml.parse(self.text, Loader=yaml.SafeLoader))
            next(self.events)  # stream start
            event = next(self.events)
            if isinstance(event, yaml.StreamEndEvent):
                raise RecipeError(Problem("the recipe is empty", Place(self.source), "`loratune init` writes a first one"))
            root = self.node(next(self.events), 0)
            next(self.events)  # document end
            extra = next(self.events)
            if not isinstance(extra, yaml.StreamEndEvent):
                self.problems.append(
                    Problem("a second YAML document", self.place(extra.start_mark), "one recipe per file")
                )
        except yaml.reader.ReaderError as error:
            before = self.text[: error.position]
            place = Place(self.source, before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1)
            raise RecipeError(Problem("a character YAML does not allow", place, "remove it")) from None
        except yaml.MarkedYAMLError as error:
            raise RecipeError(self.syntax(error)) from None
        if not isinstance(root.value, dict):
            raise RecipeError(
                Problem(f"a recipe is a mapping of sections, given {root.given()}", root.place, "start with `model:`")
            )
        return Tree(root, self.source, self.problems)

    def syntax(self, error: yaml.MarkedYAMLError) -> Problem:
        what = str(error.problem or error.context or "not YAML").replace("'", "`")
        hint = None
        place = self.place(error.problem_mark or error.context_mark)
        if "`\\t`" in what or "\t" in place.text[: place.column]:
            hint = "YAML wants spaces, not tabs, before a key"
        elif "mapping values are not allowed" in what:
            hint = "put quotes around a text that holds `: `"
        elif "could not find expected `:`" in what:
            hint = "is a `:` missing after a key?"
        return Problem(f"not YAML: {what}", place, hint)

    def node(self, event: yaml.Event, depth: int) -> Node:
        place = self.place(event.start_mark)
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise RecipeError(Problem(f"nested deeper than {MAX_DEPTH} levels", place))
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, place)
        assert isinstance(event, (yaml.ScalarEvent, yaml.SequenceStartEvent, yaml.MappingStartEvent))
        if event.tag is not None:
            self.problems.append(
                Problem(f"the tag `{_shorten(event.tag)}` is not allowed", place, "a recipe holds plain values only")
            )
        before = self.nodes
        if isinstance(event, yaml.ScalarEvent):
            node = Node(self.scalar(event, place), place, raw=event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(item := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(item, depth + 1))
            node = Node(items, place)
        else:
            node = Node(self.mapping(depth), place)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
            self.weights[event.anchor] = self.nodes - before + 1
        return node

    def alias(self, event: yaml.AliasEvent, place: Place) -> Node:
        self.aliases += 1
        self.nodes += self.weights.get(event.anchor, 0)
        if self.aliases > MAX_ALIASES or self.nodes > MAX_NODES:
            raise RecipeError(Problem(f"too many aliases (at most {MAX_ALIASES})", place, "write the values out"))
        if event.anchor not in self.anchors:
            self.problems.append(Problem(f"unknown alias `*{event.anchor}`", place))
            return Node(None, place)
        target = self.anchors[event.anchor]
        return Node(target.value, place, raw=target.raw)

    def mapping(self, depth: int) -> dict[str, Node]:
        items: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            name = key.raw
            if isinstance(key.value, (dict, list)) or isinstance(event, yaml.AliasEvent):
                self.problems.append(Problem("a key must be a word", key.place))
                continue
            if name == "<<":
                self.problems.append(Problem("merge keys (`<<`) are not read", key.place, "write the keys out"))
                continue
            if name in items:
                first = items[name].key
                self.problems.append(
                    Problem(f"`{_shorten(name)}` is given twice, first on line {first.line if first else '?'}", key.place)
                )
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
                    f"`{_shorten(text)}` could be read as octal",
                    place,
                    f"write {text.lstrip('+-0') or 0} for the number or '{text}' for the text",
                )
            )
            return str(text)
        if len(text) > 300:
            return str(text)
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        return str(text)


def assign(tree: Tree, setting: str) -> None:
    """Put `a.b=value` from the command line into the tree; the value follows the same YAML rules.

    A word that stands for a type with its defaults opens up: with `objective: sft` in the file,
    `objective.label_smoothing=0.1` gives `{type: sft, label_smoothing: 0.1}`.

    Raises:
        RecipeError: when the setting has no `=`, a step leads nowhere, or the value isn't YAML.
    """
    name, equals, text = setting.partition("=")
    path = name.strip().split(".")
    place = Place(f"--set {name.strip()}", text=setting, column=len(name) + 2)
    if not equals or not all(path):
        raise RecipeError(Problem(f"`{_shorten(setting)}` is not a setting", Place("--set"), "write --set key.key=value"))
    value = _setting_value(text, place)
    key = Place(place.source, text=setting, column=1)
    node = tree.root
    for step in path[:-1]:
        node = _child(node, step, place)
    _open(node)
    value.key = key
    if isinstance(node.value, list):
        _index(node, path[-1], place)
        node.value[int(path[-1])] = value
    else:
        assert isinstance(node.value, dict)
        node.value[path[-1]] = value


def _setting_value(text: str, place: Place) -> Node:
    try:
        inner = parse(f"value: {text}" if text.strip() else "value:", place.source)
    except RecipeError as error:
        raise RecipeError([Problem(p.message, place, p.hint) for p in error.problems]) from None
    if inner.problems:
        raise RecipeError([Problem(p.message, place, p.hint) for p in inner.problems])
    assert isinstance(inner.root.value, dict)
    value = inner.root.value["value"]
    _move(value, place)
    return value


def _move(node: Node, place: Place) -> None:
    node.place = place
    node.key = place
    for child in (
        node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    ):
        _move(child, place)


def _child(node: Node, step: str, place: Place) -> Node:
    _open(node)
    if isinstance(node.value, list):
        return node.value[_index(node, step, place)]
    assert isinstance(node.value, dict)
    return node.value.setdefault(step, Node({}, place, key=place))


def _open(node: Node) -> None:
    if node.value is None:
        node.value = {}
    elif not isinstance(node.value, (dict, list)):
        node.value = {"type": Node(node.value, node.place, node.key, node.raw)}


def _index(node: Node, step: str, place: Place) -> int:
    assert isinstance(node.value, list)
    if not step.isdigit() or int(step) >= len(node.value):
        raise RecipeError(Problem(f"`{step}` is not a place in a list of {len(node.value)}", place, "count from 0"))
    return int(step)


# ---------------------------------------------------------------- types for recipe sections


class BareWord:
    """Lets a type be named alone: `format: chat` is `format: {type: chat}`.

    Stands behind `Field(discriminator="type")` in the annotation of a union of sections. `hints` maps words people
    may try to a remedy.
    """

    def __init__(self, hints: Mapping[str, str] | None = None):
        self.hints = dict(hints or {})
        self.words: list[str] = []

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        self.words = [tag for tag, _ in _members(source)]

        def expand(value: Any) -> Any:
            return {"type": value} if isinstance(value, str) else value

        return core_schema.no_info_before_validator_function(expand, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "enum": self.words}, handler(schema)]}


def _cadence(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PydanticCustomError("expected", "must be a whole number of steps, or a fraction (0 to 1)")
    if isinstance(value, int) and value >= 1:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise PydanticCustomError("expected", "must be a whole number of steps from 1, or a fraction above 0 and up to 1.0")


def _share(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PydanticCustomError("expected", "must be a whole number of steps, or a fraction of all steps (0 to 1)")
    if (isinstance(value, int) and value >= 0) or (isinstance(value, float) and 0 <= value <= 1):
        return value
    raise PydanticCustomError("expected", "must be a whole number of steps from 0, or a fraction between 0.0 and 1.0")


Cadence = Annotated[
    int | float,
    PlainValidator(_cadence),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}]}),
]
"""How often: a whole number is steps, a fraction (above 0, up to 1.0) is that part of an epoch."""

Share = Annotated[
    int | float,
    PlainValidator(_share),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0, "maximum": 1}]}),
]
"""How long: a whole number is steps, a fraction (0 to 1) is that part of all steps."""


def as_tuple(value: Any) -> Any:
    """Let one value stand for a list of one; lists become tuples, so that a section stays frozen."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) or value is None else (value,)


# ---------------------------------------------------------------- nodes -> models


def decode(model: type[M], tree: Tree, foreign: Mapping[str, str] | None = None) -> M:
    """Turn a tree into a section.

    Args:
        model: the section to build.
        tree: what `parse` returned.
        foreign: keys of other tools, each with what to write here instead.

    Raises:
        RecipeError: with every problem of the tree and of the values, in the order of their places.
    """
    problems = list(tree.problems)
    result: M | None = None
    try:
        result = model.model_validate(tree.root.plain())
    except ValidationError as error:
        told = {problem.place for problem in problems}  # `012` need not be told to be no number as well
        found = [_problem(detail, tree, model, foreign or {}) for detail in error.errors(include_url=False)]
        problems += [problem for problem in found if problem.place not in told]
    if problems or result is None:
        raise RecipeError(in_order(problems))
    return result


def in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Sort problems by their line and column and drop those said twice."""
    unique = list(dict.fromkeys(problems))
    return sorted(unique, key=lambda p: (p.place.line, p.place.column) if p.place else (0, 0))


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """Return the known word that is closest to `word`, or None when none is close."""
    lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(lower), n=1, cutoff=0.6)
    return lower[found[0]] if found else None


def listed(words: Sequence[str], limit: int = 24) -> str:
    """Write words for a message: `a`, `b`, `c`."""
    shown = ", ".join(f"`{word}`" for word in words[:limit])
    return f"{shown} and {len(words) - limit} more" if len(words) > limit else shown


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "`true` or `false`",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
    "none_required": "nothing",
}
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _problem(detail: ErrorDetails, tree: Tree, model: type[Section], foreign: Mapping[str, str]) -> Problem:
    kind, loc = detail["type"], detail["loc"]
    node, _ = tree.root.find(loc)
    name = ".".join(_names(tree.root, loc)) or "the recipe"
    context: dict[str, Any] = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(str(loc[-1]), loc[:-1], node, tree, model, foreign)
    if kind == "missing":
        above = ".".join(_names(tree.root, loc[:-1]))
        parent, _ = tree.root.find(loc[:-1])
        where = parent.key or Place(tree.source)
        return Problem(f"{f'`{above}`' if above else 'the recipe'} needs the key `{loc[-1]}`", where, _what(model, loc))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_type(kind, context, node, name, model, loc)
    if kind == "literal_error" and loc[-1] == "type":
        return _unknown_type(kind, {"tag": node.raw}, node, ".".join(_names(tree.root, loc[:-1])), model, loc[:-1])
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        close = did_you_mean(node.raw, known)
        return Problem(
            f"`{name}` must be one of {listed(known)}, given {node.given()}",
            node.place,
            f"did you mean `{close}`?" if close else None,
        )
    if kind in _LIMITS:
        word, key = _LIMITS[kind]
        return Problem(f"`{name}` must be {word} {context[key]:g}, given {node.given()}", node.place)
    if kind in ("too_short", "string_too_short"):
        return Problem(f"`{name}` must not be empty", node.place)
    if kind in _EXPECTED:
        return Problem(f"`{name}` must be {_EXPECTED[kind]}, given {node.given()}", node.place, _remedy(kind, node) or (_what(model, loc) if node.value is None else None))
    if kind == "value_error":
        return Problem(f"`{name}`: {context['error']}", node.place)
    if kind == "expected":
        return Problem(f"`{name}` {detail['msg']}, given {node.given()}", node.place, _remedy("float_type", node))
    return Problem(f"`{name}`: {detail['msg'][:1].lower()}{detail['msg'][1:]}", node.place)


def _names(root: Node, loc: Sequence[str | int]) -> list[str]:
    """Return a pydantic path without the union tags and the indexes that came from one value standing for a list."""
    names: list[str] = []
    for index, step in enumerate(loc):
        above, depth = root.find(loc[:index])
        inside = isinstance(above.value, (dict, list))
        if inside and above._is_tag(step) and not (isinstance(above.value, dict) and step in above.value):
            continue
        if depth < index or (not inside and above.value is not None):
            continue
        names.append(str(step))
    return names


def _remedy(kind: str, node: Node) -> str | None:
    raw = node.raw.strip()
    if kind == "bool_type" and raw.lower() in ("yes", "no", "on", "off", "y", "n"):
        return f"write {'true' if raw.lower() in ('yes', 'on', 'y') else 'false'}"
    if kind in ("int_type", "float_type") and isinstance(node.value, str):
        plain = raw.replace("_", "").replace(",", "")
        if _INT.fullmatch(plain) or _FLOAT.fullmatch(plain):
            return f"write {plain}" if plain != raw else "write it without quotes"
        if re.fullmatch(r"0[xob][0-9a-fA-F]+", plain):
            return f"write {int(plain, 0)}"
    if kind == "string_type" and isinstance(node.value, (int, float)) and node.raw:
        return f"write '{raw}'"
    return None


def _what(model: type[Section], loc: Sequence[str | int]) -> str | None:
    section = _section_at(model, loc[:-1])
    info = section.model_fields.get(str(loc[-1])) if section else None
    return info.description if info else None


def _unknown_key(
    key: str, above: Sequence[str | int], node: Node, tree: Tree, model: type[Section], foreign: Mapping[str, str]
) -> Problem:
    section = _section_at(model, above)
    known = list(section.model_fields) if section else []
    name = ".".join(_names(tree.root, above))
    message = f"unknown key `{_shorten(key)}`" + (f" in `{name}`" if name else "")
    place = node.key or node.place
    close = did_you_mean(key, known)
    if close and difflib.SequenceMatcher(None, key.lower(), close).ratio() >= 0.8:
        return Problem(message, place, f"did you mean `{close}`?")
    if key in foreign:
        return Problem(message, place, foreign[key])
    homes = list(dict.fromkeys(path for path, field_name in _all_keys(model) if field_name == key))
    if homes:
        return Problem(message, place, f"`{key}` belongs to {listed(homes)}")
    if close:
        return Problem(message, place, f"did you mean `{close}`?")
    return Problem(f"{message}; known: {listed(known)}" if known else message, place)


def _unknown_type(
    kind: str, context: dict[str, Any], node: Node, name: str, model: type[Section], loc: Sequence[str | int]
) -> Problem:
    union = _annotation_at(model, loc)
    known = [tag for tag, _ in _members(union)]
    if kind == "union_tag_not_found":
        if isinstance(node.value, dict):
            return Problem(f"`{name}` needs the key `type`: one of {listed(known)}", node.key or node.place)
        return Problem(f"`{name}` must be one of {listed(known)}, or a mapping with a `type`, given {node.given()}", node.place)
    tag = str(context.get("tag", ""))
    place = node.value["type"].place if isinstance(node.value, dict) and "type" in node.value else node.place
    hints = {word: hint for meta in _metadata(union) if isinstance(meta, BareWord) for word, hint in meta.hints.items()}
    close = did_you_mean(tag, known)
    hint = hints.get(tag.lower()) or (f"did you mean `{close}`?" if close else None)
    return Problem(f"unknown {name.split('.')[-1]} `{_shorten(tag)}`; known: {listed(known)}", place, hint)


# ---------------------------------------------------------------- what a model expects at a path


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return annotation.__metadata__ if typing.get_origin(annotation) is Annotated else ()


def _sections(annotation: Any) -> list[type[Section]]:
    """Return the sections named in an annotation, through Annotated, unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) is Annotated:
        return _sections(annotation.__origin__)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, dict):
        return [found for argument in typing.get_args(annotation) for found in _sections(argument)]
    return []


def _tag(section: type[Section]) -> str | None:
    info = section.model_fields.get("type")
    if info is None or typing.get_origin(info.annotation) is not Literal:
        return None
    return str(typing.get_args(info.annotation)[0])


def _members(annotation: Any) -> list[tuple[str, type[Section]]]:
    return [(tag, section) for section in _sections(annotation) if (tag := _tag(section)) is not None]


def _annotation_at(model: type[Section], loc: Sequence[str | int]) -> Any:
    """Return the annotation of the field a pydantic path leads to."""
    annotation: Any = model
    for step in loc:
        if isinstance(step, int):
            continue
        members = dict(_members(annotation))
        if step in members and not any(step in section.model_fields for section in _sections(annotation)):
            annotation = members[step]
            continue
        for section in _sections(annotation):
            if step in section.model_fields:
                annotation = _declared(section, step)
                break
        else:
            return None
    return annotation


def _declared(section: type[Section], name: str) -> Any:
    """Return a field's annotation with the metadata pydantic strips off it."""
    info = section.model_fields[name]
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _section_at(model: type[Section], loc: Sequence[str | int]) -> type[Section] | None:
    found = _sections(_annotation_at(model, loc))
    return found[0] if found else None


def _all_keys(model: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted section, key) for every key below `model`."""
    for name, info in model.model_fields.items():
        if prefix and name != "type":
            yield prefix, name
        for section in dict.fromkeys(_sections(info.annotation)):
            yield from _all_keys(section, f"{prefix}.{name}" if prefix else name)


def read_text(path: Path) -> bytes:
    """Read a recipe file.

    Raises:
        RecipeError: when there is no such file or it can't be read.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(Problem(f"too big: {path.stat().st_size:,} bytes, at most {MAX_BYTES:,}", Place(str(path))))
        return path.read_bytes()
    except IsADirectoryError:
        raise RecipeError(Problem("is a folder, not a recipe", Place(str(path)), "name the YAML file in it")) from None
    except FileNotFoundError:
        raise RecipeError(Problem("no such recipe", Place(str(path)), "`loratune init` writes a first one")) from None
    except OSError as error:
        raise RecipeError(Problem(f"can't be read: {error.strerror}", Place(str(path)))) from None
