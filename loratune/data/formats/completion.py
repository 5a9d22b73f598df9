"""Prompt and completion: raw text, without a chat template; or lists of messages, with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from loratune.data.formats.base import (
    BAD,
    Conversation,
    Example,
    Plain,
    RowError,
    check_good,
    named,
    text_column,
    unread,
)
from loratune.data.formats.chat import joined, known_tools, lost_keys
from loratune.data.formats.section import FormatSection


class Completion(FormatSection):
    """Rows of a prompt and its completion; the completion and the end of text are trained on.

    Where both are lists of messages, they are one conversation, and the completion's assistant turns are trained on.
    """

    type: Literal["completion"] = "completion"
    prompt: str = Field("prompt", description="column with the prompt")
    completion: str = Field("completion", description="column with the completion")

    def read(self, row: Mapping[str, Any]) -> Example:
        """Return prompt and completion.

        Raises:
            RowError: when a column is missing or no text, the completion is empty, or the row says that it
                is a bad answer.
        """
        check_good(row)
        if isinstance(row.get(self.prompt), list) or isinstance(row.get(self.completion), list):
            return self._conversation(row)
        prompt, completion = text_column(row, self.prompt), text_column(row, self.completion)
        if not completion.strip():
            raise RowError(self.completion, "is empty: there is nothing to learn")
        return Plain(((prompt, False), (completion, True)))

    def unread(self, row: Mapping[str, Any], template: str) -> list[str]:
        """Return the columns with content, and the keys of messages, that `read` does not use."""
        used = [self.prompt, self.completion, *(name for name in BAD if row.get(name) is True)]
        if not isinstance(row.get(self.prompt), list):
            return unread(row, used)
        found = unread(row, [*used, *known_tools(row, template)])
        for name in (self.prompt, self.completion):
            found += lost_keys(row[name], name, template)
        return found

    def _conversation(self, row: Mapping[str, Any]) -> Conversation:
        names = (self.prompt, self.completion)
        for name in names:
            if not isinstance(row.get(name), list):
                raise RowError(name, f"must be a list of messages, as the other is, given {named(row.get(name))}")
        return joined(row, {name: row[name] for name in names}, learned=self.completion)
