"""Learning rate schedules: pure functions of (step, steps), one section each.

A factor of 1 is the optimizer's `lr`. Steps count from 0; every schedule starts at 1, so that no step is spent at
rate 0, and ends at its floor after the last step.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from loratune.config.section import BareWord, Section


class Constant(Section):
    """The same rate at every step."""

    type: Literal["constant"] = "constant"

    def factor(self, step: int, steps: int) -> float:
        """Return 1."""
        return 1.0


class Linear(Section):
    """A straight line from the full rate to the floor."""

    type: Literal["linear"] = "linear"
    floor: float = Field(0.0, ge=0, le=1, description="rate after the last step, as a fraction (0-1) of `lr`")

    def factor(self, step: int, steps: int) -> float:
        """Return the part of `lr` (0-1) for `step` (from 0) of `steps`."""
        return self.floor + (1 - self.floor) * (1 - step / max(steps, 1))


class Cosine(Section):
    """Half a cosine from the full rate to the floor. Source: Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5."""

    type: Literal["cosine"] = "cosine"
    floor: float = Field(0.0, ge=0, le=1, description="rate after the last step, as a fraction (0-1) of `lr`")

    def factor(self, step: int, steps: int) -> float:
        """Return the part of `lr` (0-1) for `step` (from 0) of `steps`."""
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))


class WarmupStableDecay(Section):
    """The full rate, then a straight line down at the end. Source: Hu et al. 2024, arXiv:2404.06395, sec. 4."""

    type: Literal["wsd"] = "wsd"
    decay: float = Field(0.2, gt=0, le=1, description="fraction (0-1) of the steps over which the rate falls")
    floor: float = Field(0.0, ge=0, le=1, description="rate after the last step, as a fraction (0-1) of `lr`")

    def factor(self, step: int, steps: int) -> float:
        """Return the part of `lr` (0-1) for `step` (from 0) of `steps`."""
        tail = max(1, round(self.decay * steps))
        left = (steps - step) / tail
        return self.floor + (1 - self.floor) * min(1.0, left)


Schedule = Annotated[
    Constant | Linear | Cosine | WarmupStableDecay,
    Field(discriminator="type"),
    BareWord(
        {
            "none": "write `constant`",
            "constant_with_warmup": "write `constant`; `train.warmup` works with every schedule",
            "warmup_stable_decay": "write `wsd`",
            "cosine_with_min_lr": "write {type: cosine, floor: 0.1}",
            "polynomial": "the nearest is `linear`",
        }
    ),
]


def warmup_steps(warmup: int | float, steps: int) -> int:
    """Return a recipe's `warmup` in steps: an integer is that already, a fraction is a part of all steps."""
    return warmup if isinstance(warmup, int) else round(warmup * steps)


def rate(schedule: Constant | Linear | Cosine | WarmupStableDecay, step: int, steps: int, warmup: int) -> float:
    """Return the part of `lr` (0-1) at a step: a linear warmup, then the schedule over the rest.

    Args:
        schedule: after the warmup.
        step: number of the step, from 0.
        steps: number of steps of the whole run.
        warmup: number of warmup steps; step `warmup - 1` is the first at the full rate.
    """
    if step < warmup:
        return (step + 1) / warmup
    return schedule.factor(step - warmup, steps - warmup)
