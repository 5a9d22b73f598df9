"""Convert Arrow tables to rows, a few megabytes at a time: a byte may become a hundred as Python objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loratune.data.formats.base import Unreadable
from loratune.errors import shorten

Value = tuple[dict[str, Any] | None, str]  # a row, or None and why it can't be read


def values(batch: Any, most: int) -> Iterator[Value]:
    """Yield the rows of an Arrow batch.

    Binary values that are too long, dates that Python can't represent and text that is not UTF-8 become `Unreadable`: a
    format that needs the column refuses the row.

    Args:
        batch: of any types.
        most: bytes of a row; for a longer one None is yielded, and which part is too long.
    """
    for part in _parts(_decoded(batch), most):
        if part.nbytes > most:
            yield _long(part, most)
        else:
            yield from ((value, "") for value in _rows(part))


def _parts(batch: Any, most: int) -> Iterator[Any]:
    """Yield a batch in parts of at most `most` bytes, or of one row."""
    if batch.num_rows <= 1 or batch.nbytes <= most:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _parts(batch.slice(0, half), most)
    yield from _parts(batch.slice(half), most)


def _decoded(batch: Any) -> Any:
    """Return a batch with values instead of dictionary indices, as each part would carry the whole dictionary."""
    import pyarrow as pa

    if not any(pa.types.is_dictionary(kind) for kind in batch.schema.types):
        return batch
    columns = [one.dictionary_decode() if pa.types.is_dictionary(one.type) else one for one in batch.columns]
    return pa.record_batch(columns, names=batch.schema.names)


def _long(row: Any, most: int) -> Value:
    """Return a row that is too long without its binary values, such as images, if that makes it short enough."""
    import pyarrow as pa

    columns, held = list(row.columns), dict[str, Any]()
    for index, column in enumerate(columns):
        if _holds_bytes(column.type):
            columns[index] = pa.nulls(1)
            held[row.schema.names[index]] = Unreadable(f"{column.nbytes:,} bytes")
    row = pa.record_batch(columns, names=row.schema.names)
    if row.nbytes <= most:
        return {**_rows(row)[0], **held}, ""
    name, longest = max(zip(row.schema.names, columns, strict=True), key=lambda one: one[1].nbytes)
    told = f"`{shorten(name)}` holds {longest.nbytes:,} bytes, of at most {most:,} in a row"
    return None, f"{told}: split it into several rows"


def _holds_bytes(kind: Any) -> bool:
    """Return whether a column of this type contains binary values."""
    import pyarrow as pa

    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    return is_bytes or any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))


def _rows(batch: Any) -> list[dict[str, Any]]:
    columns = [_of_column(column) for column in batch.columns]
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _of_column(column: Any) -> list[Any]:
    try:
        found: list[Any] = column.to_pylist()
        return found
    except Exception:  # for an unknown time zone each library raises another class
        return [_of_value(value) for value in column]


def _of_value(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except Exception as error:
        return Unreadable(f"{value.type}: {shorten(str(error))}")
