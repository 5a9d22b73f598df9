"""Rows out of files and hub data sets, each with the place it stands at."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.errors import DataError, Place, Problem, listed
from loratune.formats.base import key_twice, why_no_json
from loratune.recipe import SUFFIXES, Source


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, and where: `value` is None when the line holds no row (`problem` says why)."""

    place: Place
    value: dict[str, Any] | None
    problem: str = ""


def read(source: Source) -> Iterator[RawRow]:
    """Yield the rows of a source, in the order of its files' names and lines.

    Raises:
        DataError: when a file can't be read at all, or a hub data set can't be had.
    """
    path = Path(source.path)
    if not path.is_absolute():
        yield from _hub(source)
        return
    for file in files(path):
        try:
            yield from _file(file)
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(Problem(f"can't be read: {reason}", Place(str(file)))) from None


def files(path: Path) -> list[Path]:
    """Return the data files a path, folder or glob stands for, sorted by name.

    Raises:
        DataError: when there are none.
    """
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.is_file() and _suffix(f) in SUFFIXES)
        if not found:
            raise DataError(
                Problem(f"no data in this folder; files end in {listed(SUFFIXES)} (also .gz)", Place(str(path)))
            )
        return found
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise DataError(
                Problem(f"unknown kind of file; files end in {listed(SUFFIXES)} (also .gz)", Place(str(path)))
            )
        return [path]
    found = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
    if not found:
        raise DataError(Problem("no such data", Place(str(path))))
    return [f for match in found for f in files(match)]


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _file(path: Path) -> Iterator[RawRow]:
    kind = _suffix(path)
    name = str(path)
    if kind == ".parquet":
        yield from _parquet(io.BytesIO(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path, name)
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        if kind == ".jsonl":
            for number, raw in enumerate(stream, 1):
                line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if line.strip():
                    yield _json_line(line, Place(name, number))
        elif kind == ".json":
            yield from _json(stream.read(), name)
        else:
            text = _utf8(stream.read(), name)
            if kind == ".csv":
                yield from _csv(text, name)
            else:
                yield RawRow(Place(name), {"text": text})


def _utf8(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(Problem("not UTF-8", Place(name, line), "save it as UTF-8")) from None


def _json_line(line: bytes, place: Place) -> RawRow:
    keys = _Keys()
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=keys)  # given bytes, it would guess at UTF-16
    except UnicodeDecodeError:
        return RawRow(place, None, "not UTF-8")
    except (ValueError, RecursionError) as error:
        return RawRow(place, None, f"no JSON: {why_no_json(error)}")
    return _object(value, place, keys)


class _Keys:
    """Reads JSON objects, and remembers those that name a key twice: `json` keeps the last of the two in silence."""

    def __init__(self) -> None:
        self._twice: list[tuple[dict[str, Any], str]] = []  # with the objects, so that no other takes their id

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if (key := key_twice(pairs)) is not None:
            self._twice.append((value, key))
        return value

    def twice(self, value: Any) -> str | None:
        """Return a key that stands twice in an object of a row, or None."""
        if not self._twice:
            return None
        known = {id(one): key for one, key in self._twice}
        left = [value]
        while left:
            one = left.pop()
            if id(one) in known:
                return known[id(one)]
            if isinstance(one, dict | list):
                left += one.values() if isinstance(one, dict) else one
        return None


def _object(value: Any, place: Place, keys: _Keys) -> RawRow:
    if (key := keys.twice(value)) is not None:
        return RawRow(place, None, f"`{key}` is given twice in one object")
    if not isinstance(value, dict):
        return RawRow(place, None, 'a row must be a JSON object, such as {"messages": [...]}')
    return RawRow(place, value)


def _json(raw: bytes, name: str) -> Iterator[RawRow]:
    text = _utf8(raw, name)
    keys = _Keys()
    try:
        values = json.loads(text, object_pairs_hook=keys)
    except (ValueError, RecursionError) as error:
        place = Place(name, error.lineno if isinstance(error, json.JSONDecodeError) else 0)
        hint = "a file with one JSON object per line ends in .jsonl"
        raise DataError(Problem(f"no JSON: {why_no_json(error)}", place, hint)) from None
    if not isinstance(values, list):
        raise DataError(Problem("a .json file must hold a list of objects", Place(name)))
    for number, value in enumerate(values, 1):
        yield _object(value, Place(f"{name} row {number}"), keys)


def _csv(text: str, name: str) -> Iterator[RawRow]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)  # else an open quote swallows the rest of the file
    columns: list[str] = []
    line = 1
    try:
        for cells in reader:
            place, line = Place(name, line), reader.line_num + 1  # a row ends below its start where a cell holds lines
            if not cells:
                continue
            if not columns:
                columns = cells
            elif len(cells) != len(columns):
                what = "more" if len(cells) > len(columns) else "fewer"
                yield RawRow(place, None, f"{what} cells than the {len(columns)} columns")
            else:
                yield RawRow(place, dict(zip(columns, cells, strict=True)))
    except csv.Error as error:
        raise DataError(Problem(f"no CSV: {error}", Place(name, line))) from None


def _parquet(file: Path | io.BytesIO, name: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(file).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield RawRow(Place(f"{name} row {number}"), value)
    except UnicodeDecodeError:
        raise DataError(Problem("not UTF-8", Place(f"{name} row {number + 1} or later"))) from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError(Problem(f"no parquet: {reason.splitlines()[0]}", Place(name))) from None


def _hub(source: Source) -> Iterator[RawRow]:
    import datasets

    name = f"{source.path}[{source.split}]"
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the hub client raises dozens of kinds: all mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            Problem(
                f"can't be loaded from the hub: {reason}",
                Place(name),
                "name a local file, folder or glob if that was meant",
            )
        ) from None
    for number, value in enumerate(rows, 1):
        yield RawRow(Place(f"{name} row {number}"), dict(value))
