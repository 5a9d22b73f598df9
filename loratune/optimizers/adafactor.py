"""torch's Adafactor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from loratune.optimizers.groups import Named, groups
from loratune.section import Section

if TYPE_CHECKING:
    import torch


class Adafactor(Section):
    """Row and column means instead of one square per weight. Source: Shazeer & Stern 2018, arXiv:1804.04235."""

    type: Literal["adafactor"] = "adafactor"
    lr: float = Field(1e-3, gt=0, description="learning rate at the top of the schedule")
    relative: bool = Field(
        False,
        description="take `lr` times each matrix's own scale (its root mean square), as in the paper; off: a scale"
        " below 1 counts as 1, so that LoRA's B, which starts at zero, moves at all",
    )
    beta2_decay: float = Field(-0.8, lt=0, description="exponent of the step in the decay of the squares")
    clip: float = Field(1.0, gt=0, description="largest root mean square of one update")
    weight_decay: float = Field(
        0.0, ge=0, description="part (0-1) of each matrix taken off per step, times `lr`; norms and biases keep all"
    )

    def build(self, params: Named, device: str) -> torch.optim.Optimizer:
        """Return the optimizer over (name, parameter) pairs."""
        import torch

        least = 1e-3 if self.relative else 1.0  # scale of a matrix, at least; the paper's epsilon 2
        return torch.optim.Adafactor(
            groups(params, self.lr, self.weight_decay),
            lr=self.lr, beta2_decay=self.beta2_decay, eps=(None, least), d=self.clip,
        )  # fmt: skip

    def note(self, device: str) -> str | None:
        """Return what a person must know about this optimizer on `device`."""
        return None

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of state of a parameter: a mean per row and per column of a matrix."""
        return 4 * (sum(shape) if len(shape) == 2 else math.prod(shape))
