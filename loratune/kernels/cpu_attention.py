"""Attention within each row of a pack on a CPU, by matrix products over tiles of many rows at once.

torch's flash kernel takes rows one by one, and its backward pass in bfloat16 uses slow matrix products. Products of
whole tiles are several times faster if one call has enough of them. So rows of similar length are laid side by side,
padded to whole tiles, and the n-th tiles of all of them are multiplied with all keys up to there in one call. Scores
and softmax are float32, as in torch's kernel. In bfloat16 the probabilities of short rows are saved for the backward
pass, in the precision of the values; those of longer rows are recomputed, so that saved memory is linear in the number
of tokens.

Long rows use torch's kernel (cpu_long_rows.py): their scores outgrow the cache, and each tile is a product of its own.

With prefix sharing a common prefix is in the pack only once. Keys and values are then gathered from it for each row,
while queries are a row's own tokens only; gradients of shared tokens are summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from loratune.kernels.cpu_long_rows import LongRow
from loratune.kernels.cpu_tiling import Tiling, tilings

LONG = 768  # tokens of a row from which torch's kernel is at least as fast
KEPT = 256  # tokens of the longest rows whose probabilities are saved in bfloat16


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, own: list[int], scale: float,
    places: torch.Tensor | None = None, lengths: list[int] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return causal attention within each row, (1, tokens, heads, width of a value).

    Args:
        query: (1, heads, tokens, width).
        key: (1, heads or fewer, tokens, width).
        value: (1, as many, tokens, width of a value).
        own: number of tokens in the pack that are each row's own, in the order of the rows.
        scale: of the scores.
        places: indices in the pack of all tokens of each row, int64, (sum of lengths,); None: rows share none.
        lengths: of the rows in tokens, given with `places`.
    """
    rows = _Pack(tuple(own), tuple(lengths or own), b"" if places is None else places.numpy().tobytes())
    out: torch.Tensor = _Rows.apply(query, key, value, rows, scale)  # type: ignore[no-untyped-call]
    return out


def scores_kept(own: list[int], lengths: list[int]) -> int:
    """Return how many probabilities per head `attend` saves in bfloat16: (rows, heads, group, queries, keys) tensors.

    Args:
        own: number of tokens in the pack that are each row's own.
        lengths: of the rows in tokens.
    """
    short = [row for row, length in enumerate(lengths) if length <= LONG]
    return sum(group.scores for group in tilings(lengths, own, short) if _are_kept(group, torch.bfloat16))


def _are_kept(tiling: Tiling, dtype: torch.dtype) -> bool:
    """Return whether probabilities are saved for the backward pass; in float32 recomputing them is as fast."""
    return dtype is torch.bfloat16 and tiling.keys <= KEPT


@dataclass(frozen=True)
class _Pack:
    """Layout of the rows of a pack, hashable: own tokens of each, all tokens of each, and their indices (int64)."""

    own: tuple[int, ...]
    lengths: tuple[int, ...]
    places: bytes

    def rows(self) -> list[tuple[slice, int, torch.Tensor]]:
        """Return for each row the slice of its own tokens, the length of its shared prefix, and all indices."""
        if self.places:
            places = torch.frombuffer(bytearray(self.places), dtype=torch.int64)
        else:
            places = torch.arange(sum(self.own))
        starts = accumulate(self.own, initial=0)
        return [
            (slice(start, start + own), len(of) - own, of)
            for start, own, of in zip(starts, self.own, torch.split_with_sizes(places, self.lengths), strict=False)
        ]


@dataclass(frozen=True)
class _Lined:
    """A padded layout of the heads of several rows' tokens: one gather fills it, and one brings results back.

    Attributes:
        fill: index (token x heads + head) in the pack of what is at each place; 0 where a place is padding; int64,
            (places,).
        none: places that are padding, int64.
        heads: indices that are at a place, int64, (placed,); repeated if several rows share a token.
        slots: their places, int64, (placed,).
        order: the place of each head of the pack, int64; None where some have none.
    """

    fill: torch.Tensor
    none: torch.Tensor
    heads: torch.Tensor
    slots: torch.Tensor
    order: torch.Tensor | None

    @classmethod
    def of(cls, tokens: torch.Tensor, heads: torch.Tensor, pack: int) -> _Lined:
        """Lay out tokens (-1: padding) and heads, whose shapes broadcast to the layout, of a pack of `pack` tokens."""
        counted = torch.where(tokens < 0, -1, tokens * heads.numel() + heads).flatten()
        slots = (counted >= 0).nonzero().flatten()
        found = counted[slots]
        places = torch.full((pack * heads.numel(),), -1).index_copy_(0, found, slots)
        order = None if bool((places < 0).any()) else places
        return cls(counted.clamp(min=0), (counted < 0).nonzero().flatten(), found, slots, order)

    def padded(self, part: torch.Tensor) -> torch.Tensor:
        """Return (1, heads, tokens, width) as (places, width)."""
        table = part[0].transpose(0, 1).reshape(-1, part.shape[-1])  # most models have it in memory in this order
        return table.index_select(0, self.fill)

    def write(self, padded: torch.Tensor, out: torch.Tensor, add: bool = False) -> None:
        """Write values in the padded layout back to `out`, (tokens, heads, width), or add them to it."""
        made, into = padded.to(out.dtype).view(-1, out.shape[-1]), out.view(-1, out.shape[-1])
        if add:
            into.index_add_(0, self.heads, made.index_select(0, self.slots))
        elif self.order is not None:
            torch.index_select(made, 0, self.order, out=into)
        else:
            into.index_copy_(0, self.heads, made.index_select(0, self.slots))


@dataclass(frozen=True)
class _Group:
    """Rows of similar length, longest first.

    Attributes:
        asking: the own tokens of the rows (queries), padded to whole tiles.
        seen: all tokens of the rows (keys), padded to the end of the last tile.
        tiling: how they are cut into tiles.
        rows: for each n, how many rows have an n-th tile.
    """

    asking: _Lined
    seen: _Lined
    tiling: Tiling
    rows: tuple[int, ...]

    def steps(self) -> Iterator[tuple[int, int, int]]:
        """Yield (number of a tile, rows that have it, most keys that its tokens attend to)."""
        for number, rows in enumerate(self.rows):
            yield number, rows, self.tiling.first + (number + 1) * self.tiling.tile

    def queries(self, part: torch.Tensor, heads: int, dtype: torch.dtype, empty: bool = False) -> torch.Tensor:
        """Return (1, query heads, tokens, width) as (tiles, rows, heads, query heads of a head x tile, width).

        Padding holds arbitrary values, which nobody reads; it is zero if `empty`, as gradients there would flow to the
        keys.
        """
        padded = self.asking.padded(part)
        if empty:
            padded.index_fill_(0, self.asking.none, 0)
        return padded.view(len(self.rows), self.rows[0], heads, -1, part.shape[-1]).to(dtype)

    def keys(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return (1, heads, tokens, width) as (rows x heads, keys, width)."""
        return self.seen.padded(part).view(self.rows[0] * part.shape[1], -1, part.shape[-1]).to(dtype)


@lru_cache(maxsize=2)  # the same for all layers of a micro-batch
def _parts(pack: _Pack, longest: int, heads: int, group: int) -> tuple[list[LongRow], list[_Group]]:
    """Return the rows longer than `longest`, and the others in groups that need little padding.

    `heads` is the number of key heads, `group` that of query heads for each.
    """
    rows, tokens = pack.rows(), sum(pack.own)
    long = [LongRow(own, None if not common else of[:common]) for own, common, of in rows if len(of) > longest]
    short = [number for number, length in enumerate(pack.lengths) if length <= longest]
    groups = []
    for tiling in tilings(pack.lengths, pack.own, short):
        seen = torch.full((len(tiling.rows), tiling.keys), -1)
        asking = torch.full((len(tiling.rows), tiling.tiles * tiling.tile), -1)
        for at, row in enumerate(tiling.rows):
            _, common, of = rows[row]
            seen[at, : len(of)] = of
            asking[at, common - tiling.first : len(of) - tiling.first] = of[common:]
        asking = asking.view(len(tiling.rows), tiling.tiles, 1, 1, tiling.tile).transpose(0, 1)
        have = [-(-(pack.lengths[row] - tiling.first) // tiling.tile) for row in tiling.rows]
        groups.append(
            _Group(
                _Lined.of(asking, torch.arange(heads * group).view(heads, group, 1), tokens),
                _Lined.of(seen[:, None], torch.arange(heads).view(heads, 1), tokens),
                tiling, tuple(sum(n < own for own in have) for n in range(tiling.tiles)),
            )
        )  # fmt: skip
    return long, groups


@lru_cache(maxsize=16)
def _later(tile: int) -> torch.Tensor:
    """Return the causal mask within a tile, added to its scores: -inf for later tokens, (tile, tile)."""
    return torch.full((tile, tile), float("-inf")).triu(1)


def _probabilities(q: torch.Tensor, k: torch.Tensor, tile: int) -> torch.Tensor:
    """Return softmax of causal scores, where the queries are the last of the keys: float32, (b, group x tile, keys).

    Args:
        q: float32, (b, group x tile, width).
        k: scaled, float32, (b, keys, width).
        tile: queries per head.
    """
    scores = torch.bmm(q, k.transpose(1, 2))
    scores.view(len(k), -1, tile, k.shape[1])[..., -tile:].add_(_later(tile))
    return torch.softmax(scores, dim=-1, out=scores)  # in place, in the cache


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: _Pack, scale: float
    ) -> torch.Tensor:
        heads, dtype, wide = key.shape[1], query.dtype, torch.float32
        out = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])
        longest = LONG if query.shape[-1] == value.shape[-1] else max(pack.lengths)
        long, groups = ctx.parts = _parts(pack, longest, heads, query.shape[1] // heads)
        norms, probabilities = [], []
        for row in long:
            made, norm = row.attend(query, key, value, scale)
            out[row.own] = made[0].transpose(0, 1)
            norms.append(norm)
        for group in groups:
            q, k, v = group.queries(query, heads, wide), group.keys(key, wide).mul_(scale), group.keys(value, dtype)
            made = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=dtype)
            for tile, rows, keys in group.steps():
                b = rows * heads
                p = _probabilities(q[tile, :rows].flatten(0, 1), k[:b, :keys], group.tiling.tile).to(dtype)
                torch.bmm(p, v[:b, :keys], out=made[tile, :rows].flatten(0, 1))
                if _are_kept(group.tiling, dtype):
                    probabilities.append(p.view(rows, heads, -1, group.tiling.tile, keys))
            group.asking.write(made, out)
        ctx.save_for_backward(query, key, value, *([out, *norms] if long else []), *probabilities)
        ctx.scale, ctx.shared = scale, bool(pack.places)
        return out[None]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        heads, dtype, wide, add = key.shape[1], query.dtype, torch.float32, ctx.shared
        gradient = outer[0].transpose(1, 2)
        of_query = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        shapes = [(part.shape[2], part.shape[1], part.shape[3]) for part in (key, value)]
        of_key, of_value = (
            torch.zeros(shape, dtype=wide) if add else torch.empty(shape, dtype=dtype) for shape in shapes
        )
        long, groups = ctx.parts
        if long:
            out, *kept = kept
        norms, probabilities = kept[: len(long)], iter(kept[len(long) :])
        for row, norm in zip(long, norms, strict=True):
            row.backward(gradient, query, key, value, out, norm, ctx.scale, (of_query, of_key, of_value), add)
        for group in groups:
            q, g = group.queries(query, heads, dtype), group.queries(gradient, heads, dtype, empty=True)
            k, v = group.keys(key, dtype), group.keys(value, dtype)
            again = None if _are_kept(group.tiling, dtype) else (q.to(wide), k.to(wide) * ctx.scale)
            of_q = torch.empty_like(q)
            of_k, of_v = (torch.zeros(part.shape, dtype=wide) for part in (k, v))
            for tile, rows, keys in group.steps():
                b = rows * heads
                if again is None:
                    p = next(probabilities).view(b, -1, keys)
                else:
                    p = _probabilities(again[0][tile, :rows].flatten(0, 1), again[1][:b, :keys], group.tiling.tile)
                g_here = g[tile, :rows].flatten(0, 1)
                of_v[:b, :keys].add_(torch.bmm(p.to(dtype).transpose(1, 2), g_here))
                of_p = torch.bmm(g_here, v[:b, :keys].transpose(1, 2)).to(p.dtype)
                of_s = torch._softmax_backward_data(of_p, p, -1, p.dtype).mul_(ctx.scale).to(dtype)
                torch.bmm(of_s, k[:b, :keys], out=of_q[tile, :rows].flatten(0, 1))
                of_k[:b, :keys].add_(torch.bmm(of_s.transpose(1, 2), q[tile, :rows].flatten(0, 1)))
            group.asking.write(of_q, of_query)
            group.seen.write(of_k, of_key, add)
            group.seen.write(of_v, of_value, add)
        return *(part.to(dtype).transpose(0, 1)[None] for part in (of_query, of_key, of_value)), None, None
