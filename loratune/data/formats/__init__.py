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
from loratune.data.formats.pattern import Patterns
from loratune.data.formats.preference import Preference
from loratune.data.formats.section import FormatSection
from loratune.data.formats.text import Text

Format = Annotated[
    Auto | Chat | Instruction | Completion | Text | Preference | Rated | Labelled | Patterns,
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
            "pet": "write `{type: pattern, patterns: [...], verbalizers: {...}}`",
        }
    ),
]


def made(name: str) -> FormatSection | None:
    """Return the format of a name with its defaults, or None if it needs keys."""
    section = dict(members_of(Format))[name]
    needs = any(field.is_required() for field in section.model_fields.values())
    return None if needs else section()  # type: ignore[return-value]


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
    "Patterns",
    "Plain",
    "Preference",
    "Rated",
    "RowError",
    "Text",
    "made",
]
