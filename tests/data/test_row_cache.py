"""Rows kept on disk: found again when nothing has changed, never when anything has, whoever read them."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratune.data import cache_key, dataset, row_cache, row_files, workers
from loratune.data.dataset import Rows
from loratune.data.encode import Encoder
from loratune.data.fast_bpe import Tokens
from loratune.data.formats import Chat, RowError, Text
from loratune.data.section import Data, Source
from loratune.errors import DataError, Place, SetupError, StorageError
from loratune.models import base_files
from loratune.system import limits
from tests import templates, tiny

ENCODER = Encoder(tiny.tokenizer())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own; return the folder rows lie in."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(path=str(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chats(40))))


def load(source: Source, encoder: Encoder = ENCODER, name: str = "train", **section: Any) -> Rows:
    return dataset.load([source], Data(train=(source,), **section), encoder, name=name)


def content(rows: Rows) -> list[tuple[list[int], list[bool], str, float]]:
    found = [(rows[i].ids.tolist(), rows[i].trained.tolist(), str(rows[i].place)) for i in range(len(rows))]
    return [(*row, weight) for row, weight in zip(found, rows.weights.tolist(), strict=True)]


def book(rows: Rows, folder: Path) -> str:
    path = folder / "book.jsonl"
    path.unlink(missing_ok=True)
    rows.append_ledger(path)
    return path.read_text()


def test_the_second_time_nothing_is_read(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(source)
    monkeypatch.setattr(row_files, "blocks", None)
    again = load(source)
    monkeypatch.undo()
    assert (first.cached, again.cached) == (False, True)
    assert content(again) == content(first)
    assert (again.counts, again.formats) == (first.counts, first.formats)
    assert book(again, tmp_path) == book(first, tmp_path)


def test_a_cache_that_can_not_be_written_is_done_without(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = content(load(source))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "passing"))
    (tmp_path / "passing").mkdir()
    found = load(source)
    assert content(found) == kept
    assert "can't be written" in found.unkept
    assert not found.cached
    assert load(source).cached is False
    del found
    gc.collect()  # Python 3.12 keeps it in a cycle
    assert list((tmp_path / "passing").iterdir()) == []


def test_a_change_of_anything_is_seen(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bytes (also where size and time stay), place, rules, tokenizer, template, code and the set's name."""
    load(source)
    path = Path(source.path)
    times = os.stat(path)
    path.write_bytes(path.read_bytes().replace(b"the", b"The", 1))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not load(source).cached
    assert load(source).cached
    for section in (
        {"max_length": 300},
        {"max_length": 60, "on_long": "truncate"},
        {"max_length": 60, "on_long": "drop"},
        {"on_bad_row": "skip"},
        {"duplicates": "drop"},
        {"format": Chat()},
        {"format": Chat(train_on="last")},
    ):
        assert not load(source, **{"max_lost": 1.0, **section}).cached, section
        assert load(source, **{"max_lost": 1.0, **section}).cached, section
    assert not load(source, name="eval").cached
    assert not load(source.model_copy(update={"weight": 2.0})).cached
    assert not load(source.model_copy(update={"max_rows": 7})).cached
    for changed in (
        Encoder(tiny.tokenizer(template=tiny.CHATML + "{# a remark #}")),
        Encoder(tiny.tokenizer(special=("<|im_start|>", "<|im_end|>", "<|more|>"))),
        Encoder(tiny.tokenizer(bos="<|im_start|>")),
    ):
        assert not load(source, changed).cached
    monkeypatch.setattr(cache_key, "_code", lambda: "another release")
    assert not load(source).cached


def test_a_template_that_writes_the_date_is_good_for_a_day(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    dated = Encoder(tiny.tokenizer(template="{{ strftime_now('%d %b %Y') }}\n" + tiny.CHATML))
    assert not load(source, dated).cached
    assert load(source, dated).cached

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date(2100, 1, 1)

    monkeypatch.setattr(cache_key, "date", Tomorrow)
    assert not load(source, dated).cached
    assert load(source) is not None
    assert load(source).cached


def test_the_code_that_decides_is_named() -> None:
    """Every module of ours that a row passes through, as the imports of `prepare` tell."""
    import subprocess
    import sys

    listing = "import sys, loratune.data.prepare; print(*[m for m in sys.modules if m.startswith('loratune.')])"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    passed = {name.removeprefix("loratune.").replace(".", "/") for name in done.stdout.split()}
    # the key holds the tokenizer and its template themselves, so that it does not matter how they were loaded
    no_row = {
        "config",
        "errors",
        "events",
        "redact",
        "models",
        "system",
        "system/child_process",
        "system/paths",
        "system/version",
    }
    others = {name for name in passed if name.split("/")[0] not in ("data", "models")}
    assert others - no_row <= set(cache_key._MODULES)
    assert len(cache_key._code()) == 32


def test_a_lost_share_is_checked_each_time(source: Source) -> None:
    with pytest.raises(DataError, match=r"`data\.max_lost` allows 0\.0%"):
        load(source, max_length=60, on_long="drop", max_lost=0.0)
    kept = load(source, max_length=60, on_long="drop", max_lost=1.0)
    assert load(source, max_length=60, on_long="drop", max_lost=1.0).cached
    with pytest.raises(DataError, match="rows would be lost"):
        load(source, max_length=60, on_long="drop", max_lost=0.0)
    assert kept.counts.dropped > 0


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "no about", "about cut", "wrong bytes"])
def test_a_damaged_folder_is_read_anew(source: Source, cache: Path, damage: str) -> None:
    wanted = content(load(source))
    (folder,) = cache.iterdir()
    file, about = folder / "rows.arrow", folder / "about.json"
    if damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "gone":
        file.unlink()
    elif damage == "no about":
        about.unlink()
    elif damage == "about cut":
        os.truncate(about, 20)
    else:
        size = file.stat().st_size
        file.write_bytes(b"\0" * size)
    again = load(source)
    assert not again.cached
    assert content(again) == wanted
    assert load(source).cached


def test_nothing_is_left_of_a_reading_that_fails(source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError):
        load(source, max_length=20)
    assert list(cache.iterdir()) == []

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset._Account, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        load(source)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_written_to_while_it_is_read(source: Source, cache: Path) -> None:
    def touch(count: int, share: float) -> None:
        os.utime(source.path, ns=(1, 1))

    with pytest.raises(DataError, match="changed while it was read"):
        dataset.load([source], Data(train=(source,)), ENCODER, touch)
    assert list(cache.iterdir()) == []


def test_what_nobody_asks_for_goes_after_a_month(source: Source, tmp_path: Path, cache: Path) -> None:
    load(source)
    (old,) = cache.iterdir()
    left = cache / ".ab_cd123"  # by a killed process
    left.mkdir()
    photos = cache / "photos"  # in a folder that was named as the cache by mistake
    photos.mkdir()
    (photos / "ledger.jsonl").write_text("mine")
    now = time.time()
    os.utime(left, (now, now - 2 * 86400))
    os.utime(photos, (now, now - 99 * 86400))
    os.utime(old / "about.json", (now, now - 29 * 86400))
    other = Source(path=str(tiny.write_jsonl(tmp_path / "b.jsonl", tiny.chats(3, seed=7))))
    load(other)
    assert old.exists()
    assert not left.exists()
    os.utime(old / "about.json", (now, now - 31 * 86400))
    assert load(source).cached  # asked for: it stays
    load(other, max_length=100)
    assert old.exists()
    os.utime(old / "about.json", (now, now - 31 * 86400))
    load(other, max_length=101)
    assert not old.exists()
    assert (photos / "ledger.jsonl").read_text() == "mine"


def test_when_no_folder_can_be_written(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"can't be written: (.*\n)+.*LORATUNE_CACHE"):
        load(source)


@pytest.mark.parametrize("when", ["a line is written", "the files are closed"])
def test_a_disk_that_is_full_in_the_middle(
    source: Source, cache: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    close = row_cache.Writer._close

    def full(*given: Any) -> None:
        if when == "the files are closed":
            close(*given)
        raise OSError(28, "No space left on device")

    if when == "a line is written":
        monkeypatch.setattr(dataset.Ledger, "add", full)
    else:
        monkeypatch.setattr(row_cache.Writer, "_close", full)
    with pytest.raises(StorageError, match="can't be written: No space left on device"):
        load(source)
    assert list(cache.iterdir()) == []


def test_rows_of_a_hub_data_set_that_lies_in_memory(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import datasets

    texts = [{"text": f"row {i}"} for i in range(5)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(texts))
    hub = Source(path="someone/something")
    for _ in range(2):
        found = load(hub, format=Text())
        assert not found.cached
        assert len(found) == 5
        assert len(list(cache.iterdir())) == 1
        del found
        assert list(cache.iterdir()) == []


# ---------------------------------------------------------------- many processes


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any file be large enough for two processes, in many blocks."""
    monkeypatch.setattr(workers, "number", lambda size: 2)
    monkeypatch.setattr(row_files, "BLOCK", 1 << 10)


def mixed() -> list[dict[str, Any]]:
    """Return rows of every fate."""
    raw: list[dict[str, Any]] = [*tiny.chats(120), {"tex": 1}, *tiny.chats(30), {"messages": []}]
    return [*raw, {"messages": [{"role": "user", "content": "a" * 400}, {"role": "assistant", "content": "b"}]}]


def test_processes_read_what_one_reads(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = Source(path=str(tiny.write_jsonl(tmp_path / "rows.jsonl", mixed())), weight=0.5)
    rules = {"max_length": 200, "on_long": "drop", "on_bad_row": "skip", "duplicates": "drop", "max_lost": 1.0}
    alone = load(source, **rules)
    shutil.rmtree(base_files.cache())
    request.getfixturevalue("shared")
    together = load(source, **rules)
    assert not together.cached
    assert content(together) == content(alone)
    assert together.counts == alone.counts
    assert book(together, tmp_path) == book(alone, tmp_path)
    assert alone.counts.deduplicated > 0
    assert (alone.counts.skipped, alone.counts.dropped) == (2, 1)


def test_threads_read_what_one_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the shapes of conversations are forgotten all the time."""
    source = Source(path=str(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chats(400, seed=3))))
    wanted = content(load(source))
    shutil.rmtree(base_files.cache())
    monkeypatch.setattr(row_files, "BLOCK", 1 << 10)
    monkeypatch.setattr(limits, "cores", lambda: 7)
    assert content(load(source)) == wanted


def test_large_data_is_read_by_as_many_processes_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cores", lambda: 6)
    assert (workers.number(workers.SMALL), workers.number(workers.SMALL + 1)) == (1, 6)


def test_processes_render_what_one_renders(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A template of a reasoning model, set on the tokenizer: it must come to the workers."""
    source = Source(path=str(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chats(60))))
    (family,) = (one for one in templates.FAMILIES if one.name == "qwen3")
    thinking = Encoder(family.tokenizer())
    alone = content(load(source, thinking))
    shutil.rmtree(base_files.cache())
    request.getfixturevalue("shared")
    assert content(load(source, thinking)) == alone


def test_a_worker_that_dies_is_told(source: Source, cache: Path, shared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = workers._Worker.ask

    def killed(self: Any, block: row_files.Block) -> Any:
        self.kill()
        return ask(self, block)

    monkeypatch.setattr(workers._Worker, "ask", killed)
    with pytest.raises(SetupError, match=r"ended early \(signal 9\)"):
        load(source)
    assert list(cache.iterdir()) == []


def test_workers_end_when_the_reader_stops(source: Source, shared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[workers._Worker] = []
    begin = workers._Worker.__init__

    def remember(self: Any, *arguments: Any) -> None:
        begin(self, *arguments)
        made.append(self)

    monkeypatch.setattr(workers._Worker, "__init__", remember)
    found = workers.prepared(row_files.blocks(source), Data(train=(source,)), ENCODER, 2)
    next(found)
    found.close()
    assert len(made) == 2
    assert all(worker._process.poll() is not None for worker in made)


# ---------------------------------------------------------------- parts


def test_blocks_hold_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "BLOCK", 64)
    lines = [json.dumps({"text": "x" * (i % 90)}) for i in range(200)]
    lines[20:20] = ["", "  "]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    blocks = list(row_files.blocks(Source(path=str(path))))
    assert len(blocks) > 50
    assert sum(block.size for block in blocks) == path.stat().st_size
    found = [row for block in blocks for row in block.rows()]
    assert [row.place.line for row in found] == [i for i, line in enumerate(lines, 1) if line.strip()]
    assert [row.value for row in found] == [json.loads(line) for line in lines if line.strip()]
    for most in (1, 19, 20, 21, 60):
        some = row_files.read(Source(path=str(path), max_rows=most))
        assert [row.place.line for row in some] == [row.place.line for row in found[:most]]


def test_numbers_seen_before() -> None:
    seen = dataset._Seen()
    numbers = np.random.default_rng(0).integers(0, 100_000, 300_000).tolist()
    known: set[int] = set()
    for number in numbers:
        assert seen.again(number) == (number in known)
        known.add(number)
    assert len(seen._old) > 50_000


def test_rows_are_the_same_from_many_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(path=str(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chats(60))))
    whole = content(load(source))
    shutil.rmtree(base_files.cache())
    monkeypatch.setattr(row_cache, "BATCH", 300)
    parted = load(source)
    assert len(parted.store._batches) > 5
    assert content(parted) == whole
    picked = parted.take(np.array([50, 3, 59]))
    assert content(picked) == [whole[50], whole[3], whole[59]]
    assert picked.counts.tokens == sum(len(row[0]) for row in content(picked))


@pytest.mark.parametrize("family", templates.FAMILIES, ids=lambda family: family.name)
def test_the_quick_way_to_masks_is_the_careful_one(family: templates.Family) -> None:
    """`_at_edges` and the table of words against the library's offsets of every token; they must be used, too."""

    class Careful(Encoder):
        _words = None

        def _at_edges(self, *_: Any) -> None:
            return None

    quick, careful = Encoder(family.tokenizer()), Careful(family.tokenizer())
    examples = [(Chat().read(raw), Place("x", line)) for line, raw in enumerate(family.rows(60, seed=5), 1)]
    used = by_table = 0
    for one, other in zip(quick.batch(examples), careful.batch(examples), strict=True):
        if isinstance(one, RowError) or isinstance(other, RowError):
            assert (type(one), str(one)) == (type(other), str(other))
            continue
        for row, wanted in zip(one, other, strict=True):
            assert row.ids.tolist() == wanted.ids.tolist()
            assert row.trained.tolist() == wanted.trained.tolist()
    for example, _ in examples:
        with contextlib.suppress(RowError):
            draft = quick._draft(example)
            (piece,) = quick._tokenized(draft.texts)
            by_table += isinstance(piece, Tokens)
            used += quick._at_edges(piece, np.array(piece.ids, np.int32), draft.spans, draft.texts[0]) is not None
    assert used > 0 or family.by_turn
    assert by_table > 0 or quick._words is None or family.by_turn
