"""Convert YAML nodes to frozen pydantic models; report all problems at once, each with place and remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from loratune.config.section import (
    LEADS_OUT,
    BareWord,
    Section,
    all_keys,
    annotation_at,
    declared,
    members_of,
    metadata_of,
    sections_in,
    tag_of,
)
from loratune.config.yaml_nodes import FLOAT, INT, Node, Tree, parse
from loratune.errors import Place, Problem, RecipeError, SafetyError, did_you_mean, listed, one_edit, shorten
from loratune.redact import looks_secret, names_secret

MAX_PROBLEMS = 100

M = TypeVar("M", bound=Section)


def decode(model: type[M], tree: Tree, foreign: Mapping[str, str] | None = None) -> M:
    """Turn a tree into a section.

    Args:
        model: the section to build.
        tree: what `parse` returned.
        foreign: keys of other tools, each with its replacement here.

    Raises:
        RecipeError: with every problem of the tree and of the values, in the order of their places.
        SafetyError: instead of it, when one of them refers to a file outside of its folder.
    """
    problems = list(tree.problems)
    kind: type[RecipeError | SafetyError] = RecipeError
    result: M | None = None
    try:
        result = model.model_validate(tree.root.plain())
    except ValidationError as error:
        told = {problem.place for problem in problems}  # `012` is not reported a second time as no number
        found = [_problem(detail, tree, model, foreign or {}) for detail in error.errors(include_url=False)]
        problems += [problem for problem in found if problem and problem.place not in told]
        if any(detail["type"] == LEADS_OUT for detail in error.errors(include_url=False)):
            kind = SafetyError
    problems = _without_secrets(problems, tree.root)
    if problems or result is None:
        problems = in_order(problems)
        more = len(problems) - MAX_PROBLEMS
        raise kind(problems[:MAX_PROBLEMS] + ([Problem(f"and {more} more problems")] if more > 0 else []))
    return result


def _without_secrets(problems: list[Problem], root: Node) -> list[Problem]:
    """Return the problems, with one for each secret in the recipe instead of all that would show it."""
    secrets = [(name, node) for name, node in _scalars(root) if _is_secret(name, node)]
    if not secrets:
        return problems
    lines = {(node.place.source, node.place.line) for _, node in secrets}
    told = [_shown_without(problem, lines) for problem in problems]
    bare = {(p.source, p.line, p.column) for _, node in secrets for p in (node.place, node.key) if p}
    kept = [p for p in told if p.place is None or (p.place.source, p.place.line, p.place.column) not in bare]
    return kept + [
        Problem(f"`{shorten(name)}` looks like a secret", replace(node.key or node.place, text=""), _SECRET_HINT)
        for name, node in secrets
    ]


_SECRET_HINT = (
    "a recipe must not hold a secret: put it into the environment (HF_TOKEN), or run `hf auth login`; if it was "
    "shared, revoke it"
)


def _is_secret(name: str, node: Node) -> bool:
    known = isinstance(node.value, str) and node.value
    return looks_secret(node.raw) or looks_secret(name) or bool(known and names_secret(name.rpartition(".")[2]))


def _scalars(node: Node, name: str = "") -> Iterator[tuple[str, Node]]:
    """Yield the values of a tree with their names, such as `data.train.0.path`."""
    if isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from _scalars(child, f"{name}.{key}" if name else key)
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from _scalars(child, f"{name}.{index}")
    else:
        yield name, node


def _shown_without(problem: Problem, lines: Set[tuple[str, int]]) -> Problem:
    place = problem.place
    if place is None or (place.source, place.line) not in lines:
        return problem
    return replace(problem, place=replace(place, text=""))


def in_order(problems: Sequence[Problem]) -> list[Problem]:
    """Sort problems by line and column, without duplicates."""
    unique = list(dict.fromkeys(problems))
    return sorted(unique, key=lambda p: (p.place.line, p.place.column) if p.place else (0, 0))


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "`true` or `false`",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
    "none_required": "null",
}
_NO_MEMBER = ("union_tag_invalid", "union_tag_not_found", "literal_error", "model_type", "model_attributes_type")
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _problem(detail: ErrorDetails, tree: Tree, model: type[Section], foreign: Mapping[str, str]) -> Problem | None:
    kind, loc = detail["type"], detail["loc"]
    context: dict[str, Any] = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(str(loc[-1]), _spot(model, tree, loc[:-1]), tree, model, foreign)
    if kind == "missing":
        return _missing(str(loc[-1]), _spot(model, tree, loc[:-1]))
    if loc and loc[-1] == "type" and kind == "literal_error":  # a union of one has no tag
        loc = loc[:-1]
    spot = _spot(model, tree, loc)
    node, name = spot.node, spot.name
    if members_of(spot.annotation) and kind in _NO_MEMBER:
        return _unknown_type(spot)
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        close = did_you_mean(node.raw, known) if isinstance(node.value, str) else None
        hint = f"did you mean `{close}`?" if close else None
        if isinstance(node.value, bool) and {"on", "off"} <= set(known):
            hint = f"write {'on' if node.value else 'off'}"
        return Problem(f"`{name}` must be one of {listed(known)}, given {node.given()}", node.place, hint)
    if kind in _LIMITS:
        word, key = _LIMITS[kind]
        limit = context[key]
        shown = f"{limit:g}" if isinstance(limit, float) else str(limit)
        return Problem(f"`{name}` must be {word} {shown}, given {node.given()}", node.place)
    if kind in ("too_short", "string_too_short"):
        return Problem(f"`{name}` must not be empty", node.place, spot.description)
    if kind in _EXPECTED:
        hint = spot.description if node.value is None else _remedy(kind, node)
        return Problem(f"`{name}` must be {_EXPECTED[kind]}, given {node.given()}", node.place, hint)
    if kind in ("expected", LEADS_OUT):
        return Problem(f"`{name}` {detail['msg']}, given {node.given()}", node.place, _remedy("float_type", node))
    return Problem(f"`{name}`: {detail['msg'][:1].lower()}{detail['msg'][1:]}", node.place)


@dataclass(frozen=True)
class _Spot:
    """The target of a pydantic path: the node, its dotted name in the recipe, and its expected type."""

    node: Node
    name: str
    annotation: Any
    description: str | None

    @property
    def section(self) -> type[Section] | None:
        found = sections_in(self.annotation)
        return found[0] if found else None


def _spot(model: type[Section], tree: Tree, loc: Sequence[str | int]) -> _Spot:
    """Follow a pydantic path through the tree.

    The path also has the member of a union (`method`, `lora`, `r`), the index 0 of a value given instead of a list, and
    the `path` that a bare word means. The YAML text has none of them, nor does the name.
    """
    node, names = tree.root, list[str]()
    annotation: Any = model
    description: str | None = None
    for step in loc:
        members = dict(members_of(annotation))
        if len(members) > 1 and step in members:
            annotation = members[str(step)]
            continue
        if isinstance(step, str):
            section = next((s for s in sections_in(annotation) if step in s.model_fields), None)
            annotation = declared(section, step) if section else None
            description = section.model_fields[step].description if section else None
        inner = node.child(step)
        if inner is not None:
            node = inner
            names.append(str(step))
    return _Spot(node, ".".join(names) or "the recipe", annotation, description)


def _missing(key: str, above: _Spot) -> Problem | None:
    node = above.node
    known = list(above.section.model_fields) if above.section else []
    if isinstance(node.value, dict) and any(_typo(word, known) == key for word in node.value if word not in known):
        return None  # the misspelt key is reported
    description = above.section.model_fields[key].description if above.section else None
    if above.name == "the recipe":
        return Problem(f"the recipe needs the key `{key}`", Place(node.place.source), description)
    return Problem(f"`{above.name}` needs the key `{key}`", node.key or node.place, description)


def _typo(word: str, known: Sequence[str]) -> str | None:
    """Return the known word that `word` most certainly means."""
    close, word = did_you_mean(word, known), word.lower()
    sure = close and (one_edit(word, close) or difflib.SequenceMatcher(None, word, close).ratio() >= 0.8)
    return close if sure else None


def _remedy(kind: str, node: Node) -> str | None:
    raw = node.raw.strip()
    if kind == "bool_type" and raw.lower() in ("yes", "no", "on", "off", "y", "n", "true", "false"):
        return f"write {'true' if raw.lower() in ('yes', 'on', 'y', 'true') else 'false'}"
    if kind == "int_type" and isinstance(node.value, float) and node.value.is_integer() and abs(node.value) < 1e15:
        return f"write {int(node.value)}"
    if kind in ("int_type", "float_type") and isinstance(node.value, str) and len(raw) <= 300:
        plain = raw.replace("_", "")
        if re.fullmatch(r"[-+]?[0-9]{1,3}(,[0-9]{3})+", plain):
            plain = plain.replace(",", "")
        if re.fullmatch(r"[-+]?[0-9]+,[0-9]+", plain):
            plain = plain.replace(",", ".")
        if INT.fullmatch(plain) or FLOAT.fullmatch(plain):
            return f"write {plain}" if plain != raw else "write it without quotes"
        if re.fullmatch(r"0x[0-9a-fA-F]+|0o[0-7]+|0b[01]+", plain):
            return f"write {int(plain, 0)}"
    if kind == "string_type" and type(node.value) in (int, float):
        return f"write '{raw}'"
    return None


def _unknown_key(key: str, above: _Spot, tree: Tree, model: type[Section], foreign: Mapping[str, str]) -> Problem:
    known = list(above.section.model_fields) if above.section else []
    inside = "" if above.name == "the recipe" else above.name
    node = above.node.child(key)
    place = (node.key or node.place) if node else above.node.place
    message = f"unknown key `{shorten(key)}`" + (f" in `{inside}`" if inside else "")
    word = key.lower().replace("-", "_")
    close = did_you_mean(key, known)
    if close and close.lower() == word:  # only case or a hyphen differs
        return Problem(message, place, f"did you mean `{close}`?")
    if word in foreign:
        return Problem(message, place, foreign[word])
    if inside and word in model.model_fields:
        return Problem(message, place, f"`{word}` is a top-level key")
    homes = [(path, type_) for path, type_, name in all_keys(model) if name == word]
    types_here = [type_ for path, type_ in homes if path == inside and type_]
    if types_here:
        return Problem(message, place, f"`{word}` belongs to the {inside.split('.')[-1]} {listed(types_here)}")
    if homes:
        return Problem(message, place, f"`{word}` belongs to {listed(list(dict.fromkeys(path for path, _ in homes)))}")
    if close:
        return Problem(message, place, f"did you mean `{close}`?")
    return Problem(f"{message}; known: {listed(known)}" if known else message, place)


def _unknown_type(spot: _Spot) -> Problem:
    known = [tag for tag, _ in members_of(spot.annotation)]
    given = spot.node
    if isinstance(given.value, dict):
        if "type" not in given.value:
            message = f"`{spot.name}` needs the key `type`: one of {listed(known)}"
            meant = [f"write `type: {key}` next to its fields" for key in given.value if key in known]
            meant += [
                f"did you mean `type` instead of `{shorten(key)}`?"
                for key in given.value
                if did_you_mean(key, ["type"])
            ]
            return Problem(message, given.key or given.place, meant[0] if meant else None)
        given = given.value["type"]
    if not isinstance(given.value, str) or not given.value:
        hint = spot.description if given.value is None else None
        return Problem(f"`{spot.name}` must be one of {listed(known)}, given {given.given()}", given.place, hint)
    hint = next(
        (m.hints.get(given.value.lower()) for m in metadata_of(spot.annotation) if isinstance(m, BareWord)), None
    )
    close = did_you_mean(given.value, known)
    hint = hint or (f"did you mean `{close}`?" if close else None)
    kind = spot.name.split(".")[-1]
    return Problem(f"unknown {kind} {given.given()}; known: {listed(known)}", given.place, hint)


# ---------------------------------------------------------------- one key from the command line


def assign(tree: Tree, setting: str, model: type[Section]) -> None:
    """Put `a.b=value` from the command line into the tree of a `model`; the value follows the same YAML rules.

    A bare word for a section is expanded: with `objective: sft` in the file,
    `objective.label_smoothing=0.1` gives `{type: sft, label_smoothing: 0.1}`.

    Raises:
        RecipeError: when the setting has no `=`, a key does not exist, or the value isn't YAML.
    """
    name, equals, text = setting.partition("=")
    path = name.strip().split(".")
    place = Place(f"--set {shorten(name)}", text=setting, column=len(name) + 2)
    if not equals or not all(path):
        raise RecipeError(Problem(f"`{shorten(setting)}` is not a setting", Place("--set"), "write KEY.KEY=VALUE"))
    value = _setting_value(text, place)
    key = Place(place.source, text=setting, column=1)
    node = tree.root
    for depth, step in enumerate(path):
        _open(node, path[:depth], step, model, key)
        last = depth == len(path) - 1
        if isinstance(node.value, list):
            index = _index(node, step, key)
            node.value[index] = value if last else node.value[index]
            node = node.value[index]
        else:
            assert isinstance(node.value, dict)
            if last:
                value.key = key
                node.value[step] = value
            else:
                node = node.value.setdefault(step, _default(path[: depth + 1], model, place, key))


def _setting_value(text: str, place: Place) -> Node:
    try:
        inner = parse(f"value: {text}" if text.strip() else "value:", place.source)
    except RecipeError as error:
        raise RecipeError([Problem(p.message, place, p.hint) for p in error.problems]) from None
    if inner.problems:
        raise RecipeError([Problem(p.message, place, p.hint) for p in inner.problems])
    assert isinstance(inner.root.value, dict)
    if len(inner.root.value) > 1:
        raise RecipeError(Problem("more than one value", place, "use one --set for each key"))
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


def _default(path: Sequence[str], model: type[Section], place: Place, key: Place) -> Node:
    """Return the initial node of a section that the file omits and a setting changes: its default type."""
    above = next(iter(sections_in(annotation_at(model, path[:-1]))), None)
    default = above.model_fields[path[-1]].default if above and path[-1] in above.model_fields else None
    tag = tag_of(type(default)) if isinstance(default, Section) else None
    return Node({"type": Node(tag, place, key, tag)} if tag else {}, place, key)


def _open(node: Node, path: Sequence[str], step: str, model: type[Section], place: Place) -> None:
    """Expand a bare word or single value, so that `step` can be set in it."""
    if node.value is None:
        node.value = {}
    elif not isinstance(node.value, (dict, list)):
        sections = sections_in(annotation_at(model, [int(name) if name.isdigit() else name for name in path]))
        if not sections:
            raise RecipeError(Problem(f"`{'.'.join(path)}` is a single value and has no key `{shorten(step)}`", place))
        bare = Node(node.value, node.place, node.key, node.raw)
        first = next(iter(sections[0].model_fields))  # `path` of a data source
        node.value = [bare] if step.isdigit() else {"type" if members_of(sections[0]) else first: bare}


def _index(node: Node, step: str, place: Place) -> int:
    assert isinstance(node.value, list)
    if not re.fullmatch("[0-9]{1,9}", step) or int(step) >= len(node.value):
        raise RecipeError(
            Problem(f"`{shorten(step)}` is not an index of a list of {len(node.value)}", place, "the first is 0")
        )
    return int(step)
