"""Labelled texts, for a classifier or a regression: a text and its class, its classes, or a number."""

from __future__ import annotations

import contextlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from loratune.config.section import as_tuple
from loratune.data.formats.base import Group, Plain, RowError, column, named, parsed, text_column, unread, whole
from loratune.data.formats.section import FormatSection
from loratune.errors import listed, shorten

NAME = 1_000  # characters of a class's name: a longer one is a text in the wrong column
DIGITS = frozenset("0123456789+-.eE \t\r\n")  # of numbers that are written as text
LARGEST = 1e18  # of numbers to predict: the loss is a square in float32, which ends at 3.4e38


def _different(classes: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(classes)) < len(classes) or len(classes) == 1:
        raise PydanticCustomError("expected", "must be at least two different names")
    if any(_odd(name) or not name or name != name.strip() for name in classes):  # no row would have such a class
        told = f"must be names of 1 to {NAME:,} characters without control characters or white space around them"
        raise PydanticCustomError("expected", told)
    return classes


class Labelled(FormatSection):
    """Rows of a text and what it is labelled with; the text is tokenized as it is, without an end token."""

    type: Literal["labelled"] = "labelled"
    text: str = Field("text", description="column with the text")
    label: str = Field("label", description="column with the label: text, integer or boolean; a list of them; a number")
    labels: Literal["one", "several", "number"] = Field(
        "one", description="what a row has: one class, several classes (a list, or none), or a number to predict"
    )
    classes: Annotated[tuple[str, ...], BeforeValidator(as_tuple), AfterValidator(_different)] = Field(
        (), description="names of the classes, in the order of the outputs; default: those of the training rows, sorted"
    )

    def read(self, row: Mapping[str, Any]) -> Group:
        """Return the text with its label: the names of its classes, or the number.

        Raises:
            RowError: when a column is missing or of another kind, the text is empty, or a class is not among `classes`.
        """
        column(row, self.text, "data.format.text")
        text = text_column(row, self.text)
        if not text.strip():
            raise RowError(self.text, "is empty: there is nothing to classify")
        value = column(row, self.label, "data.format.label")
        plain = (Plain(((text, False),), closed=False),)
        if self.labels == "number":
            return Group(plain, (self._number(value),), what="texts", scored=True)
        names = self._several(value) if self.labels == "several" else (self._class(value),)
        return Group(plain, what="texts", scored=True, classes=names)

    def names(self, labels: Sequence[float], classes: Sequence[str] = ()) -> list[str]:
        """Return the label of a row: its classes, or the number."""
        if self.labels == "number":
            return [f"label {labels[0]:g}"]
        return [f"label {', '.join(classes[int(number)] for number in labels) or 'none of the classes'}"]

    def unread(self, row: Mapping[str, Any], template: str) -> list[str]:
        """Return the columns with content that `read` does not use."""
        return unread(row, (self.text, self.label))

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.classes)

    def _number(self, value: Any) -> float:
        if isinstance(value, str):  # a .csv file has no other values
            with contextlib.suppress(ValueError):
                value = float(value) if set(value) <= DIGITS else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            told = f": `{shorten(value)}`" if isinstance(value, str) else ""
            raise RowError(self.label, f"must be a number (`labels: number`), given {named(value)}{told}")
        if isinstance(value, float) and not math.isfinite(value):
            raise RowError(self.label, f"must be a finite number, given {value}")
        if abs(value) > LARGEST:
            told = f"is {shorten(str(value), 24)}, of which the square is beyond float32: at most {LARGEST:g} in size"
            raise RowError(self.label, told)
        return float(value)

    def _several(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = parsed(value, self.label)
        if not isinstance(value, list):
            raise RowError(self.label, f"must be a list of classes (`labels: several`), given {named(value)}")
        return tuple(dict.fromkeys(self._class(one) for one in value))

    def _class(self, value: Any) -> str:
        several = self.labels == "several"
        value = whole(value)
        if isinstance(value, list) and not several:
            raise RowError(self.label, "must be one class, given a list: for several set `labels: several`")
        if not isinstance(value, str | int):
            if several:
                raise RowError(self.label, f"must be a list of texts, integers or booleans; {named(value)} is in it")
            number = isinstance(value, float) and math.isfinite(value)
            hint = ": to predict a number set `labels: number`" if number else ""
            raise RowError(self.label, f"must be text, an integer or a boolean, given {named(value)}{hint}")
        text = str(value).lower() if isinstance(value, bool) else str(value)  # true, as JSON and tables have it
        name = text.strip()
        if not name:
            told = "is empty: there is nothing to learn from it"
            raise RowError(self.label, "has an empty text in its list" if several else told)
        if why := _odd(name):
            raise RowError(self.label, f"{why}: `{shorten(name)}`")
        if self.classes and name not in self._known:
            raise RowError(self.label, f"`{shorten(name)}` is not among `classes`: {listed(list(self.classes), 8)}")
        return name


def _odd(name: str) -> str:
    """Return why text can't name a class, or nothing; names stand in tables, messages and files."""
    begin = name[: NAME + 1]
    kinds = set() if begin.isprintable() else {unicodedata.category(one) for one in begin}
    if "Cs" in kinds:
        return "has a lone surrogate (half a character)"
    if "Cc" in kinds:
        return "has a line end or another control character, and names a class"
    return f"has {len(name):,} characters; the name of a class has at most {NAME:,}" if len(name) > NAME else ""
