from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter

from loratune.data.formats import Chat, Completion, Format, Instruction, Plain, RowError, Text

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "ho"}


def test_messages_are_passed_on_and_answers_trained() -> None:
    system = {"role": "system", "content": "s", "name": "boss", "weight": None}
    read = Chat().read({"messages": [system, USER, ANSWER, USER, ANSWER], "id": 7})
    assert read.messages == ({"role": "system", "content": "s", "name": "boss"}, USER, ANSWER, USER, ANSWER)
    assert read.trained == (False, False, True, False, True)
    assert read.tools is None


@pytest.mark.parametrize(
    ("sender", "role"),
    [("human", "user"), ("gpt", "assistant"), ("system", "system"), ("observation", "tool"), ("chatgpt", "assistant")],
)
def test_sharegpt(sender: str, role: str) -> None:
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}, {"from": sender, "value": "x"}]
    read = Chat().read({"conversations": turns})
    assert read.messages == (USER, ANSWER, {"role": role, "content": "x"})
    assert read.trained == (False, True, role == "assistant")


def test_conversations_may_hold_messages_and_messages_go_first() -> None:
    assert Chat().read({"conversations": [USER, ANSWER]}).messages == (USER, ANSWER)
    both = {"messages": [USER, ANSWER], "conversations": [{"from": "human", "value": "other"}]}
    assert Chat().read(both).messages == (USER, ANSWER)


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}]
    read = Chat().read({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert read.messages[0] == {"role": "user", "content": "a b"}
    assert Chat().read({"messages": [{"role": "user", "content": []}, ANSWER]}).messages[0]["content"] == ""


@pytest.mark.parametrize("arguments", [{"n": 1}, '{"n": 1}', ' {"n":1}\n'])
@pytest.mark.parametrize("flat", [False, True])
def test_tool_calls_get_their_arguments_as_an_object(arguments: Any, flat: bool) -> None:
    function = {"name": "f", "arguments": arguments}
    call = function if flat else {"id": "c1", "type": "function", "function": function}
    read = Chat().read({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
    wanted = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
    assert read.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [wanted if flat else {"id": "c1", **wanted}],
    }


@pytest.mark.parametrize("function", [{"name": "f"}, {"name": "f", "arguments": ""}, {"name": "f", "arguments": {}}])
def test_tool_calls_without_arguments(function: dict[str, Any]) -> None:
    read = Chat().read({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": function}]}]})
    assert read.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_tools_as_list_or_json_text() -> None:
    schemas = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    messages = [USER, ANSWER]
    for tools in (schemas, json.dumps(schemas)):
        assert Chat().read({"messages": messages, "tools": tools}).tools == tuple(schemas)
    for tools in (None, [], "", "  ", "[]", "null"):
        assert Chat().read({"messages": messages, "tools": tools}).tools is None


def test_instruction() -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "system": "count"}
    read = Instruction().read(row)
    assert read.messages == (
        {"role": "system", "content": "count"},
        {"role": "user", "content": "add\n\n1 2"},
        {"role": "assistant", "content": "3"},
    )
    assert read.trained == (False, False, True)
    for nothing in ({"input": None}, {"input": ""}, {}):
        short = Instruction().read({"instruction": "add", "output": "3", **nothing})
        assert [m["content"] for m in short.messages] == ["add", "3"]


def test_columns_have_other_names() -> None:
    mapped = Instruction(instruction="q", input="ctx", output="a", system="sys")
    read = mapped.read({"q": "x", "ctx": "y", "a": "z", "sys": "s", "instruction": "no", "output": "no"})
    assert [m["content"] for m in read.messages] == ["s", "x\n\ny", "z"]
    plain = Completion(prompt="q", completion="a").read({"q": "x", "a": "z", "prompt": "no", "completion": "no"})
    assert plain == Plain((("x", False), ("z", True)))
    assert Text(text="body").read({"body": "b", "text": "no"}) == Plain((("b", True),), divisible=True)


def test_completion_keeps_white_space_and_an_empty_prompt() -> None:
    read = Completion().read({"prompt": "", "completion": " b\n"})
    assert read == Plain((("", False), (" b\n", True)))


DEEP = "[" * 100_000
ROLES = "`system`, `developer`, `user`, `assistant`, `tool`"
WRONG = [
    (Chat(), {}, "`messages` is missing; the row's columns: none"),
    (Chat(), {"text": "a", "id": 1}, "`messages` is missing; the row's columns: `text`, `id`"),
    (Chat(), {"messages": None}, "`messages` must be a list of messages, given null"),
    (Chat(), {"messages": "hi"}, "`messages` must be a list of messages, given a string"),
    (Chat(), {"messages": []}, "`messages` must be a list of messages, given an empty list"),
    (Chat(), {"conversations": {}}, "`conversations` must be a list of messages, given an object"),
    (Chat(), {"messages": ["hi"]}, "`messages[0]` must be an object with `role` and `content`, given a string"),
    (Chat(), {"messages": [USER, {"content": "x"}]}, f"`messages[1].role` must be one of {ROLES}, given null"),
    (Chat(), {"messages": [{**USER, "role": "bot"}]}, f"`messages[0].role` must be one of {ROLES}, given `bot`"),
    (Chat(), {"messages": [{**USER, "role": ["user"]}]}, f"`messages[0].role` must be one of {ROLES}, given a list"),
    (Chat(), {"messages": [{"role": "user"}, ANSWER]}, "`messages[0].content` must be a string, given null"),
    (Chat(), {"messages": [{**USER, "content": 5}]}, "`messages[0].content` must be a string, given a number"),
    (Chat(), {"messages": [{**USER, "content": True}]}, "`messages[0].content` must be a string, given a boolean"),
    (
        Chat(),
        {"messages": [{**USER, "content": ["a"]}]},
        "`messages[0].content[0]` must be an object with `type` and `text`, given a string",
    ),
    (
        Chat(),
        {"messages": [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
        "`messages[0].content[1].type` must be `text`: only text is supported",
    ),
    (
        Chat(),
        {"messages": [{**USER, "content": [{"type": "text", "text": None}]}]},
        "`messages[0].content[0].text` must be a string, given null",
    ),
    (Chat(), {"messages": [USER]}, "`messages` has no assistant message: there is nothing to learn"),
    (
        Chat(),
        {"messages": [USER, {**ANSWER, "tool_calls": {"name": "f"}}]},
        "`messages[1].tool_calls` must be a list of calls, given an object",
    ),
    (
        Chat(),
        {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"arguments": {}}}]}]},
        "`messages[1].tool_calls` needs a `function` with a `name`",
    ),
    (
        Chat(),
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{n: 1}"}]}]},
        "`messages[1].tool_calls.arguments` is not JSON (Expecting property name enclosed in double quotes)",
    ),
    (
        Chat(),
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
        "`messages[1].tool_calls.arguments` must be an object, given a list",
    ),
    (
        Chat(),
        {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": DEEP}]}]},
        "`messages[1].tool_calls.arguments` is not JSON (nested too deep)",
    ),
    (
        Chat(),
        {"messages": [USER, ANSWER], "tools": "9" * 5000},
        "`tools` is not JSON (a number with too many digits)",
    ),
    (Chat(), {"messages": [USER, ANSWER], "tools": "["}, "`tools` is not JSON (Expecting value)"),
    (Chat(), {"messages": [USER, ANSWER], "tools": {}}, "`tools` must be a list of JSON schemas, given an object"),
    (Chat(), {"messages": [USER, ANSWER], "tools": ["f"]}, "`tools` must be a list of JSON schemas, given a list"),
    (Instruction(), {"instruction": "a"}, "`output` is missing; the row's columns: `instruction`"),
    (Instruction(), {"instruction": "a", "output": None}, "`output` must be a string, given null"),
    (Instruction(), {"instruction": "a", "output": " \n"}, "`output` is empty: there is nothing to learn"),
    (Instruction(), {"instruction": "a", "output": "b", "input": 3}, "`input` must be a string, given a number"),
    (Instruction(system="s"), {"instruction": "a", "output": "b", "s": []}, "`s` must be a string, given a list"),
    (Completion(), {"prompt": "a", "text": "b"}, "`completion` is missing; the row's columns: `prompt`, `text`"),
    (Completion(), {"prompt": 1.5, "completion": "b"}, "`prompt` must be a string, given a number"),
    (Completion(completion="c"), {"prompt": "a", "c": ""}, "`c` is empty: there is nothing to learn"),
    (Text(), {"body": "a"}, "`text` is missing; the row's columns: `body`"),
    (Text(), {"text": {"a": 1}}, "`text` must be a string, given an object"),
    (Text(), {"text": "\n"}, "`text` is empty: there is nothing to learn"),
    (
        Text(),
        {"text": b"raw"},
        "`text` must be a string, given bytes: write that column as text, or name another in `data.format`",
    ),
]


@pytest.mark.parametrize(("format_", "row", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_rows_name_the_field(format_: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        format_.read(row)
    assert str(caught.value) == message


def test_a_wrong_sharegpt_sender_is_named() -> None:
    for sender, given in (("alice", "`alice`"), (["gpt"], "a list"), (None, "null")):
        with pytest.raises(RowError) as caught:
            Chat().read({"conversations": [{"from": sender, "value": "x"}]})
        assert str(caught.value).startswith("`conversations[0].from` must be one of `human`, `user`, `gpt`")
        assert str(caught.value).endswith(f"given {given}")


def test_every_format_is_named_by_its_type() -> None:
    adapter = TypeAdapter(Format)
    for name, kind in (("chat", Chat), ("instruction", Instruction), ("completion", Completion), ("text", Text)):
        assert type(adapter.validate_python({"type": name})) is kind


# ---------------------------------------------------------------- which turns are trained

TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


def test_train_on_says_which_turns() -> None:
    assert Chat().read({"messages": TALK}).trained == (False, False, True, False, True)
    assert Chat(train_on="last").read({"messages": TALK}).trained == (False, False, False, False, True)
    assert Chat(train_on="all").read({"messages": TALK}).whole


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}])
def test_a_message_can_leave_itself_out(mark: dict[str, Any]) -> None:
    messages = [*TALK[:2], {**TALK[2], **mark}, *TALK[3:]]
    example = Chat().read({"messages": messages})
    assert example.trained == (False, False, False, False, True)
    assert all("train" not in message and "weight" not in message for message in example.messages)
    with pytest.raises(RowError, match="leaves a message out"):
        Chat(train_on="all").read({"messages": messages})
    with pytest.raises(RowError, match="no message to train on"):
        Chat().read({"messages": messages[:3]})


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ({"train": "no"}, "`messages[2].train` must be true or false"),
        ({"train": 1}, "`messages[2].train` must be true or false"),
        ({"weight": 0.5}, "`messages[2].weight` must be 0 or 1"),
        ({"weight": True}, "`messages[2].weight` must be 0 or 1"),
    ],
)
def test_other_marks_are_refused(mark: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError) as caught:
        Chat().read({"messages": [*TALK[:2], {**TALK[2], **mark}]})
    assert str(caught.value) == said


def test_an_empty_list_of_calls_is_none() -> None:
    read = Chat().read({"messages": [USER, {"role": "assistant", "content": "b", "tool_calls": []}]})
    assert read.messages[1] == {"role": "assistant", "content": "b"}
