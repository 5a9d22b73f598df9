"""Formats recognised by the columns of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from loratune.formats.base import Example, RowError
from loratune.formats.chat import Chat
from loratune.formats.completion import Completion
from loratune.formats.instruction import Instruction
from loratune.formats.text import Text
from loratune.section import Section

# columns that name a format, the surest first
_KNOWN: tuple[tuple[tuple[str, ...], Chat | Instruction | Completion | Text], ...] = (
    (("messages",), Chat()),
    (("conversations",), Chat()),
    (("prompt", "completion"), Completion()),
    (("instruction", "output"), Instruction()),
    (("instruction", "response"), Instruction(output="response")),
    (("question", "answer"), Instruction(instruction="question", output="answer")),
    (("query", "response"), Instruction(instruction="query", output="response")),
    (("prompt", "response"), Instruction(instruction="prompt", output="response")),
    (("input", "output"), Instruction(instruction="input", input="context", output="output")),
    (("text",), Text()),
)


class Auto(Section):
    """The format is recognised from the columns: messages, prompt and completion, instruction and output, text."""

    type: Literal["auto"] = "auto"

    def recognise(self, row: Mapping[str, Any]) -> Chat | Instruction | Completion | Text:
        """Return the format a row's columns stand for.

        Raises:
            RowError: when they stand for none, or for one that has nothing to imitate.
        """
        if "chosen" in row and "rejected" in row:
            raise RowError("chosen", "and `rejected` are preference pairs, and `objective: sft` has no use for them")
        if "text" in row and "label" in row:
            raise RowError("label", "makes these rows of a classifier; for plain text say `format: text`")
        for columns, found in _KNOWN:
            if all(name in row for name in columns):
                return found
        there = ", ".join(f"`{key}`" for key in list(row)[:8]) or "none"
        raise RowError("", f"no format has these columns ({there}); say which with `data.format`")

    def read(self, row: Mapping[str, Any]) -> Example:
        """Return the row, read as the format its columns stand for."""
        return self.recognise(row).read(row)
