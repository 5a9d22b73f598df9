"""Fused linear layer and cross entropy: the loss of a head without full logits, gradient included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from loratune.kernels import gpu_kernels, offload

ROWS = {"cpu": 128, "cuda": 1024}  # most tokens whose logits are in memory at once
TRAINED = {"cpu": 512, "cuda": 1024}  # the same for a trained head: each chunk adds a product of its size
WIDE = {"cpu": 128, "cuda": 256}  # most tokens of whose logits a float32 copy is in memory at once
_LOOKED_AT = 8  # tokens of the test whether a head is plain

_plain: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by layer: the precision it computes in; None: not plain


def layer_of(model: Any) -> Any:
    """Return the layer that computes a model's logits: its head, or the copy of it that PEFT trains instead."""
    head = model.get_output_embeddings()
    if type(head).__name__ != "ModulesToSaveWrapper":
        return head
    names = head.active_adapters
    return head.modules_to_save[names[0]] if names and not head.disable_adapters else head.original_module


def rows_at_once(weight: torch.Tensor) -> int:
    """Return the most tokens whose logits are in memory at once."""
    return (TRAINED if weight.requires_grad else ROWS)[weight.device.type]


def chunk_bytes(kind: str, words: int, itemsize: int, trained: bool) -> int:
    """Return the bytes of logits in memory at once: of a chunk, and of a partial float32 copy where it is not float32.

    Args:
        kind: of the device, `cpu` or `cuda`.
        words: of the vocabulary.
        itemsize: bytes of a logit.
        trained: whether the head is trained.
    """
    rows = (TRAINED if trained else ROWS)[kind]
    wide = 0 if itemsize == 4 else rows if kind == "cpu" else WIDE[kind]
    return words * (rows * itemsize + wide * 4)


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Return the sum of the cross entropies of a linear layer, in nats, float32, shape ().

    The gradient with respect to the logits is softmax - target: it is known in the forward pass. So the gradients of
    hidden states and weight are computed there, chunk by chunk, and no tensor of (tokens, vocabulary) exists.

    Args:
        hidden: input of the head, (tokens, width).
        weight: of the head, (vocabulary, width).
        bias: of the head, (vocabulary,), or None.
        targets: (tokens,).
        smoothing: part (0-1) of each target spread over the whole vocabulary.
    """
    if not torch.is_grad_enabled():  # inside of an autograd function this is not known
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    function = Head if weight.device == hidden.device else offload.Head
    total: torch.Tensor = function.apply(hidden, weight, bias, targets, smoothing)  # type: ignore[no-untyped-call]
    return total


def cross_entropy_of_logits(logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Return the sum of cross entropies of given logits, in nats, float32, shape (), with small float32 copies.

    Args:
        logits: (tokens, vocabulary), in any precision.
        targets: (tokens,).
        smoothing: part (0-1) of each target spread over the whole vocabulary.
    """
    total: torch.Tensor = OfLogits.apply(logits, targets, smoothing)  # type: ignore[no-untyped-call]
    return total


def is_fusible(model: Any, ids: torch.Tensor) -> bool:
    """Return whether `summed_cross_entropy` can compute a model's loss: its head is plain.

    In float16 only in an evaluation: a gradient must be scaled before it is rounded.

    Args:
        model: without a DDP wrapper.
        ids: tokens to try it with, (rows, tokens).
    """
    layer = layer_of(model)
    half = torch.is_grad_enabled() and torch.float16
    return is_plain(model, ids) and half not in (_precision(layer), _plain[layer])


def is_plain(model: Any, ids: torch.Tensor) -> bool:
    """Return whether a model's logits are the unchanged output of a linear head; see `is_fusible`."""
    layer = layer_of(model)
    half = (torch.bfloat16, torch.float16)
    if type(layer) not in (torch.nn.Linear, offload.Linear) or layer.weight.dtype not in (torch.float32, *half):
        return False
    if layer not in _plain:
        _plain[layer] = _is_all(model, layer, ids[:1, :_LOOKED_AT])
    return _plain[layer] is not None


def is_frozen_float32(model: Any, ids: torch.Tensor) -> bool:
    """Return whether `log_probabilities` can be computed: by a plain head, not trained, in float32 on a CPU."""
    layer = layer_of(model)
    if not is_plain(model, ids) or type(layer) is not torch.nn.Linear or layer.bias is not None:
        return False
    alone = layer.weight.device.type == "cpu" and not layer.weight.requires_grad
    return alone and layer.weight.dtype is _precision(layer) is torch.float32


def log_probabilities(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return log p of each target in nats, (tokens,); its gradient is kept as one vector for each token.

    Args:
        hidden: input of the head, float32, (tokens, width).
        weight: of the head, frozen, float32, (vocabulary, width).
        targets: (tokens,).
    """
    found: torch.Tensor = LogProbabilities.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return found


def _precision(layer: Any) -> torch.dtype:
    """Return the precision a linear layer computes in now: its own, or that of autocast."""
    kind = layer.weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.weight.dtype


def _is_all(model: Any, head: Any, ids: torch.Tensor) -> torch.dtype | None:
    """Return the precision of a head if the model returns its output unchanged for each token, else None.

    Tested once for each head, with made-up logits in place of the head's output. They range from 1e-5 to 1e4 in size,
    so that a cap shows on large ones and an addition on small ones. With real logits either could be lost in rounding.
    """
    seen: list[torch.dtype | None] = []
    shapes: list[torch.Size] = []  # longer than the tokens where virtual tokens precede them
    words = head.out_features
    given = torch.logspace(-5, 4, words, device=head.weight.device, dtype=torch.float32)
    given[::2] *= -1

    def instead(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        precision = _precision(head)
        cast = torch.is_autocast_enabled(head.weight.device.type)  # then the input is cast, whatever it is
        known = output.dtype == precision and (cast or inputs[0].dtype == precision)
        known = known and output.dim() == 3 and output.shape[0] == len(ids) and output.shape[1] >= ids.shape[1]
        seen.append(precision if known else None)
        shapes.append(output.shape)
        return given.to(output.dtype).expand_as(output).clone()

    hook = head.register_forward_hook(instead)
    devices = [head.weight.device] if head.weight.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):  # the test must not change the random numbers of the run
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0] is None:
        return None
    wanted = given.to(seen[0]).float().expand(shapes[0])
    return seen[0] if torch.equal(logits.float(), wanted) else None


def at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return hidden states, (rows, tokens, width), at flat positions (row x tokens + token): (positions, width)."""
    return hidden.flatten(0, -2).index_select(0, positions)


@contextmanager
def caught(layer: Any, positions: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Capture a plain head's input at `positions` (see `at`), and let the head run for at most one.

    Yields a list that will hold the input in the precision the head computes in, (positions, width).
    """
    found: list[torch.Tensor] = []

    def before(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        found.append(at(inputs[0], positions).to(_precision(layer)))
        return (found[0][: 0 if isinstance(layer, offload.Linear) else 1].detach(),)

    hook = layer.register_forward_pre_hook(before)
    try:
        yield found
    finally:
        hook.remove()


def _scores_to_gradient(scores: torch.Tensor, ones: torch.Tensor, target: torch.Tensor, smoothing: float) -> None:
    """Turn exponentials of logits into softmax - target in place, (rows, vocabulary) in float32.

    Args:
        scores: exponentials of logits, shifted by a number for each row.
        ones: their sums, (rows, 1).
        target: (rows, 1).
        smoothing: part (0-1) of each target spread over the whole vocabulary.
    """
    scores.div_(ones)
    if smoothing:
        scores.sub_(smoothing / scores.shape[1])
    scores.scatter_add_(1, target, torch.full_like(ones, smoothing - 1))


class _Softmax:
    """Cross entropy of logits, which are replaced by their gradient, with float32 copies of a few rows at a time."""

    def __init__(self, logits: torch.Tensor, smoothing: float, gradient: bool, of_bias: torch.Tensor | None):
        """Take logits of the largest chunk, (rows, vocabulary), and the tensor to add the bias's gradient to."""
        self.smoothing, self.gradient, self.of_bias = smoothing, gradient, of_bias
        self.fused = gpu_kernels.uses("cross_entropy", logits.device) and of_bias is None
        rows = len(logits) if logits.device.type == "cpu" else min(len(logits), WIDE[logits.device.type])
        of_its_own = logits.dtype is not torch.float32 and not self.fused
        self.rows = max(rows, 1)
        self.wide = torch.empty_like(logits[:rows], dtype=torch.float32) if of_its_own else None

    def __call__(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the sum of losses of a chunk, float32, (); its targets are (rows, 1)."""
        if self.fused:
            from loratune.kernels import triton_kernels

            return triton_kernels.cross_entropy(logits, target[:, 0], self.smoothing, self.gradient).sum()
        pieces = zip(torch.split(logits, self.rows), torch.split(target, self.rows), strict=True)
        sums = [self._piece(part, wanted) for part, wanted in pieces]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    def _piece(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        scores = logits if self.wide is None else self.wide[: len(logits)].copy_(logits)
        scores.sub_(scores.amax(dim=-1, keepdim=True))
        of_target, mean = scores.gather(1, target), scores.mean(dim=-1, keepdim=True) if self.smoothing else 0
        ones = scores.exp_().sum(dim=-1, keepdim=True)
        total = (ones.log() - (1 - self.smoothing) * of_target - self.smoothing * mean).sum()
        if self.gradient:
            _scores_to_gradient(scores, ones, target, self.smoothing)
            if self.of_bias is not None:
                self.of_bias += scores.sum(dim=0)
            logits.copy_(scores)
        return total


class Head(torch.autograd.Function):
    """Linear and cross entropy; the gradient of the weight is summed in float32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:  # fmt: skip
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        of_bias = None if bias is None or not ctx.needs_input_grad[2] else torch.zeros_like(bias, dtype=torch.float32)
        parts = -(-len(hidden) // rows_at_once(weight))
        rows = -(-len(hidden) // max(parts, 1))  # chunks of similar size: a small last one is slow
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)  # under autocast
        # allocated once for all chunks: new memory costs a page fault for each page
        made = hidden.new_empty(rows, len(weight))
        softmax = _Softmax(made, smoothing, any(ctx.needs_input_grad), of_bias)
        for begin in range(0, len(hidden), max(rows, 1)):
            part, target = hidden[begin : begin + rows], targets[begin : begin + rows, None]
            logits = made[: len(part)]  # (rows, vocabulary)
            if bias is None:
                torch.mm(part, weight.t(), out=logits)
            else:
                torch.addmm(bias, part, weight.t(), out=logits)
            total += softmax(logits, target)
            if not any(ctx.needs_input_grad):
                continue
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[begin : begin + rows])
            if of_weight is not None and part.dtype is torch.float32:
                of_weight.addmm_(logits.t(), part)
            elif of_weight is not None:
                of_weight += logits.t() @ part
        ctx.save_for_backward(gradient)
        ctx.summed = (of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if gradient is not None:  # in float32: 1 / count rounded to bfloat16 would scale all gradients by its error
            gradient = (gradient.float() * outer[0]).to(gradient.dtype)
        summed = [
            None if one is None else one.mul_(outer[0]).to(dtype)
            for one, dtype in zip(ctx.summed, ctx.dtypes, strict=True)
        ]
        ctx.summed = None  # scaled in place, as it is as large as the head: only once
        return gradient, *summed, None, None


class LogProbabilities(torch.autograd.Function):
    """Log p of each target; d log p / d hidden is made in the forward pass, and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        size = ROWS["cpu"]
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        made = hidden.new_empty(min(size, len(hidden)), len(weight))
        found = hidden.new_empty(len(hidden))
        for begin in range(0, len(hidden), size):
            part, target = hidden[begin : begin + size], targets[begin : begin + size, None]
            scores = torch.mm(part, weight.t(), out=made[: len(part)])  # (size, vocabulary)
            scores.sub_(scores.amax(dim=-1, keepdim=True))
            of_target = scores.gather(1, target)
            ones = scores.exp_().sum(dim=-1, keepdim=True)
            found[begin : begin + size] = (of_target - ones.log())[:, 0]
            if gradient is not None:
                _scores_to_gradient(scores, ones, target, 0.0)
                torch.mm(scores, weight, out=gradient[begin : begin + size])
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * -outer[0][:, None], None, None


class OfLogits(torch.autograd.Function):
    """Cross entropy alone; the gradient is scaled in float32 before it is rounded, as float16 needs."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
        size = WIDE[logits.device.type]
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        sums = []
        for part, target in zip(torch.split(logits, size), torch.split(targets[:, None], size), strict=True):
            scores = part.float()  # (size, vocabulary)
            sums.append(scores.logsumexp(dim=-1, keepdim=True))
            of_target, mean = scores.gather(1, target), scores.mean(dim=-1, keepdim=True) if smoothing else 0
            total += (sums[-1] - (1 - smoothing) * of_target - smoothing * mean).sum()
        ctx.save_for_backward(logits, targets, *sums)
        ctx.smoothing = smoothing
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets, *sums = ctx.saved_tensors
        size = WIDE[logits.device.type]
        gradient = torch.empty_like(logits)
        parts = zip(*(torch.split(one, size) for one in (logits, targets[:, None], gradient)), sums, strict=True)
        for part, target, into, ones in parts:
            scores = (part.float() - ones).exp_()
            _scores_to_gradient(scores, torch.ones_like(ones), target, ctx.smoothing)
            into.copy_(scores.mul_(outer[0]))
        return gradient, None, None
