"""Formats: how a data row is read. A new one is one file here and one word in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loratune.config.section import BareWord, members_of
from loratune.data.formats.auto import Auto
from loratune.data.formats.base import Alike, Conversation, Example, Group, Plain, RowError
from loratune.data.formats.chat import Chat
from loratune.data.formats.completion import Completion
from loratune.data.formats.instruction import Instruction
from loratune.data.formats.kto import Rated
from loratune.data.formats.labelled import Labelled
from loratune.data.formats.preference import Preference
from loratune.data.formats.section import FormatSection
from loratune.data.formats.text import Text

Format = Annotated[
    Auto | Chat | Instruction | Completion | Text | Preference | Rated | Labelled,
    Field(discriminator="type"),
    BareWord(
        {
            "sharegpt": "`chat` reads ShareGPT's `conversations` too",
            "messages": "write `chat`",
            "alpaca": "write `instruction`",
            "prompt_completion": "write `completion`",
            "dpo": "write `preference`",
            "pretraining": "write `text`",
            "classification": "write `labelled`",
            "labeled": "write `labelled`",
        }
    ),
]


def made(name: str) -> FormatSection:
    """Return the format of a name with its defaults."""
    found: FormatSection = dict(members_of(Format))[name]()  # type: ignore[assignment]
    return found


__all__ = [
    "Alike",
    "Auto",
    "Chat",
    "Completion",
    "Conversation",
    "Example",
    "Format",
    "Group",
    "Instruction",
    "Labelled",
    "Plain",
    "Preference",
    "Rated",
    "RowError",
    "Text",
    "made",
]
