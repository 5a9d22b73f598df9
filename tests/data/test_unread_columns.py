"""What a row says is read, refused, or told by name: nothing is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loratune.cli import app
from loratune.data import dataset, unread_columns
from loratune.data.dataset import Rows
from loratune.data.encode import Encoder
from loratune.data.section import Data, Source
from loratune.errors import DataError
from tests import tiny

ENCODER = Encoder(tiny.tokenizer())
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SAID = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
CALL = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"n": 1}'}}


def load(folder: Path, rows: list[dict[str, Any]], **section: Any) -> Rows:
    source = Source(path=str(tiny.write_jsonl(folder / "rows.jsonl", rows)))
    return dataset.load([source], Data(train=(source,), **section), ENCODER)


def rendered(rows: Rows, index: int = 0) -> tuple[str, str]:
    """Return a row's text, and its trained tokens as text."""
    row, decode = rows[index], ENCODER.tokenizer.decode
    return decode(row.ids, skip_special_tokens=False), decode(row.ids[row.trained], skip_special_tokens=False)


def shown(*messages: tuple[str, str]) -> str:
    """Return what the template writes for messages."""
    turns = [{"role": role, "content": content} for role, content in messages]
    return str(ENCODER.tokenizer.apply_chat_template(turns, tokenize=False))


PAIR = (("user", "hi"), ("assistant", "ho"))
READ: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "Dolly": (
        {"instruction": "ask", "context": "facts", "response": "ho", "category": "qa"},
        shown(("user", "ask\n\nfacts"), ("assistant", "ho")),
        ("ho",),
    ),
    "Dolly without context": (
        {"instruction": "hi", "context": "", "response": "ho", "category": None}, shown(*PAIR), ("ho",),
    ),
    "a question about a text": (
        {"question": "ask", "context": "facts", "answer": "ho"},
        shown(("user", "ask\n\nfacts"), ("assistant", "ho")),
        ("ho",),
    ),
    "Alpaca's history": (
        {"instruction": "hi", "input": "", "output": "ho", "history": [["a", "b"], ["c", "d"]], "system": "s"},
        shown(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), *PAIR),
        ("b", "d", "ho"),
    ),
    "no history": ({"instruction": "hi", "output": "ho", "history": []}, shown(*PAIR), ("ho",)),
    "a system prompt beside conversations": (
        {"conversations": SAID, "system": "s"}, shown(("system", "s"), *PAIR), ("ho",),
    ),
    "a system prompt beside messages": (
        {"messages": [USER, ANSWER], "system": "s"}, shown(("system", "s"), *PAIR), ("ho",),
    ),
    "the same system prompt twice": (
        {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "system": "s"},
        shown(("system", "s"), *PAIR),
        ("ho",),
    ),
    "a good answer": ({"messages": [USER, ANSWER], "label": True}, shown(*PAIR), ("ho",)),
    "weights of messages": (
        {"messages": [USER, {**ANSWER, "weight": 0}, {"role": "user", "content": "c"}, {**ANSWER, "weight": 1}]},
        shown(*PAIR, ("user", "c"), ("assistant", "ho")),
        ("ho",),
    ),
    "null columns of a merged set": (
        {"messages": None, "instruction": "hi", "output": "ho", "conversations": [], "label": None, "chosen": None,
         "rejected": None, "text": ""},
        shown(*PAIR), ("ho",),
    ),
    "messages as JSON text": ({"messages": json.dumps([USER, ANSWER])}, shown(*PAIR), ("ho",)),
    "prompt and completion of messages": (
        {"prompt": [USER, ANSWER, {"role": "user", "content": "c"}], "completion": [{**ANSWER, "content": "d"}]},
        shown(*PAIR, ("user", "c"), ("assistant", "d")),
        ("d",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_known_shapes_are_read(tmp_path: Path, name: str) -> None:
    row, text, answers = READ[name]
    rows = load(tmp_path, [row])
    assert rendered(rows) == (text, "".join(f"{answer}<|im_end|>" for answer in answers))
    assert rows.unread == ({"category": 1} if name == "Dolly" else {})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "KTO, prompt and completion": ({"prompt": "a", "completion": "b", "label": False}, "`label` is false: a bad ans"),
    "KTO, conversational": ({"prompt": [USER], "completion": [ANSWER], "label": False}, "`label` is false: a bad ans"),
    "KTO, messages": ({"messages": [USER, ANSWER], "label": False}, "`label` is false: a bad answer"),
    "KTO, instruction": ({"instruction": "a", "output": "b", "kto_tag": "False"}, "`kto_tag` is false: a bad answer"),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "system": "other"},
        "`system` differs from the system message in `messages`",
    ),
    "a call twice": (
        {"messages": [USER, {**CALL, "tool_calls": [{"name": "f", "arguments": {}}]}]},
        "`messages[1].function_call` is given along with `tool_calls`",
    ),
    "a call without a name": (
        {"messages": [USER, {**CALL, "function_call": {"arguments": "{}"}}]},
        "`messages[1].function_call` must be an object with `name` and `arguments`",
    ),
    "a history of objects": (
        {"instruction": "a", "output": "b", "history": [{"q": "a"}]}, "`history[0]` must be a pair of strings",
    ),
    "a text and messages": (
        {"prompt": "a", "completion": [ANSWER]}, "`prompt` must be a list of messages, as the other is, given a string",
    ),
    "messages that are no JSON": ({"messages": "[{'role': 'user'}]"}, "`messages` is not JSON"),
    "nothing of the assistant": ({"prompt": [USER], "completion": [USER]}, "`completion` has no assistant message"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cant_be_right_is_refused(tmp_path: Path, name: str) -> None:
    row, said = REFUSED[name]
    with pytest.raises(DataError) as caught:
        load(tmp_path, [row])
    assert f"rows.jsonl:1: {said}" in str(caught.value)


def test_the_bad_answers_of_a_set_can_be_skipped(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": answer, "label": answer == "good"} for answer in ("good", "bad")]
    found = load(tmp_path, rows, on_bad_row="skip", max_lost=0.5)
    assert (len(found), found.counts.skipped) == (1, 1)
    assert "good" in rendered(found)[1]


def test_calls_of_the_first_api_are_tool_calls() -> None:
    from loratune.data.formats import Chat

    functions = [{"name": "f", "parameters": {}}]
    result = {"role": "function", "name": "f", "content": "2"}
    read = Chat().read({"messages": [USER, CALL, result, ANSWER], "functions": functions})
    called = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
    assert read.messages[1] == {"role": "assistant", "content": "", "tool_calls": [called]}
    assert read.messages[2] == {"role": "tool", "name": "f", "content": "2"}
    assert read.tools == ({"type": "function", "function": functions[0]},)


def test_columns_and_keys_that_nobody_reads_are_counted(tmp_path: Path) -> None:
    rows = [
        {"conversations": [SAID[0], {**SAID[1], "thought": "hm"}], "score": 0, "tags": [], "note": " "},
        {"messages": [{**USER, "mood": "glad"}, ANSWER], "conversations": SAID, "score": None, "id": 7},
        {"prompt": "a", "completion": "b", "id": 8, "source": {}},
        {"text": "t", "id": 9},
    ]
    read = load(tmp_path, rows)
    counted = {
        "score": 1, "conversations[].thought": 1, "conversations": 1, "id": 3, "messages[].mood": 1,
    }  # fmt: skip
    assert read.unread == counted
    again = load(tmp_path, rows)
    assert again.cached
    assert again.unread == counted  # told on the second start, too


def test_a_key_is_read_where_the_template_names_it() -> None:
    from loratune.data.formats import Chat

    row = {"messages": [USER, {**ANSWER, "thought": "hm"}], "tools": [{"name": "f"}]}
    assert Chat().unread(row, "{{ message.thought }}{{ tools }}") == []
    assert Chat().unread(row, "{{ message.thoughts }}") == ["tools", "messages[].thought"]


def test_many_names_take_little_memory_and_one_line() -> None:
    counts: dict[str, int] = {}
    for number in range(1000):
        unread_columns.add(counts, [f"key{number}", "id"])
    assert len(counts) == unread_columns.NAMES + 1
    assert (counts["id"], counts[unread_columns.OTHERS]) == (1000, 901)
    (line,) = unread_columns.lines(counts, {})
    assert line.startswith("not read, though not empty: `key0` (1 rows), `id` (1,000 rows)")
    assert line.endswith("and 89 more")


def test_train_and_inspect_tell(tmp_path: Path, base: Path) -> None:
    written = tiny.write_recipe(tmp_path, base)
    tiny.write_jsonl(tmp_path / "train.jsonl", [{**row, "source": "web"} for row in tiny.chats(5)])
    told = "not read, though not empty: `source` (5 rows)"
    for _ in range(2):  # read, then found in the cache
        seen = CliRunner().invoke(app, ["inspect", str(written)])
        assert seen.exit_code == 0
        assert told in seen.stderr
    ran = CliRunner().invoke(app, ["train", str(written), "--set", "train.epochs=1"])
    assert ran.exit_code == 0, ran.output
    assert told in ran.stderr
    about = json.loads(next(tmp_path.glob("**/run.json")).read_text())
    assert about["data"]["train"]["unread"] == {"source": 5}
