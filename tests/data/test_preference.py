"""Preference rows: how they are read, what of them is compared, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratune.data import dataset
from loratune.data.encode import Encoder
from loratune.data.formats import Conversation, Group, Plain, Preference, RowError
from loratune.data.section import Data
from loratune.errors import DataError, RecipeError
from loratune.recipe import load
from tests import pairs, tiny

USER = {"role": "user", "content": "hi"}
GOOD, BAD = ({"role": "assistant", "content": word} for word in ("good", "bad"))


def read(**row: Any) -> Group:
    return Preference().read(row)


def test_texts_are_plain() -> None:
    assert read(prompt="q: ", chosen="a", rejected="b") == Group(
        (Plain((("q: ", False), ("a", True))), Plain((("q: ", False), ("b", True))))
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_messages_with_the_prompt_apart_or_inside(row: dict[str, Any]) -> None:
    assert read(**row) == Group((Conversation((USER, GOOD), (False, True)), Conversation((USER, BAD), (False, True))))


def test_earlier_answers_are_part_of_the_prompt() -> None:
    """Of two conversations with the same first turns, the last ones alone are compared."""
    before = [USER, GOOD, {"role": "user", "content": "and?"}]
    pair = read(chosen=[*before, GOOD], rejected=[*before, BAD])
    assert isinstance(pair.parts[0], Conversation)
    assert pair.parts[0].trained == (False, False, False, True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "chosen": "a"}, "`rejected` is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "`rejected` is empty: there is nothing to compare"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "`rejected` is the same as `chosen`"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, "`prompt` must be a list of messages"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": "b"}, "`rejected` must be a list of messages"),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD, USER]},
            "`rejected` must end with an assistant message",
        ),
        ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "`chosen` must end with an assistant message"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "`chosen` has no assistant message"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "`rejected` is the same as `chosen`"),
    ],
)
def test_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=said):
        read(**row)


def test_unread_columns_are_told() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score": 3}
    assert Preference().unread(row, "") == ["score"]
    row = {"prompt": [USER | {"name": "x"}], "chosen": [GOOD], "rejected": [BAD], "score": 3}
    assert Preference().unread(row, "") == ["score", "prompt[].name"]


def load_pairs(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> dataset.Rows:
    data = tiny.data(train=str(tiny.write_jsonl(folder / "rows.jsonl", rows)), format="preference", **fields)
    return dataset.load(data.train, data, Encoder(tiny.tokenizer()))


def test_rows_of_a_pair_stay_together(tmp_path: Path) -> None:
    found = load_pairs(tmp_path, pairs.rows(9))
    assert (len(found), found.samples, found.per_sample) == (18, 9, 2)
    tokens = tiny.tokenizer()
    for index in range(9):
        chosen, rejected = found.sample(index).rows
        assert chosen.place == rejected.place
        for row, word in ((chosen, "yes"), (rejected, "no")):
            said = tokens.decode(row.ids[row.trained].tolist())
            assert said.startswith(word)
            assert said.endswith("<|im_end|>")
        common = int(np.argmax(chosen.ids[: len(rejected.ids)] != rejected.ids[: len(chosen.ids)]))
        assert not chosen.trained[:common].any()
    assert found.sizes.tolist() == [2 * max(map(len, (r.ids for r in found.sample(i).rows))) for i in range(9)]


def test_held_out_pairs_stay_whole(tmp_path: Path) -> None:
    train, held = dataset.hold_out(load_pairs(tmp_path, pairs.rows(20)), 0.3, 0)
    assert (train.samples, held.samples) == (14, 6)
    for rows in (train, held):
        assert all(len({row.place for row in rows.sample(i).rows}) == 1 for i in range(rows.samples))


@pytest.mark.parametrize("on_long", ["drop", "truncate"])
def test_a_pair_with_one_long_answer_is_kept_whole_or_not_at_all(tmp_path: Path, on_long: str) -> None:
    rows = pairs.rows(6)
    rows[2]["rejected"][0]["content"] = "no " * 60
    found = load_pairs(tmp_path, rows, max_length=96, on_long=on_long, max_lost=1)
    assert found.samples == (5 if on_long == "drop" else 6)
    assert all(len({row.place for row in found.sample(i).rows}) == 1 for i in range(found.samples))
    assert found.lengths.max() <= 96


def test_the_same_pair_twice_is_a_duplicate(tmp_path: Path) -> None:
    rows = pairs.rows(5)
    assert load_pairs(tmp_path, [*rows, rows[1]], duplicates="drop").samples == 5


def test_pairs_are_recognised_for_dpo_alone(tmp_path: Path, base: Path) -> None:
    tiny.write_recipe(tmp_path, base)
    tiny.write_jsonl(tmp_path / "train.jsonl", pairs.rows(5))
    assert load(tmp_path / "recipe.yaml", ["objective=dpo"]).data.format.type == "preference"
    told = "`objective: dpo` does not learn from rows of `data.format: chat`"
    with pytest.raises(RecipeError, match=told):
        load(tmp_path / "recipe.yaml", ["objective=dpo", "data.format=chat"])
    with pytest.raises(RecipeError, match=r"`objective: sft` does not learn from rows of `data.format: preference`"):
        load(tmp_path / "recipe.yaml", ["data.format=preference"])
    section: Data = load(tmp_path / "recipe.yaml").data
    with pytest.raises(DataError, match="`format: preference` reads them, for `objective: dpo`"):
        dataset.load(section.train, section, Encoder(tiny.tokenizer()))


def test_values_follow_their_pairs(tmp_path: Path) -> None:
    rows = replace(load_pairs(tmp_path, pairs.rows(5)), values={"known": np.arange(5.0)})
    some = rows.take(np.array([2, 3, 8, 9]))
    assert [some.sample(i).values["known"] for i in range(2)] == [1.0, 4.0]
    assert [some.sample(i).place for i in range(2)] == [rows.sample(1).place, rows.sample(4).place]


def _stored(folder: Path, rows: list[dict[str, Any]], template: str = tiny.CHATML, **fields: Any) -> dataset.Rows:
    path = tiny.write_jsonl(folder / "rows.jsonl", rows)
    section = Data.model_validate({"train": str(path), "format": "preference", **fields})
    return dataset.of(section, 0, Encoder(tiny.tokenizer(template)))[0]


def test_answers_that_the_template_makes_the_same_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "chosen": [GOOD], "rejected": [{"role": "assistant", "content": "good "}]}]
    trimmed = tiny.CHATML.replace("message['content']", "message['content'] | trim")
    with pytest.raises(DataError, match=r"rows.jsonl:1: has two answers with the same tokens"):
        _stored(tmp_path, rows, trimmed)


def test_answers_that_are_the_same_once_cut_are_dropped(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q ", "chosen": "a long answer, good", "rejected": "a long answer, bad"},
        {"prompt": "q ", "chosen": "good", "rejected": "bad"},
    ]
    found = _stored(tmp_path, rows, max_length=12, on_long="truncate", max_lost=1)
    assert (found.samples, found.counts.dropped, found.counts.truncated) == (1, 1, 0)


def test_a_pair_that_is_trained_on_too_is_named_once(tmp_path: Path) -> None:
    for name, rows in (("rows", pairs.rows(4)), ("held", pairs.rows(4)[:2])):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    section = Data.model_validate(
        {"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "held.jsonl"), "format": "preference"}
    )
    with pytest.raises(DataError) as caught:
        dataset.of(section, 0, Encoder(tiny.tokenizer()))
    assert str(caught.value).count("is also a training row") == 2
    assert "2 of 2 eval rows" in str(caught.value)
