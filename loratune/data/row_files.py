"""Read rows from files and hub data sets, each with its place."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from loratune.data import parquet_pages, splits, tables
from loratune.data.formats.base import key_twice, why_no_json
from loratune.data.section import SUFFIXES, Source
from loratune.data.splits import Choice
from loratune.errors import DataError, Place, Problem, listed, shorten
from loratune.system import files as opening


@dataclass(frozen=True)
class RawRow:
    """A row as it was read, with its place; `value` is None if the line is no row (`problem` says why)."""

    place: Place
    value: dict[str, Any] | None
    problem: str = ""


@dataclass(frozen=True)
class Block:
    """Some rows of a source; those of a .jsonl file as raw lines, which another process may parse.

    Attributes:
        lines: complete lines of a .jsonl file.
        place: the file and the number of the first line.
        ready: rows of other kinds of files, read already.
        size: bytes of the file that this block is (compressed ones of a .gz file).
        weight: of the source.
        large: whether it may have a row so long that no other block should be prepared at the same time.
    """

    lines: bytes = b""
    place: Place | None = None
    ready: tuple[RawRow, ...] = ()
    size: int = 0
    weight: float = 1.0
    large: bool = False

    def rows(self) -> Iterator[RawRow]:
        """Yield the rows, in order."""
        yield from self.ready
        if self.place is None:
            return
        for number, line in enumerate(io.BytesIO(self.lines), self.place.line):
            if line.strip():
                yield _json_line(line, replace(self.place, line=number))

    def head(self, number: int) -> tuple[Block, int]:
        """Return the block cut to its first `number` rows, and how many rows it then has."""
        if self.ready:
            return replace(self, ready=self.ready[:number]), min(number, len(self.ready))
        kept, found = [], 0
        for line in io.BytesIO(self.lines):
            if found == number:
                break
            kept.append(line)
            found += bool(line.strip())
        return replace(self, lines=b"".join(kept)), found


BLOCK = 1 << 18  # bytes of lines read at once: some hundred rows, so that work can be distributed
READY = 256  # rows of a block of other kinds of files
LARGE = 1 << 20  # bytes of a block; more only if one row has more
LONGEST = 16 << 20  # bytes of a line (a row): reading and tokenizing it takes a hundred times as much memory
TEXT = 64 << 20  # bytes of a .txt file, which is also one row, but without lists and objects
_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_PAPERS = ("readme", "license", "licence", "notice", "copying", "requirements", "changelog")  # .txt that are no rows
WHOLE = 1 << 29  # decompressed bytes of a compressed table, which is read as a whole before its first row


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
        DataError: when a file can't be read at all, or a hub data set can't be loaded.
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


def _ready(rows: Iterable[RawRow], size: int = 0, each: float = 0.0) -> Iterator[Block]:
    """Yield rows in blocks; a long row is a block of its own.

    Args:
        rows: that are read.
        size: bytes of a file that was read as a whole; they count for the first block.
        each: bytes of the file per row.
    """
    ready: list[RawRow] = []
    length = 0
    for row in rows:
        more = bytes_of(row.value)
        if ready and (len(ready) == READY or length + more > LARGE):
            yield Block(ready=tuple(ready), size=size + round(each * len(ready)), large=length > LARGE)
            ready, length, size = [], 0, 0
        ready.append(row)
        length += more
    if ready:
        yield Block(ready=tuple(ready), size=size + round(each * len(ready)), large=length > LARGE)


def bytes_of(value: object) -> int:
    """Return the UTF-8 bytes of all texts in a nested value; anything else counts eight."""
    size, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            size += len(one) if one.isascii() else len(one.encode("utf-8", "surrogatepass"))
        elif isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list | tuple):
            left += one
        else:
            size += len(one) if isinstance(one, bytes) else 8
    return size


def files(path: Path) -> list[Path]:
    """Return the training files of a path, folder or glob; see `chosen`."""
    return list(chosen(path).files)


def chosen(path: Path, name: str = "train") -> Choice:
    """Return the data files of a path, folder or glob, sorted by name, and what is left out of a folder.

    Args:
        path: absolute.
        name: of the set of rows: `train`, or another for held-out rows; it selects the split of a folder.

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
    """Return the texts of a folder, such as README, that are no rows, if it also has files of rows."""
    texts = {file for file in found if _suffix(file) == ".txt"}
    if len(texts) == len(found):
        return set()
    return {file for file in texts if file.stem.lower() in _PAPERS}


def _is_file(path: Path) -> bool:
    """Return whether a path is a regular file.

    Raises:
        DataError: when it is a pipe or a device, or its name is not UTF-8, so that no place could name it.
    """
    if not opening.is_utf8(path):
        raise DataError(Problem("its name is not UTF-8", Place(opening.shown(path)), "rename it"))
    if (kind := opening.odd(path)) is not None:
        raise DataError(Problem(f"is {kind}, not a file", Place(str(path)), "remove it from the folder"))
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
            yield from _ready(_json(stream, path), size)
        elif kind == ".csv":
            yield from _ready(_csv(stream, path), size)
        else:
            text = _whole(stream, name, "such a file is one row: split it into several", TEXT)
            yield from _ready([RawRow(Place(name), {"text": _utf8(text, name)})], size)


def _whole(stream: BinaryIO | gzip.GzipFile, name: str, hint: str | None = None, most: int = WHOLE) -> bytes:
    """Read a whole file; a compressed one may expand to a thousand times its size."""
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
        whole = lines.removeprefix(b"\xef\xbb\xbf") if line == 1 else lines
        yield Block(whole, Place(name, line), size=at - done, large=len(whole) > LARGE)
        line, done = line + lines.count(b"\n"), at


def _too_long(name: str, line: int) -> DataError:
    hint = "a line is one row: is a line break missing? else split the row"
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
        value = json.loads(line.decode("utf-8"), object_pairs_hook=keys)  # given bytes, it would also detect UTF-16
    except UnicodeDecodeError:
        return RawRow(place, None, "not UTF-8")
    except (ValueError, RecursionError) as error:
        return RawRow(place, None, f"not JSON: {why_no_json(error)}")
    return _object(value, place, keys)


class _Keys:
    """Read JSON objects and record duplicate keys, of which `json` silently keeps the last."""

    def __init__(self) -> None:
        self._twice: list[tuple[dict[str, Any], str]] = []  # with the objects, so that no other gets their id

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if (key := key_twice(pairs)) is not None:
            self._twice.append((value, key))
        return value

    def twice(self, value: Any) -> str | None:
        """Return a duplicate key of an object in a row, or None."""
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


def _json(stream: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[RawRow]:
    """Yield the objects of a JSON list, which is read incrementally."""
    name, number = str(path), 0
    try:
        for value, keys in _Listed(stream):
            number += 1
            yield _object(value, Place(f"{name} row {number}"), keys)
    except UnicodeDecodeError:
        raise _no_utf8(name, _first_not_utf8(path)) from None
    except _NoList as error:
        hint = "a file with one JSON object per line ends in .jsonl" if str(error).startswith("not JSON") else None
        raise DataError(Problem(str(error), Place(name, error.line), hint)) from None


class _NoList(Exception):
    """An error in a JSON list, with the line, if it is known."""

    def __init__(self, told: str, line: int = 0):
        super().__init__(told)
        self.line = line


class _Listed:
    """Yield each value of the JSON list in a file, with its keys."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile):
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._at = "", 0
        self._lines = 1  # lines before `_text`
        self._ended = False

    def __iter__(self) -> Iterator[tuple[Any, _Keys]]:
        if self._next() != "[":
            self._value()  # raises the error, if there is one
            if self._next():
                raise self._wrong("Extra data", self._at)
            raise _NoList("a .json file must hold a list of objects")
        self._at += 1
        if self._next() != "]":
            while True:
                yield self._value()
                if self._next() != ",":
                    break
                self._at += 1
        if self._next() != "]":
            raise self._wrong("Expecting ',' delimiter", self._at)
        self._at += 1
        if self._next():
            raise self._wrong("Extra data", self._at)

    def _next(self) -> str:
        """Move to the next character that is no white space and return it; "" at the end."""
        while True:
            self._at = _JSON_SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]  # always matches
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _value(self) -> tuple[Any, _Keys]:
        self._next()
        while True:
            keys = _Keys()
            try:
                value, end = json.JSONDecoder(object_pairs_hook=keys).raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - 64 or error.msg.startswith("Unterminated")
                wrong = self._wrong(error.msg, error.pos)
                if not (cut and self._more()):
                    raise wrong from None
            except (ValueError, RecursionError) as error:
                raise _NoList(f"not JSON: {why_no_json(error)}") from None
            else:
                length = end - self._at
                if end < len(self._text) or not self._more():  # a number may continue
                    self._at += length
                    return value, keys

    def _more(self) -> bool:
        """Read as many characters as are buffered, and return whether there were any."""
        self._lines += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > LONGEST:
            raise _NoList(f"a value of more than {LONGEST:,} characters: split it into several", self._lines)
        if not self._ended:
            more = self._stream.read(min(max(BLOCK, len(self._text)), LONGEST + 1 - len(self._text)))
            self._ended = not more
            self._text += self._decoder.decode(more, final=self._ended)
        return not self._ended

    def _wrong(self, what: str, at: int) -> _NoList:
        return _NoList(f"not JSON: {what}", self._lines + self._text.count("\n", 0, at))


def _csv(stream: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[RawRow]:
    csv.field_size_limit(LONGEST)  # the default, 128 KiB, is less than a long document
    name, columns, line = str(path), list[str](), 1
    try:
        with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
            # not strict, an open quote would swallow the rest of the file
            lines = _Lines(text, name)
            reader = csv.reader(lines, strict=True)
            for cells in reader:
                lines.length = 0
                # a row has several lines if a cell has line breaks
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
        raise _no_utf8(name, _first_not_utf8(path)) from None
    except csv.Error as error:
        raise DataError(Problem(f"not CSV: {error}", Place(name, line))) from None


class _Lines:
    """Yield the lines of a text; a row that is too long is an error as soon as the limit is reached.

    Attributes:
        length: characters since the start of the current row.
    """

    def __init__(self, text: io.TextIOWrapper, name: str):
        self._text, self._name, self._number = text, name, 0
        self.length = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(LONGEST + 1):
            self._number += 1
            self.length += len(line)
            if self.length > LONGEST:
                raise _too_long(self._name, self._number)
            yield line


def _first_not_utf8(path: Path) -> int:
    """Return the number of the first line that is not UTF-8; the reader does not know it, as decoding runs ahead."""
    number, decoder = 1, codecs.getincrementaldecoder("utf-8")()
    with opening.opened(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
        while part := stream.readline(BLOCK):
            try:
                decoder.decode(part)
            except UnicodeDecodeError:
                break
            number += part.endswith(b"\n")
    return number


def _parquet(file: BinaryIO, name: str, size: int) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file, buffer_size=BLOCK)  # without a buffer it reads whole column chunks
        _check_names(table.schema_arrow, Place(name))
        at_once = parquet_pages.rows_at_once(table.metadata, file, name, READY)
        batches = table.iter_batches(batch_size=at_once, use_threads=False)
        yield from _ready(_of_batches(batches, name), each=size / max(table.metadata.num_rows, 1))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError(Problem(f"not parquet: {reason.splitlines()[0]}", Place(name))) from None


def _of_batches(batches: Iterable[Any], name: str) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for value, problem in tables.values(batch, LONGEST):
            number += 1
            yield RawRow(Place(f"{name} row {number}"), None if value is None else _as_written(value), problem)


def _check_names(schema: Any, place: Place) -> None:
    """Check the names of columns and of keys of objects in them, at any depth, with `_check_columns`."""
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
    """Check that column names are unique: of duplicates, the last would silently win."""
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice is not None:
        raise DataError(Problem(f"two {what} are named `{shorten(twice)}`", place, "rename one of them"))


def _hub(source: Source) -> Iterator[RawRow]:
    for number, value in enumerate(hub(source), 1):
        yield RawRow(Place(f"{source.path}[{source.split}] row {number}"), _as_written(dict(value)))


def _as_written(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of an Arrow table without the nulls inside its objects.

    In Arrow all objects of a column have the keys of all others: keys that an object did not have are null.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def hub(source: Source) -> Any:
    """Return a hub data set, from the local cache of `datasets` if it is there.

    Raises:
        DataError: when it can't be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # the hub client raises dozens of classes, which mean the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            Problem(
                f"can't be loaded from the hub: {reason}",
                Place(f"{source.path}[{source.split}]"),
                "name a local file, folder or glob if that was meant",
            )
        ) from None
