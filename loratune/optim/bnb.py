"""What the optimizers of bitsandbytes share: how they are built, and that paging needs a GPU."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from loratune.optim.groups import AdamFields, Named

if TYPE_CHECKING:
    import torch

Kind = Literal["AdamW8bit", "AdamW32bit", "PagedAdamW8bit", "PagedAdamW32bit"]


def build(fields: AdamFields, params: Named, kind: Kind) -> torch.optim.Optimizer:
    """Return one of bitsandbytes' AdamWs over (name, parameter) pairs."""
    import bitsandbytes as bnb

    classes = {
        "AdamW8bit": bnb.optim.AdamW8bit,
        "AdamW32bit": bnb.optim.AdamW32bit,
        "PagedAdamW8bit": bnb.optim.PagedAdamW8bit,
        "PagedAdamW32bit": bnb.optim.PagedAdamW32bit,
    }
    optimizer: torch.optim.Optimizer = classes[kind](
        fields.groups(params), lr=fields.lr, betas=(fields.beta1, fields.beta2), eps=fields.eps
    )
    return optimizer


def state_bytes_8bit(shape: tuple[int, ...]) -> int:
    """Return the bytes of 8-bit state: two bytes a number and two scales a block of 256; small tensors keep 32 bit."""
    count = math.prod(shape)
    return 8 * count if count < 4096 else 2 * count + 8 * -(-count // 256)


def unpaged_note(name: str, device: str) -> str | None:
    """Return what to tell where a paged optimizer finds no GPU memory to page out of."""
    return None if device == "cuda" else f"{name} runs unpaged: there is no GPU memory to page"


def is_paged(optimizer: Any) -> bool:
    """Return whether an optimizer is one of those whose state can be paged out of GPU memory."""
    return type(optimizer).__module__.startswith("bitsandbytes.") and bool(optimizer.is_paged)


def page(optimizer: Any) -> None:
    """Move the state of a paged optimizer into memory that can be paged, as its first step does.

    `load_state_dict` puts plain tensors there, which would stay on the GPU.
    """
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state and parameter.is_cuda:
                buffer = optimizer.get_state_buffer(parameter, dtype=state[name].dtype)
                buffer.copy_(state[name])
                state[name] = buffer
