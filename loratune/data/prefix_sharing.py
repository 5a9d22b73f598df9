"""Rows of a step that begin alike: in a pack each token is computed once. A pure function of their tokens.

What a token becomes depends on what stands before it in its row, and on nothing else. So rows with a common beginning
(a system prompt, a question with several answers, a chat and how it goes on) have all of it in common there, and the
gradients that come back to it add up. And on what stands behind the last trained token of a row no loss depends.

Source: the idea is that of shared-prefix training (Prefix Grouper, arXiv:2506.05433), here for beginnings that branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, TypeVar

import numpy as np

REPEATS = 8  # times that a token is in memory on average where attention reads the keys of each row, at most

# how the rows of a micro-batch are put together: side by side, padded to the longest; behind one another; or such that
# what they begin with alike stands there once
Layout = Literal["padded", "packed", "shared"]


class Row(Protocol):
    """A tokenized row: `ids` and `trained`, both of shape (tokens,)."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def trained(self) -> np.ndarray: ...


class Sample(Protocol):
    """Rows that stay in one pack."""

    @property
    def rows(self) -> tuple[Row, ...]: ...


S = TypeVar("S", bound=Sample)


@dataclass(frozen=True)
class Shared:
    """A pack in which what rows have in common stands once.

    The rows are laid in an order in which each begins as the one before it, as far as it begins as any of them; it adds
    the rest, its own tokens, behind those of all before it.

    Attributes:
        ids: of the tokens, int32, (tokens,).
        positions: of the tokens in their rows, int64, (tokens,).
        order: the rows that add any, in the order they are laid.
        own: how many tokens each of these adds.
        places: where the tokens of each row stand, as far as its loss depends on them; in the order the rows were
            given, int64, (tokens of the row,) each.
    """

    ids: np.ndarray
    positions: np.ndarray
    order: list[int]
    own: list[int]
    places: list[np.ndarray]


def needed(row: Row) -> int:
    """Return how many tokens of a row its loss depends on, at least one: the last trained one is only foretold."""
    trained = np.flatnonzero(row.trained)
    return max(1, int(trained[-1])) if len(trained) else 1


def lay(rows: Sequence[Row]) -> Shared:
    """Lay rows into a pack such that what they have in common stands in it once."""
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
    """Cut samples into packs of about the same size, of at most so many tokens where more than one is in them.

    Nor have the rows of a pack more than REPEATS times as many if what they share is counted for each of them.

    Returns:
        The samples of each pack; those that begin alike stand together.
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
    while limit - too_few > 1:  # parts of about the same size take less memory than one small rest
        middle = (too_few + limit) // 2
        found = filled(middle)
        if len(found) == len(parts):
            parts, limit = found, middle
        else:
            too_few = middle
    return parts


def computed(rows: Sequence[Row]) -> int:
    """Return how many tokens a pack of rows has."""
    return len(lay(rows).ids)


def _in_order(sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return sequences in an order in which those that begin alike are neighbours."""
    return [sequences[index] for index in _alike(sequences)]


def _alike(sequences: Sequence[np.ndarray]) -> list[int]:
    """Return the numbers of sequences in an order in which those that begin alike are neighbours."""
    keys = [sequence.astype(">i4").tobytes() for sequence in sequences]  # big-endian: by the first token that differs
    return sorted(range(len(keys)), key=keys.__getitem__)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length
