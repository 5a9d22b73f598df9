"""Which parameters share a learning rate and a weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from loratune.config.section import Section

if TYPE_CHECKING:
    import torch

Named = Iterable[tuple[str, "torch.nn.Parameter"]]

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamFields(Section):
    """The fields every Adam has. Source: Kingma & Ba 2015, arXiv:1412.6980; decay as in arXiv:1711.05101."""

    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    beta1: Beta = Field(0.9, description="decay (0-1) of the mean of the gradients")
    beta2: Beta = Field(0.999, description="decay (0-1) of the mean of their squares")
    eps: float = Field(1e-8, gt=0, description="added to the root of the squares")
    weight_decay: float = Field(
        0.0, ge=0, description="fraction (0-1) of each matrix subtracted per step, times `lr`; not for norms and biases"
    )
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: B's learning rate as a multiple of `lr` (arXiv:2402.12354 proposes 16)"
    )

    def groups(self, named: Named) -> list[dict[str, Any]]:
        """Return torch's parameter groups for these fields."""
        return groups(named, self.lr, self.weight_decay, self.loraplus_lr_ratio)

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of state of a parameter: a mean and a mean of squares, both float32."""
        return 8 * math.prod(shape)


def groups(
    named: Named, lr: float, weight_decay: float, loraplus_lr_ratio: float | None = None
) -> list[dict[str, Any]]:
    """Split parameters by whether they decay and by their learning rate.

    Matrices decay; norms, biases and every other vector don't. With LoRA+ the B matrices learn faster
    (Hayou et al. 2024, arXiv:2402.12354, sec. 4).

    Args:
        named: (name, parameter) of all trainable parameters.
        lr: peak learning rate.
        weight_decay: decoupled weight decay of the matrices.
        loraplus_lr_ratio: learning rate of B over that of A; None for one rate.

    Returns:
        torch parameter groups, each with `lr`, `initial_lr` (what a schedule multiplies) and `weight_decay`.
    """
    split: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        decay = weight_decay if parameter.ndim >= 2 and "norm" not in name.lower() else 0.0
        fast = loraplus_lr_ratio is not None and (".lora_B." in name or ".lora_embedding_B" in name)
        rate = lr * loraplus_lr_ratio if fast and loraplus_lr_ratio is not None else lr
        split.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in split.items()
    ]
