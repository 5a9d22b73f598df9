"""What rows have in common stands in a pack once: against a tree of their tokens, written as it is defined."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data import batches, prefix_sharing
from loratune.data.encode import Row
from loratune.errors import Place


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


@given(ROWS, st.integers(1, 30))
def test_parts_hold_each_row_once_and_no_more_tokens_than_fit(rows: list[Row], tokens: int) -> None:
    parts = prefix_sharing.cut(rows, tokens)
    assert sorted(map(id, (one for part in parts for one in part))) == sorted(map(id, rows))
    assert all(len(part) == 1 or prefix_sharing.computed(part) <= tokens for part in parts)
    if prefix_sharing.computed(rows) <= tokens:
        assert len(parts) == 1


def test_parts_are_about_equally_large() -> None:
    rows = [row([1, 2, n, n, n], [True] * 5) for n in range(10, 18)]  # 2 in common and 2 of their own
    assert [len(part) for part in prefix_sharing.cut(rows, 15)] == [4, 4]


@pytest.mark.parametrize(
    ("trained", "tokens"),
    [([0, 0, 1, 1, 0, 0], 3), ([0, 0, 0, 0, 0, 1], 5), ([0] * 6, 1), ([1, 0, 0, 0, 0, 0], 1), ([0, 1, 0, 0, 0, 0], 1)],
)
def test_nothing_behind_the_last_prediction_is_needed(trained: list[bool], tokens: int) -> None:
    assert prefix_sharing.needed(row(range(6), trained)) == tokens


class Given(list[Row]):
    """As much of `data.Rows` as the batches need."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(one.ids) for one in self])

    @property
    def weights(self) -> np.ndarray:
        return np.ones(len(self))


def test_what_is_saved() -> None:
    rows = Given(row([*range(30), *range(n, n + 11)], [False] * 30 + [True] * 11) for n in range(100, 116))

    def saved(batch_size: int, budget: int = 4096, world: int = 1, micro: int | str = "auto") -> float:
        return batches.saved(rows, batch_size, micro, 0, budget, 60, world)  # type: ignore[arg-type]

    assert saved(1) == pytest.approx(1 / 41)  # the very last token
    assert saved(8) == pytest.approx(1 - (30 + 8 * 10) / (8 * 41))
    assert saved(8, budget=70) == pytest.approx(1 - (30 + 4 * 10) / (4 * 41))
    assert saved(16, world=2) == pytest.approx(1 - (30 + 8 * 10) / (8 * 41))
    assert saved(4, micro=1) == pytest.approx(1 - (30 + 2 * 10) / (2 * 41)), "a pack of 60 tokens holds 3 of them"
    assert saved(4, micro=2) == pytest.approx(1 - (30 + 4 * 10) / (4 * 41))


def test_attention_reads_no_more_than_so_many_keys() -> None:
    rows = [row([*range(100), 200 + n, 300 + n], [False] * 100 + [True] * 2) for n in range(64)]
    parts = prefix_sharing.cut(rows, 200)
    assert [len(part) for part in parts] == [15, 15, 15, 15, 4], "8 x 200 tokens are read"
