"""Optimizers. A new one is one file here and one word in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loratune.config.section import BareWord
from loratune.optim.adafactor import Adafactor
from loratune.optim.adamw import AdamW, AdamW8bit, PagedAdamW8bit, PagedAdamW32bit

Optimizer = Annotated[
    AdamW | AdamW8bit | PagedAdamW32bit | PagedAdamW8bit | Adafactor,
    Field(discriminator="type"),
    BareWord(
        {
            "adam": "with `weight_decay: 0` `adamw` is Adam",
            "adamw_torch": "write `adamw`",
            "adamw_torch_fused": "write `adamw`: it is fused where torch supports it",
            "adamw_bnb_8bit": "write `adamw_8bit`",
        }
    ),
]

__all__ = ["Adafactor", "AdamW", "AdamW8bit", "Optimizer", "PagedAdamW8bit", "PagedAdamW32bit"]
