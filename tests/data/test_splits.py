"""Of a data folder whose files are named for splits, only what is meant is read, and what is left out is told."""

from __future__ import annotations

import json
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from loratune.cli import app
from loratune.config.yaml_nodes import parse
from loratune.data import dataset, row_files, splits
from loratune.data.encode import Encoder
from loratune.data.section import Data, Source
from loratune.errors import DataError
from loratune.models import base_files
from loratune.recipe import from_tree
from loratune.training import start_report
from tests import tiny

HUB = ("README.txt", "data/train-00000-of-00001.jsonl", "test.jsonl", "validation.jsonl")


def lay(folder: Path, *names: str) -> Path:
    """Write a row that says its own name into each file of a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": "name", "completion": name}) + "\n")
    return folder


def read(folder: Path, name: str) -> list[str]:
    return [str(file.relative_to(folder)) for file in row_files.chosen(folder, name).files]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00001.parquet", "train"),
        ("my_training_set.csv", "train"),
        ("train/test/part.jsonl", "test"),
        ("test/part-0.jsonl", "test"),
        ("TEST.jsonl", "test"),
        ("dev.jsonl.gz", "validation"),
        ("set-val2.jsonl", "validation"),
        ("valid/x.txt", "validation"),
        ("eval.jsonl", "test"),
        ("evaluation.json", "test"),
        ("contest.jsonl", None),
        ("retrained.jsonl", None),
        ("developers/values.jsonl", None),
        ("trained.jsonl", None),
    ],
)
def test_splits_are_words_of_a_name(name: str, split: str | None) -> None:
    assert splits.of(Path(name)) == split


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (HUB, [HUB[1]], [HUB[3]]),
        (("train/a.jsonl", "test/a.jsonl"), ["train/a.jsonl"], ["test/a.jsonl"]),
        (("a.jsonl", "test.jsonl"), ["a.jsonl"], ["test.jsonl"]),
        (("a.jsonl", "train.jsonl"), ["a.jsonl", "train.jsonl"], ["a.jsonl"]),
        (("a.jsonl", "b.jsonl"), ["a.jsonl", "b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (("test-a.jsonl", "test-b.jsonl"), ["test-a.jsonl", "test-b.jsonl"], ["test-a.jsonl", "test-b.jsonl"]),
        (("train-a.jsonl", "train-b.jsonl"), ["train-a.jsonl", "train-b.jsonl"], ["train-a.jsonl", "train-b.jsonl"]),
    ],
)
def test_the_split_that_is_meant_is_read(
    tmp_path: Path, names: tuple[str, ...], train: list[str], held_out: list[str]
) -> None:
    folder = lay(tmp_path / "test", *names)  # what leads to the folder says nothing of its files
    assert read(folder, "train") == train
    assert read(folder, "eval") == held_out
    assert [str(file.relative_to(folder)) for file in row_files.files(folder / "**")] == sorted(
        names
    )  # a glob is meant


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    folder = lay(tmp_path, *HUB, ".ipynb_checkpoints/a.jsonl")
    assert row_files.chosen(folder).told == (
        f"{folder}: test.jsonl, validation.jsonl are left out: named for other splits, test and validation "
        "(set data.eval to evaluate on them)",
        f"{folder}: .ipynb_checkpoints/a.jsonl, README.txt are left out: hidden or text files next to rows",
    )
    assert "test.jsonl, data" not in row_files.chosen(folder, "eval").told[0]
    only = lay(tmp_path / "only", "test.jsonl")
    assert row_files.chosen(only).told == (f"{only}: all files are read, though named for another split, test",)
    only = lay(tmp_path / "trained", "train.jsonl")
    assert row_files.chosen(only, "eval").told == (
        f"{only}: all files are read, though named for another split, train",
    )
    assert row_files.chosen(only).told == ()


def test_rows_of_a_folder_and_of_its_cache(tmp_path: Path) -> None:
    folder = lay(tmp_path / "set", *HUB)
    encoder = Encoder(tiny.tokenizer())
    source = Source(path=str(folder))
    section = Data(train=(source,), eval=(source,))
    for cached in (False, True):
        train, held_out = (dataset.load([source], section, encoder, name=name) for name in ("train", "eval"))
        assert (train.cached, held_out.cached) == (cached, cached)
        assert [train.place(i).source for i in range(len(train))] == [str(folder / HUB[1])]
        assert [held_out.place(i).source for i in range(len(held_out))] == [str(folder / HUB[3])]
        told = train.told(held_out)
        assert len(told) == 3
        assert all(line.startswith(f"data: {folder}: ") for line in told)
    lay(folder, "train/b.jsonl")
    assert len(dataset.load([source], section, encoder)) == 2  # another choice, other rows
    recipe = f"{{model: {{base: x}}, data: {{train: {folder}, eval: {folder}}}, output: out}}"
    found = start_report.sources(from_tree(parse(recipe, "recipe.yaml"), tmp_path))
    assert [Path(one["path"]).name for one in found] == ["train-00000-of-00001.jsonl", "b.jsonl", "validation.jsonl"]


def test_eval_tells_what_it_does_not_read(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    folder = tmp_path / "set"
    for name in ("train", "test"):
        tiny.write_jsonl(folder / f"{name}.jsonl", [{"prompt": "hi", "completion": name, "score": 1}])
    args = ["eval", str(base), "--data", str(folder), "--format", "completion", "--no-generate"]
    for cache in ("read", "damaged"):
        done = CliRunner().invoke(app, args)
        assert done.exit_code == 0, done.output
        assert f"data: {folder}: train.jsonl is left out: named for another split, train" in done.output
        assert "not read, though not empty: `score` (1 rows)" in done.output
        assert (dataset.DAMAGED in done.output) == (cache == "damaged")
        for file in (base_files.cache() / "rows").rglob("*.arrow"):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)


FAR = pa.array([1 << 62], pa.timestamp("us"))
COLUMNS = {
    "price": (pa.array([Decimal("1.50")]), "Decimal"),
    "wide": (pa.array([Decimal("1.50")], pa.decimal256(50, 9)), "Decimal"),
    "picture": (pa.array([b"\xff\x00"]), "bytes"),
    "hash": (pa.array([b"ab"], pa.binary(2)), "bytes"),
    "when": (pa.array([1], pa.timestamp("ns", tz="Europe/Berlin")), "Timestamp|datetime"),
    "nowhere": (
        pa.array([1], pa.timestamp("us", tz="Nowhere/At")),
        "a value that can't be read .timestamp.us, tz=Nowhere/At",
    ),
    "far": (FAR, "a value that can't be read .timestamp.us.: date value out of range"),
    "fars": (pa.ListArray.from_arrays([0, 1], FAR), "a value that can't be read .list<.*date value out of range"),
    "about": (pa.StructArray.from_arrays([FAR], names=["far"]), "a value that can't be read .struct<far: timestamp"),
    "day": (pa.array([date(2026, 1, 1)]), "date"),
    "hour": (pa.array([1], pa.time64("us")), "time"),
    "length": (pa.array([1], pa.duration("us")), "timedelta"),
    "deep": (pa.array([{"a": {"b": [Decimal("1")], "c": datetime(2026, 1, 1)}}]), "an object"),
    "map": (pa.array([[("k", b"v")]], pa.map_(pa.string(), pa.binary())), "a list"),
    "code": (pa.array([7]).dictionary_encode(), "a number"),
    "nothing": (pa.nulls(1), "null"),
}


def table_of(folder: Path, name: str) -> Source:
    pq.write_table(pa.table({"text": ["a"], name: COLUMNS[name][0]}), folder / "a.parquet")
    return Source(path=str(folder / "a.parquet"))


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_nobody_asked_for_refuse_no_table(tmp_path: Path, name: str) -> None:
    source, encoder = table_of(tmp_path, name), Encoder(tiny.tokenizer())
    found = dataset.load([source], Data(train=(source,)), encoder)
    assert encoder.tokenizer.decode(found[0].ids, skip_special_tokens=True) == "a"
    assert found.unread == ({} if name == "nothing" else {name: 1})


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_that_is_no_text_and_needed_is_named(tmp_path: Path, name: str) -> None:
    source = table_of(tmp_path, name)
    section = Data.model_validate({"train": source, "format": {"type": "text", "text": name}})
    remedy = "" if COLUMNS[name][1] in ("an object", "a list", "a number", "null") else ".*: write that column as text"
    with pytest.raises(DataError, match=f"row 1: `{name}` must be a string, given ({COLUMNS[name][1]}){remedy}"):
        dataset.load([source], section, Encoder(tiny.tokenizer()))


def test_a_column_of_a_dictionary_is_text(tmp_path: Path) -> None:
    texts = ["a", "b", "a", None]
    pq.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), tmp_path / "a.parquet")
    found = [row.value or {} for row in row_files.read(Source(path=str(tmp_path / "a.parquet")))]
    assert [row["text"] for row in found] == texts


def test_keys_of_one_name_within_a_column_are_refused(tmp_path: Path) -> None:
    inner = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    pq.write_table(pa.table({"text": ["a"], "about": inner}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two keys of `about` are named `x`"):
        list(row_files.read(Source(path=str(tmp_path / "a.parquet"))))
