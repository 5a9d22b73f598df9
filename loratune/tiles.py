"""Attention within each row of a pack on a CPU in bfloat16, by matrix products over tiles of a row.

torch's flash kernel falls back to slow products there where it goes backward; oneDNN's own are several times faster.
Scores and softmax are float32, as in that kernel; they are computed again on the way back, so that nothing of the size
(tokens, tokens) is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

TILE = 64  # tokens of a row whose scores are in memory at once: small ones skip more of what no token sees


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
    out: torch.Tensor = _Tiles.apply(query, key, value, lengths, scale)  # type: ignore[no-untyped-call]
    return out


def _tiles(lengths: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first token of the row, first and end of the tile)."""
    begin = 0
    for length in lengths:
        for first in range(begin, begin + length, TILE):
            yield begin, first, min(first + TILE, begin + length)
        begin += length


def _probabilities(q: torch.Tensor, k: torch.Tensor, tokens: int, scale: float) -> torch.Tensor:
    """Return softmax of the causal scores of a tile's last `tokens`, float32, (key heads, group x tokens, keys)."""
    scores = torch.bmm(q.float() * scale, k.float().transpose(1, 2))
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores.view(len(k), -1, tokens, k.shape[1])[..., -tokens:].masked_fill_(later, float("-inf"))
    return scores.softmax(dim=-1)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], scale: float
    ) -> torch.Tensor:
        heads, tokens, groups = query.shape[1], query.shape[2], key.shape[1]
        grouped = query[0].reshape(groups, -1, *query.shape[2:])  # (key heads, group, tokens, width)
        out = query.new_empty(1, tokens, heads, value.shape[-1])
        for begin, first, end in _tiles(lengths):
            q = grouped[:, :, first:end].flatten(1, 2)
            p = _probabilities(q, key[0, :, begin:end], end - first, scale).to(q.dtype)
            made = torch.bmm(p, value[0, :, begin:end]).view(heads, end - first, -1)
            out[0, first:end] = made.transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        groups, scale = key.shape[1], ctx.scale
        grouped = query[0].reshape(groups, -1, *query.shape[2:])
        gradient = (
            outer[0][0].transpose(0, 1).reshape(groups, -1, query.shape[2], value.shape[3])
        )  # (key heads, group, tokens, width)
        of_q = torch.empty_like(query)
        of_k, of_v = (torch.zeros(part.shape[1:], dtype=torch.float32) for part in (key, value))
        for begin, first, end in _tiles(ctx.lengths):
            q, g = (part[:, :, first:end].flatten(1, 2) for part in (grouped, gradient))
            k, v = key[0, :, begin:end], value[0, :, begin:end]
            p = _probabilities(q, k, end - first, scale)
            of_v[:, begin:end] += torch.bmm(p.to(q.dtype).transpose(1, 2), g)
            of_p = torch.bmm(g, v.transpose(1, 2)).float()
            of_s = torch._softmax_backward_data(of_p, p, -1, torch.float32).mul_(scale).to(q.dtype)
            of_q[0, :, first:end] = torch.bmm(of_s, k).view(query.shape[1], end - first, -1)
            of_k[:, begin:end] += torch.bmm(of_s.transpose(1, 2), q)
        return of_q, of_k[None].to(key.dtype), of_v[None].to(value.dtype), None, None
