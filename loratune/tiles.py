"""Attention within each row of a pack on a CPU in bfloat16, by matrix products over tiles of many rows at once.

torch's flash kernel falls back to slow products there where it goes backward; oneDNN's own are several times faster,
if there are enough of them in one call. So rows of about the same length are laid side by side, padded to whole tiles,
and the n-th tiles of all of them go through one product with all the keys before them. Scores and softmax are float32,
as in that kernel; they are computed again on the way back, so that nothing of the size (tokens, tokens) is kept.

Long rows do go through the kernel: their scores outgrow the cache, and each of their tiles is another product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

TILE = 64  # tokens of a row whose scores are computed at once: small ones skip more of what no token sees
TILES = 6  # of a row at most, else they are larger: oneDNN makes seven products ready for each, and keeps few
LONG = 768  # tokens of a row that torch's kernel takes at least as fast
SPREAD = 4  # rows up to so many times shorter than the longest lie beside it; the rest is padding, never computed with

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # gives also the logarithm of the scores' sums
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    out: torch.Tensor = _Rows.apply(query, key, value, tuple(lengths), scale)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class _Group:
    """Rows of about the same length, longest first.

    Attributes:
        tokens: of all rows where they stand in the pack, ascending, int64, (tokens,).
        slots: the place of each where the rows stand padded behind one another, int64, (tokens,).
        fill: what stands in each place: a token of the pack, or the first in place of none, int64, (places,).
        none: places where no token stands, int64.
        tile: tokens of a tile.
        rows: how many rows have an n-th tile, for each n; the padded ones have as many as the longest.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    fill: torch.Tensor
    none: torch.Tensor
    tile: int
    rows: tuple[int, ...]

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """Yield (number of a tile, rows that have it, keys its tokens see at most)."""
        for number, rows in enumerate(self.rows):
            yield number, rows, (number + 1) * self.tile

    def queries(self, part: torch.Tensor, heads: int, dtype: torch.dtype, empty: bool = False) -> torch.Tensor:
        """Return (1, query heads, tokens, width) as (tiles, rows, heads, query heads of a head x tile, width).

        Where no token stands something does, unless it is to be `empty`: it sees and gives nothing anyone asks for, but
        what comes back to it would go on to the keys.
        """
        padded = self._padded(part)
        if empty:
            padded.index_fill_(0, self.none, 0)
        padded = padded.view(self.rows[0], -1, self.tile, heads, part.shape[1] // heads, part.shape[-1])
        padded = padded.permute(1, 0, 3, 4, 2, 5)
        return torch.empty(padded.shape, dtype=dtype).copy_(padded).flatten(3, 4)

    def keys(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return (1, heads, tokens, width) as (rows x heads, tiles x tile, width)."""
        padded = self._padded(part)
        padded = padded.view(self.rows[0], -1, *padded.shape[1:]).transpose(1, 2)
        return torch.empty(padded.shape, dtype=dtype).copy_(padded).flatten(0, 1)

    def put(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """Write what `queries` gives to where it comes from, `out` of (tokens, query heads, width)."""
        apart = part.view(*part.shape[:3], -1, self.tile, part.shape[-1])  # (tiles, rows, heads, group, tile, width)
        self._write(apart.permute(1, 0, 4, 2, 3, 5), out)

    def put_keys(self, part: torch.Tensor, heads: int, out: torch.Tensor) -> None:
        """Write what `keys` gives to where it comes from, `out` of (tokens, heads, width)."""
        apart = part.view(-1, heads, *part.shape[1:])  # (rows, heads, tiles x tile, width)
        self._write(apart.transpose(1, 2), out)

    def _padded(self, part: torch.Tensor) -> torch.Tensor:
        """Return (1, heads, tokens, width) as (places, heads, width)."""
        return part[0].transpose(0, 1).index_select(0, self.fill)  # most models have it in memory that way round

    def _write(self, padded: torch.Tensor, out: torch.Tensor) -> None:
        lined = padded.to(out.dtype, memory_format=torch.contiguous_format).reshape(-1, *out.shape[1:])
        if len(self.tokens) == len(out):  # all of the pack
            torch.index_select(lined, 0, self.slots, out=out)
        else:
            out.index_copy_(0, self.tokens, lined.index_select(0, self.slots))


@lru_cache(maxsize=16)  # all layers ask for the same
def _parts(lengths: tuple[int, ...], longest: int) -> tuple[list[slice], list[_Group]]:
    """Return where rows longer than `longest` stand, and the others in groups, such that padding takes little."""
    starts = list(accumulate(lengths, initial=0))
    long = [slice(start, start + length) for start, length in zip(starts, lengths, strict=False) if length > longest]
    short = sorted((row for row, length in enumerate(lengths) if length <= longest), key=lambda row: -lengths[row])
    found: list[list[int]] = []
    for row in short:
        if not found or -(-lengths[row] // TILE) * SPREAD < -(-lengths[found[-1][0]] // TILE):
            found.append([])
        found[-1].append(row)
    groups = []
    for rows in found:
        tile = TILE
        while -(-lengths[rows[0]] // tile) > TILES:
            tile *= 2
        tiles = [-(-lengths[row] // tile) for row in rows]
        place = {row: at * tiles[0] * tile for at, row in enumerate(rows)}
        tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in sorted(rows)])
        slots = torch.cat([torch.arange(lengths[row]) + place[row] for row in sorted(rows)])
        have = tuple(sum(number < own for own in tiles) for number in range(tiles[0]))
        fill = torch.full((len(rows) * tiles[0] * tile,), -1).index_copy_(0, slots, tokens)
        none = (fill < 0).nonzero().flatten()
        groups.append(_Group(tokens, slots, fill.clamp_(min=0), none, tile, have))
    return long, groups


@lru_cache(maxsize=16)
def _later(tile: int) -> torch.Tensor:
    """Return what is added to the scores of a tile with its own tokens: none sees a later one, (tile, tile)."""
    return torch.full((tile, tile), float("-inf")).triu(1)


def _probabilities(q: torch.Tensor, k: torch.Tensor, tile: int) -> torch.Tensor:
    """Return softmax of the causal scores of queries that stand under the last keys, float32, (b, group x tile, keys).

    Args:
        q: float32, (b, group x tile, width).
        k: scaled, float32, (b, keys, width).
        tile: how many queries of a head there are.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    scores.view(len(k), -1, tile, k.shape[1])[..., -tile:].add_(_later(tile))
    return torch.softmax(scores, dim=-1, out=scores)  # in place, in the cache


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scale: float
    ) -> torch.Tensor:
        heads, dtype, wide = key.shape[1], query.dtype, torch.float32
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        ctx.parts = long, groups = _parts(lengths, LONG if query.shape[-1] == value.shape[-1] else max(lengths))
        norms = []
        for row in long:
            made, norm = _KERNEL(*(part[:, :, row] for part in (query, key, value)), 0.0, True, scale=scale)
            out[row] = made[0].transpose(0, 1)
            norms.append(norm)
        for group in groups:
            q, k, v = group.queries(query, heads, wide), group.keys(key, wide).mul_(scale), group.keys(value, dtype)
            made = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=dtype)
            for tile, rows, keys in group.steps():
                b = rows * heads
                p = _probabilities(q[tile, :rows].flatten(0, 1), k[:b, :keys], group.tile).to(dtype)
                torch.bmm(p, v[:b, :keys], out=made[tile, :rows].flatten(0, 1))
            group.put(made, out)
        ctx.save_for_backward(query, key, value, *([out, *norms] if long else []))
        ctx.scale = scale
        return out[None]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        heads, dtype, wide = key.shape[1], query.dtype, torch.float32
        gradient = outer[0].transpose(1, 2)
        of_query, of_key, of_value = (p.new_empty(p.shape[2], p.shape[1], p.shape[3]) for p in (query, key, value))
        long, groups = ctx.parts
        for row, norm in zip(long, kept[1:], strict=True):
            # each head of queries with keys of its own: the kernel adds up those of a shared one in bfloat16
            k, v = (p[:, :, row].repeat_interleave(query.shape[1] // heads, dim=1) for p in (key, value))
            q, g, made = query[:, :, row], gradient[:, :, row], kept[0][None, row].transpose(1, 2)
            of_q, of_k, of_v = _KERNEL_BACKWARD(g, q, k, v, made, norm, 0.0, True, scale=ctx.scale)
            of_query[row] = of_q[0].transpose(0, 1)
            of_key[row], of_value[row] = (p[0].unflatten(0, (heads, -1)).sum(1).transpose(0, 1) for p in (of_k, of_v))
        for group in groups:
            q, g = group.queries(query, heads, dtype), group.queries(gradient, heads, dtype, empty=True)
            k, v = group.keys(key, dtype), group.keys(value, dtype)
            q32, k32 = q.to(wide), k.to(wide) * ctx.scale
            of_q = torch.empty_like(q)
            of_k, of_v = (torch.zeros(part.shape, dtype=wide) for part in (k, v))
            for tile, rows, keys in group.steps():
                b = rows * heads
                p = _probabilities(q32[tile, :rows].flatten(0, 1), k32[:b, :keys], group.tile)
                g_here = g[tile, :rows].flatten(0, 1)
                of_v[:b, :keys].add_(torch.bmm(p.to(dtype).transpose(1, 2), g_here))
                of_p = torch.bmm(g_here, v[:b, :keys].transpose(1, 2)).to(wide)
                of_s = torch._softmax_backward_data(of_p, p, -1, wide).mul_(ctx.scale).to(dtype)
                torch.bmm(of_s, k[:b, :keys], out=of_q[tile, :rows].flatten(0, 1))
                of_k[:b, :keys].add_(torch.bmm(of_s.transpose(1, 2), q[tile, :rows].flatten(0, 1)))
            group.put(of_q, of_query)
            group.put_keys(of_k, heads, of_key)
            group.put_keys(of_v, heads, of_value)
        return *(part.transpose(0, 1)[None] for part in (of_query, of_key, of_value)), None, None
