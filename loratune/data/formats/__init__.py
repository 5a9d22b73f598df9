"""Formats: how a data row is read. A new one is one file here and one word in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loratune.config.section import BareWord
from loratune.data.formats.auto import Auto
from loratune.data.formats.base import Conversation, Example, Pair, Plain, RowError
from loratune.data.formats.chat import Chat
from loratune.data.formats.completion import Completion
from loratune.data.formats.instruction import Instruction
from loratune.data.formats.preference import Preference
from loratune.data.formats.text import Text

Format = Annotated[
    Auto | Chat | Instruction | Completion | Text | Preference,
    Field(discriminator="type"),
    BareWord(
        {
            "sharegpt": "`chat` reads ShareGPT's `conversations` too",
            "messages": "write `chat`",
            "alpaca": "write `instruction`",
            "prompt_completion": "write `completion`",
            "dpo": "write `preference`",
            "pretraining": "write `text`",
        }
    ),
]

__all__ = [
    "Auto",
    "Chat",
    "Completion",
    "Conversation",
    "Example",
    "Format",
    "Instruction",
    "Pair",
    "Plain",
    "Preference",
    "RowError",
    "Text",
]
