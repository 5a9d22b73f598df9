"""Prefix sharing: pack rows such that a common prefix is computed once. A pure function of their tokens.

The states of a token depend only on the tokens before it in its row. So rows with a common prefix (a system prompt, a
question with several answers, a chat and its continuation) have the same states there, and the gradients that flow back
to them add up. Tokens after the last label token of a row influence no loss and are left out.

Source: the idea is that of shared-prefix training (Prefix Grouper, arXiv:2506.05433), here for prefixes that branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, TypeVar

import numpy as np

REPEATS = 8  # most copies of a token, on average, where attention gathers the keys of each row

# layout of the rows of a micro-batch: padded to the longest; packed; or packed with common prefixes included once
Layout = Literal["padded", "packed", "shared"]


class Row(Protocol):
    """A tokenized row: `ids` and `trained`, both of shape (tokens,), and whether its last token is looked at."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def trained(self) -> np.ndarray: ...

    @property
    def pooled(self) -> bool: ...


class Sample(Protocol):
    """Rows that must be in the same pack."""

    @property
    def rows(self) -> tuple[Row, ...]: ...


S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class Shared:
    """A pack that contains common prefixes once.

    The rows are ordered such that each has its longest common prefix with the row directly before it. It adds its
    remaining, own tokens to the end of the pack.

    Attributes:
        ids: of the tokens, int32, (tokens,).
        positions: of the tokens in their rows, int64, (tokens,).
        order: the rows that add tokens, in the order of the pack.
        own: number of tokens that each of these adds.
        places: indices in the pack of each row's tokens, as far as its loss depends on them; in the order the rows were
            given, int64, (tokens of the row,) each.
    """

    ids: np.ndarray
    positions: np.ndarray
    order: list[int]
    own: list[int]
    places: list[np.ndarray]


def needed(row: Row) -> int:
    """Return how many tokens of a row its loss depends on, at least one: the last label token is only predicted."""
    if row.pooled:
        return len(row.ids)
    trained = np.flatnonzero(row.trained)
    return max(1, int(trained[-1])) if len(trained) else 1


def lay(rows: Sequence[Row]) -> Shared:
    """Pack rows such that common prefixes are included once."""
    sequences = [row.ids[: needed(row)] for row in rows]
    before, places = np.empty(0, np.int32), np.empty(0, np.int64)
    ids, positions, order, own = [], [], [], []
    found: list[np.ndarray] = [places] * len(rows)
    laid = 0
    for row in _alike(sequences):
        now = sequences[row]
        common = _common(before, now)
        adds = len(now) - common
        if adds:
            order.append(row)
            own.append(adds)
            ids.append(now[common:])
            positions.append(np.arange(common, len(now)))
        found[row] = places = np.concatenate([places[:common], np.arange(laid, laid + adds)])
        laid, before = laid + adds, now
    return Shared(np.concatenate(ids), np.concatenate(positions), order, own, found)


def cut(samples: Sequence[S], tokens: int) -> list[list[S]]:
    """Cut samples into packs of similar size, of at most `tokens` tokens unless one sample alone has more.

    With shared tokens counted for each row, the rows of a pack have at most REPEATS times as many.

    Returns:
        The samples of each pack; those with a common prefix are adjacent.
    """
    within = [_in_order([row.ids[: needed(row)] for row in sample.rows]) for sample in samples]
    order = _alike([sequences[0] for sequences in within])
    common = [0, *(_common(within[one][-1], within[other][0]) for one, other in pairwise(order))]
    sizes = [sum(map(len, sequences)) for sequences in within]
    own = [size - sum(_common(*two) for two in pairwise(rows)) for size, rows in zip(sizes, within, strict=True)]

    def filled(limit: int) -> list[list[S]]:
        parts: list[list[S]] = []
        has = read = 0
        for sample, known in zip(order, common, strict=True):
            adds = own[sample] - known
            if not parts or has + adds > limit or read + sizes[sample] > REPEATS * tokens:
                parts.append([])
                has, read, adds = 0, 0, own[sample]
            parts[-1].append(samples[sample])
            has, read = has + adds, read + sizes[sample]
        return parts

    parts = filled(tokens)
    too_few, limit = sum(sizes) // REPEATS // len(parts), tokens
    while limit - too_few > 1:  # parts of similar size: their peak is lower than with a small last one
        middle = (too_few + limit) // 2
        found = filled(middle)
        if len(found) == len(parts):
            parts, limit = found, middle
        else:
            too_few = middle
    return parts


def computed(rows: Sequence[Row]) -> int:
    """Return the number of tokens of a pack of rows."""
    return len(lay(rows).ids)


def _in_order(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return sequences sorted such that those with a common prefix are adjacent."""
    return [sequences[index] for index in _alike(sequences)]


def _alike(sequences: Sequence[np.ndarray]) -> list[int]:
    """Return the indices of sequences, sorted such that those with a common prefix are adjacent."""
    keys = [sequence.astype(">i4").tobytes() for sequence in sequences]  # big-endian sorts by the first different token
    return sorted(range(len(keys)), key=keys.__getitem__)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return the length of the common prefix of two sequences."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
