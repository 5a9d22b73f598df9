from __future__ import annotations

import io
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratune import recipe
from loratune.data import batches, dataset, row_cache
from loratune.data.dataset import Rows
from loratune.data.encode import Encoder, Row
from loratune.data.formats import Chat, Completion, Text
from loratune.data.ledger import Ledger
from loratune.data.section import Data, Source
from loratune.errors import DataError, Place
from tests import tiny

ENCODER = Encoder(tiny.tokenizer())
END = ENCODER.tokenizer.eos_token_id


def load(folder: Path, rows: list[dict[str, Any]], weight: float = 1, **section: Any) -> Rows:
    path = tiny.write_jsonl(folder / "rows.jsonl", rows)
    source = Source(path=str(path), weight=weight)
    section.setdefault("max_lost", 1.0)
    return dataset.load([source], Data(train=(source,), **section), ENCODER)


def refused(folder: Path, rows: list[dict[str, Any]], **section: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(folder, rows, **section)
    return str(caught.value).replace(f"{folder}/", "")


def texts(*lengths: int) -> list[dict[str, Any]]:
    """Return rows of so many tokens with the end token; all letters differ from row to row."""
    return [{"text": chr(97 + i % 26) * (length - 1)} for i, length in enumerate(lengths)]


def made(
    folder: Path,
    lengths: np.ndarray | list[int],
    contents: list[int] | None = None,
    weights: list[float] | None = None,
) -> Rows:
    """Return rows of given lengths; the ids tell the row, all but the first token are trained."""
    writer = row_cache.Writer(folder)
    for index, length in enumerate(lengths):
        row = Row(np.full(length, index, np.int32), np.ones(length, bool), Place("made", index + 1))
        content = contents[index] if contents else index
        writer.add(row, weights[index] if weights else 1.0, content, content)
    read = len(set(contents)) if contents else len(lengths)
    found = writer.commit({"counts": {}, "formats": {}, "per_sample": 1, "sample": "row"}, None)
    counts = dataset.Counts(read=read, kept=read, tokens=sum(lengths))
    return Rows(found, np.arange(len(lengths)), counts)


def places(rows: Rows) -> list[Place]:
    return [rows.place(index) for index in range(len(rows))]


# ---------------------------------------------------------------- reading


def test_rows_are_kept_with_their_places(tmp_path: Path) -> None:
    chats = tiny.chats(30)
    rows = load(tmp_path, chats)
    assert len(rows) == rows.counts.read == rows.counts.kept == 30
    for index, raw in enumerate(chats):
        wanted = ENCODER.encode(Chat().read(raw), rows.place(index))
        assert rows[index].ids.tolist() == wanted.ids.tolist()
        assert rows[index].trained.tolist() == wanted.trained.tolist()
        assert rows.place(index).line == index + 1
    assert rows.counts.tokens == sum(len(rows[i].ids) for i in range(30)) == rows.lengths.sum()
    assert rows.counts.trained_tokens == sum(rows[i].count() for i in range(30))
    assert rows.counts.first == []


def test_long_rows_are_an_error_by_default(tmp_path: Path) -> None:
    message = refused(tmp_path, texts(5, *range(11, 18)), max_length=10, format=Text())
    assert message == "\n".join(
        [
            *(f"rows.jsonl:{line}: {line + 9} tokens, at most 10" for line in range(2, 7)),
            "7 of 8 rows are longer than `data.max_length` (10 tokens)",
            "  raise data.max_length, or set data.on_long: drop, truncate or (plain text) split",
        ]
    )


def test_rows_that_cant_be_used_are_an_error(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "fine"}, *[{"tex": "a"}] * 7, {"text": "x" * 50}]
    message = refused(tmp_path, rows, max_length=10, format=Text())
    assert message == "\n".join(
        [
            *(f"rows.jsonl:{line}: `text` is missing; the row's columns: `tex`" for line in range(2, 7)),
            "and 2 more of 9 rows can't be used",
            "rows.jsonl:9: 51 tokens, at most 10",
            "1 of 9 rows are longer than `data.max_length` (10 tokens)",
            "  raise data.max_length, or set data.on_long: drop, truncate or (plain text) split",
        ]
    )
    for on_long in ("drop", "truncate", "split"):  # these forgive length and nothing else
        assert "`text` is missing" in refused(tmp_path, rows, max_length=10, format=Text(), on_long=on_long)


def test_a_row_without_a_trained_token_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(examples: list[tuple[Any, Place]]) -> list[list[Row]]:  # the first token can't be predicted
        return [[Row(np.zeros(4, np.int32), np.array([True, False, False, False]), place)] for _, place in examples]

    monkeypatch.setattr(ENCODER, "batch", untrained)
    assert refused(tmp_path, texts(4), format=Text()) == (
        "rows.jsonl:1: has no label token: nothing would be learned from it"
    )


def test_long_rows_are_dropped(tmp_path: Path) -> None:
    rows = load(tmp_path, texts(5, 11, 10, 30), max_length=10, format=Text(), on_long="drop")
    assert rows.lengths.tolist() == [5, 10]
    counts = rows.counts
    assert (counts.read, counts.kept, counts.dropped, counts.truncated, counts.split) == (4, 2, 2, 0, 0)
    assert [line.rpartition("/")[2] for line in counts.first] == [
        "rows.jsonl:2: 11 tokens, dropped",
        "rows.jsonl:4: 30 tokens, dropped",
    ]


def test_long_rows_are_cut(tmp_path: Path) -> None:
    """A row is cut at its end; one whose trained part is cut off whole is dropped, and counted as that."""
    raw = [
        {"prompt": "p" * 5, "completion": "c" * 3},
        {"prompt": "p" * 5, "completion": "c" * 9},
        {"prompt": "p" * 9, "completion": "c" * 9},
        {"prompt": "p" * 10, "completion": "c"},
        {"prompt": "p" * 40, "completion": "c"},
    ]
    rows = load(tmp_path, raw, max_length=10, format=Completion(), on_long="truncate")
    counts = rows.counts
    assert rows.lengths.tolist() == [9, 10, 10]
    assert [rows[i].count() for i in range(3)] == [4, 5, 1]
    assert (counts.read, counts.kept, counts.dropped, counts.truncated) == (5, 3, 2, 2)
    assert [line.rpartition("/")[2] for line in counts.first] == [
        "rows.jsonl:2: 15 tokens, truncated to 10",
        "rows.jsonl:3: 19 tokens, truncated to 10",
        "rows.jsonl:4: 12 tokens, dropped",
        "rows.jsonl:5: 42 tokens, dropped",
    ]


@pytest.mark.parametrize("max_length", [2, 3, 7, 10])
def test_split_loses_no_token(tmp_path: Path, max_length: int) -> None:
    lengths = [5, 10, 11, 20, 21, 22, 101]
    raw = texts(*lengths)
    rows = load(tmp_path, raw, max_length=max_length, format=Text(), on_long="split")
    for line, (row, length) in enumerate(zip(raw, lengths, strict=True), 1):
        pieces = [rows[i] for i in range(len(rows)) if rows.place(i).line == line]
        whole = [*ENCODER.tokenizer(row["text"]).input_ids, END]
        assert np.concatenate([piece.ids for piece in pieces]).tolist() == whole
        assert all(np.concatenate([piece.trained for piece in pieces]))
        assert len(pieces) == -(-length // max_length)
        sizes = [len(piece.ids) for piece in pieces]
        assert max(sizes) <= max_length
        assert max(sizes) - min(sizes) <= 1
        if max_length > 2:
            assert all(piece.count() for piece in pieces)
    long = sum(length > max_length for length in lengths)
    assert (rows.counts.split, rows.counts.read, rows.counts.kept, rows.counts.dropped) == (long, 7, 7, 0)
    assert rows.counts.tokens == sum(lengths)


@pytest.mark.parametrize("on_long", ["drop", "truncate", "split"])
@pytest.mark.parametrize("format_", [Chat(), Text()], ids=["chat", "text"])
def test_read_is_kept_and_dropped(tmp_path: Path, on_long: str, format_: Any) -> None:
    raw = tiny.chats(60) if format_.type == "chat" else texts(*range(2, 62))
    for max_length in (30, 50, 80):
        rows = load(tmp_path, raw, max_length=max_length, format=format_, on_long=on_long)
        counts = rows.counts
        assert counts.read == counts.kept + counts.dropped == 60
        assert len({place.line for place in places(rows)}) == counts.kept
        assert rows.lengths.max() <= max_length
        assert all(rows[i].count() for i in range(len(rows)))
        assert len(counts.first) == min(5, counts.dropped + counts.truncated + counts.split)


def test_no_rows_left_is_an_error(tmp_path: Path) -> None:
    message = refused(tmp_path, texts(20, 30), max_length=10, format=Text(), on_long="drop")
    assert message == (
        "rows.jsonl:1: 20 tokens, dropped\nrows.jsonl:2: 30 tokens, dropped\nrows.jsonl: no rows left: 2 read, 2 lost"
    )
    message = refused(tmp_path, [{"text": 1}], format=Text(), on_bad_row="skip", max_lost=1.0)
    assert message.startswith("rows.jsonl:1: `text` must be a string, given a number\n"), "why they are lost"
    assert refused(tmp_path, []) == "rows.jsonl: no rows left: 0 read, 0 lost"


def test_progress_and_weights_of_several_sources(tmp_path: Path) -> None:
    sources = []
    for name, number, weight in (("a", 300, 1.0), ("b", 300, 0.5)):
        path = tiny.write_jsonl(tmp_path / f"{name}.jsonl", texts(*[4] * number))
        sources.append(Source(path=str(path), weight=weight))
    told: list[tuple[int, float]] = []
    rows = dataset.load(sources, Data(train=tuple(sources), format=Text()), ENCODER, lambda *now: told.append(now))
    assert told == [(300, 0.5), (600, 1.0)]
    assert rows.weights.tolist() == [1.0] * 300 + [0.5] * 300
    assert [Path(place.source).name for place in places(rows)] == ["a.jsonl"] * 300 + ["b.jsonl"] * 300


@pytest.mark.parametrize(("number", "fraction", "held"), [(100, 0.1, 10), (7, 0.5, 4), (5, 0.01, 1), (2, 0.99, 1)])
def test_hold_out(tmp_path: Path, number: int, fraction: float, held: int) -> None:
    rows = made(tmp_path, np.arange(2, number + 2))
    train, test = dataset.hold_out(rows, fraction, seed=3)
    chosen = [place.line for place in places(test)]
    rest = [place.line for place in places(train)]
    assert len(chosen) == held
    assert sorted(chosen + rest) == list(range(1, number + 1))
    assert (rest, chosen) == (sorted(rest), sorted(chosen))
    again = dataset.hold_out(rows, fraction, seed=3)[1]
    assert [place.line for place in places(again)] == chosen
    assert train.counts.tokens == train.lengths.sum()
    assert test.counts.trained_tokens == (test.lengths - 1).sum()
    if number == 100:
        assert [p.line for p in places(dataset.hold_out(rows, fraction, seed=4)[1])] != chosen


def test_pieces_of_one_row_are_held_out_together(tmp_path: Path) -> None:
    rows = made(tmp_path, [5] * 12, [index // 3 for index in range(12)])  # four rows in three pieces each
    train, test = dataset.hold_out(rows, 0.25, seed=1)
    assert (len(train), len(test)) == (9, 3)
    assert not set(train.contents) & set(test.contents)
    assert (train.counts.held_out, test.counts.kept) == (1, 1)


def test_hold_out_needs_two_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs at least two rows"):
        dataset.hold_out(made(tmp_path, [5]), 0.5, 0)


# ---------------------------------------------------------------- order and batches

LENGTHS = np.random.default_rng(0).lognormal(4, 0.8, 1000).astype(int) + 2
ONES = np.ones(len(LENGTHS))


def plain(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_an_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    once = plain(batches.epoch_order(LENGTHS, ONES, 8, seed=1, epoch=2))
    np.random.seed(5)
    assert plain(batches.epoch_order(LENGTHS, ONES, 8, seed=1, epoch=2)) == once
    assert plain(batches.epoch_order(LENGTHS, ONES, 8, seed=1, epoch=3)) != once
    assert plain(batches.epoch_order(LENGTHS, ONES, 8, seed=2, epoch=2)) != once


@pytest.mark.parametrize("batch_size", [1, 7, 16, 5000])
def test_every_row_once_per_epoch(batch_size: int) -> None:
    found = batches.epoch_order(LENGTHS, ONES, batch_size, 0, 0)
    assert sorted(np.concatenate(found)) == list(range(1000))
    assert len(found) == -(-1000 // batch_size)
    assert sorted(map(len, found))[1:] == [batch_size] * (len(found) - 1)
    for batch in found:
        assert all(LENGTHS[a] >= LENGTHS[b] for a, b in pairwise(batch))


def test_rows_are_seen_as_often_as_their_weight_says() -> None:
    weights = np.repeat([0.5, 1.0, 2.5], [200, 300, 100])
    epochs = 40
    seen = np.zeros(600, int)
    for epoch in range(epochs):
        shown = Counter(np.concatenate(batches.epoch_order(LENGTHS[:600], weights, 16, 0, epoch)).tolist())
        per_epoch = np.array([shown[i] for i in range(600)])
        assert per_epoch[:200].sum() == 100
        assert set(per_epoch[:200]) == {0, 1}
        assert (per_epoch[200:500] == 1).all()
        assert per_epoch[500:].sum() == 250
        assert set(per_epoch[500:]) == {2, 3}
        assert per_epoch.sum() == batches.samples_per_epoch(weights) == 650
        seen += per_epoch
    assert (
        abs(seen / epochs - weights) < 0.45
    ).all()  # over the epochs every row has its turn: 5.7 standard deviations


def test_a_source_of_small_weight_is_still_seen() -> None:
    weights = np.array([0.1, 0.1])
    assert batches.samples_per_epoch(weights) == 1
    assert [len(batch) for batch in batches.epoch_order(np.array([3, 3]), weights, 4, 0, 0)] == [1]


def test_batches_pad_little() -> None:
    def padding(batches: list[np.ndarray]) -> float:
        return 1 - LENGTHS.sum() / sum(LENGTHS[batch].max() * len(batch) for batch in batches)

    shuffled = np.random.default_rng(1).permutation(1000)
    random = padding([shuffled[i : i + 8] for i in range(0, 1000, 8)])
    assert random > 0.4
    assert padding(batches.epoch_order(LENGTHS, ONES, 8, 0, 0)) < random / 3


def numbers(batch: batches.Batch) -> list[int]:
    return [int(row.ids[0]) for part in batch.micro for sample in part for row in sample.rows]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_processes_share_a_batch(tmp_path: Path, world: int) -> None:
    rows = made(tmp_path, LENGTHS[:50])
    one = list(batches.batches(rows, 8, 8, 0, 20))
    parts = [list(batches.batches(rows, 8, 2, 0, 20, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(one):
        shares = [part[step] for part in parts]
        learned = [n for share in shares for n in numbers_learned(share)]
        assert sorted(learned) == sorted(numbers(batch))
        assert all(share.micro for share in shares)  # a process without rows would leave the others waiting
        assert {(share.samples, share.epoch) for share in shares} == {(batch.samples, batch.epoch)}


def numbers_learned(batch: batches.Batch) -> list[int]:
    return [int(row.ids[0]) for part in batch.micro for sample in part for row in sample.rows if row.count()]


@pytest.mark.parametrize("micro", [1, 3, "auto"])
def test_micro_batches_dont_change_a_batch(tmp_path: Path, micro: int | str) -> None:
    rows = made(tmp_path, LENGTHS[:50])
    straight = [numbers(batch) for batch in batches.batches(rows, 8, 8, 0, 20)]
    assert [numbers(batch) for batch in batches.batches(rows, 8, micro, 0, 20)] == straight
    if isinstance(micro, int):
        assert all(len(p) <= micro for b in batches.batches(rows, 8, micro, 0, 20) for p in b.micro)


def test_a_resumed_run_sees_the_same_batches(tmp_path: Path) -> None:
    rows = made(tmp_path, LENGTHS[:50], weights=[1.0] * 30 + [2.5] * 20)
    straight = [(numbers(b), b.epoch) for b in batches.batches(rows, 8, 2, 5, 40)]
    assert len(straight) == 40
    for start in (0, 1, 7, 10, 11, 39, 40):
        assert [(numbers(b), b.epoch) for b in batches.batches(rows, 8, 2, 5, 40, start)] == straight[start:]
    assert straight[9][1] == 1.0  # 30 + 50 rows are 10 steps of 8
    assert sorted(n for batch, _ in straight[:10] for n in batch) == sorted(
        [*range(30), *[*range(30, 50)] * 2, *extra(straight)]
    )


def extra(straight: list[tuple[list[int], float]]) -> list[int]:
    """Return the ten rows of weight 2.5 that the first epoch showed a third time."""
    shown = Counter(n for batch, _ in straight[:10] for n in batch)
    third = [n for n in range(30, 50) if shown[n] == 3]
    assert len(third) == 10
    return third


@pytest.mark.parametrize("budget", [1, 50, 400, 10**6])
def test_micro_batches_of_so_many_tokens(tmp_path: Path, budget: int) -> None:
    rows = made(tmp_path, LENGTHS[:100])
    longest_first = sorted((rows.sample(i) for i in range(100)), key=lambda sample: -sample.tokens)
    parts = batches.split(longest_first, "auto", budget)
    assert [sample for part in parts for sample in part] == longest_first
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        longest = part[0].tokens
        assert len(part) * longest <= budget or len(part) == 1
        if after is not None:  # and one more would have been too many
            assert (len(part) + 1) * longest > budget


def test_an_evaluation_sees_every_row_once(tmp_path: Path) -> None:
    rows = made(tmp_path, LENGTHS[:60])
    parts = batches.in_length_order(rows, "auto", 4096)
    seen = [int(sample.rows[0].ids[0]) for part in parts for sample in part]
    assert sorted(seen) == list(range(60))
    assert all(LENGTHS[a] >= LENGTHS[b] for a, b in pairwise(seen))
    assert [len(part) for part in batches.in_length_order(rows, 25, 4096)] == [25, 25, 10]


# ---------------------------------------------------------------- the ledger


def lines(rows: Rows, folder: Path) -> list[dict[str, Any]]:
    rows.append_ledger(folder / "ledger.jsonl")
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_row_read_has_its_line(tmp_path: Path) -> None:
    raw = [*texts(5, 11), {"tex": "bad"}, *texts(7), {"text": "aaaa"}, *texts(40)]
    rows = load(tmp_path, raw, max_length=10, format=Text(), on_long="drop", on_bad_row="skip", duplicates="drop")
    found = lines(rows, tmp_path)
    assert [line["fate"] for line in found] == ["kept", "dropped", "skipped", "kept", "duplicate", "dropped"]
    assert [line["place"].rpartition(":")[2] for line in found] == list("123456")
    assert [line.get("lost", 0) for line in found] == [0, 11, 0, 0, 5, 40]
    counts = rows.counts
    assert (counts.read, counts.kept, counts.dropped, counts.skipped, counts.deduplicated) == (6, 2, 2, 1, 1)
    assert counts.lost_tokens == 56
    assert all("reason" in line for line in found if line["fate"] != "kept")


def test_more_lost_than_allowed_is_an_error(tmp_path: Path) -> None:
    raw = [*texts(*[5 + i % 3 for i in range(98)]), *texts(11, 12)]
    refusal = refused(tmp_path, raw, max_length=10, format=Text(), on_long="drop", max_lost=0.01)
    assert refusal == "\n".join(
        [
            "rows.jsonl:99: 11 tokens, dropped",
            "rows.jsonl:100: 12 tokens, dropped",
            "2 of 100 rows would be lost (2.0%); `data.max_lost` allows 1.0%",
            "  fix them, raise data.max_length, or accept it with data.max_lost: 0.025",
        ]
    )
    kept = load(tmp_path, raw, max_length=10, format=Text(), on_long="drop", max_lost=0.02)
    assert len(kept) == 98


def test_three_hundred_of_a_thousand(tmp_path: Path) -> None:
    """Rows whose prompt alone fills the length: an error that counts them, or exactly so many dropped."""
    raw = [{"prompt": "p" * (99 if i % 10 < 3 else 20), "completion": f"answer {i}"} for i in range(1000)]
    refusal = refused(tmp_path, raw, max_length=100, format=Completion()).splitlines()
    assert len(refusal) == 7
    assert refusal[0].startswith("rows.jsonl:1: ")
    assert refusal[5] == "300 of 1,000 rows are longer than `data.max_length` (100 tokens)"
    rows = load(tmp_path, raw, max_length=100, format=Completion(), on_long="drop")
    assert (rows.counts.dropped, rows.counts.kept) == (300, 700)
    assert rows.counts.trained_tokens == sum(len(f"answer {i}") + 1 for i in range(1000) if i % 10 >= 3)


def test_rows_of_both_sets_are_an_error(tmp_path: Path) -> None:
    tiny.write_jsonl(tmp_path / "train.jsonl", texts(5, 6, 7))
    tiny.write_jsonl(tmp_path / "eval.jsonl", [*texts(9), {"text": "b" * 5}])
    base = {"model": {"base": "some/model"}, "output": "run"}
    section = {"train": "train.jsonl", "eval": "eval.jsonl", "format": "text"}

    def loaded(**more: str) -> recipe.Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({**base, "data": {**section, **more}}), encoding="utf-8")
        return recipe.load(path)

    with pytest.raises(DataError) as caught:
        dataset.of(loaded().data, 0, ENCODER)
    assert str(caught.value).replace(f"{tmp_path}/", "") == "\n".join(
        [
            "eval.jsonl:2: is also a training row: train.jsonl:2",
            "1 of 2 eval rows are also training rows: the eval loss would be too low",
            "  remove them from one of the two, or set data.overlap: allow",
        ]
    )
    assert len(dataset.of(loaded(overlap="allow").data, 0, ENCODER)[1] or []) == 2


def test_twins_are_held_out_together(tmp_path: Path) -> None:
    rows = load(tmp_path, texts(*range(4, 14)) * 2, format=Text())
    assert rows.counts.duplicates == 10
    for seed in range(20):
        train, test = dataset.hold_out(rows, 0.2, seed)
        assert not set(train.contents) & set(test.contents)
        assert (train.counts.held_out, test.counts.read) == (4, 4)
        assert train.counts.read == train.counts.kept + train.counts.held_out


def test_only_the_first_rows_of_a_source(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", texts(5, 6, 7, 8))
    source = Source(path=str(path), max_rows=3)
    rows = dataset.load([source], Data(train=(source,), format=Text()), ENCODER)
    assert rows.lengths.tolist() == [5, 6, 7]
    assert rows.counts.read == 3


def test_formats_are_recognised_row_by_row(tmp_path: Path) -> None:
    raw = [*tiny.chats(3), {"prompt": "a", "completion": "b"}, {"instruction": "do", "output": "done"}, *texts(4)]
    rows = load(tmp_path, raw)
    assert rows.formats == {"chat": 3, "completion": 1, "instruction": 1, "text": 1}
    refusal = refused(tmp_path, [{"chosen": "a", "rejected": "b"}, {"text": "a", "label": 1}, {"x": 1}])
    assert refusal == "\n".join(
        [
            "rows.jsonl:1: `chosen` and `rejected` are preference pairs: `format: preference` reads them, for `objective: dpo`",
            "rows.jsonl:2: `label` marks rows of a classifier; for plain text set `format: text`",
            "rows.jsonl:3: no format has these columns (`x`); set `data.format`",
        ]
    )


# ---------------------------------------------------------------- damaged files

GOOD: list[dict[str, Any]] = [
    {"text": "the cat"},
    {"prompt": "one", "completion": "two"},
    {"instruction": "say", "output": "hello"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ä 😀"}]},
    {"text": "nul \x00 as an escape"},
]
ON_LINES = {  # what is done to a line, and whether it is still a row
    "bad JSON": False,
    "byte order mark": False,
    "bad UTF-8": False,
    "NUL": False,
    "missing key": False,
    "null": False,
    "wrong type": False,
    "very long line": True,
    "empty line": None,
    "duplicate key": False,
}
ON_FILES = ("empty file", "byte order mark", "CRLF", "type change late in the file")


def damaged(rng: random.Random, value: dict[str, Any], defect: str) -> bytes:
    """Return a line with a defect."""
    line = json.dumps(value, ensure_ascii=False).encode()
    last = list(value)[-1]
    if defect == "bad JSON":
        return rng.choice([line[:-1], line + b"}", line.replace(b":", b"", 1), b"[" * 3000, b"nope", b'"text"', b"{]"])
    if defect == "byte order mark":
        return b"\xef\xbb\xbf" + line
    if defect == "bad UTF-8":
        return line.replace(b'"}', rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"]) + b'"}', 1)
    if defect == "NUL":
        return rng.choice([line.replace(b'": "', b'": "\x00', 1), b"\x00" * 9, line + b"\x00"])
    if defect == "missing key":
        return json.dumps({key: value[key] for key in value if key != last}).encode()
    if defect == "null":
        return json.dumps({**value, last: None}).encode()
    if defect == "wrong type":
        return json.dumps({**value, last: rng.choice([5, 1.5, True, {"a": 1}, [1], [None], [[]], {}])}).encode()
    if defect == "very long line":
        return json.dumps({"text": "long " * rng.choice([100, 100, 5000])}).encode()
    if defect == "empty line":
        return rng.choice([b"", b"  ", b"\t", b"\x0b"])
    assert defect == "duplicate key"
    return line.replace(b"{", b'{"%s": "first", ' % last.encode(), 1)


def damaged_file(rng: random.Random) -> tuple[bytes, dict[int, bool]]:
    """Return a file with defects, and for the number of each line that is not empty whether it holds a row."""
    on_file = {defect for defect in ON_FILES if rng.random() < (0.03 if defect == "empty file" else 0.25)}
    if "empty file" in on_file:
        return rng.choice([b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n\r\n"]), {}
    lines, wanted = [], {}
    number = rng.randint(1, 12)
    for at in range(1, number + 1):
        value = rng.choice(GOOD)
        state: bool | None = True
        line = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
        if "type change late in the file" in on_file and at > 0.7 * number:
            line, state = damaged(rng, value, "wrong type"), False
        elif rng.random() < 0.4:
            defect = rng.choice(list(ON_LINES))
            line, state = damaged(rng, value, defect), ON_LINES[defect]
            if defect == "byte order mark" and at == 1:
                state = "byte order mark" not in on_file  # one is no part of the data
        lines.append(line)
        if state is not None:
            wanted[at] = state
    end = b"\r\n" if "CRLF" in on_file else b"\n"
    content = end.join(lines) + (end if rng.random() < 0.7 else b"")
    return (b"\xef\xbb\xbf" if "byte order mark" in on_file else b"") + content, wanted


@pytest.mark.parametrize("number", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_are_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Rows or a DataError, and for every line that holds something a line in the ledger."""
    ledgers: list[Ledger] = []
    books: list[io.StringIO] = []

    def ledger(name: str, lines: Any) -> Ledger:
        books.append(io.StringIO())
        ledgers.append(Ledger(name, books[-1]))
        return ledgers[-1]

    monkeypatch.setattr(dataset, "Ledger", ledger)
    rng = random.Random(11)
    path = tmp_path / "a.jsonl"
    source = Source(path=str(path))
    sections = [
        Data(train=(source,), max_length=100, max_lost=1.0, on_bad_row="skip", on_long=on_long, duplicates=duplicates)
        for on_long in ("error", "drop", "truncate")
        for duplicates in ("keep", "drop")
    ] + [Data(train=(source,), max_length=100, max_lost=1.0, on_bad_row="skip", on_long="split", format=Text())]
    fates: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for _ in range(number):
        content, wanted = damaged_file(rng)
        path.write_bytes(content)
        section = rng.choice(sections)
        ledgers.clear()
        books.clear()
        try:
            rows = dataset.load([source], section, ENCODER)
        except DataError:
            counts = ledgers[0].counts
            assert counts.kept == 0 or counts.refused
            ends["DataError"] += 1
        else:
            if rows.cached:  # the same damage on the same line as in an earlier file
                continue
            assert rows.counts.refused == 0
            counts = rows.counts
            ends["Rows"] += 1
            if len(set(rows.contents.tolist())) > 1 and rng.random() < 0.3:
                rest, out = dataset.hold_out(rows, 0.3, seed=1)
                counts = rest.counts
                assert out.counts.read == out.counts.kept == counts.held_out > 0
                ends["held out"] += 1
        assert counts.read == (
            counts.kept + counts.dropped + counts.skipped + counts.deduplicated + counts.refused + counts.held_out
        )
        found = [json.loads(line) for line in books[0].getvalue().splitlines()]
        assert len(ledgers) == 1
        assert len(found) == counts.read
        assert [int(line["place"].rpartition(":")[2]) for line in found] == list(wanted)
        fates.update(line["fate"] for line in found)
        if section.format.type != "auto":  # of the good rows only those of plain text are
            continue
        assert [line["fate"] != "skipped" for line in found] == list(wanted.values())
    print(f"\n{number:,} files: {dict(ends)}; rows: {dict(fates)}")
    assert set(fates) == {"kept", "skipped", "dropped", "duplicate", "refused", "cut", "split"}
    assert min(*fates.values(), *ends.values()) > number / 50
