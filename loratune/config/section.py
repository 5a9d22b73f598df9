"""The building blocks of recipe sections: the frozen base class, bare words, and shared types."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from loratune.system.paths import is_inside


class Section(BaseModel):
    """A part of a recipe: frozen, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Complaint(NamedTuple):
    """A value that is valid in its section but conflicts with another: message, path of its key, and remedy."""

    message: str
    path: tuple[str, ...]
    hint: str | None = None


class BareWord:
    """Allow a bare word for a type: `format: chat` is `format: {type: chat}`.

    Used after `Field(discriminator="type")` in the annotation of a union of sections. `hints` maps words that people
    may try to a remedy; `default` is the type of a mapping without one.
    """

    def __init__(self, hints: Mapping[str, str] | None = None, default: str | None = None):
        self.hints = dict(hints or {})
        self.default = default
        self.words: list[str] = []

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        self.words = [tag for tag, _ in members_of(source)]

        def expand(value: Any) -> Any:
            if isinstance(value, dict) and self.default is not None:
                return {"type": self.default, **value}
            return {"type": value} if isinstance(value, str) else value

        return core_schema.no_info_before_validator_function(expand, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "enum": self.words}, handler(schema)]}


LEADS_OUT = "leads_out"  # pydantic error type of a path outside of its folder, refused for safety


def _inside(value: str) -> str:
    if not value:
        raise PydanticCustomError("expected", "must not be empty")
    if not is_inside(value):
        raise PydanticCustomError(LEADS_OUT, "must not point outside its folder")
    return value


Inside = Annotated[str, AfterValidator(_inside)]
"""A word that becomes part of a path: a revision, a configuration of a data set."""


def _cadence(value: Any) -> int | float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and (value >= 1 if isinstance(value, int) else 0 < value < 1e6):
        return value  # type: ignore[no-any-return]
    raise PydanticCustomError(
        "expected", "must be an integer number of steps from 1, or a number of epochs with a decimal point, such as 0.5"
    )


def _share(value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PydanticCustomError("expected", "must be an integer number of steps, or a fraction of all steps (0 to 1)")
    if (isinstance(value, int) and value >= 0) or (isinstance(value, float) and 0 <= value <= 1):
        return value
    raise PydanticCustomError(
        "expected", "must be an integer number of steps from 0, or a fraction between 0.0 and 1.0"
    )


Cadence = Annotated[
    int | float,
    PlainValidator(_cadence),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "number", "exclusiveMinimum": 0}]}),
]
"""How often: an integer is steps, a number with a decimal point is epochs."""

Share = Annotated[
    int | float,
    PlainValidator(_share),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "number", "minimum": 0, "maximum": 1}]}),
]
"""How long: an integer is steps, a fraction (0 to 1) is that part of all steps."""


def as_tuple(value: Any) -> Any:
    """Turn a single value into a tuple of one, and lists into tuples, so that a section stays frozen."""
    if isinstance(value, list):
        return tuple(value)
    return value if isinstance(value, tuple) or value is None else (value,)


# ---------------------------------------------------------------- what is expected at a path


def metadata_of(annotation: Any) -> tuple[Any, ...]:
    """Return the metadata of an Annotated type."""
    return annotation.__metadata__ if typing.get_origin(annotation) is Annotated else ()


def sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections named in an annotation, through Annotated, unions, lists and mappings."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) is Annotated:
        return sections_in(annotation.__origin__)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, dict):
        return [found for argument in typing.get_args(annotation) for found in sections_in(argument)]
    return []


def tag_of(section: type[Section]) -> str | None:
    """Return the value of a section's `type`, or None if it has none."""
    info = section.model_fields.get("type")
    if info is None or typing.get_origin(info.annotation) is not Literal:
        return None
    return str(typing.get_args(info.annotation)[0])


def members_of(annotation: Any) -> list[tuple[str, type[Section]]]:
    """Return the sections of a union with their `type` words."""
    return [(tag, section) for section in sections_in(annotation) if (tag := tag_of(section)) is not None]


def annotation_at(model: type[Section], loc: Sequence[str | int]) -> Any:
    """Return the annotation of the field a pydantic path leads to."""
    annotation: Any = model
    for step in loc:
        if isinstance(step, int):
            continue
        members = dict(members_of(annotation))
        if step in members and not any(step in section.model_fields for section in sections_in(annotation)):
            annotation = members[step]
            continue
        for section in sections_in(annotation):
            if step in section.model_fields:
                annotation = declared(section, step)
                break
        else:
            return None
    return annotation


def declared(section: type[Section], name: str) -> Any:
    """Return a field's annotation with the metadata that pydantic strips."""
    info = section.model_fields[name]
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


@cache  # called for each unknown key
def all_keys(model: type[Section]) -> tuple[tuple[str, str | None, str], ...]:
    """Return (dotted section, its type where it has one, key) for every key below `model`."""
    return tuple(_keys(model, ""))


def _keys(model: type[Section], prefix: str) -> Iterator[tuple[str, str | None, str]]:
    for name, info in model.model_fields.items():
        if prefix and name != "type":
            yield prefix, tag_of(model), name
        for section in dict.fromkeys(sections_in(info.annotation)):
            yield from _keys(section, f"{prefix}.{name}" if prefix else name)
