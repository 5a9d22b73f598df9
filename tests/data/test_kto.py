"""Rated answers: how a prompt, an answer and its label are read, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratune.data import dataset
from loratune.data.encode import Encoder
from loratune.data.formats import Conversation, Group, Plain, Rated, RowError
from tests import rated, tiny

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "good"}
CHAT = Conversation((USER, GOOD), (False, True))


def read(**row: Any) -> Group:
    return Rated().read(row)


@pytest.mark.parametrize(
    ("label", "number"),
    [
        (True, 1.0), (False, 0.0), (1, 1.0), (0, 0.0), (1.0, 1.0), ("true", 1.0), ("False", 0.0), (" TRUE ", 1.0),
        ("0", 0.0), ("1", 1.0),
    ],
)  # fmt: skip
def test_labels(label: Any, number: float) -> None:
    found = read(prompt="q: ", completion="a", label=label)
    assert found == Group((Plain((("q: ", False), ("a", True))),), labels=(number,), what="completions")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "completion": [GOOD], "label": False},
        {"prompt": [USER], "completion": "good", "label": False},
        {"prompt": "hi", "completion": [GOOD], "label": False},
        {"prompt": json.dumps([USER]), "completion": json.dumps([GOOD]), "label": "0"},
        {"messages": [USER, GOOD], "label": False},
        {"messages": [USER, GOOD], "kto_tag": "false"},
        {"messages": [USER, GOOD], "kto_tag": False, "label": None},
        {"messages": [USER, GOOD], "kto_tag": False, "label": 0},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "good"}], "label": False},
        {"messages": [USER, GOOD], "prompt": None, "completion": "", "label": False},
    ],
)
def test_messages(row: dict[str, Any]) -> None:
    assert Rated().read(row) == Group((CHAT,), labels=(0.0,), what="completions")


def test_of_a_conversation_the_last_answer_is_rated() -> None:
    found = read(messages=[USER, GOOD, USER, GOOD], label=True).parts[0]
    assert isinstance(found, Conversation)
    assert found.trained == (False, False, False, True)


def test_other_column_names() -> None:
    form = Rated(prompt="question", completion="reply", label="thumb")
    assert form.read({"question": "q", "reply": "a", "thumb": 0}).labels == (0.0,)
    assert form.read({"messages": [USER, GOOD], "thumb": True}) == Group((CHAT,), (1.0,), "completions")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "completion": "a"}, "`label` is missing; the row's columns: `prompt`, `completion`"),
        ({"prompt": "q", "completion": "a", "label": None}, "`label` must be true or false (or 1 or 0), given null"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "`label` must be true or false (or 1 or 0), given `good`"),
        ({"prompt": "q", "completion": "a", "label": 2}, "given `2`"),
        ({"prompt": "q", "completion": "a", "label": 0.5}, "given `0.5`"),
        ({"prompt": "q", "completion": "a", "kto_tag": [True]}, "`kto_tag` must be true or false (or 1 or 0), given a list"),
        ({"prompt": "q", "completion": "a", "label": True, "kto_tag": False}, "`label` and `kto_tag` contradict"),
        ({"prompt": "q", "completion": " ", "label": True}, "`completion` is empty"),
        ({"prompt": "q", "label": True}, "`completion` is missing"),
        ({"prompt": 3, "completion": "a", "label": True}, "`prompt` must be a string, given a number"),
        ({"prompt": "", "completion": "a", "label": True}, "`prompt` is empty: there is no prompt"),
        ({"prompt": [], "completion": [GOOD], "label": True}, "`prompt` is empty: there is no prompt"),
        ({"prompt": [USER], "completion": 5, "label": True}, "`completion` must be a string, given a number"),
        ({"prompt": [USER], "completion": [USER, GOOD], "label": True}, "`completion` must begin with an assistant"),
        ({"prompt": [USER, GOOD], "completion": [GOOD], "label": True}, "the answer follows one of the role `assistant`"),
        ({"messages": [{**USER, "role": "system"}, GOOD], "label": 1}, "the answer follows one of the role `system`"),
        ({"messages": [GOOD], "label": True}, "`messages` must answer a message of the user's (or a tool's)"),
        ({"prompt": [USER], "completion": [USER], "label": True}, "`completion` has no assistant message"),
        ({"prompt": [USER], "completion": [GOOD, USER], "label": True}, "`completion` must end with an assistant"),
        ({"messages": [USER, GOOD, USER], "label": True}, "`messages` must end with an assistant message"),
        ({"messages": [USER], "label": True}, "`messages` has no assistant message"),
        ({"messages": [USER, {**GOOD, "content": " "}], "label": True}, "`messages` ends with an empty answer"),
        ({"prompt": [USER], "completion": [{**GOOD, "content": ""}], "label": True}, "ends with an empty answer"),
    ],
)  # fmt: skip
def test_refused(row: dict[str, Any], told: str) -> None:
    with pytest.raises(RowError) as raised:
        Rated().read(row)
    assert told in str(raised.value)


def test_unread_columns_are_told() -> None:
    assert Rated().unread({"prompt": "q", "completion": "a", "label": True, "score": 3}, "") == ["score"]
    assert Rated().unread({"messages": [USER, GOOD], "kto_tag": False, "score": 3}, "") == ["score"]
    row = {"prompt": [USER | {"name": "x"}], "completion": [GOOD], "label": True, "score": 3}
    assert Rated().unread(row, "") == ["score", "prompt[].name"]


def load_rated(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> dataset.Rows:
    data = tiny.data(train=str(tiny.write_jsonl(folder / "rows.jsonl", rows)), format="kto", **fields)
    return dataset.load(data.train, data, Encoder(tiny.tokenizer()))


def test_labels_come_with_the_rows(tmp_path: Path) -> None:
    found = load_rated(tmp_path, rated.rows(9, bad=3))
    assert (len(found), found.samples) == (9, 9)
    assert found.first_labels.tolist() == [0, 1, 1] * 3
    tokens = tiny.tokenizer()
    for index in range(9):
        row = found.sample(index).rows[0]
        assert row.labels.tolist() == [found.first_labels[index]]
        said = tokens.decode(row.ids[row.trained].tolist())
        assert said.startswith("yes" if index % 3 else "no")
        assert said.endswith("<|im_end|>")
    assert found.take(np.array([3, 4])).first_labels.tolist() == [0, 1]


def test_other_formats_have_no_labels(tmp_path: Path) -> None:
    from tests import pairs
    from tests.data.test_preference import load_pairs

    assert np.isnan(load_pairs(tmp_path, pairs.rows(3)).first_labels).tolist() == [True] * 3


def test_the_same_answer_rated_both_ways_is_no_duplicate(tmp_path: Path) -> None:
    row = {"prompt": "q", "completion": "a"}
    found = load_rated(tmp_path, [{**row, "label": True}, {**row, "label": False}], duplicates="drop")
    assert found.first_labels.tolist() == [1, 0]
