"""Prompt and completion: raw text, without a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from loratune.formats.base import Plain, RowError, text_column
from loratune.section import Section


class Completion(Section):
    """Rows of a prompt and its completion; the completion and the end of text are trained."""

    type: Literal["completion"] = "completion"
    prompt: str = Field("prompt", description="column with the text the model is given")
    completion: str = Field("completion", description="column with the text it is to go on with")

    def read(self, row: Mapping[str, Any]) -> Plain:
        """Return prompt and completion.

        Raises:
            RowError: when a column is missing or no text, or the completion is empty.
        """
        prompt, completion = text_column(row, self.prompt), text_column(row, self.completion)
        if not completion.strip():
            raise RowError(self.completion, "is empty: there is nothing to learn")
        return Plain(((prompt, False), (completion, True)))
