"""Plain text: every token is trained, as in pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from loratune.data.formats.base import Plain, RowError, text_column, unread
from loratune.data.formats.section import FormatSection


class Text(FormatSection):
    """Rows of plain text; a .txt file is one row per file."""

    type: Literal["text"] = "text"
    text: str = Field("text", description="column with the text")

    def read(self, row: Mapping[str, Any]) -> Plain:
        """Return the text, all of it trained.

        Raises:
            RowError: when the column is missing, no text, or empty.
        """
        text = text_column(row, self.text)
        if not text.strip():
            raise RowError(self.text, "is empty: there is nothing to learn")
        return Plain(((text, True),), divisible=True)

    def unread(self, row: Mapping[str, Any], template: str) -> list[str]:
        """Return the columns with content that `read` does not use."""
        return unread(row, (self.text,))
