"""Packs: every row once, none over the limit, as few as the textbook's best-fit-decreasing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data import batches
from loratune.data.batches import split_packed
from loratune.data.bin_packing import pack
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample, single
from loratune.errors import Place
from tests import tiny

LENGTHS = st.integers(1, 60).flatmap(lambda most: st.lists(st.integers(1, most), max_size=60))


def naive(lengths: list[int], capacity: int) -> list[int]:
    """Return what is left in each pack after best-fit-decreasing, written as it is defined."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(left) if room >= length]
        if fitting:
            left[min(fitting, key=lambda i: left[i])] -= length
        else:
            left.append(capacity - length)
    return left


@given(LENGTHS, st.integers(60, 200))
def test_packs_are_those_of_the_definition(lengths: list[int], capacity: int) -> None:
    packs = pack(np.array(lengths, dtype=np.int64), capacity)
    assert sorted(row for members in packs for row in members.tolist()) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in members) for members in packs]
    assert sorted(capacity - size for size in sizes) == sorted(naive(lengths, capacity))
    assert all(0 < size <= capacity for size in sizes)
    for members in packs:
        assert [lengths[row] for row in members] == sorted((lengths[row] for row in members), reverse=True)


def test_best_fit_and_not_first_fit() -> None:
    """60 and 70 leave 40 and 30: the first fit for 28 would be the pack of 60, the best is that of 70."""
    packs = pack(np.array([60, 28, 70, 41]), 100)
    assert [members.tolist() for members in packs] == [[2, 1], [0], [3]]


def test_a_million_rows_take_seconds() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.2, 1.0, 1_000_000).astype(np.int64), 1, 2048)
    packs = pack(lengths, 2048)
    assert lengths.sum() / (2048 * len(packs)) > 0.999


def test_a_row_that_does_not_fit_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        pack(np.array([11]), 10)


def rows(lengths: list[int]) -> list[Row]:
    return [
        Row(np.arange(n, dtype=np.int32), np.ones(n, dtype=bool), Place("made", i + 1)) for i, n in enumerate(lengths)
    ]


def samples(lengths: list[int]) -> list[Sample]:
    return single(rows(lengths))


def lengths_of(parts: list[list[Sample]]) -> list[list[int]]:
    return [[sample.tokens for sample in part] for part in parts]


def test_micro_batches_of_packs() -> None:
    made = samples([8, 7, 5, 5, 3, 2])  # packs of 10: 8+2, 7+3, 5+5
    assert lengths_of(split_packed(made, 10, 1, 0)) == [[8, 2], [7, 3], [5, 5]]
    assert lengths_of(split_packed(made, 10, 2, 0)) == [[8, 2, 7, 3], [5, 5]]
    assert lengths_of(split_packed(made, 10, "auto", 29)) == [[8, 2, 7, 3], [5, 5]]
    assert lengths_of(split_packed(made, 10, "auto", 30)) == [[8, 2, 7, 3, 5, 5]]
    assert lengths_of(split_packed(made, 10, "auto", 5)) == [[8, 2], [7, 3], [5, 5]]  # at least one


def test_parts_of_auto_are_about_equally_large() -> None:
    made = samples([1000] + [100] * 5)
    parts = split_packed(made, 1000, "auto", 1100)
    assert [sum(part) for part in lengths_of(parts)] == [1000, 500]
    parts = split_packed(samples([100] * 12), 100, "auto", 1000)
    assert [sum(part) for part in lengths_of(parts)] == [600, 600]


@pytest.mark.parametrize("world", [1, 3])
def test_packing_leaves_the_rows_of_every_step_alone(world: int) -> None:
    data = tiny.stored(rows(np.random.default_rng(0).integers(2, 40, 101).tolist()))

    def made(layout: Layout, rank: int, start: int = 0) -> list[batches.Batch]:
        return list(batches.batches(data, 8, "auto", 7, 26, start, 96, rank, world, 64, layout))

    def steps(layout: Layout, rank: int) -> list[list[int]]:
        return [sorted(sample.place.line for part in batch.micro for sample in part) for batch in made(layout, rank)]

    for rank in range(world):
        assert steps("padded", rank) == steps("packed", rank) == steps("shared", rank)
        for layout in ("packed", "shared"):
            assert [batch.micro for batch in made(layout, rank, 9)] == [batch.micro for batch in made(layout, rank)[9:]]


def test_how_full_packs_are() -> None:
    data = tiny.stored(rows([30, 30, 20, 20] * 4))
    each, filled = batches.filling(data, 16, 0, 50)
    assert (each, filled) == (2.0, 1.0)
