from __future__ import annotations

import io
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loratune.data import parquet_pages, row_files
from loratune.data.formats.base import Unreadable
from loratune.data.section import Source
from loratune.errors import DataError


def written(table: pa.Table, **options: Any) -> io.BytesIO:
    stream = io.BytesIO()
    pq.write_table(table, stream, **options)
    return stream


def read(path: Path) -> list[row_files.RawRow]:
    return list(row_files.read(Source(path=str(path))))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_headers_say_what_pages_hold(version: str, dictionary: bool) -> None:
    texts = [f"{i} " * 50 for i in range(3000)]
    table = pa.table({"text": texts, "list": [[i] * 5 for i in range(3000)]})
    stream = written(
        table, data_page_version=version, use_dictionary=dictionary, compression="zstd", data_page_size=20_000,
        row_group_size=1000, write_batch_size=100,
    )  # fmt: skip
    metadata = pq.ParquetFile(stream).metadata
    for group in range(3):
        for index in range(2):
            chunk = metadata.row_group(group).column(index)
            found = list(parquet_pages._pages(chunk, stream))
            data = [page for page in found if page.kind != parquet_pages._DICTIONARY]
            assert sum(page.values for page in data) == chunk.num_values == (1000, 5000)[index]
            assert len(found) - len(data) == dictionary
            header = chunk.total_uncompressed_size - sum(page.unpacked for page in found)
            assert 0 < header <= 600 * len(found)
            assert len(data) > 2 or dictionary or index


def test_a_header_with_long_statistics_is_read(tmp_path: Path) -> None:
    """The smallest and the largest text of a page stand in its header."""
    texts = ["a" * 300_000, "b" * 300_000]
    stream = written(pa.table({"text": texts}), use_dictionary=False, compression="zstd")
    chunk = pq.ParquetFile(stream).metadata.row_group(0).column(0)
    assert [(page.values, page.unpacked) for page in parquet_pages._pages(chunk, stream)] == [(2, 600_014)]


def test_a_page_that_unpacks_to_too_much_is_refused_before_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(written(pa.table({"id": [1], "text": ["a" * (300 << 20)]}), compression="zstd").getvalue())
    assert path.stat().st_size < 100_000
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"{path}: column `text` has a page of 314,572,804 bytes, uncompressed; at most 134,217,728" in str(
        caught.value
    )
    assert "without that column" in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 50_000  # KiB


def test_equal_numbers_in_a_list_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of them is a few bytes in a page, whatever its length."""
    monkeypatch.setattr(parquet_pages, "PAGE", 1 << 20)
    path = tmp_path / "a.parquet"
    path.write_bytes(written(pa.table({"text": ["a"], "ids": [[7] * 200_000]}), compression="zstd").getvalue())
    assert path.stat().st_size < 2000
    with pytest.raises(DataError, match=r"column `ids.list.element` has a page of 1,600,000 bytes"):
        read(path)


@pytest.mark.parametrize(("texts", "most"), [
    (["a" * 1000] * 500, 256),  # a page of one value
    ([f"{i:06}" * 200_000 for i in range(4)] * 25, 27),  # any row may be any of the dictionary's
    ([f"{i}" for i in range(5000)], 256),
], ids=["short", "long", "many"])  # fmt: skip
def test_how_many_rows_are_read_at_once(texts: list[str], most: int) -> None:
    stream = written(pa.table({"text": texts}), dictionary_pagesize_limit=64 << 20)
    assert parquet_pages.rows_at_once(pq.ParquetFile(stream).metadata, stream, "a", 256) == most


def test_a_cell_that_is_too_long_is_a_row_that_can_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and the like are nobody's text: they refuse no row."""
    monkeypatch.setattr(row_files, "LONGEST", 1000)
    path = tmp_path / "a.parquet"
    picture = pa.array([None, {"bytes": b"\xff" * 5000, "path": "x"}, None, {"bytes": b"y", "path": "z"}])
    table = pa.table({"text": ["a", "b", "c" * 2000, "d"], "picture": picture})
    pq.write_table(table, path)
    found = read(path)
    assert [row.value and row.value["text"] for row in found] == ["a", "b", None, "d"]
    assert found[2].problem == "`text` holds 2,004 bytes, of at most 1,000 in a row: split it into several rows"
    assert found[1].value == {"text": "b", "picture": Unreadable("5,011 bytes")}
    assert found[3].value == {"text": "d", "picture": {"bytes": b"y", "path": "z"}}
    assert [str(row.place) for row in found] == [f"{path} row {number}" for number in (1, 2, 3, 4)]


def test_a_dictionary_of_long_texts_makes_no_row_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "LONGEST", 1000)
    texts = [f"{i} " * 100 for i in range(20)] * 3
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), tmp_path / "a.parquet")
    assert [row.value for row in read(tmp_path / "a.parquet")] == [{"text": text} for text in texts]


def test_long_rows_stand_in_blocks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "LARGE", 1000)
    texts = ["a", "b" * 600, "c" * 600, "d" * 3000, "e"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    blocks = list(row_files.blocks(Source(path=str(tmp_path / "a.parquet"))))
    assert [(len(block.ready), block.large) for block in blocks] == [(2, False), (1, False), (1, True), (1, False)]
    assert abs(sum(block.size for block in blocks) - (tmp_path / "a.parquet").stat().st_size) < len(blocks)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_headers_end_in_rows_or_a_message(tmp_path: Path, seed: int) -> None:
    from random import Random

    random = Random(seed)
    content = bytearray(written(pa.table({"text": [f"{i}" for i in range(500)], "n": range(500)})).getvalue())
    for _ in range(3):
        content[random.randrange(4, 200)] ^= 1 << random.randrange(8)
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    try:
        found = read(path)
    except DataError as error:
        found, told = [], str(error)
    assert len(found) == 500 or str(path) in told
