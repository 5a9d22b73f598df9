"""Alpaca's rows: an instruction, sometimes an input, and the output to learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from loratune.data.formats.base import BAD, Conversation, RowError, check_good, has_content, named, text_column, unread
from loratune.data.formats.section import FormatSection


class Instruction(FormatSection):
    """Rows of columns that become one question and one answer in the model's chat template."""

    type: Literal["instruction"] = "instruction"
    instruction: str = Field("instruction", description="column with the question or the task")
    input: str = Field(
        "input",
        description="column with the input of the task; may be empty or missing; instead of a missing "
        "`input`, `context` is read",
    )
    output: str = Field("output", description="column with the answer to train on")
    system: str = Field("system", description="column with a system prompt; may be empty or missing")
    history: str = Field(
        "history", description="column with earlier turns, a list of pairs of question and answer; their answers are "
        "trained on, too; may be empty or missing",
    )  # fmt: skip

    def read(self, row: Mapping[str, Any]) -> Conversation:
        """Return the row as a conversation: system and earlier turns (if any), instruction and input, output.

        Raises:
            RowError: when a column is missing or no text, the output is empty, or the row says that it is a bad answer.
        """
        check_good(row)
        question = text_column(row, self.instruction)
        answer = text_column(row, self.output)
        if not answer.strip():
            raise RowError(self.output, "is empty: there is nothing to learn")
        more, system = self._optional(row, self._more(row)), self._optional(row, self.system)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages += self._earlier(row)
        messages.append({"role": "user", "content": f"{question}\n\n{more}" if more else question})
        messages.append({"role": "assistant", "content": answer})
        return Conversation(tuple(messages), tuple(m["role"] == "assistant" for m in messages))

    def unread(self, row: Mapping[str, Any], template: str) -> list[str]:
        """Return the columns with content that `read` does not use."""
        used = (self.instruction, self._more(row), self.output, self.system, self.history)
        return unread(row, (*used, *(name for name in BAD if row.get(name) is True)))

    def _more(self, row: Mapping[str, Any]) -> str:
        """Return the column of the input, which Dolly's rows and question answering data call `context`."""
        missing = self.input == self.instruction or not has_content(row.get(self.input))
        other = self.input == "input" and missing and "context" not in (self.instruction, self.output, self.system)
        return "context" if other else self.input

    def _earlier(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        pairs = row.get(self.history)
        if not has_content(pairs):
            return []
        if not isinstance(pairs, list):
            raise RowError(self.history, f"must be a list of pairs of question and answer, given {named(pairs)}")
        messages: list[dict[str, Any]] = []
        for index, pair in enumerate(pairs):
            texts = isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
            if not texts:
                raise RowError(f"{self.history}[{index}]", "must be a pair of strings: question and answer")
            if not pair[1].strip():
                raise RowError(f"{self.history}[{index}]", "has an empty answer: there is nothing to learn")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        return messages

    def _optional(self, row: Mapping[str, Any], name: str) -> str:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise RowError(name, f"must be a string, given {named(value)}")
        return value or ""
