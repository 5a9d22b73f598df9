"""Rows that stay in one micro-batch, as an objective compares them with one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loratune.data.encode import Row
from loratune.errors import Place


@dataclass(frozen=True)
class Sample:
    """One row, or a chosen and a rejected one.

    Attributes:
        rows: in the order the objective wants them.
        values: numbers known of it before training, such as log p under the base.
    """

    rows: tuple[Row, ...]
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens its rows have together."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def padded(self) -> int:
        """How many tokens its rows take side by side, each padded to the longest."""
        return len(self.rows) * max(len(row.ids) for row in self.rows)

    @property
    def place(self) -> Place:
        """Where it came from."""
        return self.rows[0].place


def single(rows: Iterable[Row]) -> list[Sample]:
    """Return each row as a sample of its own."""
    return [Sample((row,)) for row in rows]
