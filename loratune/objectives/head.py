"""The loss of a frozen head without its logits: linear and cross entropy in one, the gradient taken on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch

ROWS = {"cpu": 128, "cuda": 256}  # tokens whose logits are in memory at once, at most
_LOOKED_AT = 8  # tokens by which it is found out whether a head is plain

_plain: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # by head module


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Return the sum of the cross entropies of a linear layer that is not trained, in nats, float32, shape ().

    The gradient of a sum with respect to the hidden states is (softmax - target) W: it is known as soon as the logits
    are, so it is taken there and then, chunk by chunk. Two matrix products, and no tensor of (tokens, vocabulary).

    Args:
        hidden: what the head gets, (tokens, width).
        weight: of the head, (vocabulary, width).
        bias: of the head, (vocabulary,), or None.
        targets: (tokens,).
        smoothing: part (0-1) of each target spread over the whole vocabulary.
    """
    total: torch.Tensor = _function().apply(hidden, weight, bias, targets, smoothing)
    return total


def losses_and_hits(states: torch.Tensor, layer: Any, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -log p of each target in nats, and 1 where it is the most probable token; float32, (tokens,) each.

    Chunk by chunk, so that few logits are in memory in float32, and where there is a layer few at all.

    Args:
        states: what the layer gets, (tokens, width); without a layer: logits, (tokens, vocabulary).
        layer: a plain linear head (see `is_plain`), or None.
        targets: (tokens,).
    """
    import torch
    from torch.nn.functional import cross_entropy, linear

    losses, hits = [], []
    size = ROWS[states.device.type]
    for part, target in zip(torch.split(states, size), torch.split(targets, size), strict=True):
        logits = (part if layer is None else linear(part, layer.weight, layer.bias)).float()  # (size, vocabulary)
        losses.append(cross_entropy(logits, target, reduction="none"))
        hits.append((logits.argmax(dim=-1) == target).float())
    return torch.cat(losses), torch.cat(hits)


def is_fusible(model: Any, ids: torch.Tensor) -> bool:
    """Return whether `summed_cross_entropy` gives a model's loss: its head is plain and frozen.

    Not in float16, where the gradient must be scaled before it is rounded.

    Args:
        model: without the wrapper of several processes.
        ids: tokens to try it with, (rows, tokens).
    """
    import torch

    head = model.get_output_embeddings()
    if any(p.requires_grad or p.dtype is torch.float16 for p in head.parameters()):
        return False
    return is_plain(model, ids)


def is_plain(model: Any, ids: torch.Tensor) -> bool:
    """Return whether a model's logits are what a linear head gives, and nothing else; see `is_fusible`.

    Not under autocast.
    """
    import torch

    head = model.get_output_embeddings()
    if (
        type(head) is not torch.nn.Linear
        or head.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or torch.is_autocast_enabled(head.weight.device.type)
    ):
        return False
    if head not in _plain:
        _plain[head] = _is_all(model, head, ids[:1, :_LOOKED_AT])
    return _plain[head]


def _is_all(model: Any, head: Any, ids: torch.Tensor) -> bool:
    """Return whether a model gives away what its head gives, and gives its head one hidden state for each token.

    Tried once for each head, with logits put in the place of the head's own: from a hundred thousandth to ten thousand
    in size, so that a cap shows at the large ones and whatever is added at the small ones. The model's own may lie
    where either is lost in rounding.
    """
    import torch

    seen: list[bool] = []
    words = head.out_features
    given = torch.logspace(-5, 4, words, device=head.weight.device, dtype=torch.float32)
    given[::2] *= -1

    def instead(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0].shape[:-1] == ids.shape and inputs[0].dtype == output.dtype == head.weight.dtype)
        return given.to(output.dtype).expand_as(output).clone()

    hook = head.register_forward_hook(instead)
    devices = [head.weight.device] if head.weight.is_cuda else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):  # a resumed run tries as well, and must draw the same
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    wanted = given.to(head.weight.dtype).float().expand(*ids.shape, words)
    return seen == [True] and torch.equal(logits.float(), wanted)


def at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the states of (rows, tokens, width) at positions counted through all rows, (positions, width)."""
    return hidden.flatten(0, -2).index_select(0, positions)


@contextmanager
def caught(head: Any, positions: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Catch the head's input at `positions` (see `at`), and let it run for one of them only.

    Yields a list that will hold the input, (positions, width).
    """
    found: list[torch.Tensor] = []

    def before(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        found.append(at(inputs[0], positions))
        return (found[0][:1].detach(),)

    hook = head.register_forward_pre_hook(before)
    try:
        yield found
    finally:
        hook.remove()


@cache
def _function() -> Any:
    import torch

    class FrozenHead(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
            smoothing: float,
        ) -> torch.Tensor:  # fmt: skip
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            parts = -(-len(hidden) // ROWS[hidden.device.type])
            rows = -(-len(hidden) // max(parts, 1))  # of about the same size: a small rest is slow
            # once for all parts: memory that is new has to be found page by page
            made = hidden.new_empty(rows, len(weight))
            wide = torch.empty_like(made, dtype=torch.float32) if made.dtype is not torch.float32 else made
            for begin in range(0, len(hidden), max(rows, 1)):
                part, target = hidden[begin : begin + rows], targets[begin : begin + rows, None]
                logits, scores = made[: len(part)], wide[: len(part)]  # (rows, vocabulary) each
                if bias is None:
                    torch.mm(part, weight.t(), out=logits)
                else:
                    torch.addmm(bias, part, weight.t(), out=logits)
                scores.copy_(logits)
                scores.sub_(scores.amax(dim=-1, keepdim=True))
                of_target, mean = scores.gather(1, target), scores.mean(dim=-1, keepdim=True) if smoothing else 0
                ones = scores.exp_().sum(dim=-1, keepdim=True)
                total += (ones.log() - (1 - smoothing) * of_target - smoothing * mean).sum()
                if gradient is not None:
                    scores.div_(ones)
                    if smoothing:
                        scores.sub_(smoothing / scores.shape[1])
                    scores.scatter_add_(1, target, torch.full_like(ones, smoothing - 1))
                    torch.mm(logits.copy_(scores), weight, out=gradient[begin : begin + rows])
            ctx.save_for_backward(gradient)
            return total

        @staticmethod
        def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
            (gradient,) = ctx.saved_tensors
            if gradient is None:
                return None, None, None, None, None
            # in float32: one over the count, rounded to bfloat16, would scale all gradients alike
            return (gradient.float() * outer[0]).to(gradient.dtype), None, None, None, None

    return FrozenHead
