"""Rated answers: a prompt, one answer, and whether it is a good one. No pairs are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from loratune.data.formats.base import (
    BAD,
    Conversation,
    Group,
    Plain,
    RowError,
    column,
    has_content,
    named,
    unread,
)
from loratune.data.formats.chat import ASKS, Chat, joined, known_tools, lost_keys, text_or_messages
from loratune.data.formats.section import FormatSection
from loratune.errors import shorten

_WORDS = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}


class Rated(FormatSection):
    """Rows of a prompt, a completion and a label: true for a good completion, false for a bad one.

    Texts are tokenized as they are. Lists of messages are rendered by the chat template; in place of prompt and
    completion a row may have `messages`, whose last one, the assistant's, is the completion.
    """

    type: Literal["kto"] = "kto"
    whole: ClassVar[bool] = True
    prompt: str = Field("prompt", description="column with the text or the messages before the completion")
    completion: str = Field("completion", description="column with the completion")
    label: str = Field(
        "label", description="column that says whether it is good: true or false, 1 or 0; `kto_tag` is read too"
    )

    def read(self, row: Mapping[str, Any]) -> Group:
        """Return the completion after its prompt, with its label: 1 for a good one, 0 for a bad one.

        Raises:
            RowError: when a column is missing or of another kind, the completion is empty, or the label is neither true
                nor false.
        """
        if self._is_chat(row):
            part: Conversation | Plain = self._chat(row)
        else:
            values = self._values(row)
            prompt, completion = values.values()
            if isinstance(prompt, str) and isinstance(completion, str):
                part = Plain(((prompt, False), (completion, True)))
            else:
                part = self._messages(row, values)
        return Group((part,), labels=(self._label(row),), what="completions")

    def unread(self, row: Mapping[str, Any], template: str) -> list[str]:
        """Return the columns with content, and the keys of messages, that `read` does not use."""
        if self._is_chat(row):
            return Chat().unread(self._unrated(row), template)
        lists = {name: value for name, value in self._values(row).items() if isinstance(value, list)}
        tools = known_tools(row, template) if lists else ()
        found = unread(row, [self.prompt, self.completion, *self._labels, *tools])
        for name, value in lists.items():
            found += lost_keys(value, name, template)
        return found

    @property
    def _labels(self) -> tuple[str, ...]:
        """Columns that may hold the label."""
        return tuple(dict.fromkeys((self.label, *BAD)))

    def _unrated(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in self._labels}

    def _is_chat(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is a conversation, and has no completion of its own."""
        whole = any(has_content(row.get(name)) for name in ("messages", "conversations"))
        return whole and not has_content(row.get(self.completion))

    def _chat(self, row: Mapping[str, Any]) -> Conversation:
        name = "messages" if has_content(row.get("messages")) else "conversations"
        return _ended(Chat(train_on="last").read(self._unrated(row)), name)

    def _values(self, row: Mapping[str, Any]) -> dict[str, str | list[Any]]:
        """Return prompt and completion, by their columns: each a text or a list of messages."""
        values = {name: text_or_messages(row, name) for name in (self.prompt, self.completion)}
        for name, value in values.items():
            if not has_content(value):
                raise RowError(
                    name, f"is empty: there is {'nothing to learn' if name == self.completion else 'no prompt'}"
                )
        return values

    def _messages(self, row: Mapping[str, Any], values: Mapping[str, str | list[Any]]) -> Conversation:
        """Return prompt and completion as a conversation; a text is the user's or the assistant's message."""
        lists = {
            name: value if isinstance(value, list) else [{"role": role, "content": value}]
            for (name, value), role in zip(values.items(), ("user", "assistant"), strict=True)
        }
        found = _ended(joined(row, lists, learned=self.completion), self.completion)
        if found.messages[len(lists[self.prompt])]["role"] != "assistant":
            raise RowError(self.completion, "must begin with an assistant message")
        return found

    def _label(self, row: Mapping[str, Any]) -> float:
        there = [name for name in self._labels if has_content(row.get(name))]
        name = there[0] if there else self.label
        found = [_number(row[one], one) for one in there] or [_number(column(row, name), name)]
        if len(set(found)) > 1:
            raise RowError(name, f"and `{there[1]}` contradict each other: which is meant?")
        return found[0]


def _ended(found: Conversation, name: str) -> Conversation:
    """Return a conversation that ends with an answer of the assistant's, or raise RowError for another one."""
    last = found.messages[-1]
    if not found.trained[-1]:
        raise RowError(name, "must end with an assistant message")
    if not last["content"].strip() and not last.get("tool_calls"):
        raise RowError(name, "ends with an empty answer: there is nothing to learn")
    first = found.trained.index(True)
    if first == 0 or found.messages[first - 1]["role"] not in ASKS:
        after = f"follows one of the role `{found.messages[first - 1]['role']}`" if first else "is the first"
        raise RowError(name, f"must answer a message of the user's (or a tool's), but the answer {after}")
    return found


def _number(value: Any, name: str) -> float:
    """Return 1 or 0 for a value that says true or false, or raise RowError."""
    if isinstance(value, str) and (word := value.strip().lower()) in _WORDS:
        return _WORDS[word]
    if isinstance(value, bool | int | float) and value in (0, 1):
        return float(value)
    given = f"`{shorten(str(value), 40)}`" if isinstance(value, str | int | float) else named(value)
    raise RowError(name, f"must be true or false (or 1 or 0), given {given}")
