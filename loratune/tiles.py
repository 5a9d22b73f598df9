"""Attention within each row of a pack on a CPU in bfloat16, by matrix products over tiles of many rows at once.

torch's flash kernel falls back to slow products there where it goes backward; oneDNN's own are several times faster,
if there are enough of them in one call. So rows of about the same length are laid side by side, padded to whole tiles,
and the n-th tiles of all of them go through one product with all the keys before them. Scores and softmax are float32,
as in that kernel; they are computed again on the way back, so that nothing of the size (tokens, tokens) is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

TILE = 64  # tokens of a row whose scores are computed at once: small ones skip more of what no token sees
SPREAD = 4  # rows up to so many times shorter than the longest lie beside it; the rest is padding, never computed with


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float
) -> torch.Tensor:
    """Return causal attention within each row, (1, tokens, heads, width of a value).

    Args:
        query: (1, heads, tokens, width).
        key: (1, heads or fewer, tokens, width).
        value: (1, as many, tokens, width of a value).
        lengths: of the rows in tokens.
        scale: of the scores.
    """
    out: torch.Tensor = _Tiles.apply(query, key, value, tuple(lengths), scale)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class _Group:
    """Rows of about the same length, longest first.

    Attributes:
        tokens: of all rows where they stand in the pack, ascending, int64, (tokens,).
        slots: the place of each where the rows stand padded behind one another, int64, (tokens,).
        tiles: number of tiles of the longest row, and so of the padded ones.
        rows: how many rows have an n-th tile, for each n.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    tiles: int
    rows: tuple[int, ...]

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """Yield (number of a tile, rows that have it, keys its tokens see at most)."""
        for number, rows in enumerate(self.rows):
            yield number, rows, (number + 1) * TILE

    def padded(self, part: torch.Tensor) -> torch.Tensor:
        """Return (1, heads, tokens, width) as (rows, tiles, TILE, heads, width)."""
        lined = part[0].transpose(0, 1)  # (tokens, heads, width), which is how most models have it in memory
        out = part.new_zeros(self.rows[0] * self.tiles * TILE, *lined.shape[1:])
        out.index_copy_(0, self.slots, lined if len(self.tokens) == len(lined) else lined[self.tokens])
        return out.view(self.rows[0], self.tiles, TILE, *lined.shape[1:])

    def queries(self, part: torch.Tensor, heads: int) -> torch.Tensor:
        """Return (1, query heads, tokens, width) as (tiles, rows, heads, query heads of a head x TILE, width)."""
        padded = self.padded(part).view(self.rows[0], self.tiles, TILE, heads, -1, part.shape[-1])
        return padded.permute(1, 0, 3, 4, 2, 5).flatten(3, 4).contiguous()

    def keys(self, part: torch.Tensor) -> torch.Tensor:
        """Return (1, heads, tokens, width) as (rows x heads, tiles x TILE, width)."""
        return self.padded(part).flatten(1, 2).transpose(1, 2).flatten(0, 1)

    def put(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """Write what `queries` gives to where it comes from, `out` of (tokens, query heads, width)."""
        apart = part.view(*part.shape[:3], -1, TILE, part.shape[-1])  # (tiles, rows, heads, group, TILE, width)
        self._write(apart.permute(1, 0, 4, 2, 3, 5).reshape(-1, *out.shape[1:]), out)

    def put_keys(self, part: torch.Tensor, heads: int, out: torch.Tensor) -> None:
        """Write what `keys` gives to where it comes from, `out` of (tokens, heads, width)."""
        apart = part.view(-1, heads, *part.shape[1:])  # (rows, heads, tiles x TILE, width)
        self._write(apart.transpose(1, 2).reshape(-1, *out.shape[1:]), out)

    def _write(self, padded: torch.Tensor, out: torch.Tensor) -> None:
        out.index_copy_(0, self.tokens, padded.index_select(0, self.slots).to(out.dtype))


@lru_cache(maxsize=16)  # all layers ask for the same
def _groups(lengths: tuple[int, ...]) -> list[_Group]:
    """Return rows in groups, such that padding takes little."""
    starts = list(accumulate(lengths, initial=0))
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    found: list[list[int]] = []
    for row in order:
        if not found or _tiles(lengths[row]) * SPREAD < _tiles(lengths[found[-1][0]]):
            found.append([])
        found[-1].append(row)
    groups = []
    for rows in found:
        most = _tiles(lengths[rows[0]])
        place = {row: at * most * TILE for at, row in enumerate(rows)}
        tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in sorted(rows)])
        slots = torch.cat([torch.arange(lengths[row]) + place[row] for row in sorted(rows)])
        have = tuple(sum(_tiles(lengths[row]) > number for row in rows) for number in range(most))
        groups.append(_Group(tokens, slots, most, have))
    return groups


def _tiles(tokens: int) -> int:
    return -(-tokens // TILE)


@lru_cache(maxsize=1)
def _later() -> torch.Tensor:
    """Return what is added to the scores of a tile with its own tokens: none sees a later one, (TILE, TILE)."""
    return torch.full((TILE, TILE), float("-inf")).triu(1)


def _probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return softmax of the causal scores of queries that stand under the last keys, float32, (b, group x TILE, keys).

    Args:
        q: scaled, float32, (b, group x TILE, width).
        k: float32, (b, keys, width).
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    scores.view(len(k), -1, TILE, k.shape[1])[..., -TILE:] += _later()
    return scores.softmax(dim=-1)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scale: float
    ) -> torch.Tensor:
        heads = key.shape[1]
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        for group in _groups(lengths):
            q, k, v = group.queries(query, heads).float() * scale, group.keys(key).float(), group.keys(value)
            made = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=query.dtype)
            for tile, rows, keys in group.steps():
                b = rows * heads
                p = _probabilities(q[tile, :rows].flatten(0, 1), k[:b, :keys]).to(query.dtype)
                torch.bmm(p, v[:b, :keys], out=made[tile, :rows].flatten(0, 1))
            group.put(made, out)
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scale = lengths, scale
        return out[None]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        heads, dtype = key.shape[1], query.dtype
        of_query, of_key, of_value = (p.new_empty(p.shape[2], p.shape[1], p.shape[3]) for p in (query, key, value))
        for group in _groups(ctx.lengths):
            q, g = group.queries(query, heads), group.queries(outer[0].transpose(1, 2), heads)
            k, v = group.keys(key), group.keys(value)
            q32, k32 = q.float() * ctx.scale, k.float()
            of_q = torch.empty_like(q)
            of_k, of_v = (torch.zeros(part.shape, dtype=torch.float32) for part in (k, v))
            for tile, rows, keys in group.steps():
                b = rows * heads
                p = _probabilities(q32[tile, :rows].flatten(0, 1), k32[:b, :keys])
                g_here = g[tile, :rows].flatten(0, 1)
                of_v[:b, :keys] += torch.bmm(p.to(dtype).transpose(1, 2), g_here)
                of_p = torch.bmm(g_here, v[:b, :keys].transpose(1, 2)).float()
                of_s = torch._softmax_backward_data(of_p, p, -1, torch.float32).mul_(ctx.scale).to(dtype)
                torch.bmm(of_s, k[:b, :keys], out=of_q[tile, :rows].flatten(0, 1))
                of_k[:b, :keys] += torch.bmm(of_s.transpose(1, 2), q[tile, :rows].flatten(0, 1))
            group.put(of_q, of_query)
            group.put_keys(of_k, heads, of_key)
            group.put_keys(of_v, heads, of_value)
        return *(part.transpose(0, 1)[None] for part in (of_query, of_key, of_value)), None, None
