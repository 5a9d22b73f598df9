"""bitsandbytes' paged AdamW with 32-bit states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loratune.optimizers.groups import AdamFields, Named

if TYPE_CHECKING:
    import torch


class PagedAdamW32bit(AdamFields):
    """AdamW with float32 states that move to main memory when the GPU is full. Source: QLoRA, arXiv:2305.14314, sec. 3."""

    type: Literal["paged_adamw_32bit"] = "paged_adamw_32bit"

    def build(self, params: Named, device: str) -> torch.optim.Optimizer:
        """Return the optimizer over (name, parameter) pairs; without a GPU there is nothing to page out of."""
        import bitsandbytes as bnb

        kind = bnb.optim.PagedAdamW32bit if device == "cuda" else bnb.optim.AdamW32bit
        optimizer: torch.optim.Optimizer = kind(
            self.groups(params), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps
        )
        return optimizer

    def note(self, device: str) -> str | None:
        """Return what a person must know about this optimizer on `device`."""
        return None if device == "cuda" else "paged_adamw_32bit runs unpaged: there is no GPU memory to page"
