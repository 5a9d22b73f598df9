"""Samples: rows that stay in one micro-batch, as an objective compares them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from loratune.data.encode import Row
from loratune.errors import Place


@dataclass(frozen=True)
class Sample:
    """One row, a pair of a chosen and a rejected row, or a row for each label.

    Attributes:
        rows: in the objective's order.
        values: known before training, such as log p under the base.
    """

    rows: tuple[Row, ...]
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Total tokens of its rows."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def padded(self) -> int:
        """Total tokens of its rows, each padded to the longest."""
        return len(self.rows) * max(len(row.ids) for row in self.rows)

    @property
    def labels(self) -> np.ndarray:
        """What its data row says besides its texts, float32, (labels,)."""
        return self.rows[0].labels

    @property
    def place(self) -> Place:
        """Where it came from."""
        return self.rows[0].place


def single(rows: Iterable[Row]) -> list[Sample]:
    """Return each row as a sample of its own."""
    return [Sample((row,)) for row in rows]
