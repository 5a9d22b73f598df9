"""Samples of two rows, and rows with virtual tokens before them, as the tensors of a micro-batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratune.data import batches
from loratune.data.collate import collate
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample, single
from loratune.errors import Place
from tests import tiny

LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")


def row(ids: list[int], trained: str, number: int = 1) -> Row:
    """Return a row; `trained` has a 1 for each token that is."""
    return Row(np.array(ids, np.int32), np.array([one == "1" for one in trained]), Place("made", number))


PAIRS = [
    Sample((row([5, 6, 7, 8], "0011"), row([5, 6, 9], "0001"[:2] + "1")), {"chosen": -1.5, "rejected": -2.25}),
    Sample((row([1, 2], "01"), row([1, 3, 4], "011")), {"chosen": -0.5, "rejected": -8.0}),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_of_two_rows(layout: Layout) -> None:
    batch = collate(PAIRS, layout)
    assert batch.targets.tolist() == [7, 8, 9, 2, 3, 4]
    assert batch.row.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.sample.tolist() == [0, 0, 1, 1]
    assert (batch.samples, batch.tokens) == (2, 12)
    assert batch.values.keys() == {"chosen", "rejected"}
    assert torch.equal(batch.values["chosen"], torch.tensor([-1.5, -0.5]))
    assert torch.equal(batch.values["rejected"], torch.tensor([-2.25, -8.0]))
    assert batch.per_row(torch.ones(6)).tolist() == [2, 1, 1, 2]
    assert batch.per_sample(torch.ones(6)).tolist() == [3, 3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_place_holds_the_token_before_its_target(layout: Layout) -> None:
    batch = collate(PAIRS, layout)
    assert batch.inputs["input_ids"].flatten()[batch.places].tolist() == [6, 7, 6, 1, 1, 3]
    # rows of 4 tokens; one behind another; 5 6 9 and 5 6 7 8 from 5 6 on, and so 1 2 and 1 3 4
    assert batch.computed == {"padded": 16, "packed": 12, "shared": 5}[layout]


@pytest.mark.parametrize("virtual", [0, 1, 3])
def test_virtual_tokens_before_each_row(virtual: int) -> None:
    """Token t of row i is at i (V + T) + V + t in the model's output; its input holds none of them."""
    plain, batch = collate(PAIRS), collate(PAIRS, virtual_tokens=virtual)
    width = virtual + 4
    assert batch.places.tolist() == [
        i * width + virtual + t for i, t in [(0, 1), (0, 2), (1, 1), (2, 0), (3, 0), (3, 1)]
    ]
    for name, value in plain.inputs.items():
        assert torch.equal(batch.inputs[name], value)
    assert torch.equal(batch.targets, plain.targets)
    assert torch.equal(batch.row, plain.row)
    assert torch.equal(batch.sample, plain.sample)
    assert (batch.tokens, batch.computed) == (plain.tokens, plain.computed) == (12, 16)


def test_virtual_tokens_and_no_padding_are_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        collate(PAIRS, "packed", virtual_tokens=1)


def test_a_sample_and_what_is_known_of_it() -> None:
    rows = [row([n] * length, "1" * length, n) for n, length in enumerate([5, 3, 2, 9], 1)]
    data = tiny.stored(rows, [1.0, 1.0, 2.5, 2.5], per_sample=2)
    data.values = {"chosen": np.array([-1.0, -2.0])}
    assert (data.samples, len(data)) == (2, 4)
    assert data.sizes.tolist() == [10, 18]
    assert data.sample_weights.tolist() == [1.0, 2.5]
    second = data.sample(1)
    assert second.rows == (rows[2], rows[3])
    assert (second.values, second.tokens, second.padded, second.place.line) == ({"chosen": -2.0}, 11, 18, 3)
    one = tiny.stored(rows)
    assert [one.sample(i).rows for i in range(4)] == [(known,) for known in rows]
    assert (one.samples, one.sizes.tolist()) == (4, [5, 3, 2, 9])


# ---------------------------------------------------------------- batches

LENGTHS = np.random.default_rng(0).integers(2, 40, 80).tolist()  # of 40 pairs
DATA = tiny.stored([row([n] * length, "1" * length, n) for n, length in enumerate(LENGTHS)], per_sample=2)


def numbers(batch: batches.Batch) -> list[int]:
    """Return the numbers of the samples of a batch, each of which has two rows that belong together."""
    found = []
    for sample in (sample for part in batch.micro for sample in part):
        first, second = (one.place.line for one in sample.rows)
        assert first % 2 == 0
        assert second == first + 1
        found.append(first // 2)
    return sorted(found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("micro", [1, 3, "auto"])
@pytest.mark.parametrize("world", [1, 3])
def test_pairs_stay_together_in_every_layout(layout: Layout, micro: int | str, world: int) -> None:
    whole = list(batches.batches(DATA, 8, 8, 7, 10))
    assert sorted(n for batch in whole[:5] for n in numbers(batch)) == list(range(40)), "an epoch, each once"
    parts = [list(batches.batches(DATA, 8, micro, 7, 10, 0, 200, rank, world, 100, layout)) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert sorted(n for part in parts for n in numbers(part[step])) == numbers(batch)
        assert {(part[step].samples, part[step].epoch) for part in parts} == {(8, (step + 1) / 5)}
    made = [part for rank in parts for batch in rank for part in batch.micro]
    if layout == "padded" and micro != "auto":
        assert max(map(len, made)) == min(int(micro), 8)
    most = 200 if micro == "auto" else int(micro) * 100
    for part in made if layout != "padded" or micro == "auto" else []:
        assert collate(part, layout).computed <= most or len(part) == 1


def test_a_process_without_a_pair_repeats_one_and_learns_nothing() -> None:
    data = tiny.stored([row([1, 2, 3], "011"), row([1, 4], "01")], per_sample=2)
    data.values = {"chosen": np.array([-3.0])}
    (batch,) = batches.batches(data, 4, 4, 0, 1, rank=1, world=2)
    ((sample,),) = batch.micro
    assert [one.ids.tolist() for one in sample.rows] == [[1, 2, 3], [1, 4]]
    assert [one.count() for one in sample.rows] == [0, 0]
    assert sample.values == {"chosen": -3.0}
    assert batch.samples == 1


def test_pairs_in_packs_and_micro_batches() -> None:
    pairs = [Sample((row([1] * a, "1" * a), row([1] * b, "1" * b))) for a, b in [(5, 4), (4, 3), (1, 2), (2, 1)]]
    sizes = [[one.tokens for one in part] for part in batches.split_packed(pairs, 12, 1, 0)]
    assert sizes == [[9, 3], [7, 3]]
    assert [[one.padded for one in part] for part in batches.split(pairs, "auto", 20)] == [[10, 8], [4, 4]]
    assert [len(part) for part in batches.split(single(pairs[0].rows), "auto", 10)] == [2]


def test_an_evaluation_sees_every_pair_once() -> None:
    parts = batches.in_length_order(DATA, "auto", 200)
    flat = [sample for part in parts for sample in part]
    assert sorted(sample.rows[0].place.line for sample in flat) == list(range(0, 80, 2))
    assert [sample.padded for sample in flat] == sorted((sample.padded for sample in flat), reverse=True)
    assert all(collate(part).computed <= 200 for part in parts if len(part) > 1)


def test_how_full_packs_of_pairs_are() -> None:
    data = tiny.stored([row([1] * n, "1" * n) for n in [20, 10, 12, 8] * 4], per_sample=2)
    assert batches.filling(data, 8, 0, 50) == (2.0, 1.0)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_pooled_row_is_looked_at_where_it_ends(layout: Layout) -> None:
    """At no label token; sharing keeps its last token, though no other token is predicted from there."""
    ids, none, some = np.array([5, 6, 7], np.int32), np.zeros(3, bool), np.array([False, True, False, False])
    labels = [np.array(of, np.float32) for of in ((2,), (), (0, 1))]
    one, two = (Row(ids, none, Place("made", n), labels[n], pooled=True) for n in (0, 1))
    other = Row(np.array([5, 6, 9, 4], np.int32), some, Place("made", 3), labels[2], pooled=True)
    batch = collate(single([one, two, other]), layout)
    assert batch.targets.tolist() == [0, 0, 0]
    assert batch.row.tolist() == [0, 1, 2]
    assert batch.labels.nan_to_num(-1).tolist() == [[2, -1], [-1, -1], [0, 1]]
    seen = batch.inputs["input_ids"].flatten()[batch.places].tolist()
    assert seen == [7, 7, 4], "the last tokens"
    if layout == "shared":
        assert batch.computed == 5, "two rows that are the same stand there once"
