"""Preference rows: how they are read, what of them is compared, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratune import train
from loratune.data import dataset, prepare
from loratune.data.encode import Encoder, Row
from loratune.data.formats import Auto, Conversation, Group, Plain, Preference, RowError
from loratune.data.section import Data
from loratune.errors import DataError, Place, RecipeError
from loratune.models import base_model
from loratune.recipe import load
from tests import pairs, tiny

USER, OTHER = ({"role": "user", "content": word} for word in ("hi", "and?"))
SYSTEM = {"role": "system", "content": "be short"}
HUMAN = {"from": "human", "value": "hi"}
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
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": " hi\n", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD], "question": "of another column"},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": "bad"},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD, "prompt": None},
        {"messages": [USER, GOOD], "rejected_response": "bad"},
        {"messages": [USER, GOOD], "rejected_messages": [USER, BAD], "rejected_response": ""},
        {"messages": [USER], "chosen_response": "good", "rejected_response": "bad"},
        {
            "conversations": [HUMAN],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        {"chosen": [HUMAN, GOOD], "rejected": [USER, BAD]},
        {"instruction": "hi", "chosen": "good", "rejected": "bad", "input": ""},
        {"question": "hi", "chosen": "good", "rejected": "bad", "system": ""},
        {"input": "hi", "chosen_response": "good", "rejected_response": "bad", "chosen": None},
        {"query": "hi", "response": "good", "rejected_response": "bad"},
    ],
)
def test_columns_that_data_sets_have(row: dict[str, Any]) -> None:
    assert read(**row) == Group((Conversation((USER, GOOD), (False, True)), Conversation((USER, BAD), (False, True))))


def test_a_system_column_goes_first_and_an_input_after_its_instruction() -> None:
    row = {"instruction": "say", "input": "this", "system": "be short", "chosen": "good", "rejected": "bad"}
    pair = read(**row)
    asked = {"role": "user", "content": "say\n\nthis"}
    assert pair.parts[0] == Conversation((SYSTEM, asked, GOOD), (False, False, True))
    assert Preference().unread(row, "") == []
    again = read(conversations=[HUMAN], system="be short", chosen="good", rejected="bad")
    assert again.parts[1] == Conversation((SYSTEM, USER, BAD), (False, False, True))


def test_texts_are_messages_if_the_recipe_says_so() -> None:
    row = {"prompt": "hi", "chosen": "good", "rejected": "bad", "system": "be short"}
    assert Preference().unread(row, "") == ["system"]
    messages = Preference(texts="messages")
    assert messages.read(row).parts[0] == Conversation((SYSTEM, USER, GOOD), (False, False, True))
    assert messages.unread(row, "") == []


def test_columns_that_the_recipe_names_are_read_as_they_are() -> None:
    row = {"question": "q: ", "best": "a", "worst": "b", "chosen": "x", "rejected": "y", "prompt": "z"}
    named = Preference(prompt="question", chosen="best", rejected="worst")
    assert named.read(row) == read(prompt="q: ", chosen="a", rejected="b")
    assert named.unread(row, "") == ["chosen", "rejected", "prompt"]
    with pytest.raises(RowError, match="`question` is missing"):
        named.read({"prompt": "q", "best": "a", "worst": "b"})


def test_a_text_that_is_no_list_of_messages_stays_text() -> None:
    row = {"prompt": "in JSON: ", "chosen": '[{"role": "admin"}]', "rejected": '[{"role": "user", "age": 3}'}
    assert read(**row).parts[0] == Plain((("in JSON: ", False), ('[{"role": "admin"}]', True)))


def test_turns_after_the_first_difference_are_trained() -> None:
    """Also where the prompt is apart: a first answer that both have is part of it."""
    tail = [OTHER, GOOD]
    for row in (
        {"chosen": [USER, GOOD, *tail], "rejected": [USER, BAD, OTHER, BAD]},
        {"prompt": [USER], "chosen": [GOOD, *tail], "rejected": [BAD, OTHER, BAD]},
    ):
        pair = read(**row)
        assert [part.trained for part in pair.parts if isinstance(part, Conversation)] == [
            (False, True, False, True)
        ] * 2
    pair = read(prompt=[USER], chosen=[BAD, OTHER, GOOD], rejected=[BAD, OTHER, BAD])
    assert [part.trained for part in pair.parts if isinstance(part, Conversation)] == [(False, False, False, True)] * 2


def test_a_margin_is_read_if_the_recipe_names_its_column() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 8, "score_rejected": 2.5, "gap": 1e-3}
    assert Preference().read(row).labels == ()
    assert Preference().unread(row, "") == ["score_chosen", "score_rejected", "gap"]
    scores = Preference.model_validate({"margin": ["score_chosen", "score_rejected"]})
    assert scores.read(row).labels == (5.5,)
    assert scores.unread(row, "") == ["gap"]
    assert Preference.model_validate({"margin": "gap"}).read(row).labels == (1e-3,)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "`gap` must be a finite number, as it is the margin of a pair, given nan"),
        (float("-inf"), "given -inf"),
        (10**400, "given one beyond 1e30"),
        ("3", "`gap` must be a number, as it is the margin of a pair, given a string"),
        (None, "given null"),
        (True, "given a boolean"),
        (..., "`gap` is missing"),
    ],
)
def test_a_margin_must_be_a_finite_number(value: Any, said: str) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "gap": value}
    if value is ...:
        del row["gap"]
    with pytest.raises(RowError, match=said):
        Preference.model_validate({"margin": "gap"}).read(row)


def test_earlier_answers_are_part_of_the_prompt() -> None:
    """Of two conversations with the same first turns, the last ones alone are compared."""
    before = [USER, GOOD, {"role": "user", "content": "and?"}]
    pair = read(chosen=[*before, GOOD], rejected=[*before, BAD])
    assert isinstance(pair.parts[0], Conversation)
    assert pair.parts[0].trained == (False, False, False, True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "q", "chosen": "a"}, "`rejected` is missing"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "`rejected` is empty: there is nothing to compare"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "`rejected` is the same as `chosen`"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": ""}, "`rejected` is empty"),
    ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "`chosen` is empty"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"content": " "}]}, "`rejected` is empty"),
    ({"prompt": "q", "chosen": 1, "rejected": "b"}, "`chosen` must be a string, given a number"),
    ({"prompt": {}, "chosen": "a"}, "`rejected` is missing"),
    (
        {"chosen": "the sky is blue", "rejected": "the sky is green"},
        "`chosen` and `rejected` are texts without a pr",
    ),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "`chosen` and `rejected` are texts without a prompt"),
    ({"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "`prompt` differs from the first user"),
    ({"prompt": [USER, GOOD], "chosen": [BAD], "rejected": [GOOD]}, r"(?s)must follow .*ends with `assistant`"),
    ({"prompt": [SYSTEM], "chosen": [BAD], "rejected": [GOOD]}, r"(?s)must follow .*ends with `system`"),
    ({"chosen": [USER, GOOD], "rejected": [OTHER, BAD]}, "`rejected` and `chosen` have no first message in common"),
    ({"chosen": [USER, GOOD, OTHER, BAD], "rejected": [USER, GOOD, USER, BAD]}, "ends with `assistant`"),
    ({"chosen": [USER, OTHER, GOOD], "rejected": [USER, BAD]}, "`chosen` must answer with an assistant message"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "are the same until one of them ends"),
    ({"messages": [USER, GOOD], "rejected_response": "good"}, "`rejected_response` is the same as `messages`"),
    ({"messages": [USER, GOOD], "chosen_response": "a", "rejected_response": "b"}, "ends with `assistant`"),
    ({"prompt": "q", "chosen": "[{'role': 'user'}]", "rejected": "b"}, "`chosen` is a list of messages as Python"),
    ({"question": "q", "chosen": "a"}, "`rejected` is missing"),
    (
        {"prompt": [USER], "chosen": {"role": "assistant"}, "rejected": "b"},
        r"`chosen\[0\].content` must be a string",
    ),
    (
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD, USER]},
        "`rejected` must end with an assistant message",
    ),
    ({"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]}, "`chosen` must end with an assistant message"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "`chosen` has no assistant message"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "`rejected` is the same as `chosen`"),
]


@pytest.mark.parametrize(("row", "said"), REFUSED)
def test_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError, match=said):
        read(**row)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_each_refused_row_is_named_or_counted(tmp_path: Path, on_bad_row: str) -> None:
    good = pairs.rows(1)
    for row, _ in REFUSED:
        if on_bad_row == "error":
            with pytest.raises(DataError, match=r"rows\.jsonl:2: "):
                load_pairs(tmp_path, [*good, row])
    if on_bad_row == "skip":
        found = load_pairs(tmp_path, [*good, *(row for row, _ in REFUSED)], on_bad_row="skip", max_lost=1)
        assert (found.samples, found.counts.skipped) == (1, len(REFUSED))
        found.append_ledger(tmp_path / "ledger.jsonl")
        lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
        assert [line["fate"] for line in lines] == ["kept", *["skipped"] * len(REFUSED)]
        assert [line["place"].rpartition(":")[2] for line in lines] == [str(i + 1) for i in range(len(lines))]


def test_bad_pairs_end_a_training_before_the_base_is_loaded(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_recipe(tmp_path, base, objective="dpo")
    tiny.write_jsonl(tmp_path / "train.jsonl", [*pairs.rows(3), {"chosen": "blue", "rejected": "green"}])

    def load_none(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(base_model, "load", load_none)
    with pytest.raises(
        DataError, match=r"train\.jsonl:4: `chosen` and `rejected` are texts without a prompt"
    ) as caught:
        train(load(tmp_path / "recipe.yaml"))
    assert caught.value.exit_code == 2


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


def test_a_long_pair_may_only_be_dropped(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_pairs(tmp_path, pairs.rows(2), max_length=20)
    assert caught.value.problems[-1].hint == "raise data.max_length, or set data.on_long: drop"


@pytest.mark.parametrize("on_long", ["drop", "truncate"])
def test_a_pair_with_one_long_answer_is_kept_whole_or_not_at_all(tmp_path: Path, on_long: str) -> None:
    rows = pairs.rows(6)
    rows[2]["rejected"][0]["content"] = "no " * 60
    found = load_pairs(tmp_path, rows, max_length=96, on_long=on_long, max_lost=1)
    assert (found.samples, found.counts.dropped, found.counts.truncated) == (5, 1, 0)
    assert found.counts.first == [f"{tmp_path / 'rows.jsonl'}:3: 218 tokens, dropped"]
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
    with pytest.raises(RowError, match="`chosen_response` and `rejected_response` are preference pairs"):
        Auto().recognise({"question": "q", "chosen_response": "a", "rejected_response": "b"})
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


def test_answers_after_different_prompt_tokens_are_refused(tmp_path: Path) -> None:
    """This template says in its first line how often the assistant speaks."""
    template = "{{ messages | selectattr('role', 'equalto', 'assistant') | list | length > 1 }}" + tiny.CHATML
    rows = [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD, OTHER, BAD]},
    ]
    with pytest.raises(DataError, match=r"rows.jsonl:2: ") as caught:
        _stored(tmp_path, rows, template)
    assert "rows.jsonl:1: " not in str(caught.value)


def test_a_prompt_that_tokens_of_the_answer_change_is_refused() -> None:
    """As the tokens of a prompt may depend on what follows, both answers must leave them the same."""
    place = Place("rows.jsonl", 1)
    rows = [Row(np.array(ids, dtype=np.int32), np.array(ids) > 9, place) for ids in ([1, 2, 11], [1, 3, 12])]
    section = Data.model_validate({"train": "rows.jsonl", "format": "preference"})
    pair = read(prompt="q", chosen="a", rejected="b")
    assert prepare._fitted(pair, "preference", place, rows, section).reason.startswith(
        "has answers to different prompt tokens: the chat template or the tokenizer writes the prompt differently"
    )
    rows[1].ids[1] = 2
    assert prepare._fitted(pair, "preference", place, rows, section).fate == "kept"


def test_pairs_that_contradict_are_told_and_so_are_many_without_a_difference(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"{number} ", "chosen": "a", "rejected": "b" if number % 3 else "a"} for number in range(60)
    ]
    rows += [{"prompt": "1 ", "chosen": "b", "rejected": "a"}, {"prompt": "2 ", "chosen": "b", "rejected": "a"}]
    found = load_pairs(tmp_path, rows, on_bad_row="skip", max_lost=1)
    assert found.counts.skipped == 20
    assert found.told() == [
        f"pairs that contradict an earlier one (same prompt, answers swapped): 2; the first is "
        f"{tmp_path / 'rows.jsonl'}:61",
        "20 of 62 pairs (32.3%) have two equal answers: skipped",
    ]
    assert load_pairs(tmp_path, rows, on_bad_row="skip", max_lost=1).cached
    assert load_pairs(tmp_path, [row for row in rows[:60] if row["rejected"] == "b"]).told() == []


def test_what_an_objective_can_not_do_with_pairs_is_a_recipe_error(tmp_path: Path, base: Path) -> None:
    tiny.write_recipe(tmp_path, base)
    tiny.write_jsonl(tmp_path / "train.jsonl", pairs.rows(5))
    with pytest.raises(RecipeError, match=r"`objective: orpo` does not use `data.format.margin`"):
        load(tmp_path / "recipe.yaml", ["objective=orpo", "data.format={type: preference, margin: gap}"])
    with pytest.raises(RecipeError, match=r"`data.format.margin` must be one column, or two whose difference is meant"):
        load(tmp_path / "recipe.yaml", ["objective=dpo", "data.format={type: preference, margin: [a, b, c]}"])
    assert load(tmp_path / "recipe.yaml", ["objective=dpo", "data.format={type: preference, margin: null}"])
    told = "`data.on_long: truncate` would cut answers of `data.format: preference`, which are compared whole"
    with pytest.raises(RecipeError, match=told):
        load(tmp_path / "recipe.yaml", ["objective=dpo", "data.on_long=truncate"])
    assert load(tmp_path / "recipe.yaml", ["objective=dpo", "data.on_long=drop"]).data.on_long == "drop"


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
