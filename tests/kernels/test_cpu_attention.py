"""Attention by tiles against scaled_dot_product_attention, row by row, and against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from loratune.data import prefix_sharing
from loratune.kernels import cpu_attention, cpu_long_rows, cpu_tiling
from tests.data.test_prefix_sharing import alike, row


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


TILE = 64
LENGTHS = [
    [1], [5, 1, 9], [TILE], [TILE + 1, 3], [2 * TILE + 7, TILE - 1], [3, 2 * TILE, 5 * TILE + 1, 7, 4 * TILE],
    [cpu_tiling.TILES * cpu_tiling.LARGEST + 1, 9, 3 * TILE],
]  # fmt: skip
LONG = [
    [cpu_attention.LONG + 1],
    [7, cpu_attention.LONG + 9, TILE, 3, cpu_attention.LONG + 2],
]  # torch's kernel takes some of these


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS + LONG)
def test_float32_is_sdpas(lengths: list[int], groups: int) -> None:
    parts = made(sum(lengths), groups, torch.float32, of_value=16 if lengths in LONG else 24)
    got = gradients(cpu_attention.attend(*parts, lengths, 0.3), parts)
    for mine, other in zip(got, gradients(by_rows(parts, lengths, 0.3), parts), strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() < 2e-6 * other.norm() + 1e-6


def near(lengths: list[int]) -> float:
    """Return what is near in bfloat16: half its step, or a little more if all probabilities are kept, and so rounded."""
    return (1.1 if max(lengths) <= cpu_attention.KEPT else 1.0) * 2**-8


@pytest.mark.parametrize("lengths", LENGTHS[1:] + LONG)
def test_bfloat16_is_as_near_to_the_truth_as_sdpa(lengths: list[int]) -> None:
    parts = made(sum(lengths), 2, torch.bfloat16, of_value=16 if lengths in LONG else 24)
    exact = [part.detach().double().requires_grad_() for part in parts]
    truth = gradients(by_rows(exact, lengths, 0.25), exact)
    sdpas = gradients(by_rows(parts, lengths, 0.25), parts)
    for mine, other, true in zip(
        gradients(cpu_attention.attend(*parts, lengths, 0.25), parts), sdpas, truth, strict=True
    ):
        assert (mine - true).norm() < max(1.2 * (other - true).norm(), near(lengths) * true.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_go_through_torchs_kernel_and_values_wider_than_keys_do_not(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    kernel = cpu_long_rows.KERNEL
    monkeypatch.setattr(cpu_long_rows, "KERNEL", lambda *given, **named: used.append(1) or kernel(*given, **named))
    lengths = [cpu_attention.LONG, cpu_attention.LONG + 1, 3]
    for of_value, times in ((24, 0), (16, 1)):
        parts = made(sum(lengths), 2, dtype, of_value)
        cpu_attention.attend(*parts, lengths, 0.25)
        assert len(used) == times


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("common", [0, 40])
def test_probabilities_of_short_rows_are_kept_in_bfloat16(common: int, dtype: torch.dtype) -> None:
    lengths = [cpu_attention.KEPT, 100, 90, 41, cpu_attention.LONG - 1]
    pack = shared(lengths, common)
    whole = [len(pack.places[row]) for row in pack.order]
    parts = made(len(pack.ids), 2, dtype)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: found.append(part) or part, lambda part: part):
        places = torch.from_numpy(np.concatenate([pack.places[row] for row in pack.order]))
        cpu_attention.attend(*parts, pack.own, 0.25, places, whole)
    kept = [part for part in found if part.dim() == 5]
    expected = 6 * cpu_attention.scores_kept(pack.own, whole)
    assert expected > 0
    assert sum(part.numel() for part in kept) == (expected if dtype is torch.bfloat16 else 0)
    assert all(part.shape[1:3] == (2, 3) and part.shape[-1] <= cpu_attention.KEPT for part in kept)


# rows that begin alike, as the first of each pair does: within a tile, over several, and in torch's kernel
BEGINNINGS = [
    ([30, 20, 31], 9), ([TILE + 9, 3 * TILE, TILE, 5], TILE), ([150, 200, 90, 201, 260], 70),
    ([5 * TILE + 1, 5 * TILE, 130], 2 * TILE + 1), ([cpu_attention.LONG + 5, 80, cpu_attention.LONG + 90, 300], 50),
]  # fmt: skip


def shared(lengths: list[int], common: int) -> prefix_sharing.Shared:
    """Return the pack of rows of these lengths: all begin with the same tokens, and every other with twice as many."""
    made = [row(range(1000 * n, 1000 * n + length + 1), [True] * (length + 1)) for n, length in enumerate(lengths)]
    return prefix_sharing.lay(alike(made, common))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize(("lengths", "common"), BEGINNINGS)
def test_what_rows_share_is_as_if_it_stood_in_each(
    lengths: list[int], common: int, groups: int, dtype: torch.dtype
) -> None:
    """Against all rows written out, where the gradients of what they share add up; in bfloat16 against float64."""
    pack = shared(lengths, common)
    every = [pack.places[number] for number in pack.order]
    places, whole = torch.from_numpy(np.concatenate(every)), [len(of) for of in every]
    assert len(places) > len(pack.ids)
    parts = made(len(pack.ids), groups, dtype, of_value=16)

    def written_out(parts: list[torch.Tensor]) -> torch.Tensor:
        out = by_rows([part.index_select(2, places) for part in parts], whole, 0.25)
        return torch.cat([of[:, -own:] for of, own in zip(out.split(whole, dim=1), pack.own, strict=True)], dim=1)

    got = gradients(cpu_attention.attend(*parts, pack.own, 0.25, places, whole), parts)
    exact = [part.detach().double().requires_grad_() for part in parts]
    truth = gradients(written_out(exact), exact)
    sdpas = gradients(written_out(parts), parts)
    for mine, other, true in zip(got, sdpas, truth, strict=True):
        assert mine.shape == other.shape
        allowed = 2e-6 if dtype is torch.float32 else max(1.2 * float((other - true).norm() / true.norm()), near(whole))
        assert (mine - true).norm() < allowed * true.norm()


def test_what_no_row_asks_for_is_hardly_computed() -> None:
    """64 rows of 30 tokens behind a common beginning of 300: their tiles begin there."""
    lengths, own = [330] * 64, [330, *[30] * 63]
    alone, others = cpu_tiling.tilings(lengths, own, list(range(64)))
    assert (alone.rows, alone.first) == ((0,), 0)
    assert (others.rows, others.first, others.tile) == (tuple(range(1, 64)), 288, 48)


def test_rows_of_one_length_lie_beside_one_another_and_a_small_one_is_no_group_of_its_own() -> None:
    (together,) = cpu_tiling.tilings([186, 186, 180, 175, 60], [186, 162, 156, 150, 35], [0, 1, 2, 3, 4])
    assert together.rows == (0, 1, 2, 3, 4)
    apart = cpu_tiling.tilings([600, *[20] * 40], [600, *[20] * 40], list(range(41)))
    assert sorted(len(group.rows) for group in apart) == [1, 40]


@given(st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=12))
def test_every_row_has_its_tiles(pairs: list[tuple[int, int]]) -> None:
    lengths, own = [max(pair) for pair in pairs], [min(pair) for pair in pairs]
    chosen = [row for row in range(len(pairs)) if lengths[row] != 7]
    groups = cpu_tiling.tilings(lengths, own, chosen)
    assert sorted(row for group in groups for row in group.rows) == chosen
    assert len(groups) == 1 or sum(group.tiles for group in groups) <= cpu_tiling.TOGETHER
    for group in groups:
        longest = lengths[group.rows[0]]
        assert longest == max(lengths[row] for row in group.rows)
        assert group.first <= min(lengths[row] - own[row] for row in group.rows)
        assert 1 <= -(-(longest - group.first) // group.tile) == group.tiles <= cpu_tiling.TILES
        assert group.first % cpu_tiling.STEP == group.tile % cpu_tiling.STEP == 0
