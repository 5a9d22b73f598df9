"""Attention by tiles against scaled_dot_product_attention, row by row, and against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from loratune import tiles


def made(tokens: int, groups: int, dtype: torch.dtype, of_value: int = 24) -> list[torch.Tensor]:
    torch.manual_seed(tokens)
    shapes = ((6, 16), (groups, 16), (groups, of_value))
    parts = [torch.randn(1, heads, tokens, width, dtype=torch.float64) for heads, width in shapes]
    return [part.to(dtype).requires_grad_() for part in parts]


def by_rows(parts: list[torch.Tensor], lengths: list[int], scale: float) -> torch.Tensor:
    rows = zip(*(part.split(lengths, dim=2) for part in parts), strict=True)
    out = [sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=True) for q, k, v in rows]
    return torch.cat(out, dim=2).transpose(1, 2)


def gradients(out: torch.Tensor, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(9)
    outer = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, parts, outer)]


TILE = tiles.TILE
LENGTHS = [
    [1], [5, 1, 9], [TILE], [TILE + 1, 3], [2 * TILE + 7, TILE - 1], [3, 2 * TILE, 5 * TILE + 1, 7, 4 * TILE],
    [tiles.TILES * TILE + 1, 9, 3 * TILE],
]  # fmt: skip
LONG = [[tiles.LONG + 1], [7, tiles.LONG + 9, TILE, 3, tiles.LONG + 2]]  # torch's kernel takes some of these


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS + LONG)
def test_float32_is_sdpas(lengths: list[int], groups: int) -> None:
    parts = made(sum(lengths), groups, torch.float32, of_value=16 if lengths in LONG else 24)
    got = gradients(tiles.attend(*parts, lengths, 0.3), parts)
    for mine, other in zip(got, gradients(by_rows(parts, lengths, 0.3), parts), strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() < 2e-6 * other.norm() + 1e-6


@pytest.mark.parametrize("lengths", LENGTHS[1:] + LONG)
def test_bfloat16_is_as_near_to_the_truth_as_sdpa(lengths: list[int]) -> None:
    parts = made(sum(lengths), 2, torch.bfloat16, of_value=16 if lengths in LONG else 24)
    exact = [part.detach().double().requires_grad_() for part in parts]
    truth = gradients(by_rows(exact, lengths, 0.25), exact)
    sdpas = gradients(by_rows(parts, lengths, 0.25), parts)
    for mine, other, true in zip(gradients(tiles.attend(*parts, lengths, 0.25), parts), sdpas, truth, strict=True):
        assert (mine - true).norm() < max(1.2 * (other - true).norm(), 2**-8 * true.norm())


def test_long_rows_go_through_torchs_kernel_and_values_wider_than_keys_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    kernel = tiles._KERNEL
    monkeypatch.setattr(tiles, "_KERNEL", lambda *given, **named: used.append(1) or kernel(*given, **named))
    lengths = [tiles.LONG, tiles.LONG + 1, 3]
    for of_value, times in ((24, 0), (16, 1)):
        parts = made(sum(lengths), 2, torch.bfloat16, of_value)
        tiles.attend(*parts, lengths, 0.25)
        assert len(used) == times
