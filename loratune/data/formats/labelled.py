"""Labelled texts, for a classifier or a regression: a text and its class, its classes, or a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from loratune.config.section import as_tuple
from loratune.data.formats.base import Group, Plain, RowError, column, named, parsed, text_column, unread
from loratune.data.formats.section import FormatSection
from loratune.errors import listed, shorten


def _different(classes: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(classes)) < len(classes) or len(classes) == 1:
        raise PydanticCustomError("expected", "must be at least two different names")
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
        text = text_column(row, self.text)
        if not text.strip():
            raise RowError(self.text, "is empty: there is nothing to classify")
        value = column(row, self.label)
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

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RowError(self.label, f"must be a number (`labels: number`), given {named(value)}")
        if not math.isfinite(value):
            raise RowError(self.label, f"must be a finite number, given {value}")
        return float(value)

    def _several(self, value: Any) -> tuple[str, ...]:
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = parsed(value, self.label)
        if not isinstance(value, list):
            raise RowError(self.label, f"must be a list of classes (`labels: several`), given {named(value)}")
        return tuple(dict.fromkeys(self._class(one) for one in value))

    def _class(self, value: Any) -> str:
        if isinstance(value, list):
            raise RowError(self.label, "must be one class, given a list: for several set `labels: several`")
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a table's column of integers with gaps
        if not isinstance(value, str | int):
            hint = ": to predict a number set `labels: number`" if isinstance(value, float) else ""
            raise RowError(self.label, f"must be text, an integer or a boolean, given {named(value)}{hint}")
        name = str(value).strip()
        if not name:
            raise RowError(self.label, "is empty: there is nothing to learn from it")
        if self.classes and name not in self.classes:
            raise RowError(self.label, f"`{shorten(name)}` is not among `classes`: {listed(list(self.classes), 8)}")
        return name
