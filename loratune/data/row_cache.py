"""Cache of tokenized rows: Arrow files that are memory-mapped, not loaded.

A folder has `rows.arrow`, `ledger.jsonl`, and `about.json` with digests of all three. It is written under a temporary
name, flushed to the disk and renamed, so that it is complete or does not exist. Its name is a hash of everything that
its content depends on.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from xxhash import xxh3_128

from loratune.data.encode import Row
from loratune.errors import Place, Problem, StorageError
from loratune.system import files

BATCH = 1 << 20  # tokens of an Arrow batch
_FILES = ("rows.arrow", "ledger.jsonl")
_NAME = re.compile(r"[0-9a-f]{32}|\.[a-z0-9_]{8}")  # a hash, or a name of `mkdtemp`
UNUSED = 30 * 86400  # seconds after which an unused folder is deleted
_SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.bool_()),
        "length": pa.int32(),
        "count": pa.int32(),  # label tokens
        "labels": pa.list_(pa.float32()),
        "weight": pa.float64(),  # how often the row occurs per epoch
        "content": pa.int64(),  # the same for rows with the same content
        "record": pa.int64(),  # index of the row that was read: pieces of one share it
        "source": pa.string(),
        "line": pa.int32(),
    }
)


class Writer:
    """Write rows to a temporary folder of the cache.

    Args:
        parent: the cache.
        passing: whether the folder is temporary: it is deleted when no longer used, and `parent` is not tidied.

    Raises:
        StorageError: when it can't be written.
    """

    def __init__(self, parent: Path, passing: bool = False):
        with writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            if not passing:
                _tidy(parent)
            self.folder = Path(tempfile.mkdtemp(prefix="loratune-rows-" if passing else ".", dir=parent))
            self.ledger = (self.folder / "ledger.jsonl").open("w", encoding="utf-8")
            self._file = pa.OSFile(str(self.folder / "rows.arrow"), "wb")
            self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._waiting: list[tuple[Row, float, int, int]] = []
        self._tokens = 0

    def add(self, row: Row, weight: float, content: int, record: int) -> None:
        """Add a row; see the schema."""
        self._waiting.append((row, weight, content, record))
        self._tokens += len(row.ids)
        if self._tokens >= BATCH:
            self._flush()

    def _flush(self) -> None:
        rows, weights, contents, records = zip(*self._waiting, strict=True) if self._waiting else ((),) * 4
        lengths = np.array([len(row.ids) for row in rows], dtype=np.int32)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        ids = np.concatenate([np.empty(0, np.int32), *(row.ids for row in rows)])
        trained = np.concatenate([np.empty(0, bool), *(row.trained for row in rows)])
        columns = [
            pa.ListArray.from_arrays(offsets, pa.array(ids)),
            pa.ListArray.from_arrays(offsets, pa.array(trained)),
            pa.array(lengths),
            pa.array([row.count() for row in rows], pa.int32()),
            pa.array([row.labels for row in rows], pa.list_(pa.float32())),
            pa.array(weights, pa.float64()),
            pa.array(contents, pa.int64()),
            pa.array(records, pa.int64()),
            pa.array([row.place.source for row in rows], pa.string()),
            pa.array([row.place.line for row in rows], pa.int32()),
        ]
        with writing(self.folder):
            self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._waiting, self._tokens = [], 0

    def commit(self, about: dict[str, Any], name: str | None) -> Store:
        """Finish the folder, give it its name (None: it is deleted when no longer used) and open it."""
        self._flush()
        with writing(self.folder):
            self._close()
            about = {**about, "digests": {file: _digest(self.folder / file) for file in _FILES}}
            about["seal"] = _seal(about)
            (self.folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
            if name is None:
                return Store(self.folder, passing=True)
            for file in self.folder.iterdir():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            target = self.folder.parent / name
            if target.exists() and not _is_whole(target):
                _remove(target)
            if not target.exists():  # else another process was faster
                self.folder.rename(target)
        _remove(self.folder)
        return Store(target)

    def discard(self) -> None:
        """Delete the folder; write errors no longer matter."""
        with suppress(OSError):
            self._close()
        _remove(self.folder)

    def _close(self) -> None:
        if not self._file.closed:
            self._writer.close()
            self._file.close()
            self.ledger.close()


class Store:
    """The rows of a folder, memory-mapped.

    Attributes:
        about: metadata written with the rows.
        ledger: the file with a line for each row that was read.
        lengths, trained, weights, contents, records: columns of the schema (`trained`: `count`), each of shape (rows,).
    """

    def __init__(self, folder: Path, passing: bool = False):
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.ledger = folder / "ledger.jsonl"
        file = folder / "rows.arrow"
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        self._batches = [_Batch(batch) for batch in table.to_batches()]
        self._starts = np.cumsum([0, *(len(batch) for batch in self._batches)])
        columns: list[np.ndarray] = [
            _numbers(table.column(name).combine_chunks()) for name in ("length", "count", "weight", "content", "record")
        ]
        self.lengths, self.trained, self.weights, self.contents, self.records = columns
        if passing:
            weakref.finalize(self, _remove, folder)

    def row(self, number: int) -> Row:
        """Return a row, as a writable copy."""
        batch, index = self._where(number)
        return batch.row(index)

    def place(self, number: int) -> Place:
        """Return where a row came from."""
        batch, index = self._where(number)
        return batch.place(index)

    @cached_property
    def digest(self) -> str:
        """A hash (hex) of ids, label tokens and labels of all rows, in order; not of where they came from."""
        digest = xxh3_128()
        for batch in self._batches:
            batch.add_to(digest)
        return digest.hexdigest()

    @property
    def used(self) -> np.ndarray:
        """The different token ids of all rows, ascending."""
        return np.unique(np.concatenate([np.empty(0, np.int32), *(batch.used for batch in self._batches)]))

    @property
    def largest(self) -> int:
        """The largest token id."""
        return max((batch.largest for batch in self._batches), default=0)

    @property
    def first_labels(self) -> np.ndarray:
        """The first label of each row, float32, (rows,); NaN for a row without one."""
        return np.concatenate([np.empty(0, np.float32), *(batch.first_labels for batch in self._batches)])

    def tails(self, width: int) -> dict[tuple[int, ...], int]:
        """Return the different last `width` trained tokens of rows, each with the number of rows that end with them.

        They are those of the last trained span, padded with -1 on the left if it is shorter.
        """
        found: dict[tuple[int, ...], int] = {}
        for batch in self._batches:
            tails, numbers = np.unique(batch.tails(width), axis=0, return_counts=True)
            for tail, number in zip(tails.tolist(), numbers.tolist(), strict=True):
                found[tuple(tail)] = found.get(tuple(tail), 0) + number
        return found

    def _where(self, number: int) -> tuple[_Batch, int]:
        batch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._batches[batch], number - int(self._starts[batch])


class _Batch:
    def __init__(self, batch: pa.RecordBatch):
        ids = batch.column("ids")
        self._offsets = _numbers(ids.offsets)
        self._ids = _numbers(ids.values)
        trained = batch.column("trained").values
        self._bits, self._first_bit = np.frombuffer(trained.buffers()[1] or b"", np.uint8), trained.offset
        labels = batch.column("labels")
        self._label_offsets, self._labels = _numbers(labels.offsets), _numbers(labels.values)
        self._source, self._line = batch.column("source"), batch.column("line")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, index: int) -> Row:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        trained = self._trained(start, end)
        labels = self._labels[self._label_offsets[index] : self._label_offsets[index + 1]].copy()
        return Row(self._ids[start:end].copy(), trained, self.place(index), labels)

    def tails(self, width: int) -> np.ndarray:
        """Return the last tokens of each row's last trained span, shape (rows with one, width); see `Store.tails`."""
        first, past = int(self._offsets[0]), int(self._offsets[-1])
        trained = self._trained(first, past)
        places = np.flatnonzero(trained) + first
        after = np.searchsorted(places, self._offsets[1:])  # number of trained tokens before the end of each row
        some = after > np.searchsorted(places, self._offsets[:-1])
        last, begin = places[after[some] - 1], self._offsets[:-1][some]
        back = last[:, None] - np.arange(width)[::-1]  # (rows, width)
        inside = (back >= begin[:, None]) & trained[np.maximum(back - first, 0)]
        inside = np.logical_and.accumulate(inside[:, ::-1], axis=1)[:, ::-1]
        return np.where(inside, self._ids[np.maximum(back, 0)], -1)

    @property
    def largest(self) -> int:
        return int(self._ids.max(initial=0))

    @property
    def used(self) -> np.ndarray:
        return np.unique(self._ids[self._offsets[0] : self._offsets[-1]])

    def add_to(self, digest: xxh3_128) -> None:
        """Add the content of all rows to a hash; each is preceded by its lengths."""
        first, past = int(self._offsets[0]), int(self._offsets[-1])
        labels = self._labels[self._label_offsets[0] : self._label_offsets[-1]]
        for part in (self._offsets - first, self._ids[first:past], self._trained(first, past),
                     self._label_offsets - self._label_offsets[0], labels):  # fmt: skip
            digest.update(np.ascontiguousarray(part).tobytes())

    def _trained(self, first: int, past: int) -> np.ndarray:
        """Return which tokens from `first` to before `past` are label tokens, (tokens,)."""
        start, end = first + self._first_bit, past + self._first_bit
        bits = np.unpackbits(self._bits[start >> 3 : -(-end >> 3)], bitorder="little")
        return bits[start & 7 : (start & 7) + past - first].view(np.bool_)

    @property
    def first_labels(self) -> np.ndarray:
        begins, some = self._label_offsets[:-1], np.diff(self._label_offsets) > 0
        found = np.full(len(self), np.nan, dtype=np.float32)
        found[some] = self._labels[begins[some]]
        return found

    def place(self, index: int) -> Place:
        return Place(self._source[index].as_py(), self._line[index].as_py())


def _numbers(array: pa.Array) -> np.ndarray:
    """Return an array as NumPy without a copy; `to_numpy` would import pandas."""
    return np.from_dlpack(array)


def find(parent: Path, name: str) -> Store | None:
    """Return the rows of that name, or None if there are none; record that they are in use.

    Raises:
        Damaged: when they are not as they were written.
    """
    folder = parent / name
    if not folder.exists():
        return None
    if not _is_whole(folder):
        raise Damaged(str(folder))
    with suppress(OSError):
        os.utime(folder / "about.json")
    return Store(folder)


class Damaged(Exception):
    """Rows in the cache that are not as they were written."""


def _is_whole(folder: Path) -> bool:
    """Return whether a folder has exactly what was written to it; every byte is read."""
    try:
        about = json.loads(files.text(folder / "about.json"))
        seal = about.pop("seal")
        return bool(_seal(about) == seal and all(_digest(folder / file) == about["digests"][file] for file in _FILES))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _seal(about: dict[str, Any]) -> str:
    return xxh3_128(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _digest(file: Path) -> str:
    digest = xxh3_128()
    with files.opened(file) as stream:
        while part := stream.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


def _tidy(parent: Path) -> None:
    """Delete folders unused for a month, and what a killed process left a day ago; other names are kept."""
    for folder in parent.iterdir():
        if folder.is_symlink() or not folder.is_dir() or not _NAME.fullmatch(folder.name):
            continue
        used = folder / "about.json"
        age = time.time() - (used if used.exists() else folder).stat().st_mtime
        if age > (86400 if folder.name.startswith(".") else UNUSED):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Delete the files of a folder of rows, and the folder if nothing else is in it."""
    with suppress(OSError):
        for name in (*_FILES, "about.json"):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError of writing into a StorageError."""
    try:
        yield
    except OSError as error:
        hint = "tokenized rows are cached there; set another folder with $LORATUNE_CACHE"
        raise StorageError(Problem(f"can't be written: {error.strerror or error}", Place(str(folder)), hint)) from None
