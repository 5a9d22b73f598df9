"""Group rows and choose tile sizes for attention by tiles, such that few unused scores are computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

STEP = 16  # tiles, and the tokens before the first, are multiples of it, for the vector instructions of processors
LARGEST = 128  # tokens of a tile: larger ones compute more scores that the causal mask discards
TILES = 6  # most tiles of a row; where a row would have more, tiles are larger
TOGETHER = 12  # tiles of all groups, if groups can be merged: oneDNN prepares seven products for each, and caches few

# Other costs in units of one score for all heads of a row; measured for 9 heads
_OF_A_GROUP, _OF_A_TILE = 8192, 8192  # calls
_OF_A_PLACE = 32  # copies


@dataclass(frozen=True)
class Tiling:
    """Rows of which the n-th tiles are computed together.

    Attributes:
        rows: their indices, longest first.
        first: token of a row at which the first tile begins; before it all tokens are shared.
        tile: tokens of a tile.
        tiles: number of tiles of the longest row.
        scores: computed per head, for all rows.
        cost: time, in scores.
    """

    rows: tuple[int, ...]
    first: int
    tile: int
    tiles: int
    scores: int
    cost: int

    @property
    def keys(self) -> int:
        """Number of keys that the last tile attends to."""
        return self.first + self.tiles * self.tile


def tilings(lengths: Sequence[int], own: Sequence[int], rows: list[int]) -> list[Tiling]:
    """Group rows with shared prefixes of similar length, and similar lengths.

    Args:
        lengths: of all rows in tokens.
        own: how many of these, the last ones, are the row's own; the others are a shared prefix, and only keys.
        rows: indices of the rows to group.
    """
    by: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        by.setdefault(((lengths[row] - own[row]) // STEP, -lengths[row] // (4 * STEP)), []).append(row)

    def of(chosen: Iterable[int]) -> Tiling:
        return _tiling(lengths, own, tuple(sorted(chosen, key=lambda row: -lengths[row])))

    found = [of(by[key]) for key in sorted(by)]
    both = [of(one.rows + other.rows) for one, other in pairwise(found)]
    while both:  # merge neighbours while that saves time
        gains = [one.cost + other.cost - pair.cost for (one, other), pair in zip(pairwise(found), both, strict=True)]
        at = max(range(len(both)), key=gains.__getitem__)
        if gains[at] <= 0 and sum(group.tiles for group in found) <= TOGETHER:
            break
        found[at : at + 2] = [both.pop(at)]
        for pair in {at - 1, at} & set(range(len(both))):
            both[pair] = of(found[pair].rows + found[pair + 1].rows)
    return found


def _tiling(lengths: Sequence[int], own: Sequence[int], rows: tuple[int, ...]) -> Tiling:
    """Return how a group of rows, longest first, is best cut into tiles."""
    longest, seen = lengths[rows[0]], min(lengths[row] - own[row] for row in rows)
    best: list[Tiling] = []
    for first in {0, seen // STEP * STEP}:
        least = max(-(-(longest - first) // (TILES * STEP)), min(2, -(-(longest - first) // STEP))) * STEP
        for tile in range(least, max(LARGEST, least) + 1, STEP):
            tiles = [-(-(lengths[row] - first) // tile) for row in rows]
            scores = sum(tile * (n * first + tile * n * (n + 1) // 2) for n in tiles)
            places = len(rows) * (2 * tiles[0] * tile + first)
            cost = scores + _OF_A_PLACE * places + _OF_A_TILE * tiles[0] + _OF_A_GROUP
            best.append(Tiling(rows, first, tile, tiles[0], scores, cost))
    return min(best, key=lambda one: (one.cost, one.first, one.tile))
