"""Rows out of files and hub data sets, each with the place it stands at."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from loratune import files as opening
from loratune import splits
from loratune.errors import DataError, Place, Problem, listed, shorten
from loratune.formats.base import key_twice, why_no_json
from loratune.recipe import SUFFIXES, Source
from loratune.splits import Choice


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, and where: `value` is None when the line holds no row (`problem` says why)."""

    place: Place
    value: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class Block:
    """Some rows of a source, still as lines where they are lines: another process may read them.

    Attributes:
        lines: of a .jsonl file, whole ones.
        place: the file and the number of the first line.
        ready: rows that are read already, of the other kinds of files.
        size: bytes of the file that this is (packed ones of a .gz file).
        weight: of the source.
    """

    lines: bytes = b""
    place: Place | None = None
    ready: tuple[RawRow, ...] = ()
    size: int = 0
    weight: float = 1.0

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows, in order."""
        yield from self.ready
        if self.place is None:
            return
        for number, line in enumerate(io.BytesIO(self.lines), self.place.line):
            if line.strip():
                yield _json_line(line, replace(self.place, line=number))

    def head(self, number: int) -> tuple[Block, int]:
        """Return the block without what is behind its first `number` rows, and how many rows it has then."""
        if self.ready:
            return replace(self, ready=self.ready[:number]), min(number, len(self.ready))
        kept, found = [], 0
        for line in io.BytesIO(self.lines):
            if found == number:
                break
            kept.append(line)
            found += bool(line.strip())
        return replace(self, lines=b"".join(kept)), found


BLOCK = 1 << 18  # bytes of lines read at once: some hundred rows, so that work can be shared out
READY = 256  # rows of a block of the other kinds
LONGEST = 16 << 20  # bytes of a line, which is a row: reading and tokenizing it takes a hundred times as much memory
TEXT = 64 << 20  # bytes of a .txt file, which is one row, too, and has no lists and objects in it
_PAPERS = ("readme", "license", "licence", "notice", "copying", "requirements", "changelog")  # .txt that are no rows
WHOLE = 1 << 30  # bytes, unpacked, of a file that is read whole before its first row is known


def read(source: Source) -> Iterator[RawRow]:
    """Yield the rows of a source, in the order of its files' names and lines; see `blocks`."""
    for block in blocks(source):
        yield from block.rows()


def blocks(source: Source, name: str = "train") -> Iterator[Block]:
    """Yield a source in blocks, in the order of its files' names and lines; no more than `max_rows` rows.

    Args:
        source: of the rows.
        name: of the set of rows; see `chosen`.

    Raises:
        DataError: when a file can't be read at all, or a hub data set can't be had.
    """
    left = source.max_rows
    for block in _blocks(source, name):
        if left is not None:
            block, found = block.head(left)
            left -= found
        yield replace(block, weight=source.weight)
        if left == 0:
            return


def _blocks(source: Source, name: str) -> Iterator[Block]:
    path = Path(source.path)
    if not path.is_absolute():
        yield from _ready(_hub(source))
        return
    for file in chosen(path, name).files:
        try:
            yield from _file(file)
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise DataError(Problem(f"can't be read: {reason}", Place(str(file)))) from None


def _ready(rows: Iterable[RawRow], size: int = 0) -> Iterator[Block]:
    """Yield rows in blocks; the first stands for the whole file, as it was read whole."""
    left = iter(rows)
    while ready := tuple(islice(left, READY)):
        yield Block(ready=ready, size=size)
        size = 0


def files(path: Path) -> list[Path]:
    """Return the files with rows to train on that a path, folder or glob stands for; see `chosen`."""
    return list(chosen(path).files)


def chosen(path: Path, name: str = "train") -> Choice:
    """Return the data files a path, folder or glob stands for, sorted by name, and what is left out of a folder.

    Args:
        path: absolute.
        name: of the set of rows: `train`, or another for rows that are held out; of a folder, its split is read.

    Raises:
        DataError: when there are none.
    """
    if not opening.is_utf8(path):
        raise DataError(Problem("its name is not UTF-8", Place(opening.shown(path)), "rename it"))
    if (kind := opening.odd(path)) is not None:
        hint = "rows are read more than once: write them to a file first"
        raise DataError(Problem(f"is {kind}, not a file", Place(str(path)), hint))
    try:
        return _of_folder(path, name) if path.is_dir() else Choice(tuple(_files(path)))
    except OSError as error:
        place = Place(str(error.filename or path))
        raise DataError(Problem(f"can't be read: {error.strerror or error}", place)) from None


def _of_folder(folder: Path, name: str) -> Choice:
    seen = sorted(file for file in opening.below(folder) if _suffix(file) in SUFFIXES)
    hidden = {file for file in seen if any(part.startswith(".") for part in file.relative_to(folder).parts)}
    found = [file for file in seen if file not in hidden and _is_file(file)]
    if not found:
        raise DataError(
            Problem(f"no data in this folder; files end in {listed(SUFFIXES)} (also .gz)", Place(str(folder)))
        )
    papers = _papers(found)
    choice = splits.choose(folder, [file for file in found if file not in papers], name)
    return replace(choice, told=(*choice.told, *splits.no_rows(folder, sorted(hidden), sorted(papers))))


def _files(path: Path) -> list[Path]:
    if _is_file(path):
        if _suffix(path) not in SUFFIXES:
            raise DataError(
                Problem(f"unknown kind of file; files end in {listed(SUFFIXES)} (also .gz)", Place(str(path)))
            )
        return [path]
    found = opening.matching(str(path))
    if not found:
        raise DataError(Problem("no such data", Place(str(path))))
    return [f for match in found for f in _files(match)]


def _papers(found: list[Path]) -> set[Path]:
    """Return the texts that come with a data set and are no rows, where a folder has files of rows, too."""
    texts = {file for file in found if _suffix(file) == ".txt"}
    if len(texts) == len(found):
        return set()
    return {file for file in texts if file.stem.lower() in _PAPERS}


def _is_file(path: Path) -> bool:
    """Return whether a path is a regular file.

    Raises:
        DataError: when it is a pipe or a device, or its name is not UTF-8: no place could be written with it.
    """
    if not opening.is_utf8(path):
        raise DataError(Problem("its name is not UTF-8", Place(opening.shown(path)), "rename it"))
    if (kind := opening.odd(path)) is not None:
        raise DataError(Problem(f"is {kind}, not a file", Place(str(path)), "take it out of the folder"))
    return path.is_file()


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _file(path: Path) -> Iterator[Block]:
    kind, name, size = _suffix(path), str(path), path.stat().st_size
    with opening.opened(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
        if kind == ".jsonl":
            yield from _jsonl(stream, raw, name)
        elif kind == ".parquet":
            yield from _parquet(raw if stream is raw else io.BytesIO(_whole(stream, name)), name, size)
        elif kind == ".json":
            yield from _ready(_json(_whole(stream, name, "a .jsonl file is read line by line"), name), size)
        elif kind == ".csv":
            yield from _ready(_csv(stream, path), size)
        else:
            text = _whole(stream, name, "such a file is one row: cut it into several", TEXT)
            yield from _ready([RawRow(Place(name), {"text": _utf8(text, name)})], size)


def _whole(stream: BinaryIO | gzip.GzipFile, name: str, hint: str | None = None, most: int = WHOLE) -> bytes:
    """Read a file whole; a packed one may be a thousand times its size."""
    found = stream.read(most + 1)
    if len(found) > most:
        raise DataError(Problem(f"is longer than {most:,} bytes", Place(name), hint))
    return found


def _jsonl(stream: BinaryIO | gzip.GzipFile, raw: BinaryIO, name: str) -> Iterator[Block]:
    line, done = 1, 0
    while lines := stream.read(BLOCK):
        if not lines.endswith(b"\n"):
            lines += stream.readline(LONGEST)
        if not lines.endswith(b"\n") and len(lines) >= LONGEST:
            raise _too_long(name, line + lines.count(b"\n"))
        at = raw.tell()
        yield Block(lines.removeprefix(b"\xef\xbb\xbf") if line == 1 else lines, Place(name, line), size=at - done)
        line, done = line + lines.count(b"\n"), at


def _too_long(name: str, line: int) -> DataError:
    hint = "a line is one row: is its end missing somewhere? else cut the row into several"
    return DataError(Problem(f"a line of more than {LONGEST:,} bytes", Place(name, line), hint))


def _utf8(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _no_utf8(name, raw.count(b"\n", 0, error.start) + 1) from None


def _no_utf8(name: str, line: int) -> DataError:
    return DataError(Problem("not UTF-8", Place(name, line), "save it as UTF-8"))


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


def _csv(stream: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(LONGEST)  # the default, 128 KiB, is less than a long document
    name, columns, line = str(path), list[str](), 1
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            # not strict, an open quote would swallow the rest of the file
            reader = csv.reader(_lines(text, name), strict=True)
            for cells in reader:
                # a row ends below its start where a cell holds lines
                place, line = Place(name, line), reader.line_num + 1
                if not cells:
                    continue
                if not columns:
                    columns = cells
                    _check_columns([cell for cell in cells if cell], place)
                elif len(cells) != len(columns):
                    what = "more" if len(cells) > len(columns) else "fewer"
                    yield RawRow(place, None, f"{what} cells than the {len(columns)} columns")
                else:
                    yield RawRow(place, dict(zip(columns, cells, strict=True)))
    except UnicodeDecodeError:
        with opening.opened(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as again:
            raise _no_utf8(name, _first_not_utf8(again)) from None
    except csv.Error as error:
        raise DataError(Problem(f"no CSV: {error}", Place(name, line))) from None


def _lines(text: io.TextIOWrapper, name: str) -> Iterator[str]:
    """Yield the lines of a text; one that is too long is an error, not read on."""
    number = 0
    while line := text.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise _too_long(name, number)
        yield line


def _first_not_utf8(stream: Iterable[bytes]) -> int:
    """Return the number of the first line that is not UTF-8: decoding runs ahead of reading rows."""
    number = 0
    for number, line in enumerate(stream, 1):  # noqa: B007 - the last line where none is wrong alone
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            break
    return number


def _parquet(file: BinaryIO, name: str, size: int) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        table = pq.ParquetFile(file)
        _check_names(table.schema_arrow, Place(name))
        for batch in table.iter_batches(batch_size=READY):
            values = enumerate(_values(batch), number + 1)
            ready = tuple(RawRow(Place(f"{name} row {row}"), _as_written(value)) for row, value in values)
            number += len(ready)
            yield Block(ready=ready, size=size * len(ready) // table.metadata.num_rows)
    except UnicodeDecodeError:
        raise DataError(Problem("not UTF-8", Place(f"{name} row {number + 1} or later"))) from None
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError(Problem(f"no parquet: {reason.splitlines()[0]}", Place(name))) from None


def _values(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of an Arrow batch; dates that Python has no value for are bytes, which are no text."""
    import pyarrow as pa

    columns = []
    for column in batch.columns:
        try:
            columns.append(column.to_pylist())
        except (ValueError, OverflowError, pa.ArrowException):
            if not pa.types.is_temporal(column.type):
                raise
            stand_in = str(column.type).encode()
            columns.append([stand_in if there else None for there in column.is_valid().to_pylist()])
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _check_names(schema: Any, place: Place) -> None:
    """Check the names of columns and of the keys of objects in them, of any depth, as `_check_columns` does."""
    import pyarrow as pa

    _check_columns(schema.names, place)
    left = [(field.name, field.type) for field in schema]
    while left:
        column, kind = left.pop()
        fields = [kind.field(i) for i in range(kind.num_fields)]
        if pa.types.is_struct(kind):
            _check_columns([field.name for field in fields], place, f"keys of `{shorten(column)}`")
        left += [(column, field.type) for field in fields]


def _check_columns(names: list[str], place: Place, what: str = "columns") -> None:
    """Check that no two columns have one name: the last would win in silence."""
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice is not None:
        raise DataError(Problem(f"two {what} are named `{shorten(twice)}`", place, "rename one of them"))


def _hub(source: Source) -> Iterator[RawRow]:
    for number, value in enumerate(hub(source), 1):
        yield RawRow(Place(f"{source.path}[{source.split}] row {number}"), _as_written(dict(value)))


def _as_written(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of an Arrow table without the nulls inside its objects.

    All objects of a column have the keys of any of them there: what a tool's schema never said stands in it as null.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def hub(source: Source) -> Any:
    """Return a hub data set, from the local cache of `datasets` where it is there.

    Raises:
        DataError: when it can't be had.
    """
    import datasets

    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the hub client raises dozens of kinds: all mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            Problem(
                f"can't be loaded from the hub: {reason}",
                Place(f"{source.path}[{source.split}]"),
                "name a local file, folder or glob if that was meant",
            )
        ) from None
