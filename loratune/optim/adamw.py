"""AdamW: torch's own, fused, and those of bitsandbytes with 8-bit or paged states."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from loratune.config.section import tag_of
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
        """Return a note for the start report about this optimizer on `device`, or None."""
        return None


class _OfBitsandbytes(AdamFields):
    """Base class of bitsandbytes' AdamWs."""

    bits: ClassVar[Literal[8, 32]]
    paged: ClassVar[bool]

    def build(self, params: Named, device: str) -> torch.optim.Optimizer:
        """Return the optimizer over (name, parameter) pairs; paged on a GPU only."""
        import bitsandbytes

        name = f"{'Paged' if self.paged and device == 'cuda' else ''}AdamW{self.bits}bit"
        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(
            self.groups(params), lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps
        )
        return optimizer

    def note(self, device: str) -> str | None:
        """Return a note for the start report about this optimizer on `device`, or None."""
        if not self.paged or device == "cuda":
            return None
        return f"{tag_of(type(self))} runs unpaged: there is no GPU memory to page"

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of state: 8 bits: two per number, two scales per block of 256; small tensors use 32 bits."""
        count = math.prod(shape)
        return super().state_bytes(shape) if self.bits == 32 or count < 4096 else 2 * count + 8 * -(-count // 256)


class AdamW8bit(_OfBitsandbytes):
    """AdamW with 8-bit states: 2 bytes per trainable parameter. Slower on a GPU, where it waits for each tensor.

    `adamw` steps all of them in one kernel. Source: Dettmers et al. 2022, arXiv:2110.02861.
    """

    type: Literal["adamw_8bit"] = "adamw_8bit"
    bits: ClassVar[Literal[8, 32]] = 8
    paged: ClassVar[bool] = False


class PagedAdamW32bit(_OfBitsandbytes):
    """AdamW with float32 states that move to main memory when the GPU is full. Source: arXiv:2305.14314, sec. 3."""

    type: Literal["paged_adamw_32bit"] = "paged_adamw_32bit"
    bits: ClassVar[Literal[8, 32]] = 32
    paged: ClassVar[bool] = True


class PagedAdamW8bit(_OfBitsandbytes):
    """AdamW with 8-bit states that move to main memory when the GPU is full. Source: arXiv:2305.14314, sec. 3."""

    type: Literal["paged_adamw_8bit"] = "paged_adamw_8bit"
    bits: ClassVar[Literal[8, 32]] = 8
    paged: ClassVar[bool] = True


def is_paged(optimizer: Any) -> bool:
    """Return whether an optimizer is one of those whose state can be paged out of GPU memory."""
    return type(optimizer).__module__.startswith("bitsandbytes.") and bool(optimizer.is_paged)


def page(optimizer: Any) -> None:
    """Move the state of a paged optimizer into paged memory, as its first step does.

    `load_state_dict` creates plain tensors, which would stay on the GPU.
    """
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state and parameter.is_cuda:
                buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                buffer.copy_(state[name])
                state[name] = buffer
