"""Conversations: OpenAI's `messages` and ShareGPT's `conversations`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from loratune.errors import listed
from loratune.formats.base import Conversation, RowError, column, named, parsed
from loratune.section import Section

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
_ROLES = ("system", "developer", "user", "assistant", "tool")


class Chat(Section):
    """Rows with `messages` (role, content) or `conversations` (from, value); the assistant's turns are trained."""

    type: Literal["chat"] = "chat"
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="which turns are trained: the assistant's, its last only, or everything anybody says; "
        "`train: false` (or `weight: 0`) in a message leaves that one out",
    )

    def read(self, row: Mapping[str, Any]) -> Conversation:
        """Return the row's conversation.

        Raises:
            RowError: when a message has no known role, its content is no text, or nothing in it is the assistant's.
        """
        name = "messages" if "messages" in row or "conversations" not in row else "conversations"
        turns = column(row, name)
        if not isinstance(turns, list) or not turns:
            raise RowError(
                name, f"must be a list of messages, given {named(turns) if turns != [] else 'an empty list'}"
            )
        messages = tuple(_message(turn, f"{name}[{index}]") for index, turn in enumerate(turns))
        assistant = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not assistant:
            raise RowError(name, "has no message of the assistant: there is nothing to learn")
        wanted = assistant[-1:] if self.train_on == "last" else assistant
        asked = [_is_trained(turn, f"{name}[{index}]") for index, turn in enumerate(turns)]
        trained = tuple(index in wanted and asked[index] for index in range(len(messages)))
        if not any(trained):
            raise RowError(name, "has no message that is to be trained: there is nothing to learn")
        if self.train_on == "all" and not all(asked):
            raise RowError(name, "leaves a message out, and `train_on: all` trains every one")
        return Conversation(messages, trained, tools(row.get("tools")), whole=self.train_on == "all")


def _is_trained(turn: Mapping[str, Any], name: str) -> bool:
    """Return what `train` (true or false) or `weight` (0 or 1) of a message says; without them it is trained."""
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
    if "from" in turn and "value" in turn and "role" not in turn:
        sender = turn["from"]
        if not isinstance(sender, str) or sender not in _SHAREGPT:
            given = f"`{sender}`" if isinstance(sender, str) else named(sender)
            raise RowError(f"{name}.from", f"must be one of {listed(list(_SHAREGPT))}, given {given}")
        turn = {"role": _SHAREGPT[sender], "content": turn["value"]}
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


def _content(turn: Mapping[str, Any], name: str) -> str:
    content = turn.get("content")
    if content is None and turn.get("tool_calls"):
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{name}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise RowError(f"{name}.content", f"must be text, given {named(content)}")
    return content


def _part(part: Any, name: str) -> str:
    if not isinstance(part, dict):
        raise RowError(name, f"must be an object with `type` and `text`, given {named(part)}")
    if part.get("type") != "text":
        raise RowError(f"{name}.type", "must be `text`: only text is trained here")
    if not isinstance(part.get("text"), str):
        raise RowError(f"{name}.text", f"must be text, given {named(part.get('text'))}")
    return str(part["text"])


def _tool_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Return the calls with `arguments` as an object: templates write it as JSON themselves."""
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


def tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Read a `tools` column: a list of JSON schemas, or that list as JSON text."""
    if isinstance(value, str):
        value = parsed(value, "tools") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("tools", f"must be a list of JSON schemas, given {named(value)}")
    return tuple(value)
