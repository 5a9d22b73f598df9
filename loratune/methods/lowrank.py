"""LoRA's layer in few passes: PEFT's own module with another forward, for plain LoRA over a frozen linear layer.

Layers that are given the same state (query, key and value; gate and up) are computed together: what is small is then
read and added up once for all of them.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from loratune.methods import recompute

if TYPE_CHECKING:
    import torch

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of layers that share what they are given


def fits(layer: Any) -> bool:
    """Return whether a layer is one whose product this module computes itself: linear, not quantized, not float16."""
    import torch

    return type(layer) is torch.nn.Linear and layer.weight.dtype in (torch.float32, torch.bfloat16)


def join(model: Any) -> None:
    """Tell the layers of a model which others are given the same state; if they are not, each is computed alone."""
    _, kind = modules()
    for parent in model.modules():
        for names in TOGETHER:
            found = [getattr(parent, name, None) for name in names]
            members = tuple(layer for layer in found if isinstance(layer, kind))
            for layer in members:
                layer.together = members


@cache
def modules() -> tuple[dict[Any, Any], Any]:
    """Return what PEFT is to put over which layer, for `LoraConfig._register_custom_module`, and its class."""
    import torch
    from peft.tuners.lora import Linear
    from torch.nn.functional import linear

    class LowRank(torch.autograd.Function):
        """x W^T + b + s x A^T B^T with W and b frozen, for some layers; in the precision of x, A and B may be wider.

        The small products of all layers with x, and with its gradient, are one: their A stand below one another.
        """

        @staticmethod
        def forward(
            ctx: Any, x: torch.Tensor, again: recompute.Again, scales: list[float], *given: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            """Take weight, bias, A and B of each layer; return what each gives."""
            rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
            weights, biases, a, b = (given[part::4] for part in range(4))
            downs = [
                part.to(x.dtype) for part in a
            ]  # (r, in) each, kept as such: copies of weights, known by their size
            ups = [(part * scale).to(x.dtype) for part, scale in zip(b, scales, strict=True)]  # (out, r) each
            inners = torch.split_with_sizes(
                rows @ torch.cat(downs).t(), [part.shape[1] for part in ups], dim=1
            )  # (tokens, r) each
            parts = zip(weights, biases, inners, ups, strict=True)
            outs = [linear(rows, weight, bias).addmm_(inner, up.t()) for weight, bias, inner, up in parts]
            ctx.save_for_backward(*weights, *ups, *inners, *downs, *again.kept)
            ctx.scales, ctx.masters, ctx.product, ctx.shape = scales, (a[0].dtype, b[0].dtype), again.product, x.shape
            ctx.set_materialize_grads(False)
            return tuple(out.view(*x.shape[:-1], -1) for out in outs)

        @staticmethod
        def backward(ctx: Any, *outer: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            number = len(outer)
            saved = ctx.saved_tensors  # once: a checkpointed layer is computed again by it
            weights, ups, inners, downs = (saved[part * number : (part + 1) * number] for part in range(4))
            kept = saved[4 * number :]
            found: list[torch.Tensor | None] = [None] * (4 * number)
            of_x = None
            gradients = [None if g is None else g.reshape(-1, g.shape[-1]) for g in outer]
            throughs = [
                inner.new_zeros(inner.shape) if g is None else g @ up
                for g, up, inner in zip(gradients, ups, inners, strict=True)
            ]
            through = torch.cat(throughs, dim=1) if number > 1 else throughs[0]  # (tokens, all r)
            if any(ctx.needs_input_grad[5::4]):
                of_down = ctx.product(through, *kept).to(ctx.masters[0])
                found[2::4] = torch.split_with_sizes(of_down, [part.shape[1] for part in ups])
            for index, g in enumerate(gradients):
                if g is None:
                    continue
                if ctx.needs_input_grad[6 + 4 * index]:  # this way round: the other is slower on a CPU
                    of_b = (inners[index].t() @ g).t().to(ctx.masters[1])
                    found[4 * index + 3] = of_b.mul_(ctx.scales[index])
                if ctx.needs_input_grad[0]:
                    of_x = g @ weights[index] if of_x is None else of_x.addmm_(g, weights[index])
            if of_x is not None:
                of_x = of_x.addmm_(through, torch.cat(downs)).view(ctx.shape)
            return of_x, None, None, *found

    class FewPasses(Linear):  # type: ignore[misc]
        """PEFT's LoRA layer; whatever is not plain LoRA in training goes PEFT's way."""

        together: tuple[FewPasses, ...] = ()  # itself and others, which are given the same

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            made: dict[FewPasses, torch.Tensor] = getattr(x, "_made", {})
            if self in made:
                return made.pop(self)
            if args or kwargs or not self._plain(x):
                out: torch.Tensor = super().forward(x, *args, **kwargs)
                return out
            layers = [self, *(other for other in self.together if other is not self and other._plain(x))]
            given = [part for layer in layers for part in layer._tensors()]
            scales = [layer.scaling[layer.active_adapters[0]] for layer in layers]
            outs = LowRank.apply(x, recompute.of(x), scales, *given)  # type: ignore[no-untyped-call]
            if len(layers) > 1:
                x._made = dict(zip(layers[1:], outs[1:], strict=True))  # type: ignore[attr-defined]
            return outs[0]  # type: ignore[no-any-return]

        def _tensors(self) -> tuple[torch.Tensor | None, ...]:
            name = self.active_adapters[0]
            return self.base_layer.weight, self.base_layer.bias, self.lora_A[name].weight, self.lora_B[name].weight

        def _plain(self, x: torch.Tensor) -> bool:
            base, names = self.base_layer, self.active_adapters
            return (
                self.training  # an evaluation is PEFT's to the bit
                and not (self.disable_adapters or self.merged)
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

    return {torch.nn.Linear: FewPasses}, FewPasses
