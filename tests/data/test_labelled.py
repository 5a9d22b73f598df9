"""Labelled rows of odd texts and labels: each is read, or an error names what is wrong."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from loratune.data import dataset, labels
from loratune.data.encode import Encoder
from loratune.data.formats import Labelled, RowError
from loratune.data.formats.base import Group
from loratune.errors import DataError
from tests import tiny
from tests.conftest import Fit
from tests.faults import oddities
from tests.faults.odd_samples import ODD_LABELS

TEXTS: list[Any] = [
    "a", "x" * 50_000, "", " ", "\u3000\n\t", "\u200b", "\x00", "\x1b[2J", "\u202e", "\ud800", "a\udc00", "😀", "<|im_end|>",
    "{text}", "null", "\ufeff", 1, 0.5, float("nan"), True, None, [], ["a"], {"a": 1},
]  # fmt: skip


def _read(form: Labelled, row: dict[str, Any]) -> tuple[Group | None, str]:
    """Return what a row is read as, and why it can't be read."""
    try:
        return form.read(row), ""
    except RowError as error:
        return None, str(error)


def test_a_thousand_odd_rows_are_read_or_named() -> None:
    """The format alone: what it returns are names and finite numbers, and what it refuses names the column."""
    draw, ends = Random(0), Counter[str]()
    for kind in ("one", "several", "number"):
        form = Labelled(labels=kind)
        for _ in range(1_000):
            label = draw.choice(ODD_LABELS) if draw.random() < 0.7 else oddities.value(draw)
            row = {"text": draw.choice(TEXTS) if draw.random() < 0.3 else "a", "label": label}
            read, said = _read(form, row)
            if read is None:
                ends[f"{kind} refused"] += 1
                assert said.startswith(("`text` ", "`label` "))
                assert said.isprintable()
                assert len(said) < 200
                continue
            ends[f"{kind} read"] += 1
            assert (read.classes is None) == (kind == "number")
            assert all(name.encode() and name == name.strip() for name in read.classes or ())
            with np.errstate(all="raise"):
                assert all(math.isfinite(np.float32(one) ** 2) for one in read.labels)
    assert set(ends) == {f"{kind} {end}" for kind in ("one", "several", "number") for end in ("read", "refused")}


@pytest.mark.parametrize(
    ("kind", "label", "told"),
    [
        ("one", "\ud800", "has a lone surrogate (half a character): `\\ud800`"),
        ("one", "a\x1b[2Jb", "has a line end or another control character"),
        ("one", "two\nlines", "has a line end"),
        ("one", "x" * 1_001, "has 1,001 characters; the name of a class has at most 1,000"),
        ("one", float("nan"), "must be text, an integer or a boolean, given NaN (not a number)"),
        ("one", float("inf"), "must be text, an integer or a boolean, given an infinite number"),
        (
            "one",
            1e300,
            "must be text, an integer or a boolean, given a number: to predict a number set `labels: number`",
        ),
        ("several", ["a", ["b"]], "must be a list of texts, integers or booleans; a list is in it"),
        ("several", ["a", None], "must be a list of texts, integers or booleans; null is in it"),
        ("several", "[NaN]", "must be a list of texts, integers or booleans; NaN (not a number) is in it"),
        ("several", ["a", " "], "has an empty text in its list"),
        ("number", "x", "must be a number (`labels: number`), given a string: `x`"),
        ("number", "1_000", "must be a number (`labels: number`), given a string: `1_000`"),
        ("number", "1e400", "must be a finite number, given inf"),
        ("number", 10**400, "is 10000000000000000000000…, of which the square is beyond float32: at most 1e+18"),
        ("number", -1e19, "is -1e+19, of which the square is beyond float32"),
        ("number", float("nan"), "must be a finite number, given nan"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_what_is_wrong_with_a_label_is_said(kind: Any, label: Any, told: str) -> None:
    with pytest.raises(RowError) as error:
        Labelled(labels=kind).read({"text": "a", "label": label})
    assert str(error.value).startswith(f"`label` {told}")


def test_numbers_of_a_csv_file_are_read(tmp_path: Path) -> None:
    """Where all values are text."""
    (tmp_path / "rows.csv").write_text("text,label\na,1.5\nb, -2 \nc,1e3\n")
    data = tiny.data(train=str(tmp_path / "rows.csv"), format={"type": "labelled", "labels": "number"})
    found, _ = dataset.of(data, 0, Encoder(tiny.tokenizer()), pooled=True)
    assert [one.tolist() for one in found.labels] == [[1.5], [-2.0], [1000.0]]


def test_a_column_that_is_missing_is_told_with_the_others_in_short() -> None:
    with pytest.raises(
        RowError, match=r"^`label` is missing; the row's columns: `text`, `x{59}…`; `data.format.label` names another$"
    ):
        Labelled().read({"text": "a", "x" * 5_000: 1})


@pytest.mark.parametrize("classes", [["a", " b"], ["a", "b\n"], ["a", ""], ["a", "b\x00c"], ["a", "x" * 1_001]])
def test_classes_that_no_row_can_have_are_refused(classes: list[str]) -> None:
    with pytest.raises(ValidationError, match="must be names of 1 to 1,000 characters without control"):
        Labelled(classes=classes)  # type: ignore[arg-type]


def of(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> tuple[dataset.Rows, Labelled]:
    file = folder / "rows.jsonl"
    file.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    form = {"type": "labelled", **fields.pop("format", {})}
    data = tiny.data(train=str(file), format=form, on_bad_row="skip", max_lost=1.0, on_long="drop", **fields)
    made = data.format
    assert isinstance(made, Labelled)
    return dataset.of(data, 0, Encoder(tiny.tokenizer()), pooled=True)[0], made


@pytest.mark.parametrize("kind", ["one", "several", "number"])
def test_a_file_of_odd_rows_is_read(kind: str, tmp_path: Path) -> None:
    """Each row is kept or counted; a text that can't be tokenized is one of the latter."""
    label: Any = {"one": "x", "several": ["x", "y"], "number": 1}[kind]
    rows = [{"text": text, "label": label} for text in TEXTS]
    rows += [{"text": f"a {index}", "label": one} for index, one in enumerate((*ODD_LABELS, "x", "y"))]
    found, _ = of(tmp_path, rows, format={"labels": kind})
    counts = found.counts
    assert counts.read == len(rows)
    assert counts.kept + counts.lost == len(rows)
    assert all(np.isfinite(one).all() for one in found.labels)


def test_thousands_of_classes(tmp_path: Path) -> None:
    found, form = of(tmp_path, [{"text": f"a {number}", "label": number % 4_000} for number in range(5_000)])
    assert found.classes == tuple(map(str, range(4_000)))
    assert [int(one[0]) for one in found.labels] == [number % 4_000 for number in range(5_000)]
    assert labels.check_seen(form, found) == []


def test_the_report_of_a_run_counts_the_rows_of_the_first_labels(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"text": f"a {n}", "label": n % 30} for n in range(60)])
    fit("run", objective="classify", data={"train": str(file)}, train={"batch_size": 60})
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.strip().startswith("labels")]
    assert line.split(maxsplit=1)[1] == ", ".join(f"{n} 2" for n in range(24)) + " and 6 more labels"


def test_classes_that_differ_in_case_or_spaces_are_told(tmp_path: Path) -> None:
    names = ["good", "Good", " good ", "very bad", "very  bad", "so"]
    found, form = of(tmp_path, [{"text": f"a {number}", "label": name} for number, name in enumerate(names)])
    assert found.classes == ("Good", "good", "so", "very  bad", "very bad")
    (note,) = labels.check_seen(form, found)
    assert note == (
        "labels that differ in case or spaces alone are different classes: `Good`, `good`; `very  bad`, `very bad`"
    )


def test_an_error_about_all_rows_names_their_file(tmp_path: Path) -> None:
    rows = [{"text": f"a {number}", "label": "x"} for number in range(3)]
    found, form = of(tmp_path, rows, format={"classes": ["x", "y"]})
    with pytest.raises(DataError, match=r"rows\.jsonl: all 3 training rows have the label `x`"):
        labels.check_seen(form, found)
    several = {"labels": "several", "classes": ["x", "y"]}
    found, form = of(tmp_path, [{"text": f"a {number}", "label": []} for number in range(3)], format=several)
    with pytest.raises(DataError, match=r"rows\.jsonl: none of 3 training rows has a label"):
        labels.check_seen(form, found)
    found, form = of(tmp_path, [{"text": "a", "label": ["x"]}, {"text": "b", "label": []}], format=several)
    assert labels.check_seen(form, found) == ["no training row has the label `y`"]


def test_booleans_are_named_as_json_and_tables_have_them() -> None:
    for value in (True, "true"):
        assert Labelled().read({"text": "a", "label": value}).classes == ("true",)
