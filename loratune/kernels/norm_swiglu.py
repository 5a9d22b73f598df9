"""RMSNorm and SwiGLU that save little for the backward pass: their outputs are recomputed from tensors saved anyway.

An RMSNorm saves its input; a SwiGLU its gate and its input. Otherwise float32 copies and the normed and gated states
are most of what a decoder layer saves. A layer that takes such a state as input, and would save it for its own backward
pass, finds on it how to recompute what it needs (`Again`), and saves nothing.

Which modules can be replaced is tested, not looked up by name: the outputs must be equal bit for bit.
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
    """How to do without a saved state x of shape (..., width) in the backward pass.

    Attributes:
        product: returns l^T x, (r, width), for l of shape (tokens, r) and `kept`.
        kept: tensors it needs, which are saved anyway.
        versions: version counters of the state and of `kept` then: an in-place change since makes this invalid.
    """

    product: Callable[..., torch.Tensor]
    kept: tuple[torch.Tensor, ...]
    versions: tuple[int, ...] = ()


def of(x: torch.Tensor) -> Again:
    """Return how to do without a state; for one without a valid entry, the state itself is kept."""
    found: Again | None = getattr(x, "_again", None)
    if found is None or found.versions != _versions(x, *found.kept):
        return Again(_product, (x.detach(),))
    return found


def version(x: torch.Tensor) -> int:
    """Return how often a tensor was modified in place; 0 for one made under `inference_mode`, which has no counter."""
    return 0 if x.is_inference() else x._version


def _versions(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(version(tensor) for tensor in tensors)


def _remember(out: torch.Tensor, product: Callable[..., torch.Tensor], *kept: torch.Tensor) -> None:
    """Attach to a state how to do without it."""
    out._again = Again(product, kept, _versions(out, *kept))  # type: ignore[attr-defined]


def install(model: Any, again: bool) -> None:
    """Let the norms and SwiGLUs of a model save little in training; in an evaluation they are unchanged.

    Args:
        model: its norms are frozen.
        again: whether an `Again` is attached to their outputs. Not where something keeps a reference to an output: that
            would keep its inputs alive, too.
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
            module.forward = MethodType(forward, module)  # a bound method, so that a copy of the module gets its own


def found(model: Any) -> set[tuple[str, int, Any]]:
    """Return the operations of the modules that `install` found: `norm` or `gate`, with width and device of each."""
    return {_need(module) for module in model.modules() if _installed(module)}


def switch(model: Any, way: str, needs: set[tuple[str, int, Any]]) -> None:
    """Set how the norms and SwiGLUs of a model with these needs (see `found`) compute: plain, compiled or in Triton.

    Args:
        model: after `install`.
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
    """RMSNorm with a frozen weight; returns the normed state and its scale."""

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
    """SwiGLU's gate; both inputs are saved by the layers that computed them."""

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
    """Return the new forward of a module that looks like an RMSNorm or a SwiGLU, or None."""
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
    """Return whether another forward equals a module's own, bit for bit, for small and large inputs.

    Its gradient may differ by rounding.
    """
    is_norm = hasattr(module, "weight")
    width = module.weight.shape[0] if is_norm else module.gate_proj.in_features
    dtype = module.weight.dtype if is_norm else precision(module.gate_proj)
    waves = torch.linspace(-9, 9, 4 * width, device=next(module.parameters()).device).sin().view(4, width)
    states = waves * torch.tensor([[1e-3], [1.0], [30.0], [1e3]], device=waves.device)
    parts = [(part, part.training) for part in module.modules()]
    module.eval()  # without dropout, both are deterministic
    module.training = True
    try:
        own = type(module).forward
        with torch.no_grad():
            if not all(torch.equal(forward(module, x), own(module, x)) for x in states[:, None, None].to(dtype)):
                return False
        mine, others = (_gradient(way, module, states[1:3].to(dtype)) for way in (forward, own))
        return bool((mine - others).norm() <= (1e-4 if dtype is torch.float32 else 5e-2) * others.norm())
    except (TypeError, ValueError, RuntimeError):  # the module takes other inputs than one state
        return False
    finally:
        for part, was in parts:
            part.training = was


def _gradient(forward: Callable[..., torch.Tensor], module: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a weighted sum of the output, float32, of the shape of x."""
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        out = forward(module, given)
        outer = torch.linspace(-5, 5, out.numel(), device=out.device).cos().view_as(out).to(out.dtype)
        (found,) = torch.autograd.grad(out, given, outer)
    return found.float()


def _product(left: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return left.t() @ x.reshape(-1, x.shape[-1])


def _product_of_normed(left: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return l^T n for n = norm(x), without n: l is scaled by each token's scale, the result by the norm's weight."""
    return _product((left * scale.view(-1, 1)).to(left.dtype), x).float() * weight


def _product_of_gated(
    operations: elementwise.Operations, left: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    return _product(left, operations.gate(gate, up))
