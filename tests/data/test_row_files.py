from __future__ import annotations

import gzip
import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loratune.data import row_files
from loratune.data.formats import Chat, RowError, Text
from loratune.data.formats.base import Unreadable
from loratune.data.section import Source
from loratune.errors import DataError

ROWS = [{"prompt": "ä 😀", "completion": "one\ntwo"}, {"prompt": "b", "completion": 'say "x", then y'}]


def as_jsonl(values: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values).encode()


def as_json(values: list[dict[str, Any]]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1).encode()


def as_csv(values: list[dict[str, Any]]) -> bytes:
    import csv

    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(values[0]))
    writer.writeheader()
    writer.writerows(values)
    return text.getvalue().encode()


def as_parquet(values: list[dict[str, Any]]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(values), stream)
    return stream.getvalue()


def as_txt(values: list[dict[str, Any]]) -> bytes:
    return values[0]["prompt"].encode()


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": as_jsonl,
    ".json": as_json,
    ".csv": as_csv,
    ".parquet": as_parquet,
    ".txt": as_txt,
}


def read(path: Path) -> list[row_files.RawRow]:
    return list(row_files.read(Source(path=str(path))))


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def told(folder: Path, name: str, content: bytes | str) -> list[str]:
    """Write and read a file; return what was told of each row, or of the file, without the folder's name."""
    path = write(folder, name, content)
    try:
        found = read(path)
    except DataError as error:
        return [f"file: {error}".replace(f"{folder}/", "")]
    return [
        f"{row.place}: {row.problem or json.dumps(row.value, ensure_ascii=False)}".replace(f"{folder}/", "")
        for row in found
    ]


@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, zipped: bool) -> None:
    content = KINDS[kind](ROWS)
    path = write(tmp_path, f"a{kind}{'.gz' if zipped else ''}", gzip.compress(content) if zipped else content)
    found = read(path)
    wanted = [{"text": "ä 😀"}] if kind == ".txt" else ROWS
    assert [row.value for row in found] == wanted
    places = {
        ".jsonl": [":1", ":2"],
        ".json": [" row 1", " row 2"],
        ".csv": [":2", ":4"],
        ".parquet": [" row 1", " row 2"],
        ".txt": [""],
    }[kind]
    assert [str(row.place) for row in found] == [f"{path}{place}" for place in places]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, f"a{kind}", b"\xef\xbb\xbf" + KINDS[kind](ROWS))
    assert read(path)[0].value == ({"text": "ä 😀"} if kind == ".txt" else ROWS[0])


def test_line_ends_and_blank_lines(tmp_path: Path) -> None:
    assert told(tmp_path, "a.jsonl", '\n{"a": 1}\r\n\r\n  \n{"a": 2}') == ['a.jsonl:2: {"a": 1}', 'a.jsonl:5: {"a": 2}']
    assert told(tmp_path, "a.csv", "\r\na,b\r\n\r\n1,2\r\n\r\n3,4") == [
        'a.csv:4: {"a": "1", "b": "2"}',
        'a.csv:6: {"a": "3", "b": "4"}',
    ]
    assert told(tmp_path, "b.csv", "a,b\r1,2\r") == ['b.csv:2: {"a": "1", "b": "2"}']
    assert told(tmp_path, "a.json", '\r\n[\r\n{"a": 1}]\r\n') == ['a.json row 1: {"a": 1}']
    assert told(tmp_path, "a.txt", "a\r\n\r\nb") == ['a.txt: {"text": "a\\r\\n\\r\\nb"}']


def test_bad_lines_of_jsonl(tmp_path: Path) -> None:
    lines = [
        b'{"a": 1}',
        b'{"a": 1,}',
        b"[1, 2]",
        b"5",
        b"null",
        b'{"a": "\xff"}',
        b'{"a": "\x00"}',
        b"\x00\x00",
        b'{"a": ' + b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1} {"a": 2}',
        b'{"a": 3}',
    ]
    an_object = 'a row must be a JSON object, such as {"messages": [...]}'
    assert told(tmp_path, "a.jsonl", b"\n".join(lines)) == [
        'a.jsonl:1: {"a": 1}',
        "a.jsonl:2: not JSON: Expecting property name enclosed in double quotes",
        f"a.jsonl:3: {an_object}",
        f"a.jsonl:4: {an_object}",
        f"a.jsonl:5: {an_object}",
        "a.jsonl:6: not UTF-8",
        "a.jsonl:7: not JSON: Invalid control character at",
        "a.jsonl:8: not JSON: Expecting value",
        "a.jsonl:9: not JSON: nested too deep",
        "a.jsonl:10: not JSON: a number with too many digits",
        "a.jsonl:11: not JSON: Extra data",
        'a.jsonl:12: {"a": 3}',
    ]


def test_a_key_given_twice(tmp_path: Path) -> None:
    """JSON's readers keep the last of the two in silence."""
    lines = [
        '{"text": "a", "text": "b"}',
        '{"text": "a"}',
        '{"messages": [{"role": "user", "content": "a", "role": "assistant"}]}',
        '{"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}',
        '{"a": [{"b": 1, "c": 2, "c": 2}], "a": 1}',
    ]
    wanted = [
        "`text` is given twice in one object",
        '{"text": "a"}',
        "`role` is given twice in one object",
        lines[3],
        "`a` is given twice in one object",
    ]
    assert told(tmp_path, "a.jsonl", "\n".join(lines)) == [f"a.jsonl:{i}: {text}" for i, text in enumerate(wanted, 1)]
    assert told(tmp_path, "a.json", f"[{','.join(lines)}]") == [f"a.json row {i}: {t}" for i, t in enumerate(wanted, 1)]
    deep = '{"a":' * 300 + '{"b": 1, "b": 2}' + "}" * 300
    assert told(tmp_path, "b.jsonl", deep) == ["b.jsonl:1: `b` is given twice in one object"]
    with pytest.raises(RowError, match=r"`tools` is not JSON \(`name` is given twice\)"):
        Chat().read({"messages": [{"role": "assistant", "content": "a"}], "tools": '[{"name": "a", "name": "b"}]'})


def test_utf16_is_not_guessed(tmp_path: Path) -> None:
    assert told(tmp_path, "a.jsonl", '{"a": 1}'.encode("utf-16")) == ["a.jsonl:1: not UTF-8"]
    assert told(tmp_path, "b.jsonl", '{"a": 1}'.encode("utf-16-le"))[0].startswith("b.jsonl:1: not JSON: ")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_bad_utf8_names_the_line(tmp_path: Path, kind: str) -> None:
    start = {".jsonl": b'{"a": 1}\n{"a": "', ".json": b'[\n{"a": "', ".csv": b'a\n"', ".txt": b"one\n"}[kind]
    (line,) = [line for line in told(tmp_path, f"a{kind}", start + b"\xc3(") if "UTF" in line]
    assert line.removeprefix("file: ").split("\n")[0] == f"a{kind}:2: not UTF-8"


def test_bad_json_files(tmp_path: Path) -> None:
    hint = "\n  a file with one JSON object per line ends in .jsonl"
    assert told(tmp_path, "a.json", '[{"a": 1},\n {"a" 2}]') == [
        f"file: a.json:2: not JSON: Expecting ':' delimiter{hint}"
    ]
    assert told(tmp_path, "a.json", '{"a": 1}\n{"a": 2}') == [f"file: a.json:2: not JSON: Extra data{hint}"]
    assert told(tmp_path, "a.json", "[" * 100_000) == [f"file: a.json: not JSON: nested too deep{hint}"]
    assert told(tmp_path, "a.json", "[" + "9" * 5000 + "]") == [
        f"file: a.json: not JSON: a number with too many digits{hint}"
    ]
    assert told(tmp_path, "a.json", "") == [f"file: a.json:1: not JSON: Expecting value{hint}"]
    assert told(tmp_path, "a.json", '{"a": 1}') == ["file: a.json: a .json file must hold a list of objects"]
    assert told(tmp_path, "a.json", '[{"a": 1}, 2]') == [
        'a.json row 1: {"a": 1}',
        'a.json row 2: a row must be a JSON object, such as {"messages": [...]}',
    ]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64])
def test_a_list_read_in_small_parts_is_the_same(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a part ends: in a character, a number, a word, white space, an escape."""
    values = [{"a": "ä😀\n\u1234 \\", "b": [1234567, -1.5e-3, True, None]}, {}, {"long": "x" * 300}, {"c": {"d": []}}]
    text = json.dumps(values[:2], ensure_ascii=False)[:-1] + " ,\r\n\t" + json.dumps(values[2:], indent=3)[1:] + " \n"
    wanted = [f"a.json row {number}: {json.dumps(one, ensure_ascii=False)}" for number, one in enumerate(values, 1)]
    broken = {
        "[]": [], "[\n]": [], "[1": ["Expecting ',' delimiter:1"], "[1,": ["Expecting value:1"], "[{},\n{}\n{}]":
        ["Expecting ',' delimiter:3"], '[\n\n{"a": tru}]': ["Expecting value:3"], "[1]\n\nx": ["Extra data:3"], "": ["Expecting value:1"],
        '[{"a": "b}]\n': ["Invalid control character at:1"], '\n[{"a": "b': ["Unterminated string starting at:2"],
    }  # fmt: skip
    monkeypatch.setattr(row_files, "BLOCK", step)
    assert told(tmp_path, "a.json", b"\xef\xbb\xbf" + text.encode()) == wanted
    for content, ends in broken.items():
        found = [one for one in told(tmp_path, "a.json", content) if one.startswith("file")]
        hint = "\n  a file with one JSON object per line ends in .jsonl"
        said = [
            f"file: a.json:{line}: not JSON: {what}{hint}" for what, _, line in (one.rpartition(":") for one in ends)
        ]
        assert found == said, content
    with pytest.raises(DataError, match=r"a.json:2: not UTF-8"):
        read(write(tmp_path, "a.json", b'["a",\n"\xff"]'))


@pytest.mark.parametrize("step", [1, 3, 1 << 18])
def test_the_line_of_what_is_not_utf8(tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a character is cut at the end of the file or of a line, and with others around it."""
    monkeypatch.setattr(row_files, "BLOCK", step)
    for name, start in (("a.csv", "text\nä😀\n"), ("a.json", '[\n"ä😀",\n')):
        for wrong in (b"\xc3", b"\xf0\x9f\n", b"\xff\n\xc3\xa4\n", "ä".encode() + b"\x9f"):
            assert told(tmp_path, name, start.encode() + wrong)[-1].startswith(f"file: {name}:3: not UTF-8"), wrong


def test_ragged_and_long_csv(tmp_path: Path) -> None:
    text = 'a,"b\nb"\n"1\n\n1",2\n3\n4,5,6\n7,8\n'
    assert told(tmp_path, "a.csv", text) == [
        'a.csv:3: {"a": "1\\n\\n1", "b\\nb": "2"}',
        "a.csv:6: fewer cells than the 2 columns",
        "a.csv:7: more cells than the 2 columns",
        'a.csv:8: {"a": "7", "b\\nb": "8"}',
    ]
    assert told(tmp_path, "b.csv", 'a,b\n1,2\n3,"open\n4,5\n') == [
        "file: b.csv:3: not CSV: unexpected end of data",
    ]
    assert told(tmp_path, "c.csv", "a\x00,b\n1\x00,2\n") == ['c.csv:2: {"a\\u0000": "1\\u0000", "b": "2"}']
    path = write(tmp_path, "long.csv", "text\n" + "x" * 300_000)
    assert read(path)[0].value == {"text": "x" * 300_000}


def test_a_huge_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "x" * 5_000_000}) + "\n" + '{"text": "y"}')
    assert [(row.place.line, len(row.value["text"])) for row in read(path) if row.value] == [(1, 5_000_000), (2, 1)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    assert told(tmp_path, name, gzip.compress(b"") if name.endswith(".gz") else b"") == []


def test_broken_archives_and_tables(tmp_path: Path) -> None:
    random.seed(0)
    content = as_jsonl([{"a": random.random()} for _ in range(2000)])
    packed = bytearray(gzip.compress(content))
    cut = "file: a.jsonl.gz: can't be read: Compressed file ended before the end-of-stream marker was reached"
    assert told(tmp_path, "a.jsonl.gz", bytes(packed[: len(packed) // 2])) == [cut]
    assert told(tmp_path, "a.jsonl.gz", b"no archive") == [
        "file: a.jsonl.gz: can't be read: Not a gzipped file (b'no')"
    ]
    packed[30:60] = bytes(30)
    assert told(tmp_path, "a.jsonl.gz", bytes(packed))[-1].startswith("file: a.jsonl.gz: can't be read: ")
    assert told(tmp_path, "a.parquet", b"no table")[0].startswith("file: a.parquet: not parquet: ")
    assert told(tmp_path, "a.parquet", b"")[0].startswith("file: a.parquet: not parquet: ")
    whole = as_parquet(ROWS)
    assert told(tmp_path, "a.parquet", whole[: len(whole) // 2])[0].startswith("file: a.parquet: not parquet: ")
    # text that is not UTF-8 passes through a table unseen until it is looked at
    wrong = pa.array([b"\xff\xfe"], pa.binary()).cast(pa.binary()).view(pa.string())
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": wrong}), stream)
    (row,) = read(write(tmp_path, "b.parquet", stream.getvalue()))
    assert row.value == {"text": Unreadable("not UTF-8")}
    with pytest.raises(
        RowError, match=r"`text` must be a string, given a value that can't be read .not UTF-8.: write that column"
    ):
        Text().read(row.value)


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "a.jsonl", "{}")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: can't be read: Permission denied"


def test_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "z.csv"):
        write(tmp_path, name, as_jsonl([{"n": name}]) if name.endswith("l") else f"n\n{name}\n")
    write(tmp_path, "README.md", "# no data")
    names = [row.value["n"] for row in read(tmp_path) if row.value]
    assert names == ["a.jsonl", "b.jsonl", "deep/c.jsonl", "z.csv"]
    assert [row.value["n"] for row in read(tmp_path / "*.jsonl") if row.value] == ["a.jsonl", "b.jsonl"]
    deep = [row.value["n"] for row in read(tmp_path / "**" / "*.jsonl") if row.value]
    assert sorted(deep) == ["a.jsonl", "b.jsonl", "deep/c.jsonl"]


def test_no_data(tmp_path: Path) -> None:
    kinds = "`.jsonl`, `.json`, `.csv`, `.parquet`, `.txt` (also .gz)"
    assert told(tmp_path, "a.xlsx", "x") == [f"file: a.xlsx: unknown kind of file; files end in {kinds}"]
    assert told(tmp_path, "a.gz", "x") == [f"file: a.gz: unknown kind of file; files end in {kinds}"]
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "empty", f"no data in this folder; files end in {kinds}"),
        (tmp_path / "none.jsonl", "no such data"),
        (tmp_path / "*.nothing", "no such data"),
    ):
        with pytest.raises(DataError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: {message}"


def test_an_unknown_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route\nto anywhere")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError) as caught:
        list(row_files.read(Source(path="someone/something", split="test")))
    assert str(caught.value) == (
        "someone/something[test]: can't be loaded from the hub: no route\n"
        "  name a local file, folder or glob if that was meant"
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    found = list(row_files.read(Source(path="someone/something")))
    assert [(str(r.place), r.value) for r in found] == [
        (f"someone/something[train] row {i}", value) for i, value in enumerate(ROWS, 1)
    ]


def _damage(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(damaged) + 1)
        what = rng.randrange(6)
        if what == 0:
            damaged[at:] = b""
        elif what == 1:
            damaged[at : at + rng.randint(1, 9)] = b""
        elif what == 2:
            damaged[at : at + 1] = bytes([rng.randrange(256)])
        elif what == 3:
            damaged[at:at] = rng.randbytes(rng.randint(1, 9))
        elif what == 4:
            damaged[at:at] = rng.choice([b'"', b"\n", b"\x00", b"{", b"]", b",", b"\r", b"\\", b"\xed\xa0\x80"])
        else:
            damaged[at:at] = damaged[at : at + 20]
        if not damaged:
            break
    return bytes(damaged)


@pytest.mark.parametrize("zipped", [False, True], ids=["", "gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_rows_or_an_error(tmp_path: Path, kind: str, zipped: bool) -> None:
    rng = random.Random(f"{kind}{zipped}")
    content = KINDS[kind]([{"prompt": f"word {i} ä", "completion": 'x, "y"\nz'} for i in range(6)])
    content = gzip.compress(content) if zipped else content
    path = tmp_path / f"a{kind}{'.gz' if zipped else ''}"
    errors = 0
    for _ in range(40):
        path.write_bytes(_damage(content, rng))
        try:
            for row in read(path):
                assert (row.value is None) == bool(row.problem)
                assert str(row.place).startswith(str(path))
        except DataError as error:
            errors += 1
            assert error.problems[0].place is not None, "no place"  # noqa: PT017 - the error is one of two right ends
    if zipped or kind in (".json", ".parquet"):
        assert errors > 5


def test_tools_of_a_table_have_no_keys_of_other_tools(tmp_path: Path) -> None:
    """Arrow gives each object of a column the keys of all: what a schema never said is null there."""
    one = {"type": "function", "function": {"name": "a", "parameters": {"properties": {"x": {"type": "string"}}}}}
    two = {"type": "function", "function": {"name": "b", "parameters": {"properties": {"y": {"type": "number"}}}}}
    values = [{"id": 1, "tools": [one]}, {"id": None, "tools": [two]}]
    assert pa.Table.from_pylist(values).to_pylist() != values
    assert [row.value for row in read(write(tmp_path, "a.parquet", as_parquet(values)))] == values


def test_hidden_files_and_papers_of_a_folder_are_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", ".ipynb_checkpoints/a.jsonl", ".cache/b.jsonl", ".c.jsonl", "deep/LICENSE.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    for name in ("requirements.txt", "README.txt", "tale.txt"):
        (tmp_path / name).write_text("words")
    assert [file.name for file in row_files.files(tmp_path)] == ["a.jsonl", "tale.txt"]
    (tmp_path / "a.jsonl").unlink()
    found = [file.name for file in row_files.files(tmp_path)]  # a folder of texts alone is what it is
    assert found == ["README.txt", "LICENSE.txt", "requirements.txt", "tale.txt"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    text = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([text, text], names=["text", "text"]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("\ntext,id,text\na,1,b\n")
    for name, line in (("a.parquet", ""), ("a.csv", ":2")):
        with pytest.raises(DataError) as caught:
            list(row_files.read(Source(path=str(tmp_path / name))))
        assert f"{name}{line}: two columns are named `text`" in str(caught.value)


def test_a_column_of_dates_does_not_refuse_a_table(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": ["a", "b"],
            "far": pa.array([1 << 62, None], pa.timestamp("us")),
            "fine": pa.array([1, 2], pa.timestamp("ns")),
            "day": pa.array([2**30, 0], pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = [row.value or {} for row in row_files.read(Source(path=str(tmp_path / "a.parquet")))]
    assert [value["text"] for value in found] == ["a", "b"]
    assert found[0]["far"] == Unreadable("timestamp[us]: date value out of range")
    assert found[1]["far"] is None
