"""Keep embedding, head and the inputs of checkpointed layers in main memory, for a GPU that is short of memory.

Rows of the embedding are looked up in main memory. The head is copied to the GPU slice by slice, each slice while the
one before is in use. The input of a checkpointed layer is copied out during its forward pass, and back for its backward
pass. The weights are frozen: they are only read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import embedding, linear

SLICE = 8192  # rows of a head that are on the GPU at once; twice that, as the next are copied meanwhile
LOGITS = 1 << 24  # numbers in float32 that a slice's logits may have
SMALL = 1 << 20  # bytes of a tensor that is not worth copying


class Embedding(torch.nn.Embedding):
    """An embedding whose weight is in main memory."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ids, on their device; the host waits for the ids."""
        rows = embedding(ids.to(self.weight.device), self.weight)
        return to_device(rows, ids.device)


class Linear(torch.nn.Linear):
    """A frozen linear layer whose weight is in main memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b on the device of x."""
        if not x.numel():  # the weight would be copied for nothing
            return x.new_empty(*x.shape[:-1], self.out_features)
        out: torch.Tensor = _Product.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return out


_CLASSES: dict[type, type] = {torch.nn.Embedding: Embedding, torch.nn.Linear: Linear}


def movable(net: Any) -> list[Any]:
    """Return embedding and head of a model, each if it is plain and frozen."""
    found = [net.get_input_embeddings(), net.get_output_embeddings()]
    plain = [module for module in found if type(module) in (*_CLASSES, *_CLASSES.values())]
    return [
        module for module in plain
        if not any(p.requires_grad for p in module.parameters())
        and module.weight.dtype in (torch.bfloat16, torch.float32) and getattr(module, "max_norm", None) is None
    ]  # fmt: skip


def movable_bytes(net: Any) -> int:
    """Return the bytes of the weights that `weights_to_host` moves; tied ones count once."""
    return sum({id(module.weight): module.weight.nbytes for module in movable(net)}.values())


def weights_to_host(net: Any) -> None:
    """Move embedding and head of a model to main memory."""
    for module in movable(net):
        weight = module.weight
        if weight.is_cuda:  # a tied weight is one parameter, moved once
            weight.data = weight.data.to("cpu").pin_memory()
        module.__class__ = _CLASSES.get(type(module), type(module))


def inputs_to_host(layers: list[Any]) -> None:
    """Keep the inputs of checkpointed layers in main memory between forward and backward pass.

    Args:
        layers: for which transformers' gradient checkpointing is on.
    """
    for layer in layers:
        checkpoint = layer._gradient_checkpointing_func

        def offloaded(*given: Any, _checkpoint: Callable[..., Any] = checkpoint) -> Any:
            with saved_tensors_hooks(_out, _back):  # for the inputs: within the layer those of `checkpoint` count
                return _checkpoint(*given)

        layer._gradient_checkpointing_func = offloaded


class _OnHost:
    """A tensor on its way to main memory, and back."""

    def __init__(self, tensor: torch.Tensor):
        self.device = tensor.device
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        beside = _beside(self.device)
        beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(beside):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(beside)
        self.copied = beside.record_event()

    def back(self) -> torch.Tensor:
        torch.cuda.current_stream(self.device).wait_event(self.copied)
        return self.host.to(self.device, non_blocking=True)


def _out(tensor: torch.Tensor) -> Any:
    return _OnHost(tensor) if tensor.is_cuda and tensor.nbytes >= SMALL else tensor


def _back(kept: Any) -> torch.Tensor:
    found: torch.Tensor = kept.back() if isinstance(kept, _OnHost) else kept
    return found


_streams: dict[torch.device, Any] = {}


def _beside(device: torch.device) -> Any:
    """Return a stream for copies, which run beside the default one."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


def slices(weight: torch.Tensor, device: torch.device, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row and the rows of each slice of a weight, (rows, width), on a device.

    The next slice is copied while one is in use; a slice is overwritten after the next one was taken.
    """
    if weight.device == device:
        for begin in range(0, len(weight), rows):
            yield begin, weight[begin : begin + rows]
        return
    now, beside = torch.cuda.current_stream(device), _beside(device)
    buffers = [torch.empty((rows, weight.shape[1]), dtype=weight.dtype, device=device) for _ in range(2)]
    beside.wait_stream(now)
    begins = range(0, len(weight), rows)
    used: list[Any] = [None, None]

    def copy(number: int) -> tuple[torch.Tensor, Any]:
        part = weight[begins[number] : begins[number] + rows]
        into = buffers[number % 2][: len(part)]
        if used[number % 2] is not None:
            beside.wait_event(used[number % 2])
        with torch.cuda.stream(beside):
            into.copy_(part, non_blocking=True)
        return into, beside.record_event()

    following = copy(0)
    for number, begin in enumerate(begins):
        part, copied = following
        if number + 1 < len(begins):
            following = copy(number + 1)
        now.wait_event(copied)
        yield begin, part
        used[number % 2] = now.record_event()


class _Product(torch.autograd.Function):
    """x W^T + b with a frozen W in main memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight, ctx.device = weight, x.device
        return torch.cat([out for _, _, out in _products(x, weight, bias, SLICE)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = torch.zeros((), device=ctx.device)
        for begin, part in slices(ctx.weight, ctx.device, SLICE):
            gradient = gradient + (outer[0][..., begin : begin + len(part)] @ part).float()
        return gradient.to(outer[0].dtype), None, None


class Head(torch.autograd.Function):
    """Linear and cross entropy with a frozen weight in main memory; see `linear_cross_entropy.summed_cross_entropy`.

    The weight is read twice: for the sums of exponentials, shifted by the largest logit so far, and for the gradient.
    Source of the sums: Milakov and Gimelshein 2018, arXiv:1805.02867, alg. 3.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:  # fmt: skip
        tokens, words = len(hidden), len(weight)
        rows = min(SLICE, max(1, LOGITS // max(tokens, 1)))
        top = hidden.new_full((tokens, 1), -torch.inf, dtype=torch.float32)
        ones, of_target, mean = (hidden.new_zeros((tokens, 1), dtype=torch.float32) for _ in range(3))
        for _, logits, places, inside in _logits(hidden, weight, bias, targets, rows):
            of_target += torch.where(inside, logits.gather(1, places), 0)
            if smoothing:
                mean += logits.sum(dim=1, keepdim=True) / words
            higher = torch.maximum(top, logits.amax(dim=1, keepdim=True))
            ones.mul_((top - higher).exp_()).add_(logits.sub_(higher).exp_().sum(dim=1, keepdim=True))
            top = higher
        total = top + ones.log()
        gradient = None
        if ctx.needs_input_grad[0]:
            summed = torch.zeros_like(hidden, dtype=torch.float32)
            for part, logits, places, inside in _logits(hidden, weight, bias, targets, rows):
                scores = logits.sub_(total).exp_()
                if smoothing:
                    scores.sub_(smoothing / words)
                scores.scatter_add_(1, places, torch.where(inside, smoothing - 1.0, 0.0))
                summed += scores.to(hidden.dtype) @ part
            gradient = summed.to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return (total - (1 - smoothing) * of_target - smoothing * mean).sum()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        if gradient is not None:
            gradient = (gradient.float() * outer[0]).to(gradient.dtype)
        return gradient, None, None, None, None


def _products(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the first row of each slice of a weight, the slice, and its part of x W^T + b."""
    for begin, part in slices(weight, x.device, rows):
        offset = None if bias is None else to_device(bias[begin : begin + len(part)], x.device)
        yield begin, part, linear(x, part, offset)


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield each slice of a head, its logits in float32, and the targets' places in it and whether they are there."""
    for begin, part, logits in _products(hidden, weight, bias, rows):
        places = (targets - begin)[:, None]
        inside = (places >= 0) & (places < len(part))
        yield part, logits.float(), places.clamp(0, len(part) - 1), inside


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device; from pageable memory the host would wait for the copy."""
    pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return pinned.to(device, non_blocking=True)
