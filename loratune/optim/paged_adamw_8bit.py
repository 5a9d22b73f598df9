"""bitsandbytes' paged AdamW with 8-bit states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loratune.optim import bnb
from loratune.optim.groups import AdamFields, Named

if TYPE_CHECKING:
    import torch


class PagedAdamW8bit(AdamFields):
    """AdamW with 8-bit states that move to main memory when the GPU is full. Source: arXiv:2305.14314, sec. 3."""

    type: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"

    def build(self, params: Named, device: str) -> torch.optim.Optimizer:
        """Return the optimizer over (name, parameter) pairs, paged on a GPU."""
        return bnb.build(self, params, "PagedAdamW8bit" if device == "cuda" else "AdamW8bit")

    def note(self, device: str) -> str | None:
        """Return what a person must know about this optimizer on `device`."""
        return bnb.unpaged_note(self.type, device)

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of state of a parameter."""
        return bnb.state_bytes_8bit(shape)
