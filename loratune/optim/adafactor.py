"""Adafactor as torch computes it, without synchronising with the GPU."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from loratune.config.section import Section
from loratune.optim.groups import Named, groups

if TYPE_CHECKING:
    import torch


class Adafactor(Section):
    """Row and column means instead of one square per weight. Source: Shazeer & Stern 2018, arXiv:1804.04235."""

    type: Literal["adafactor"] = "adafactor"
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    relative: bool = Field(
        False,
        description="multiply `lr` by each matrix's root mean square, as in the paper; off: one below 1 counts as 1,"
        " so that LoRA's B, which starts at zero, is updated at all",
    )
    beta2_decay: float = Field(-0.8, lt=0, description="exponent of the step in the decay of the squares")
    clip: float = Field(1.0, gt=0, description="largest root mean square of one update")
    weight_decay: float = Field(
        0.0, ge=0, description="fraction (0-1) of each matrix subtracted per step, times `lr`; not for norms and biases"
    )

    def build(self, params: Named, device: str) -> torch.optim.Optimizer:
        """Return the optimizer over (name, parameter) pairs."""
        least = 1e-3 if self.relative else 1.0  # smallest scale of a matrix; the paper's epsilon 2
        made: torch.optim.Optimizer = _never_waiting()(
            groups(params, self.lr, self.weight_decay),
            lr=self.lr, beta2_decay=self.beta2_decay, eps=(None, least), d=self.clip,
        )  # fmt: skip
        return made

    def note(self, device: str) -> str | None:
        """Return a note for the start report about this optimizer on `device`, or None."""
        return None

    def state_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of state of a parameter: a mean per row and per column of a matrix."""
        return 4 * (sum(shape) if len(shape) == 2 else math.prod(shape))


@cache
def _never_waiting() -> Any:
    """Return torch's Adafactor with our own step: same options, same state, but norms stay on the GPU.

    torch's own converts two norms of each matrix to Python numbers: about 900 synchronisations a step.
    """
    import torch

    class NeverWaiting(torch.optim.Adafactor):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            """Do one step with the current gradients."""
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        _move(parameter, parameter.grad, self.state[parameter], group)

    return NeverWaiting


def _move(x: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """Update one parameter with its gradient, (..., rows, columns) or a vector. Source: arXiv:1804.04235, alg. 4, 5.

    Args:
        x: the parameter.
        g: its gradient.
        state: its state, by torch's names; empty before the first step.
        group: torch's options: `lr`, `beta2_decay`, `eps`, `d`, `weight_decay`.
    """
    import torch
    from torch.linalg import vector_norm

    if not state:
        state["step"] = torch.tensor(0.0)  # on the CPU: it is read as a number
        if g.dim() > 1:
            state["row_var"] = g.new_zeros(*g.shape[:-1], 1)
            state["col_var"] = g.new_zeros(*g.shape[:-2], 1, g.shape[-1])
        else:
            state["variance"] = torch.zeros_like(g)
    state["step"] += 1
    step, root = float(state["step"]), math.sqrt(x.numel())
    new, (least_square, least_scale) = step ** group["beta2_decay"], group["eps"]
    if least_square is None:
        least_square = torch.finfo(x.dtype).eps
    scale = vector_norm(x, dtype=torch.float32).div_(root).clamp_(min=least_scale)  # ()
    if group["weight_decay"]:
        x.mul_(1 - group["lr"] * group["weight_decay"])
    if g.dim() > 1:
        rows, columns = state["row_var"], state["col_var"]
        rows.lerp_(vector_norm(g, dim=-1, keepdim=True).square_().div_(g.shape[-1]), new)
        columns.lerp_(vector_norm(g, dim=-2, keepdim=True).square_().div_(g.shape[-2]), new)
        squares = (rows @ columns).div_(rows.mean(dim=-2, keepdim=True).clamp_(min=least_square))
    else:
        squares = state["variance"].lerp_(g.square(), new).clone()
    update = squares.clamp_(min=least_square**2).rsqrt_().mul_(g).float()
    rate = scale.mul_(min(group["lr"], step**-0.5))
    x.sub_(update.mul_(rate / vector_norm(update).div_(root * group["d"]).clamp_(min=1)))
