"""Norms and SwiGLU that keep little until the way back: what they gave is computed again from what is there anyway.

An RMSNorm keeps what it was given, a SwiGLU its gate and its input; the copies in float32, the normed and the gated
states in between are most of what a decoder layer keeps otherwise. Whatever takes such a state and needs it on its own
way back finds in it how to do without (`Again`), and keeps nothing.

Which modules that may stand for is tried, not looked up: the same numbers must come out, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch

from loratune.kernels import elementwise
from loratune.kernels.layer_kinds import precision


@dataclass(frozen=True)
class Again:
    """How to do without a state x of shape (..., width) on the way back.

    Attributes:
        product: gives l^T x for l of shape (tokens, r) and `kept`, (r, width).
        kept: tensors it needs, which others keep as well.
        versions: of the state and of `kept`, as they were when it was made: one that was edited in place since is
            another state.
    """

    product: Callable[..., torch.Tensor]
    kept: tuple[torch.Tensor, ...]
    versions: tuple[int, ...] = ()


def of(x: torch.Tensor) -> Again:
    """Return how to do without a state; one that nothing is known of, or no longer, is kept itself."""
    found: Again | None = getattr(x, "_again", None)
    if found is None or found.versions != _versions(x, *found.kept):
        return Again(_product, (x.detach(),))
    return found


def version(x: torch.Tensor) -> int:
    """Return how often a tensor was edited in place; one made under `inference_mode` is not counted, and never is."""
    return 0 if x.is_inference() else x._version


def _versions(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(version(tensor) for tensor in tensors)


def _remember(out: torch.Tensor, product: Callable[..., torch.Tensor], *kept: torch.Tensor) -> None:
    """Leave on a state how to do without it."""
    out._again = Again(product, kept, _versions(out, *kept))  # type: ignore[attr-defined]


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


def found(model: Any) -> set[tuple[str, int, Any]]:
    """Return which operations those need that `install` found: `norm` or `gate`, with width and device of each."""
    return {_need(module) for module in model.modules() if _installed(module)}


def switch(model: Any, way: str, needs: set[tuple[str, int, Any]]) -> None:
    """Let the norms and SwiGLUs of a model with these needs (see `found`) go another way from now on.

    Args:
        model: given to `install` before.
        way: one of `elementwise.WAYS`.
        needs: of those that change.
    """
    for module in model.modules():
        if _installed(module) and _need(module) in needs:
            now = module.forward.__func__
            module.forward = MethodType(partial(now.func, **{**now.keywords, "way": way}), module)


def _installed(module: Any) -> bool:
    now = getattr(vars(module).get("forward"), "__func__", None)
    return isinstance(now, partial) and now.func in (_normed, _gated)


def _need(module: Any) -> tuple[str, int, Any]:
    device = next(module.parameters()).device
    if module.forward.__func__.func is _normed:
        return "norm", module.weight.shape[0], device
    return "gate", module.gate_proj.out_features, device


class Norm(torch.autograd.Function):
    """The normed state, and what it was scaled with; its weight is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, operations: elementwise.Operations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, scale = operations.norm(x, weight, epsilon)
        ctx.save_for_backward(x, scale, weight)
        ctx.mark_non_differentiable(scale)
        ctx.operations = operations
        return out, scale

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        x, scale, weight = ctx.saved_tensors
        return ctx.operations.norm_back(outer[0], x, scale, weight), None, None, None


class Gate(torch.autograd.Function):
    """The gated state; both of what it is made of are kept by whoever made them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, operations: elementwise.Operations) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.operations = operations
        return operations.gate(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up = ctx.saved_tensors
        return *ctx.operations.gate_back(outer[0], gate, up), None


def _way(module: Any, again: bool) -> Callable[..., torch.Tensor] | None:
    """Return the other forward of a module that looks like an RMSNorm or a SwiGLU, or None."""
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


def _normed(module: Any, x: torch.Tensor, *others: Any, again: bool, way: str = "plain", **named: Any) -> torch.Tensor:
    plain = module.training and x.dtype == module.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    if not plain or others or named:
        out: torch.Tensor = type(module).forward(module, x, *others, **named)
        return out
    given = (x, module.weight, _epsilon(module), elementwise.WAYS[way]())
    out, scale = Norm.apply(*given)  # type: ignore[no-untyped-call]
    if again:
        _remember(out, _product_of_normed, x.detach(), scale, module.weight)
    return out


def _gated(module: Any, x: torch.Tensor, *others: Any, again: bool, way: str = "plain", **named: Any) -> torch.Tensor:
    if not module.training or others or named:
        done: torch.Tensor = type(module).forward(module, x, *others, **named)
        return done
    gate, up = module.gate_proj(x), module.up_proj(x)
    operations = elementwise.WAYS[way]()
    out = Gate.apply(gate, up, operations)  # type: ignore[no-untyped-call]
    if again:
        _remember(out, partial(_product_of_gated, operations), gate.detach(), up.detach())
    return module.down_proj(out)  # type: ignore[no-any-return]


def _agree(module: Any, forward: Callable[..., torch.Tensor]) -> bool:
    """Return whether another forward gives the same as a module's own, to the bit, for states small and large.

    Its gradient may differ by what rounds otherwise.
    """
    is_norm = hasattr(module, "weight")
    width = module.weight.shape[0] if is_norm else module.gate_proj.in_features
    dtype = module.weight.dtype if is_norm else precision(module.gate_proj)
    waves = torch.linspace(-9, 9, 4 * width, device=next(module.parameters()).device).sin().view(4, width)
    states = waves * torch.tensor([[1e-3], [1.0], [30.0], [1e3]], device=waves.device)
    parts = [(part, part.training) for part in module.modules()]
    module.eval()  # what is inside draws no random numbers then, and goes one way whoever asks
    module.training = True
    try:
        own = type(module).forward
        with torch.no_grad():
            if not all(torch.equal(forward(module, x), own(module, x)) for x in states[:, None, None].to(dtype)):
                return False
        mine, others = (_gradient(way, module, states[1:3].to(dtype)) for way in (forward, own))
        return bool((mine - others).norm() <= (1e-4 if dtype is torch.float32 else 5e-2) * others.norm())
    except (TypeError, ValueError, RuntimeError):  # it wants more than a state, or other ones
        return False
    finally:
        for part, was in parts:
            part.training = was


def _gradient(forward: Callable[..., torch.Tensor], module: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a weighted sum of what comes out, in float32, of the shape of x."""
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        out = forward(module, given)
        outer = torch.linspace(-5, 5, out.numel(), device=out.device).cos().view_as(out).to(out.dtype)
        (found,) = torch.autograd.grad(out, given, outer)
    return found.float()


def _product(left: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return left.t() @ x.reshape(-1, x.shape[-1])


def _product_of_normed(left: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return l^T x for the normed x without it: scales of tokens go to the left, of the width behind the sum."""
    return _product((left * scale.view(-1, 1)).to(left.dtype), x).float() * weight


def _product_of_gated(
    operations: elementwise.Operations, left: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    return _product(left, operations.gate(gate, up))
