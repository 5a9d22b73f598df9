"""Norms and SwiGLU that keep little until the way back: what they gave is computed again from what is there anyway.

An RMSNorm keeps what it was given, a SwiGLU its gate and its input; the copies in float32, the normed and the gated
states in between are most of what a decoder layer keeps otherwise. Whatever takes such a state and needs it on its own
way back finds in it how to do without (`Again`), and keeps nothing.

Which modules that may stand for is tried, not looked up: the same numbers must come out, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Again:
    """How to do without a state x of shape (..., width) on the way back.

    Attributes:
        product: gives l^T x for l of shape (tokens, r) and `kept`, (r, width).
        kept: tensors it needs, which others keep as well.
    """

    product: Callable[..., torch.Tensor]
    kept: tuple[torch.Tensor, ...]


def of(x: torch.Tensor) -> Again:
    """Return how to do without a state; one that nothing is known of is kept itself."""
    found: Again = getattr(x, "_again", None) or Again(_product, (x.detach(),))
    return found


def install(model: Any, again: bool) -> None:
    """Let the norms and SwiGLUs of a model keep little while they train; in an evaluation they stay what they are.

    Args:
        model: its norms are frozen.
        again: whether what they give also tells how to do without it. Not where something holds on to it: that would
            hold on to what it was made of, too.
    """
    tried: dict[Any, bool] = {}
    for module in model.modules():
        forward = _way(module, again)
        if forward is None:
            continue
        key = (type(module), type(getattr(module, "act_fn", None)))
        if key not in tried:
            tried[key] = _agree(module, forward)
        if tried[key]:
            module.forward = MethodType(forward, module)  # a method, so that a copy of the module gets one of its own


def _way(module: Any, again: bool) -> Callable[..., torch.Tensor] | None:
    """Return the other forward of a module that looks like an RMSNorm or a SwiGLU, or None."""
    import torch

    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    if all(isinstance(getattr(module, part, None), torch.nn.Module) for part in parts):
        return partial(_gated, again=again) if "silu" in type(module.act_fn).__name__.lower() else None
    weight = getattr(module, "weight", None)
    if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, torch.Tensor) and weight.dim() == 1):
        return None
    plain = weight.dtype in (torch.float32, torch.bfloat16) and not weight.requires_grad
    return partial(_normed, again=again) if plain and _epsilon(module) is not None else None


def _epsilon(module: Any) -> float | None:
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in found if isinstance(value, float)), None)


def _normed(module: Any, x: torch.Tensor, *others: Any, again: bool, **named: Any) -> torch.Tensor:
    import torch

    plain = module.training and x.dtype == module.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if not plain or others or named:
        out: torch.Tensor = type(module).forward(module, x, *others, **named)
        return out
    out, scale = _functions()[0].apply(x, module.weight, _epsilon(module))
    if again:
        out._again = Again(_product_of_normed, (x.detach(), scale, module.weight))  # type: ignore[attr-defined]
    return out


def _gated(module: Any, x: torch.Tensor, *others: Any, again: bool, **named: Any) -> torch.Tensor:
    if not module.training or others or named:
        done: torch.Tensor = type(module).forward(module, x, *others, **named)
        return done
    gate, up = module.gate_proj(x), module.up_proj(x)
    out = _functions()[1].apply(gate, up)
    if again:
        out._again = Again(_product_of_gated, (gate.detach(), up.detach()))
    return module.down_proj(out)  # type: ignore[no-any-return]


def _agree(module: Any, forward: Callable[..., torch.Tensor]) -> bool:
    """Return whether another forward gives the same as a module's own, to the bit, for states small and large."""
    import torch

    width = module.weight.shape[0] if hasattr(module, "weight") else module.gate_proj.in_features
    like = next(module.parameters())
    waves = torch.linspace(-9, 9, 4 * width, device=like.device).sin().view(4, width)
    states = waves * torch.tensor([[1e-3], [1.0], [30.0], [1e3]], device=like.device)
    parts = [(part, part.training) for part in module.modules()]
    module.eval()  # what is inside draws no random numbers then, and goes one way whoever asks
    module.training = True
    try:
        with torch.no_grad():
            own = type(module).forward
            return all(torch.equal(forward(module, x), own(module, x)) for x in states[:, None, None].to(like.dtype))
    except (TypeError, ValueError, RuntimeError):  # it wants more than a state, or other ones
        return False
    finally:
        for part, was in parts:
            part.training = was


def _product(left: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return left.t() @ x.reshape(-1, x.shape[-1])


def _product_of_normed(left: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return l^T x for the normed x without it: scales of tokens go to the left, of the width behind the sum."""
    return _product((left * scale.view(-1, 1)).to(left.dtype), x).float() * weight


def _product_of_gated(left: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import silu

    return _product(left, silu(gate).mul_(up))


@cache
def _functions() -> tuple[Any, Any]:
    import torch
    from torch.nn.functional import silu

    class Norm(torch.autograd.Function):
        """w x / sqrt(mean(x^2) + e) in float32 but for the product with w, and 1 / sqrt(...); w is frozen.

        Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4, in the order of operations of transformers' Llama.
        """

        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float
        ) -> tuple[torch.Tensor, torch.Tensor]:
            wide = x.to(torch.float32, copy=True)
            scale = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()  # (..., 1)
            ctx.save_for_backward(x, scale, weight)
            ctx.mark_non_differentiable(scale)
            return weight * wide.mul_(scale).to(x.dtype), scale

        @staticmethod
        def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
            x, scale, weight = ctx.saved_tensors
            normed = x.to(torch.float32, copy=True).mul_(scale)
            gradient = (outer[0] * weight).to(torch.float32, copy=True)
            along = (normed * gradient).mean(-1, keepdim=True)
            return gradient.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), None, None

    class Gate(torch.autograd.Function):
        """silu(gate) up. Source: Shazeer 2020, arXiv:2002.05202, eq. 6."""

        @staticmethod
        def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(gate, up)
            return silu(gate).mul_(up)

        @staticmethod
        def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
            gate, up = ctx.saved_tensors
            of_up = silu(gate).mul_(outer[0]) if ctx.needs_input_grad[1] else None
            of_gate = torch.ops.aten.silu_backward(outer[0] * up, gate) if ctx.needs_input_grad[0] else None
            return of_gate, of_up

    return Norm, Gate
