"""bitsandbytes' AdamW with 8-bit states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loratune.optim import bnb
from loratune.optim.groups import AdamFields, Named

if TYPE_CHECKING:
    import torch


class AdamW8bit(AdamFields):
    """AdamW with 8-bit states: 2 bytes per trainable parameter. For want of memory: on a GPU it waits for each tensor.

    `adamw` steps all of them in one kernel. Source: Dettmers et al. 2022, arXiv:2110.02861.
    """

    type: Literal["adamw_8bit"] = "adamw_8bit"

    def build(self, params: Named, device: str) -> torch.optim.Optimizer:
        """Return the optimizer over (name, parameter) pairs."""
        return bnb.build(self, params, "AdamW8bit")

    def note(self, device: str) -> str | None:
        """Return what a person must know about this optimizer on `device`."""
        return None

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of state of a parameter."""
        return bnb.state_bytes_8bit(shape)
