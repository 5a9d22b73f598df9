"""Alpaca's rows: an instruction, sometimes an input, and the output to learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from loratune.formats.base import Conversation, RowError, named, text_column
from loratune.section import Section


class Instruction(Section):
    """Rows of columns that become one question and one answer in the model's chat template."""

    type: Literal["instruction"] = "instruction"
    instruction: str = Field("instruction", description="column with the question or the task")
    input: str = Field("input", description="column with what the task works on; empty or missing is fine")
    output: str = Field("output", description="column with the answer that is trained")
    system: str = Field("system", description="column with a system prompt; empty or missing is fine")

    def read(self, row: Mapping[str, Any]) -> Conversation:
        """Return the row as a conversation: system (if any), instruction and input, output.

        Raises:
            RowError: when a column is missing or no text, or the output is empty.
        """
        question = text_column(row, self.instruction)
        answer = text_column(row, self.output)
        if not answer.strip():
            raise RowError(self.output, "is empty: there is nothing to learn")
        more, system = self._optional(row, self.input), self._optional(row, self.system)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": f"{question}\n\n{more}" if more else question})
        messages.append({"role": "assistant", "content": answer})
        return Conversation(tuple(messages), tuple(m["role"] == "assistant" for m in messages))

    def _optional(self, row: Mapping[str, Any], name: str) -> str:
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise RowError(name, f"must be text, given {named(value)}")
        return value or ""
