"""Fused LoRA layer: PEFT's module with another forward, for plain LoRA on a frozen layer, 4-bit ones included.

Layers with the same input (query, key and value; gate and up) are computed together, so that their small products are
one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from torch.nn.functional import linear

from loratune.kernels import gpu_kernels, norm_swiglu
from loratune.kernels.layer_kinds import is_of_bitsandbytes, precision

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names of layers with the same input


def fits(layer: Any) -> bool:
    """Return whether this module can compute a layer's product: a plain or 4-bit linear layer, not in float16."""
    plain = type(layer) is torch.nn.Linear
    return (plain or _in_4_bits(layer)) and precision(layer) in (torch.float32, torch.bfloat16)


def misfits(model: Any) -> list[str]:
    """Return why linear layers of a model are not supported here: float16, or the names of their classes."""
    linear = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and not fits(module))
    return sorted({"float16" if type(m).__name__ == "Linear" else type(m).__name__ for m in linear})


def _in_4_bits(layer: Any) -> bool:
    return is_of_bitsandbytes(layer, "Linear4bit")


def dequantized(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return a dequantized 4-bit weight, (out, in), in its original precision.

    Args:
        packed: bitsandbytes' storage of it, (out * in / 2, 1).
        state: its `QuantState`.
    """
    if gpu_kernels.uses("nf4", packed.device) and is_nf4(packed, state):
        return in_one_launch(packed, state)
    from bitsandbytes.functional import dequantize_4bit

    wide: torch.Tensor = dequantize_4bit(packed, state)
    return wide


def is_nf4(packed: torch.Tensor, state: Any) -> bool:
    """Return whether `in_one_launch` can read a weight: nf4 in contiguous bytes."""
    plain = packed.dtype is torch.uint8 and packed.dim() == 2 and packed.shape[1] == 1 and packed.is_contiguous()
    return (
        plain and state.quant_type == "nf4" and state.absmax.dtype is (torch.uint8 if state.nested else torch.float32)
    )


def in_one_launch(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """Return a weight dequantized from nf4 by our own kernel, both levels of scales in one; see `dequantized`."""
    from loratune.kernels import triton_kernels

    nested = (state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize) if state.nested else None
    return triton_kernels.nf4(packed, state.absmax, state.code, state.blocksize, state.shape, state.dtype, nested)


def join(model: Any) -> None:
    """Set for each layer of a model which others have the same input; where they don't, each is computed alone."""
    kinds = tuple(MODULES.values())
    for parent in model.modules():
        for names in TOGETHER:
            found = [getattr(parent, name, None) for name in names]
            members = tuple(layer for layer in found if isinstance(layer, kinds))
            for layer in members:
                layer.together = members


@dataclass(frozen=True)
class Cast:
    """A and s B of some layers with the same input, in the precision that these compute in.

    Attributes:
        downs: stacked A of all layers, (all r, in).
        ups: s B of each layer, (out, r).
    """

    downs: torch.Tensor
    ups: tuple[torch.Tensor, ...]


class Casts:
    """A and s B of a model in the precision of its layers, made once per step.

    Otherwise each layer casts them in each micro-batch, and again where it is recomputed.
    """

    def __init__(self, model: Any):
        """Take a model after `join`."""
        layers = [module for module in model.modules() if isinstance(module, _Ours)]
        self._groups = [layer.group for layer in layers if layer is layer.group[0]]
        self._into: list[Cast] = []

    @contextmanager
    def made(self) -> Iterator[None]:
        """Cast all matrices that are wider than their layer; layers use these until the context ends."""
        groups = [group for group in self._groups if all(layer.is_wider() for layer in group)]
        if not groups:
            yield
            return
        if not self._into:  # the memory of the first step is used by all
            self._into = [_empty(group) for group in groups]
        masters = [layer.master() for group in groups for layer in group]
        into = [part for cast in self._into for part in torch.split_with_sizes(cast.downs, _ranks(cast.ups))]
        with torch.no_grad():
            torch._foreach_copy_(into, [a for a, _, _ in masters])
            scaled = torch._foreach_mul([b for _, b, _ in masters], [scale for _, _, scale in masters])
            torch._foreach_copy_([up for cast in self._into for up in cast.ups], scaled)
        del scaled
        for group, cast in zip(groups, self._into, strict=True):
            group[0].cast = cast
        try:
            yield
        finally:
            for group in groups:
                group[0].cast = None


def _empty(group: Sequence[_Ours]) -> Cast:
    """Return memory for the cast matrices of layers with the same input."""
    masters = [layer.master() for layer in group]
    given: dict[str, Any] = {"dtype": precision(group[0]), "device": masters[0][0].device}
    downs = torch.empty(sum(len(a) for a, _, _ in masters), masters[0][0].shape[1], **given)
    return Cast(downs, tuple(torch.empty(b.shape, **given) for _, b, _ in masters))


class LowRank(torch.autograd.Function):
    """x W^T + b + s x A^T B^T with W and b frozen, for some layers; in the precision of x, A and B may be wider.

    The small products of all layers with x, and with its gradient, are one product of their stacked A.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, again: norm_swiglu.Again, cast: Cast | None, scales: list[float],
        weights: list[Callable[[], torch.Tensor]], *given: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """Return the outputs of some layers.

        Args:
            ctx: of autograd.
            x: their input.
            again: how to do without x in the backward pass.
            cast: A and s B in the precision of x; None to cast them here.
            scales: s of each layer.
            weights: a function of each layer that returns its weight.
            given: bias, A and B of each layer.
        """
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        biases, a, b = (given[part::3] for part in range(3))
        if cast is not None:
            downs, ups = [cast.downs], list(cast.ups)
        else:
            downs = [part.to(x.dtype) for part in a]  # (r, in) each, saved apart: copies of weights, known by shape
            ups = [(part * scale).to(x.dtype) for part, scale in zip(b, scales, strict=True)]  # (out, r) each
        inners = torch.split_with_sizes(rows @ _stacked(downs).t(), _ranks(ups), dim=1)  # (tokens, r) each
        parts = zip(weights, biases, inners, ups, strict=True)
        outs = [_product(rows, weight(), bias, inner, up) for weight, bias, inner, up in parts]
        ctx.save_for_backward(*ups, *inners, *downs, *again.kept)
        ctx.weights, ctx.scales, ctx.stacks = weights, scales, len(downs)
        ctx.masters, ctx.product, ctx.shape = (a[0].dtype, b[0].dtype), again.product, x.shape
        ctx.set_materialize_grads(False)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        number = len(outer)
        saved = ctx.saved_tensors  # once: for a checkpointed layer this triggers the recomputation
        ups, inners, rest = saved[:number], saved[number : 2 * number], saved[2 * number :]
        downs, kept = rest[: ctx.stacks], rest[ctx.stacks :]
        found: list[torch.Tensor | None] = [None] * (3 * number)
        gradients = [None if g is None else g.reshape(-1, g.shape[-1]) for g in outer]
        throughs = [
            inner.new_zeros(inner.shape) if g is None else g @ up
            for g, up, inner in zip(gradients, ups, inners, strict=True)
        ]
        through = torch.cat(throughs, dim=1) if number > 1 else throughs[0]  # (tokens, all r)
        # the small product first where the large one can add to it at no cost
        small_first = ctx.needs_input_grad[0] and _adds_for_free(through)
        of_x = through @ _stacked(downs) if small_first else None
        if any(ctx.needs_input_grad[6::3]):
            of_down = ctx.product(through, *kept).to(ctx.masters[0])
            found[1::3] = torch.split_with_sizes(of_down, _ranks(ups))
        for index, g in enumerate(gradients):
            if g is None:
                continue
            if ctx.needs_input_grad[7 + 3 * index]:  # in this order: the other is slower on a CPU
                of_b = (inners[index].t() @ g).t().to(ctx.masters[1])
                found[3 * index + 2] = of_b.mul_(ctx.scales[index])
            if ctx.needs_input_grad[0]:
                weight = ctx.weights[index]()
                of_x = g @ weight if of_x is None else of_x.addmm_(g, weight)
                del weight  # frees a dequantized one before the next
        if of_x is not None:
            of_x = (of_x if small_first else of_x.addmm_(through, _stacked(downs))).view(ctx.shape)
        return of_x, None, None, None, None, *found


def _ranks(ups: Sequence[torch.Tensor]) -> list[int]:
    """Return the rank of each layer, from its s B, (out, r)."""
    return [up.shape[1] for up in ups]


def _stacked(downs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the stacked A of all layers, (all r, in)."""
    return torch.cat(list(downs)) if len(downs) > 1 else downs[0]


def _adds_for_free(x: torch.Tensor) -> bool:
    """Return whether a large product can add to an existing tensor at no cost: on a GPU."""
    return x.is_cuda


def _product(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, inner: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """Return x W^T + b + i B^T, (tokens, out).

    The small product comes first where the large one can add to it at no cost.
    """
    if not _adds_for_free(rows):
        return linear(rows, weight, bias).addmm_(inner, up.t())
    small = inner @ up.t() if bias is None else torch.addmm(bias, inner, up.t())
    return small.addmm_(rows, weight.t())


class _Ours(torch.nn.Module):
    """Overrides the forward of PEFT's LoRA layer; whatever is not plain LoRA is left to PEFT's.

    So is an evaluation in float32, and with it the reference of a merge. In bfloat16 an evaluation uses the training's
    forward: PEFT's would make a float32 copy of each layer's input.
    """

    together: tuple[Any, ...] = ()  # itself and others with the same input
    cast: Cast | None = None  # of all these, at the first of them, during a step
    base_layer: Any
    scaling: Any
    active_adapters: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: Any
    disable_adapters: Any
    merged: Any

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        version = norm_swiglu.version(x)
        made: dict[Any, torch.Tensor] = getattr(x, "_made", {}).get(version, {})  # none if x was modified since
        if self in made:
            return made.pop(self)
        if args or kwargs or not self._plain(x):
            out: torch.Tensor = super().forward(x, *args, **kwargs)
            return out
        layers = [self, *(other for other in self.together if other is not self and other._plain(x))]
        given = [part for layer in layers for part in layer._tensors()]
        scales = [layer.master()[2] for layer in layers]
        weights = [layer._weight for layer in layers]
        cast = self.cast if len(layers) == len(self.group) else None
        outs = LowRank.apply(x, norm_swiglu.of(x), cast, scales, weights, *given)  # type: ignore[no-untyped-call]
        if len(layers) > 1:
            x._made = {version: dict(zip(layers[1:], outs[1:], strict=True))}  # type: ignore[attr-defined]
        return outs[0]  # type: ignore[no-any-return]

    @property
    def group(self) -> tuple[Any, ...]:
        """All layers with the same input; itself alone where there are no others."""
        return self.together or (self,)

    def master(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A, B and the scale s."""
        name = self.active_adapters[0]
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]

    def is_wider(self) -> bool:
        """Return whether A and B are in another precision than the layer computes in."""
        return bool(self.active_adapters) and self.master()[0].dtype != precision(self)

    def _tensors(self) -> tuple[torch.Tensor | None, ...]:
        bias = self.base_layer.bias
        return bias if bias is None else bias.to(precision(self)), *self.master()[:2]

    def _weight(self) -> torch.Tensor:
        """Return the base's weight in the precision it computes in, (out, in)."""
        base = self.base_layer
        if not _in_4_bits(base):
            return base.weight  # type: ignore[no-any-return]
        return dequantized(base.weight.data, base.weight.quant_state).to(base.compute_dtype)

    def _plain(self, x: torch.Tensor) -> bool:
        base, names = self.base_layer, self.active_adapters
        return (
            (self.training or x.dtype is torch.bfloat16)  # in float32 an evaluation equals PEFT's bit for bit
            and not (self.disable_adapters or self.merged)
            and len(names) == 1
            and names[0] in self.lora_A
            and names[0] not in self.lora_variant
            and type(self.lora_dropout[names[0]]) is torch.nn.Identity
            and self.lora_B[names[0]].bias is None
            and fits(base)
            and x.dtype == precision(base)
            and not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
            and not torch.is_autocast_enabled(x.device.type)
        )


class FewPasses(_Ours, lora.Linear):  # type: ignore[misc]
    """LoRA on a linear layer."""


MODULES: dict[Any, Any] = {torch.nn.Linear: FewPasses}
"""Which class goes over which layer."""


def replace_layers(config: Any) -> None:
    """Have PEFT put these classes over linear layers, not its own; the only way there is in PEFT 0.17 and later."""
    config._register_custom_module(MODULES)


if is_bnb_4bit_available():
    from bitsandbytes.nn import Linear4bit

    class FewPasses4bit(_Ours, lora.Linear4bit):  # type: ignore[misc]
        """LoRA on a 4-bit linear layer."""

    MODULES = {Linear4bit: FewPasses4bit, **MODULES}  # the first match counts, and one is a subclass of the other
