"""What is minimised. A new objective is one file here and one word in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loratune.config.section import BareWord
from loratune.objectives.sft import Sft

# one member for now: a union of one needs no discriminator, and pydantic allows none
Objective = Annotated[Sft, Field(), BareWord({"causal_lm": "its name here is `sft`"})]

__all__ = ["Objective", "Sft"]
