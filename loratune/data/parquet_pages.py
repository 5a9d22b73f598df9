"""How many rows of a Parquet file are read at once: from its page headers, before any page is decompressed.

A page is decompressed as a whole, to the size in its header: a few kilobytes may become two gigabytes. A small page of
dictionary indices may also expand to as many large values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from loratune.errors import DataError, Place, Problem, shorten

PAGE = 128 << 20  # bytes of a decompressed page; most programs write 1 MB, few 100 MB
BATCH = 128 << 20  # approximate bytes of a batch of rows
_HEADER = (256, 1 << 16, 1 << 24)  # bytes read of a header, which may contain the smallest and largest value
_DICTIONARY = 2  # type of a page


@dataclass(frozen=True)
class Page:
    """The header of a page: its type, its bytes decompressed and in the file, its number of values."""

    kind: int
    unpacked: int
    packed: int
    values: int


def rows_at_once(metadata: Any, file: BinaryIO, name: str, most: int) -> int:
    """Return how many rows of a Parquet file to read at once.

    Args:
        metadata: of `pyarrow.parquet`.
        file: open, at any position.
        name: of the file, for a message.
        most: rows.

    Raises:
        DataError: when a page is longer than `PAGE`.
    """
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        for index in range(group.num_columns):
            chunk, repeats = group.column(index), metadata.schema.column(index).max_repetition_level > 0
            each = chunk.num_values / max(group.num_rows, 1) if repeats else 1.0  # values per row
            for page in _pages(chunk, file):
                # a run of equal indices takes no space in a page, but eight bytes each in memory
                size = max(page.unpacked, 8 * page.values if repeats else 0)
                if size > PAGE:
                    column = shorten(chunk.path_in_schema)
                    told = f"column `{column}` has a page of {size:,} bytes, uncompressed; at most {PAGE:,} are read"
                    hint = "is the file damaged? else write it with smaller pages, or without that column"
                    raise DataError(Problem(told, Place(name), hint))
                # any row may have the dictionary's largest value; without one, rows share the page
                value = page.unpacked if page.kind == _DICTIONARY else size / max(page.values, 1)
                most = min(most, int(BATCH / max(value * each, 1)))
    return max(most, 1)


def _pages(chunk: Any, file: BinaryIO) -> Iterator[Page]:
    """Yield a column chunk's page headers, as far as they can be read; pyarrow reports errors in the rest."""
    place = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        place = min(place, chunk.dictionary_page_offset)
    end = place + chunk.total_compressed_size
    while place < end:
        for length in _HEADER:
            file.seek(place)
            header = _Compact(file.read(length))
            try:
                page = header.page()
                break
            except IndexError:  # the header is longer, or the file ends here
                continue
        else:
            return
        if page.packed < 0 or page.unpacked < 0:
            return
        yield page
        place += header.at + page.packed


class _Compact:
    """Read a header in Thrift's compact protocol; raise IndexError if the bytes end before it does."""

    def __init__(self, given: bytes):
        self._given = given
        self.at = 0

    def page(self) -> Page:
        """Read a page's header: fields 1 to 3, and the number of values, field 1 of 5 (data), 7 (dictionary) or 8."""
        found = self._struct()
        inner: dict[int, Any] = next((found[one] for one in (5, 7, 8) if isinstance(found.get(one), dict)), {})
        kind, unpacked, packed = (_number(found.get(one)) for one in (1, 2, 3))
        return Page(kind, unpacked, packed, max(_number(inner.get(1)), 0))

    def _struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > 8:
            raise IndexError
        found, number = dict[int, Any](), 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            found[number] = self._value(head & 15, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # a boolean's value is in its type
            return None
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == 12:
            return self._struct(depth + 1)
        if kind in (9, 10):
            return self._list(depth)
        sizes = {3: 1, 7: 8}
        self._skip(sizes[kind] if kind in sizes else self._varint() if kind == 8 else len(self._given) + 1)
        return None

    def _list(self, depth: int) -> None:
        head = self._byte()
        number = head >> 4 if head >> 4 < 15 else self._varint()
        for _ in range(number):
            if head & 15 in (1, 2):
                self._byte()
            else:
                self._value(head & 15, depth + 1)

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise IndexError

    def _byte(self) -> int:
        byte = self._given[self.at]
        self.at += 1
        return byte

    def _skip(self, length: int) -> None:
        if self.at + length > len(self._given):
            raise IndexError
        self.at += length


def _number(value: Any) -> int:
    return value if isinstance(value, int) else -1
