"""LoRA's layer in few passes: PEFT's own module with another forward, for plain LoRA over a frozen linear layer."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from loratune.methods import recompute

if TYPE_CHECKING:
    import torch


def fits(layer: Any) -> bool:
    """Return whether a layer is one whose product this module computes itself: linear, not quantized, not float16."""
    import torch

    return type(layer) is torch.nn.Linear and layer.weight.dtype in (torch.float32, torch.bfloat16)


@cache
def modules() -> dict[Any, Any]:
    """Return what PEFT is to put over which layer, for `LoraConfig._register_custom_module`."""
    import torch
    from peft.tuners.lora import Linear
    from torch.nn.functional import linear

    class LowRank(torch.autograd.Function):
        """x W^T + b + s x A^T B^T with W and b frozen, in the precision of x; A and B may be wider (masters)."""

        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, a: torch.Tensor,
            b: torch.Tensor, scale: float, again: recompute.Again,
        ) -> torch.Tensor:  # fmt: skip
            rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
            down, up = a.to(x.dtype), (b * scale).to(x.dtype)  # (r, in), (out, r)
            inner = rows @ down.t()
            out = linear(rows, weight, bias).addmm_(inner, up.t())
            ctx.save_for_backward(weight, down, up, inner, *again.kept)
            ctx.scale, ctx.masters, ctx.product, ctx.shape = scale, (a.dtype, b.dtype), again.product, x.shape
            return out.view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            weight, down, up, inner, *kept = ctx.saved_tensors
            gradient = outer[0].reshape(-1, weight.shape[0])
            through = gradient @ up  # (tokens, r)
            of_a = ctx.product(through, *kept).to(ctx.masters[0]) if ctx.needs_input_grad[3] else None
            of_b = None
            if ctx.needs_input_grad[4]:  # this way round: the other is slower on a CPU
                of_b = (inner.t() @ gradient).t().to(ctx.masters[1]).mul_(ctx.scale)
            of_x = (gradient @ weight).addmm_(through, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
            return of_x, None, None, of_a, of_b, None, None

    class FewPasses(Linear):  # type: ignore[misc]
        """PEFT's LoRA layer; whatever is not plain LoRA in training goes PEFT's way."""

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            base, names = self.base_layer, self.active_adapters
            plain = (
                self.training  # an evaluation is PEFT's to the bit
                and not (args or kwargs or self.disable_adapters or self.merged)
                and len(names) == 1
                and names[0] in self.lora_A
                and names[0] not in self.lora_variant
                and type(self.lora_dropout[names[0]]) is torch.nn.Identity
                and self.lora_B[names[0]].bias is None
                and fits(base)
                and x.dtype == base.weight.dtype
                and not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
                and not torch.is_autocast_enabled(x.device.type)
            )
            if not plain:
                out: torch.Tensor = super().forward(x, *args, **kwargs)
                return out
            a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
            made: torch.Tensor = LowRank.apply(  # type: ignore[no-untyped-call]
                x, base.weight, base.bias, a, b, self.scaling[names[0]], recompute.of(x)
            )
            return made

    return {torch.nn.Linear: FewPasses}
