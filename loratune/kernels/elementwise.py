"""RMSNorm and SwiGLU, forward and backward, as functions of the last dimension: by torch, its compiler or Triton.

Compiled, or as our own kernels on a GPU, each is one pass over its tensors instead of up to seven. A new number of
tokens does not cause a recompilation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import silu

CLOSE = {"torch.float32": 1e-5, "torch.float16": 2**-9, "torch.bfloat16": 2**-6}  # relative difference from plain ones


@dataclass(frozen=True)
class Operations:
    """The elementwise operations between the matrix products of a layer.

    Attributes:
        norm: x, weight, epsilon -> w x / sqrt(mean(x^2) + e), and 1 / sqrt(...), float32, (..., 1).
            Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4, in the order of operations of transformers' Llama.
        norm_back: gradient, x, 1 / sqrt(...), weight -> gradient of x.
        gate: gate, up -> silu(gate) up. Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
        gate_back: gradient, gate, up -> gradients of gate and of up.
    """

    norm: Callable[..., Any]
    norm_back: Callable[..., Any]
    gate: Callable[..., Any]
    gate_back: Callable[..., Any]


def _norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(torch.float32, copy=True)
    scale = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
    return weight * wide.mul_(scale).to(x.dtype), scale


def _norm_back(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    normed = x.to(torch.float32, copy=True).mul_(scale)
    wide = (gradient * weight).to(torch.float32, copy=True)
    along = (normed * wide).mean(-1, keepdim=True)
    return wide.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)


def _gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate).mul_(up)


def _gate_back(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)


PLAIN = Operations(_norm, _norm_back, _gate, _gate_back)
"""The operations as torch computes them."""


@cache
def compiled() -> Operations:
    """Return the operations compiled by torch; each is compiled at its first call."""
    return Operations(_compiled(_norm), _compiled(_norm_back), _compiled(_gate), _compiled(_gate_back))


@cache
def in_triton() -> Operations:
    """Return the operations as our own kernels, which need a GPU and `triton`.

    Raises:
        ImportError: where `triton` is not installed.
    """
    from loratune.kernels import triton_kernels

    return Operations(triton_kernels.norm, triton_kernels.norm_back, triton_kernels.gate, triton_kernels.gate_back)


WAYS: dict[str, Callable[[], Operations]] = {"plain": lambda: PLAIN, "compiled": compiled, "triton": in_triton}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    made = torch.compile(function, dynamic=False)  # except for the tokens, which are marked below

    def call(*given: Any) -> Any:
        lead = given[0].shape[:-1]
        flat = []
        for part in given:
            if isinstance(part, torch.Tensor) and part.dim() > 1:
                part = part.detach().reshape(-1, part.shape[-1])
                torch._dynamo.mark_dynamic(part, 0)
            flat.append(part)
        out = made(*flat)
        if isinstance(out, tuple):
            return tuple(part.view(*lead, -1) for part in out)
        return out.view(*lead, -1)

    return call


def is_near(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Return whether a tensor differs from another as little as `CLOSE` allows in its precision; never for NaN."""
    return bool((wanted - got).float().norm() <= CLOSE[str(wanted.dtype)] * wanted.float().norm())


def differs(kind: str, width: int, dtype: Any, device: Any, way: str = "compiled") -> str | None:
    """Return which operation of a kind, `norm` or `gate`, differs from the plain one, or None.

    Raises:
        Exception: of many classes, when torch or Triton can't compile here.
    """
    one, other = PLAIN, WAYS[way]()
    random = torch.Generator(device="cpu").manual_seed(0)
    x, up, g = (torch.randn(48, width, generator=random).to(device, dtype) * size for size in (3, 1, 1))
    weight = torch.linspace(0.5, 1.5, width).to(device, dtype)
    cases: dict[str, tuple[Any, ...]]
    if kind == "norm":
        cases = {"norm": (x, weight, 1e-5), "norm_back": (g, x, one.norm(x, weight, 1e-5)[1], weight)}
    else:
        cases = {"gate": (x, up), "gate_back": (g, x, up)}
    with torch.no_grad():
        for name, given in cases.items():
            wanted, got = (getattr(which, name)(*given) for which in (one, other))
            pairs = zip(wanted, got, strict=True) if isinstance(wanted, tuple) else [(wanted, got)]
            if not all(is_near(b, a) for a, b in pairs):
                return name
    return None
