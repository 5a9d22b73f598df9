"""Objectives: the loss that is minimised. A new one is one file here and one word in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loratune.config.section import BareWord
from loratune.objectives.classify import Classify
from loratune.objectives.kto import Kto
from loratune.objectives.pattern import Pattern
from loratune.objectives.preference import Cpo, Dpo, Orpo, Simpo
from loratune.objectives.reward import Reward
from loratune.objectives.sft import Sft

Objective = Annotated[
    Sft | Dpo | Orpo | Simpo | Cpo | Kto | Reward | Classify | Pattern,
    Field(discriminator="type"),
    BareWord(
        {
            "causal_lm": "write `sft`",
            "ipo": "write `{type: dpo, loss: ipo}`",
            "cdpo": "write `{type: dpo, label_smoothing: 0.1}`",
            "rdpo": "write `{type: dpo, loss: robust, label_smoothing: 0.1}`",
            "apo": "write `{type: dpo, loss: apo_zero}`",
            "reward_model": "write `reward`",
            "classification": "write `classify`",
            "rpo": "write `{type: dpo, sft_weight: 1.0}`",
            "pet": "write `pattern`",
        },
        default="sft",
    ),
]

__all__ = ["Classify", "Cpo", "Dpo", "Kto", "Objective", "Orpo", "Pattern", "Reward", "Sft", "Simpo"]
