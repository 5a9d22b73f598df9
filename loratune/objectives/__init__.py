"""Objectives: the loss that is minimised. A new one is one file here and one word in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loratune.config.section import BareWord
from loratune.objectives.preference import Dpo
from loratune.objectives.sft import Sft

Objective = Annotated[
    Sft | Dpo,
    Field(discriminator="type"),
    BareWord({"causal_lm": "write `sft`"}, default="sft"),
]

__all__ = ["Dpo", "Objective", "Sft"]
