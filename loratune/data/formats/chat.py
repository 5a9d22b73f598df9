"""Conversations: OpenAI's `messages` and ShareGPT's `conversations`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from loratune.data.formats.base import (
    BAD,
    Conversation,
    RowError,
    check_good,
    column,
    has_content,
    named,
    parsed,
    text_column,
    unread,
)
from loratune.data.formats.section import FormatSection
from loratune.errors import listed

_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_OURS = {"role", "content", "function_call", "train", "weight"}  # keys of a message that are read here
_LISTED = re.compile(r"\s*\[\s*\{\s*([\"'])(?:role|content|from|value)\1\s*:")
ASKS = ("user", "tool")  # roles that an assistant answers
_ROLES = ("system", "developer", "user", "assistant", "tool")


class Chat(FormatSection):
    """Rows with `messages` (role, content) or `conversations` (from, value); the assistant's turns are trained on."""

    type: Literal["chat"] = "chat"
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="which turns are trained on: the assistant's, only its last, or all; "
        "`train: false` (or `weight: 0`) in a message leaves that one out",
    )

    def read(self, row: Mapping[str, Any]) -> Conversation:
        """Return the row's conversation.

        Raises:
            RowError: when a message has no known role, its content is no text, nothing in it is the assistant's, or the
                row says that it is a bad answer.
        """
        check_good(row)
        name = _column(row)
        turns = _list(column(row, name), name)
        if not isinstance(turns, list) or not turns:
            raise RowError(
                name, f"must be a list of messages, given {named(turns) if turns != [] else 'an empty list'}"
            )
        messages = tuple(_message(turn, f"{name}[{index}]") for index, turn in enumerate(turns))
        assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not assistant:
            raise RowError(name, "has no assistant message: there is nothing to learn")
        wanted = assistant[-1:] if self.train_on == "last" else assistant
        asked = [_is_trained(turn, f"{name}[{index}]") for index, turn in enumerate(turns)]
        trained = tuple(index in wanted and asked[index] for index in range(len(messages)))
        if not any(trained):
            raise RowError(name, "has no message to train on: there is nothing to learn")
        if self.train_on == "all" and not all(asked):
            raise RowError(name, "leaves a message out, but `train_on: all` trains on all of them")
        messages, trained = with_system(row, messages, trained, name)
        return Conversation(messages, trained, tools_of(row), whole=self.train_on == "all")

    def unread(self, row: Mapping[str, Any], template: str) -> list[str]:
        """Return the columns with content, and the keys of messages, that neither `read` nor the template reads."""
        name = _column(row)
        good = (flag for flag in BAD if row.get(flag) is True)
        found = unread(row, (name, "system", *known_tools(row, template), *good))
        return found + lost_keys(_list(row[name], name), name, template)


def joined(row: Mapping[str, Any], parts: Mapping[str, list[Any]], learned: str) -> Conversation:
    """Return several columns of messages as one conversation.

    Args:
        row: with these columns.
        parts: columns in order.
        learned: the column whose assistant turns are trained.

    Raises:
        RowError: when a message can't be read, or nothing is trained.
    """
    messages: list[dict[str, Any]] = []
    trained: list[bool] = []
    for name, turns in parts.items():
        for message, asked in messages_of(turns, name):
            messages.append(message)
            trained.append(name == learned and message["role"] == "assistant" and asked)
    if not any(trained):
        raise RowError(learned, "has no assistant message to train on: there is nothing to learn")
    return Conversation(tuple(messages), tuple(trained), tools_of(row))


def messages_of(turns: list[Any], name: str) -> list[tuple[dict[str, Any], bool]]:
    """Return the messages of a column as they are passed to the template, each with whether it may be trained.

    Raises:
        RowError: when one can't be read.
    """
    places = (f"{name}[{index}]" for index in range(len(turns)))
    return [(_message(turn, place), _is_trained(turn, place)) for turn, place in zip(turns, places, strict=True)]


def text_or_messages(row: Mapping[str, Any], name: str) -> str | list[Any]:
    """Return a text, or a list of messages: given as such, as one message, or as JSON text."""
    value = column(row, name)
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, dict) else listed_in(text_column(row, name), name)


def listed_in(text: str, name: str) -> str | list[Any]:
    """Return the list of messages that a text is in JSON, as tables have them; any other text as it is."""
    if not (found := _LISTED.match(text)):
        return text
    if found[1] == "'":
        raise RowError(name, "is a list of messages as Python prints it; write it as JSON")
    try:
        turns = parsed(text, name)
    except RowError:
        return text
    keys = ({"role", "content"}, {"from", "value"})
    listed = all(isinstance(turn, dict) and any(some <= turn.keys() for some in keys) for turn in turns)
    return turns if listed else text


def known_tools(row: Mapping[str, Any], template: str) -> tuple[str, ...]:
    """Return the columns of tools that a chat template renders."""
    if not re.search(r"\btools\b", template):
        return ()
    return ("tools",) if has_content(row.get("tools")) else ("tools", "functions")


def lost_keys(turns: list[Any], name: str, template: str) -> list[str]:
    """Return the keys of messages with content that neither this program nor the chat template reads, each once."""
    found: dict[str, None] = {}
    for turn in turns:
        sharegpt = _is_sharegpt(turn)
        for key, value in turn.items():
            if key in ("from", "value", "train", "weight") if sharegpt else key in _OURS:
                continue
            if has_content(value) and (sharegpt or not _is_named(key, template)):
                found[f"{name}[].{key}"] = None
    return list(found)


@lru_cache(maxsize=256)
def _is_named(key: str, template: str) -> bool:
    """Return whether a chat template mentions a key; `inspect` shows what it does with it."""
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", template) is not None


def _column(row: Mapping[str, Any]) -> str:
    """Return the column of the messages: the first of the two with content."""
    for name in ("messages", "conversations"):
        if has_content(row.get(name)):
            return name
    return "messages" if "messages" in row or "conversations" not in row else "conversations"


def _list(turns: Any, name: str) -> Any:
    """Return a list of messages that is given as JSON text; anything else as it is."""
    return parsed(turns, name) if isinstance(turns, str) and turns.lstrip().startswith("[") else turns


def with_system(
    row: Mapping[str, Any], messages: tuple[dict[str, Any], ...], trained: tuple[bool, ...], name: str
) -> tuple[tuple[dict[str, Any], ...], tuple[bool, ...]]:
    """Return the messages, after the system prompt of a separate column, if any."""
    system = row.get("system")
    if not has_content(system):
        return messages, trained
    if not isinstance(system, str):
        raise RowError("system", f"must be a string, given {named(system)}")
    if messages[0]["role"] not in ("system", "developer"):
        return ({"role": "system", "content": system}, *messages), (False, *trained)
    if messages[0]["content"].strip() != system.strip():
        raise RowError("system", f"differs from the system message in `{name}`: which is meant?")
    return messages, trained


def role_of(turn: Any) -> str | None:
    """Return the role of a message that is not checked yet, or None."""
    if not isinstance(turn, Mapping):
        return None
    sender = turn["from"] if _is_sharegpt(turn) else turn.get("role")
    if not isinstance(sender, str):
        return None
    return _SHAREGPT.get(sender) if _is_sharegpt(turn) else sender


def _is_sharegpt(turn: Mapping[str, Any]) -> bool:
    return "from" in turn and "value" in turn and "role" not in turn


def _is_trained(turn: Mapping[str, Any], name: str) -> bool:
    """Return whether a message is trained: its `train` (true or false) or `weight` (0 or 1), else true."""
    for key, allowed in (("train", (True, False)), ("weight", (0, 1))):
        value = turn.get(key)
        if value is not None:
            if value not in allowed or (key == "train") != isinstance(value, bool):
                raise RowError(f"{name}.{key}", f"must be {'true or false' if key == 'train' else '0 or 1'}")
            if not value:
                return False
    return True


def _message(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise RowError(name, f"must be an object with `role` and `content`, given {named(turn)}")
    if _is_sharegpt(turn):
        sender = turn["from"]
        if not isinstance(sender, str) or sender not in _SHAREGPT:
            given = f"`{sender}`" if isinstance(sender, str) else named(sender)
            raise RowError(f"{name}.from", f"must be one of {listed(list(_SHAREGPT))}, given {given}")
        turn = {"role": _SHAREGPT[sender], "content": turn["value"]}
    turn = _modern(turn, name)
    role = turn.get("role")
    if role not in _ROLES:
        given = f"`{role}`" if isinstance(role, str) else named(role)
        raise RowError(f"{name}.role", f"must be one of {listed(_ROLES)}, given {given}")
    message = {key: value for key, value in turn.items() if value is not None and key not in ("train", "weight")}
    message["content"] = _content(turn, name)
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{name}.tool_calls")
    return message


def _modern(turn: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a message with `function_call` and the role `function`, of OpenAI's first API, as tool calls and tool."""
    if turn.get("role") == "function":
        turn = {**turn, "role": "tool"}
    if "function_call" not in turn:
        return turn
    call = turn["function_call"]
    turn = {key: value for key, value in turn.items() if key != "function_call"}
    if not has_content(call):
        return turn
    if has_content(turn.get("tool_calls")):
        raise RowError(f"{name}.function_call", "is given along with `tool_calls`: which is meant?")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RowError(f"{name}.function_call", "must be an object with `name` and `arguments`")
    if turn.get("role") != "assistant":
        raise RowError(f"{name}.function_call", "is allowed in assistant messages only")
    return {**turn, "tool_calls": [call]}


def _content(turn: Mapping[str, Any], name: str) -> str:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{name}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise RowError(f"{name}.content", f"must be a string, given {named(content)}")
    return content


def _part(part: Any, name: str) -> str:
    if not isinstance(part, dict):
        raise RowError(name, f"must be an object with `type` and `text`, given {named(part)}")
    if part.get("type") != "text":
        raise RowError(f"{name}.type", "must be `text`: only text is supported")
    if not isinstance(part.get("text"), str):
        raise RowError(f"{name}.text", f"must be a string, given {named(part.get('text'))}")
    return str(part["text"])


def _tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Return the calls with `arguments` as an object, which templates convert to JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(name, f"must be a list of calls, given {named(calls)}")
    read = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(name, "needs a `function` with a `name`")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parsed(arguments.strip() or "{}", f"{name}.arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"{name}.arguments", f"must be an object, given {named(arguments)}")
        read.append({**call, "type": "function", "function": {**function, "arguments": arguments}})
        if "function" not in call:
            read[-1] = {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
    return read


def tools_of(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """Return the tools of a row, or the `functions` of OpenAI's first API as tools."""
    if not has_content(row.get("functions")) or has_content(row.get("tools")):
        return tools(row.get("tools"))
    functions = tools(row["functions"], "functions")
    return tuple({"type": "function", "function": one} for one in functions) if functions else None


def tools(value: Any, name: str = "tools") -> tuple[dict[str, Any], ...] | None:
    """Read a `tools` column: a list of JSON schemas, or that list as JSON text."""
    if isinstance(value, str):
        value = parsed(value, name) if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(name, f"must be a list of JSON schemas, given {named(value)}")
    return tuple(value)
