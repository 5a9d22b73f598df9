"""The format `auto`: recognised from the columns of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from loratune.data.formats.base import Example, RowError, check_good, has_content
from loratune.data.formats.chat import Chat
from loratune.data.formats.completion import Completion
from loratune.data.formats.instruction import Instruction
from loratune.data.formats.section import FormatSection
from loratune.data.formats.text import Text

# columns that identify a format, the most certain first
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


class Auto(FormatSection):
    """The format is recognised from the columns: messages, prompt and completion, instruction and output, text."""

    type: Literal["auto"] = "auto"

    def recognise(self, row: Mapping[str, Any]) -> Chat | Instruction | Completion | Text:
        """Return the format that a row's columns match.

        Raises:
            RowError: when they match none, or one without an answer to imitate.
        """
        some = {name for name, value in row.items() if has_content(value)}
        given = {name for name, value in row.items() if value is not None}
        for chosen in ("chosen", "chosen_response"):
            rejected = chosen.replace("chosen", "rejected")
            if {chosen, rejected} <= some:
                told = "are preference pairs: `format: preference` reads them, for `objective: dpo`"
                raise RowError(chosen, f"and `{rejected}` {told}")
        if {"text", "label"} <= given and not any(set(columns) <= some for columns, _ in _KNOWN[:-1]):
            raise RowError("label", "marks rows of a classifier; for plain text set `format: text`")
        check_good(row)
        # a merged data set has the columns of all its parts, null or empty in other parts' rows
        for names in (some, given, row.keys()):
            for columns, found in _KNOWN:
                if set(columns) <= names:
                    return found
        there = ", ".join(f"`{key}`" for key in list(row)[:8]) or "none"
        raise RowError("", f"no format has these columns ({there}); set `data.format`")

    def read(self, row: Mapping[str, Any]) -> Example:
        """Return the row, read in the format that its columns match."""
        return self.recognise(row).read(row)
