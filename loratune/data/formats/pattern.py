"""Patterns and verbalizers: a text with a label, as sentences that end in a word for each label."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from loratune.config.section import as_tuple
from loratune.data.formats.base import Group, Plain, RowError, column, named, unread, whole
from loratune.data.formats.section import FormatSection
from loratune.errors import listed, shorten


def parts_of(pattern: str) -> list[tuple[str, str | None]]:
    """Return (text, column after it, or None) of a pattern; `{{` and `}}` are braces.

    Raises:
        ValueError: when a brace stands alone, or braces hold anything but the name of a column.
    """
    found: list[tuple[str, str | None]] = []
    for text, name, spec, conversion in string.Formatter().parse(pattern):
        if name is not None and (not name.strip() or spec or conversion or set(name) & set(".[]{}")):
            raise ValueError("braces hold the name of a column and nothing else")
        found.append((text, name))
    return found


def _pattern(value: str) -> str:
    try:
        found = parts_of(value)
    except ValueError:
        told = "must have names of columns in braces and nothing else there, such as `{text}`; `{{` is a brace"
        raise PydanticCustomError("expected", told) from None
    if not any(name is not None for _, name in found):
        raise PydanticCustomError("expected", "must name a column of the row in braces, such as `{text}`")
    return value


def _some(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise PydanticCustomError("expected", "must have one text or more")
    return value


def _verbalizer(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("expected", "must be a text that follows the pattern")
    return value


def _verbalizers(value: dict[str, str]) -> dict[str, str]:
    if len(value) < 2:
        raise PydanticCustomError("expected", "must have two labels or more, each with its text")
    if len(set(value.values())) < len(value):
        raise PydanticCustomError("expected", "must have another text for each label")
    return value


_Verbalizers = Annotated[dict[str, Annotated[str, AfterValidator(_verbalizer)]], AfterValidator(_verbalizers)]


class Patterns(FormatSection):
    """Rows of texts and a label: each pattern is filled with the row's columns and followed by the text of each label.

    Of the texts that follow, only the tokens of the verbalizer count; no end of text follows them. Nothing goes through
    the chat template.
    """

    type: Literal["pattern"] = "pattern"
    sample: ClassVar[str] = "row"
    whole: ClassVar[bool] = True
    patterns: Annotated[
        tuple[Annotated[str, AfterValidator(_pattern)], ...],
        BeforeValidator(as_tuple, json_schema_input_type=str | list[str]),
        AfterValidator(_some),  # not min_length, of which pydantic complains as well where an item is wrong
    ] = Field(description='texts with columns of the row in braces, such as "{text} It was"; `{{` and `}}` are braces')
    verbalizers: _Verbalizers = Field(
        description="each label with the text that stands for it after a pattern, such as "
        '{neg: " terrible", pos: " great"}'
    )
    label: str = Field("label", description="column with the label: text, an integer, or true or false")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the recipe."""
        return tuple(self.verbalizers)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that patterns name, each once."""
        names = (name for pattern in self.patterns for _, name in parts_of(pattern) if name is not None)
        return tuple(dict.fromkeys(names))

    @property
    def rows_per_sample(self) -> int:
        """Tokenized rows that one data row becomes: each pattern with each label."""
        return len(self.patterns) * len(self.verbalizers)

    def read(self, row: Mapping[str, Any]) -> Group:
        """Return each pattern with each label's text; `labels` has 1 for the row's label, and 0 for the others.

        Raises:
            RowError: when a column is missing, empty or no text or number, or the label is not in the recipe.
        """
        given = self._label(row)
        values = {name: _text(row, name) for name in self.columns}
        filled = (_filled(pattern, values) for pattern in self.patterns)
        parts = [
            Plain(((text, False), (verbalizer, True)), closed=False)
            for text in filled
            for verbalizer in self.verbalizers.values()
        ]
        return Group(tuple(parts), tuple(float(label == given) for label in self.labels), "labels")

    def unread(self, row: Mapping[str, Any], template: str) -> list[str]:
        """Return the columns with content that `read` does not use."""
        return unread(row, (self.label, *self.columns))

    def names(self, labels: Sequence[float], classes: Sequence[str] = ()) -> list[str]:
        """Return names of a sample's rows: the pattern's number and the label."""
        marked = [name + " (its label)" * bool(one) for name, one in zip(self.labels, labels, strict=True)]
        return [f"pattern {number}: {name}" for number in range(1, len(self.patterns) + 1) for name in marked]

    def _label(self, row: Mapping[str, Any]) -> str:
        value = whole(column(row, self.label))
        if isinstance(value, bool):
            text = str(value).lower()
        elif isinstance(value, (str, int)):
            text = str(value)
        else:
            raise RowError(self.label, f"must be a string, an integer or a boolean, given {named(value)}")
        if text not in self.verbalizers:
            known = listed(list(self.labels))
            raise RowError(self.label, f"is `{shorten(text)}`, which is no label of `data.format.verbalizers`: {known}")
        return text


def _text(row: Mapping[str, Any], name: str) -> str:
    value = column(row, name)
    number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not (isinstance(value, str) or number):
        raise RowError(name, f"must be a string or a number, as a pattern names it, given {named(value)}")
    if not (text := str(value)).strip():
        raise RowError(name, "is empty, but a pattern names it")
    return text


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    return "".join(text + (values[name] if name is not None else "") for text, name in parts_of(pattern))
