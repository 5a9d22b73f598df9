"""How rows are laid beside one another for attention by tiles, such that little is computed that no one asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

STEP = 16  # tiles and what stands before the first are multiples of it: processors take so many numbers at once
LARGEST = 128  # tokens of a tile: large ones compute more of what no token sees
TILES = 6  # of a row at most, else they are larger
TOGETHER = 12  # of all groups, if they can be joined: oneDNN makes seven products ready for each, and keeps few

# What else takes time, in scores of all heads of a row that could be computed instead; measured for 9 heads
_OF_A_GROUP, _OF_A_TILE = 8192, 8192  # calls
_OF_A_PLACE = 32  # copies


@dataclass(frozen=True)
class Tiling:
    """Rows of which the n-th tiles are computed together.

    Attributes:
        rows: their numbers, longest first.
        first: where the first tile begins, in tokens of a row: no row has any of its own before.
        tile: tokens of a tile.
        tiles: how many the longest has.
        scores: of a head that are computed for all rows.
        cost: time it takes, in scores.
    """

    rows: tuple[int, ...]
    first: int
    tile: int
    tiles: int
    scores: int
    cost: int

    @property
    def keys(self) -> int:
        """How many keys the last tile sees."""
        return self.first + self.tiles * self.tile


def tilings(lengths: Sequence[int], own: Sequence[int], rows: list[int]) -> list[Tiling]:
    """Put rows into groups: those that have about as much in common with others, and are about as long.

    Args:
        lengths: of all rows in tokens.
        own: how many of these, the last, are the row's own: the others only are seen by them.
        rows: the numbers of those to be put into groups.
    """
    by: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        by.setdefault(((lengths[row] - own[row]) // STEP, -lengths[row] // (4 * STEP)), []).append(row)

    def of(chosen: Iterable[int]) -> Tiling:
        return _tiling(lengths, own, tuple(sorted(chosen, key=lambda row: -lengths[row])))

    found = [of(by[key]) for key in sorted(by)]
    both = [of(one.rows + other.rows) for one, other in pairwise(found)]
    while both:  # neighbours that take less time together
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
