"""Rows out of files and hub data sets, each with the place it stands at."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.decode import listed
from loratune.errors import DataError, Place, Problem
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
        except (OSError, EOFError) as error:
            raise DataError(Problem(f"can't be read: {error.strerror if isinstance(error, OSError) else error}", Place(str(file)))) from None


def files(path: Path) -> list[Path]:
    """Return the data files a path, folder or glob stands for, sorted by name.

    Raises:
        DataError: when there are none.
    """
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.is_file() and _suffix(f) in SUFFIXES)
        if not found:
            raise DataError(Problem(f"no data in this folder; files end in {listed(SUFFIXES)} (also .gz)", Place(str(path))))
        return found
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise DataError(Problem(f"unknown kind of file; files end in {listed(SUFFIXES)} (also .gz)", Place(str(path))))
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
        yield from _parquet(path)
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
    try:
        value = json.loads(line)
    except UnicodeDecodeError:
        return RawRow(place, None, "not UTF-8")
    except (json.JSONDecodeError, RecursionError) as error:
        return RawRow(place, None, f"no JSON: {error.msg if isinstance(error, json.JSONDecodeError) else 'nested too deep'}")
    return _object(value, place)


def _object(value: Any, place: Place) -> RawRow:
    if not isinstance(value, dict):
        return RawRow(place, None, "a row must be a JSON object, such as {\"messages\": [...]}")
    return RawRow(place, value)


def _json(raw: bytes, name: str) -> Iterator[RawRow]:
    try:
        values = json.loads(_utf8(raw, name))
    except (json.JSONDecodeError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise DataError(
            Problem(f"no JSON: {what}", Place(name, line), "a file with one JSON object per line ends in .jsonl")
        ) from None
    if not isinstance(values, list):
        raise DataError(Problem("a .json file must hold a list of objects", Place(name)))
    for number, value in enumerate(values, 1):
        yield _object(value, Place(f"{name} row {number}"))


def _csv(text: str, name: str) -> Iterator[RawRow]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    line = 2
    for value in reader:
        place, line = Place(name, line), reader.line_num + 1
        if None in value or None in value.values():
            yield RawRow(place, None, f"{'more' if None in value else 'fewer'} cells than the {len(reader.fieldnames or ())} columns")
        else:
            yield RawRow(place, dict(value))


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(path).iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield RawRow(Place(f"{path} row {number}"), value)
    except pa.ArrowInvalid as error:
        raise DataError(Problem(f"no parquet: {str(error).splitlines()[0]}", Place(str(path)))) from None


def _hub(source: Source) -> Iterator[RawRow]:
    import datasets

    name = f"{source.path}[{source.split}]"
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the hub client raises dozens of kinds: all mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            Problem(f"can't be loaded from the hub: {reason}", Place(name), "name a local file, folder or glob if that was meant")
        ) from None
    for number, value in enumerate(rows, 1):
        yield RawRow(Place(f"{name} row {number}"), dict(value))
