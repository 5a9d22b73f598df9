"""torch's own AdamW, fused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loratune.optim.groups import AdamFields, Named

if TYPE_CHECKING:
    import torch


class AdamW(AdamFields):
    """AdamW in float32, one fused kernel per step: 8 bytes of state per trainable parameter."""

    type: Literal["adamw"] = "adamw"

    def build(self, params: Named, device: str) -> torch.optim.Optimizer:
        """Return the optimizer over (name, parameter) pairs."""
        import torch

        return torch.optim.AdamW(
            self.groups(params), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True
        )

    def note(self, device: str) -> str | None:
        """Return what a person must know about this optimizer on `device`."""
        return None
