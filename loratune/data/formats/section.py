"""The base class of all formats' recipe sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from loratune.config.section import Section


class FormatSection(Section):
    """How a data row is read.

    Attributes:
        sample: word for what one data row becomes: a row, or a pair.
        whole: whether a row is compared or judged as a whole, so that one that is too long is never cut.
    """

    sample: ClassVar[str] = "row"
    whole: ClassVar[bool] = False

    @property
    def rows_per_sample(self) -> int:
        """Tokenized rows that one data row becomes."""
        return 1

    def names(self, labels: Sequence[float], classes: Sequence[str] = ()) -> Sequence[str]:
        """Return a name for each tokenized row of a sample with these labels, for a reader; "" for a row alone.

        Args:
            labels: of the sample.
            classes: names of the classes that the labels are numbers of; empty where they are no classes.
        """
        return ("",)
