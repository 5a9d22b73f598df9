"""What rows have in common stands in a pack once: against a tree of their tokens, written as it is defined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data import batches, prefix_sharing
from loratune.data.encode import Row
from loratune.data.sample import Sample, single
from loratune.errors import Place
from tests import tiny


def row(ids: Sequence[int], trained: Sequence[bool], number: int = 1) -> Row:
    return Row(np.array(ids, np.int32), np.array(trained, bool), Place("made", number))


def alike(rows: list[Row], tokens: int) -> list[Row]:
    """Return rows of the same lengths that all begin with the same tokens, and every other one with twice as many."""
    beginning = max(rows, key=lambda row: len(row.ids)).ids
    made = []
    for number, one in enumerate(rows):
        ids = one.ids.copy()
        common = min(len(ids), tokens * (1 + number % 2))
        ids[:common] = beginning[:common]
        made.append(Row(ids, one.trained, one.place))
    return made


PAIRS = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=8)
ROWS = st.lists(PAIRS.map(lambda pairs: row(*zip(*pairs, strict=True))), min_size=1, max_size=12)


def tree(rows: Sequence[Row]) -> set[tuple[int, ...]]:
    """Return all beginnings of the rows as far as their loss depends on them: each is a token to be computed."""
    found = set()
    for one in rows:
        last = max((t for t in range(1, len(one.ids)) if one.trained[t]), default=1)
        found |= {tuple(one.ids[:end].tolist()) for end in range(1, last + 1)}
    return found


@given(ROWS)
def test_each_token_stands_once_and_each_row_is_whole(rows: list[Row]) -> None:
    shared = prefix_sharing.lay(rows)
    assert len(shared.ids) == len(shared.positions) == len(tree(rows)) == prefix_sharing.computed(rows)
    for one, places in zip(rows, shared.places, strict=True):
        assert len(places) == prefix_sharing.needed(one)
        assert shared.ids[places].tolist() == one.ids[: len(places)].tolist()
        assert shared.positions[places].tolist() == list(range(len(places)))
    stands = np.split(np.arange(len(shared.ids)), np.cumsum(shared.own)[:-1])
    for number, own in zip(shared.order, stands, strict=True):
        assert shared.places[number][-len(own) :].tolist() == own.tolist(), (
            "its own tokens are its last, in their order"
        )


def cut(rows: list[Row], tokens: int) -> list[list[Row]]:
    """Return the rows of each pack, each row a sample of its own."""
    return [[row for sample in part for row in sample.rows] for part in prefix_sharing.cut(single(rows), tokens)]


@given(ROWS, st.integers(1, 30))
def test_parts_hold_each_row_once_and_no_more_tokens_than_fit(rows: list[Row], tokens: int) -> None:
    parts = cut(rows, tokens)
    assert sorted(map(id, (one for part in parts for one in part))) == sorted(map(id, rows))
    assert all(len(part) == 1 or prefix_sharing.computed(part) <= tokens for part in parts)
    if prefix_sharing.computed(rows) <= tokens:
        assert len(parts) == 1


def test_parts_are_about_equally_large() -> None:
    rows = [row([1, 2, n, n, n], [True] * 5) for n in range(10, 18)]  # 2 in common and 2 of their own
    assert [len(part) for part in cut(rows, 15)] == [4, 4]


@pytest.mark.parametrize(
    ("trained", "tokens"),
    [([0, 0, 1, 1, 0, 0], 3), ([0, 0, 0, 0, 0, 1], 5), ([0] * 6, 1), ([1, 0, 0, 0, 0, 0], 1), ([0, 1, 0, 0, 0, 0], 1)],
)
def test_nothing_behind_the_last_prediction_is_needed(trained: list[bool], tokens: int) -> None:
    assert prefix_sharing.needed(row(range(6), trained)) == tokens


def test_what_is_saved() -> None:
    rows = tiny.stored([row([*range(30), *range(n, n + 11)], [False] * 30 + [True] * 11) for n in range(100, 116)])

    def saved(batch_size: int, budget: int = 4096, world: int = 1, micro: int | str = "auto") -> float:
        return batches.saved(rows, batch_size, micro, 0, budget, 60, world)

    assert saved(1) == pytest.approx(1 / 41)  # the very last token
    assert saved(8) == pytest.approx(1 - (30 + 8 * 10) / (8 * 41))
    assert saved(8, budget=70) == pytest.approx(1 - (30 + 4 * 10) / (4 * 41))
    assert saved(16, world=2) == pytest.approx(1 - (30 + 8 * 10) / (8 * 41))
    assert saved(4, micro=1) == pytest.approx(1 - (30 + 2 * 10) / (2 * 41)), "a pack of 60 tokens holds 3 of them"
    assert saved(4, micro=2) == pytest.approx(1 - (30 + 4 * 10) / (4 * 41))


def test_attention_reads_no_more_than_so_many_keys() -> None:
    rows = [row([*range(100), 200 + n, 300 + n], [False] * 100 + [True] * 2) for n in range(64)]
    parts = cut(rows, 200)
    assert [len(part) for part in parts] == [15, 15, 15, 15, 4], "8 x 200 tokens are read"


@given(ROWS, st.integers(1, 30))
def test_rows_of_a_sample_stay_together(rows: list[Row], tokens: int) -> None:
    made = [Sample(tuple(pair)) for pair in zip(rows[::2], rows[1::2], strict=False)] or single(rows)
    parts = prefix_sharing.cut(made, tokens)
    assert sorted(map(id, (one for part in parts for one in part))) == sorted(map(id, made)), "each once, and whole"
    for part in parts:
        assert len(part) == 1 or prefix_sharing.computed([row for one in part for row in one.rows]) <= tokens


def test_samples_that_begin_alike_are_laid_side_by_side() -> None:
    """Four prompts with two answers each, out of order: a pack of 30 tokens holds two of them."""

    def pair(prompt: int) -> Sample:
        both = [row([prompt] * 10 + [answer] * 6, [False] * 10 + [True] * 6) for answer in (50 + prompt, 60 + prompt)]
        return Sample(tuple(both))

    pairs = [pair(number) for number in (3, 1, 4, 2)]
    parts = prefix_sharing.cut(pairs, 40)  # 10 in common, and 5 of each answer are needed
    assert [[one.rows[0].ids[0] for one in part] for part in parts] == [[1, 2], [3, 4]]
    assert [prefix_sharing.computed([r for one in part for r in one.rows]) for part in parts] == [40, 40]
    assert [len(part) for part in prefix_sharing.cut(pairs, 39)] == [1, 1, 1, 1]


def plainly(rows: list[Row], tokens: int) -> list[list[Row]]:
    """Cut rows of their own as it is defined: along their order, at the least limit that takes no more packs."""
    ordered = sorted(rows, key=lambda one: one.ids[: prefix_sharing.needed(one)].tolist())

    def filled(limit: int) -> list[list[Row]]:
        parts: list[list[Row]] = []
        for one in ordered:
            read = sum(prefix_sharing.needed(other) for other in [*parts[-1], one]) if parts else 0
            fits = parts and prefix_sharing.computed([*parts[-1], one]) <= limit
            if not fits or read > prefix_sharing.REPEATS * tokens:
                parts.append([])
            parts[-1].append(one)
        return parts

    fewest = len(filled(tokens))
    return next(parts for parts in map(filled, range(1, tokens + 1)) if len(parts) == fewest)


@given(ROWS, st.integers(1, 30))
def test_rows_of_their_own_are_cut_as_it_is_defined(rows: list[Row], tokens: int) -> None:
    mine, defined = cut(rows, tokens), plainly(rows, tokens)
    assert [[id(one) for one in part] for part in mine] == [[id(one) for one in part] for part in defined]
