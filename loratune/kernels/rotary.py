"""Rotary position embeddings by our own kernel, in place of the function that a model's attention calls.

In transformers that function is `apply_rotary_pos_emb` in the module of the attention. Whether it rotates halves, as
most do, is tested; models that do something else keep theirs.
"""

from __future__ import annotations

import sys
from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch

from loratune.kernels import gpu_kernels

_NAME = "apply_rotary_pos_emb"


class Rotary(torch.autograd.Function):
    """Rotate the halves of queries and keys, (batch, heads, tokens, width), by the angles of their positions."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from loratune.kernels import triton_kernels

        ctx.save_for_backward(cos, sin)
        return triton_kernels.rotary(query, key, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        from loratune.kernels import triton_kernels

        cos, sin = ctx.saved_tensors
        return *triton_kernels.rotary(outer[0], outer[1], cos, sin, back=True), None, None


def homes(net: Any) -> list[ModuleType]:
    """Return those modules of a model's layers whose function rotates halves."""
    found = {name: sys.modules[name] for name in sorted({type(m).__module__ for m in net.modules()} & set(sys.modules))}
    return [home for home in found.values() if _turns_halves(own(home))]


def own(home: ModuleType) -> Any:
    """Return a module's original function, also where it is replaced now; None where it has none."""
    there = vars(home).get(_NAME)
    return getattr(there, "own", there)


def use(home: ModuleType, device: torch.device) -> None:
    """Let a module's attention use the kernel on a device until `gpu_kernels.stop`, and its own function elsewhere."""
    before = own(home)

    @wraps(before)
    def rotated(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *others: Any, **named: Any
    ) -> Any:
        if others or named or not (gpu_kernels.uses("rotary", q.device) and fits(q, k, cos, sin)):
            return before(q, k, cos, sin, *others, **named)
        return Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]

    rotated.own = before  # type: ignore[attr-defined]
    vars(home)[_NAME] = rotated
    gpu_kernels.use("rotary", device, partial(vars(home).update, {_NAME: before}))


def fits(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Return whether the kernel supports (batch, heads, tokens, width) with angles of (batch or 1, tokens, width)."""
    width = q.shape[-1]
    return (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1:] == (q.shape[2], width)
        and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
        and width % 2 == 0
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and not (cos.requires_grad or sin.requires_grad)
        and q.stride(3) == k.stride(3) == cos.stride(2) == sin.stride(2) == 1
    )


def _turns_halves(function: Any) -> bool:
    if function is None:
        return False
    random = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(s, generator=random) for s in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)))
    try:
        found = function(q, k, cos, sin)
        wanted = [x * cos[:, None] + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin[:, None] for x in (q, k)]
        return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    except Exception:  # it takes other arguments
        return False
