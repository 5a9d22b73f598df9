"""Patterns and verbalizers: how a row with a label is read, its tokens, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import loratune
from loratune.data import dataset, labels
from loratune.data.encode import Encoder
from loratune.data.formats import Patterns, Plain, RowError
from loratune.data.formats.pattern import parts_of
from loratune.errors import DataError, Place
from tests import labelled, tiny

TOKENS = tiny.tokenizer()
REVIEW = {"text": "A dull film.", "label": "neg"}


def form(**changes: Any) -> Patterns:
    return Patterns.model_validate({**labelled.FORMAT, **changes})


def texts(part: Any) -> tuple[str, str]:
    (before, trained), (after, learned) = part.segments
    assert (trained, learned, part.closed) == (False, True, False)
    return before, after


def test_each_pattern_with_each_label() -> None:
    found = form().read(REVIEW)
    assert [texts(part) for part in found.parts] == [
        ("A dull film. It was", " bad"),
        ("A dull film. It was", " good"),
        ("Review: A dull film.\nSentiment:", " bad"),
        ("Review: A dull film.\nSentiment:", " good"),
    ]
    assert (found.labels, found.what) == ((1.0, 0.0), "labels")
    assert form().rows_per_sample == len(found.parts)
    assert form().read({**REVIEW, "label": "pos"}).labels == (0.0, 1.0)


def test_columns_braces_and_numbers() -> None:
    """Braces in a value are text: nothing is filled in twice."""
    made = form(patterns="{{{title}}}: {n} of {title}? {text}")
    assert made.columns == ("title", "n", "text")
    row = {"title": "{text}", "n": 3, "text": "x", "label": "neg"}
    assert texts(made.read(row).parts[0])[0] == "{{text}}: 3 of {text}? x"
    assert made.read({**row, "n": 0.5}).parts[0].segments[0][0].startswith("{{text}}: 0.5 of")
    assert made.unread({**row, "rest": "y", "none": None}, "") == ["rest"]


@pytest.mark.parametrize(
    ("value", "key"),
    [(True, "true"), (False, "false"), (1, "1"), (-2, "-2"), (2.0, "2"), ("1", "1"), ("true", "true")],
)
def test_labels_are_compared_as_text(value: Any, key: str) -> None:
    made = form(verbalizers={"other": " no", key: " yes"})
    assert made.read({"text": "x", "label": value}).labels == (0.0, 1.0)


@pytest.mark.parametrize("pattern", ["{a", "a}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{ }"])
def test_braces_hold_a_column_and_nothing_else(pattern: str) -> None:
    with pytest.raises(ValueError):
        parts_of(pattern)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"label": "bad"}, "`label` is `bad`, which is no label of `data.format.verbalizers`: `neg`, `pos`"),
        ({"label": 1.5}, "`label` must be a string, an integer or a boolean, given a number"),
        ({"label": 1e300}, "`label` must be a string, an integer or a boolean, given a number"),
        ({"label": 1.0}, "`label` is `1`, which is no label"),
        ({"label": None}, "`label` must be a string, an integer or a boolean, given null"),
        ({"label": True}, "`label` is `true`, which is no label"),
        ({"text": ""}, "`text` is empty, but a pattern names it"),
        ({"text": " \n"}, "`text` is empty, but a pattern names it"),
        ({"text": None}, "`text` must be a string or a number, as a pattern names it, given null"),
        ({"text": True}, "given a boolean"),
        ({"text": float("nan")}, "given NaN (not a number)"),
        ({"text": float("-inf")}, "given an infinite number"),
        ({"text": ["a"]}, "given a list"),
    ],
    ids=str,
)
def test_bad_rows(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError) as error:
        form().read({**REVIEW, **changes})
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["text", "label"])
def test_a_column_that_is_missing(name: str) -> None:
    with pytest.raises(RowError, match=f"`{name}` is missing; the row's columns: `"):
        form().read({key: value for key, value in REVIEW.items() if key != name})


def read(folder: Path, rows: list[dict[str, Any]], tokens: Any = TOKENS, **fields: Any) -> dataset.Rows:
    train = tiny.write_jsonl(folder / "labelled.jsonl", rows)
    section = tiny.data(train=str(train), **{"format": labelled.FORMAT, **fields})
    return dataset.of(section, 0, Encoder(tokens))[0]


@pytest.mark.parametrize("bos", [None, "<|im_start|>"])
def test_tokens_are_those_of_pattern_and_verbalizer(tmp_path: Path, bos: str | None) -> None:
    """No end of text; a BOS where the tokenizer adds one; of the verbalizer every token, and no other, is a label."""
    tokens = tiny.tokenizer(bos=bos)
    if bos:
        tokens.add_bos_token = True
    rows = read(tmp_path, [REVIEW, {"text": "Fine.", "label": "pos"}], tokens)
    assert (len(rows), rows.samples, rows.per_sample, rows.sample_word) == (8, 2, 4, "row")
    for index, part in enumerate(form().read(REVIEW).parts):
        before, after = texts(part)
        front = tokens(before, add_special_tokens=True).input_ids
        row = rows[index]
        assert row.ids.tolist() == front + tokens(after, add_special_tokens=False).input_ids
        assert np.flatnonzero(row.trained).tolist() == list(range(len(front), len(row.ids)))
        assert row.ids[-1] != tokens.eos_token_id
    assert np.stack(rows.labels).tolist() == [[1, 0], [0, 1]]
    assert [rows.sample(index).labels.tolist() for index in (0, 1)] == [[1, 0], [0, 1]]


def merging() -> PreTrainedTokenizerFast:
    """Return a tokenizer that merges `s` and a space, and a space and `g`."""
    words = ["▁", *"abdeosgtxIw:.", "s▁", "▁g"]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("s", "▁"), ("▁", "g")], unk_token="."))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Replace("▁", " ")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="x", clean_up_tokenization_spaces=False)


def test_no_token_crosses_from_the_pattern_into_the_verbalizer() -> None:
    """`s` and ` ` would merge: the tokens of the pattern stay what they are before every label."""
    tokens = merging()
    encoder = Encoder(tokens)
    parts = form(patterns="{text} was", verbalizers={"neg": " bad", "pos": " good"}).read(
        {"text": "It", "label": "neg"}
    )
    front = tokens("It was").input_ids
    for part, own in zip(parts.parts, ("▁", "▁g"), strict=True):
        row = encoder.encode(part, Place("made"))
        assert row.ids[: len(front)].tolist() == front
        learned = tokens.convert_ids_to_tokens(row.ids[row.trained].tolist())
        assert learned[0] == own
        assert int(row.trained.sum()) == len(row.ids) - len(front)


def test_a_verbalizer_that_is_cut_is_not_compared(tmp_path: Path) -> None:
    """A row that is too long is left out with all its labels."""
    long = {"text": "word " * 30, "label": "pos"}
    rows = read(
        tmp_path, [REVIEW, long, {"text": "Fine.", "label": "pos"}], max_length=64, on_long="drop", max_lost=0.5
    )
    assert (rows.samples, rows.counts.dropped) == (2, 1)
    assert np.stack(rows.labels).tolist() == [[1, 0], [0, 1]]


def test_the_same_tokens_for_two_labels() -> None:
    tokens = tiny.tokenizer()
    tokens.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match="the tokens of the labels `neg`, `pos` are the same after pattern 1"):
        labels.check_verbalizers(form(verbalizers={"neg": " no", "pos": " NO"}), Encoder(tokens))


def test_a_label_that_begins_with_another() -> None:
    made = form(verbalizers={"good": " good", "bad": " bad", "best": " good indeed"})
    (note,) = labels.check_verbalizers(made, Encoder(TOKENS))
    assert note == (
        "the tokens of the label `best` begin with those of `good`: by their sum, `good` is always the likelier"
    )
    assert labels.check_verbalizers(form(), Encoder(TOKENS)) == []


def test_labels_that_no_row_has(tmp_path: Path) -> None:
    made = form(verbalizers={"neg": " bad", "pos": " good", "mixed": " so so"})
    rows = read(tmp_path, labelled.rows(6), format=made.model_dump())
    assert labels.counted(made, rows) == {"neg": 3, "pos": 3, "mixed": 0}
    assert labels.check_seen(made, rows) == ["no training row has the label `mixed`"]
    assert labels.check_seen(form(), read(tmp_path, labelled.rows(6))) == []
    with pytest.raises(DataError, match="all 3 training rows have the label `neg`"):
        labels.check_seen(form(), read(tmp_path, labelled.rows(6)[::2]))


def test_the_order_of_labels_is_part_of_the_cache_s_key(tmp_path: Path) -> None:
    """Else another recipe's rows would be read with labels that mean the others."""
    given = labelled.rows(4)
    straight = read(tmp_path, given)
    turned = read(tmp_path, given, format={**labelled.FORMAT, "verbalizers": {"pos": " good", "neg": " bad"}})
    assert not turned.cached
    assert np.stack(turned.labels).tolist() == np.stack(straight.labels)[:, ::-1].tolist()
    assert read(tmp_path, given).cached


def test_a_run_says_how_many_rows_have_each_label(fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verbalizers = {"neg": " bad", "pos": " good", "best": " good indeed"}
    labelled.fitted(fit, tmp_path, 12)(data={"format": {**labelled.FORMAT, "verbalizers": verbalizers}})
    said = capsys.readouterr().err
    assert "labels   neg 6, pos 6, best 0" in said
    assert "no training row has the label `best`" in said
    assert "the tokens of the label `best` begin with those of `pos`" in said
    assert "where to stop" not in said, "no end is learned, and none is missed"


def test_a_run_with_one_label_is_refused(fit: Any, tmp_path: Path) -> None:
    train = tiny.write_jsonl(tmp_path / "one.jsonl", labelled.rows(8)[::2])
    with pytest.raises(DataError, match="have the label `neg`: it would be learned for any text"):
        labelled.fitted(fit, tmp_path)(data={"train": str(train)})


def test_inspect_names_pattern_and_label(tmp_path: Path, base: Path) -> None:
    from loratune.commands import inspect

    train = tiny.write_jsonl(tmp_path / "rows.jsonl", labelled.rows(4))
    path = tiny.write_recipe(
        tmp_path, base, objective="pattern", data={"train": str(train), "eval": None, "format": labelled.FORMAT}
    )
    found = inspect.inspect(loratune.load_recipe(path), row=2)
    assert (found.rows, found.pairs) == (4, False)
    assert [one.answer for one in found.shown] == [
        "pattern 1: neg", "pattern 1: pos (its label)", "pattern 2: neg", "pattern 2: pos (its label)",
    ]  # fmt: skip
    assert [[piece.text for piece in one.pieces if piece.trained] for one in found.shown] == [
        [" bad"], [" good"], [" bad"], [" good"],
    ]  # fmt: skip
    text = inspect.as_text(found, colour=False)
    assert "\nrow 2 pattern 1: pos (its label)  " in text
    assert "It was[[ good]]" in text
    assert "4 rows, " in text


def test_a_plain_text_ends_where_nothing_else_is_said() -> None:
    row = Encoder(TOKENS).encode(Plain((("a", False), ("b", True))), Place("made"))
    assert row.ids[-1] == TOKENS.eos_token_id
    assert row.trained.tolist() == [False, True, True]
