"""A model as objectives use it: its head runs only where a label token is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from loratune.kernels import linear_cross_entropy, packed_attention
from loratune.models import score_head
from loratune.models.batch import Batch


class Policy:
    """What an objective may compute with a model, the same in training and evaluation.

    Args:
        net: the model, possibly in a DDP wrapper.
        off: context in which the model is as before step 1; None where the method can't restore that.
        virtual_tokens: before each row in the model's output.
    """

    def __init__(self, net: Any, off: Callable[[], AbstractContextManager[Any]] | None = None, virtual_tokens: int = 0):
        self.net = net
        self.inner = unwrapped(net)
        self.virtual_tokens = virtual_tokens
        self._off = off

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return bool(self.net.training)

    def alone(self) -> Policy:
        """Return the same without a DDP wrapper, which would wait for the other processes."""
        return Policy(self.inner, self._off, self.virtual_tokens)

    @contextmanager
    def reference(self) -> Iterator[Policy]:
        """Yield the model as it was before step 1.

        Raises:
            ValueError: where it can't be restored.
        """
        if self._off is None:
            raise ValueError("the model before step 1 can't be restored from this one")
        with self._off():
            yield self

    def cross_entropy(
        self, batch: Batch, smoothing: float = 0.0, during: AbstractContextManager[Any] | None = None
    ) -> torch.Tensor:
        """Return the sum of -log p of the targets in nats, float32, shape ().

        At most a chunk of float32 logits is in memory.

        Args:
            batch: the rows.
            smoothing: part (0-1) of each target spread over the whole vocabulary.
            during: context for the forward pass only, such as noise on embeddings.
        """
        fused = linear_cross_entropy.is_fusible(self.inner, batch.inputs["input_ids"])
        states, layer = self._states(batch, fused, during)
        if layer is None:
            return linear_cross_entropy.cross_entropy_of_logits(states, batch.targets, smoothing)
        return linear_cross_entropy.summed_cross_entropy(states, layer.weight, layer.bias, batch.targets, smoothing)

    def per_target(self, batch: Batch, f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return a function of logits and target at each target, (targets, ...), with its gradient.

        The full logits of a plain head are never in memory: each chunk is recomputed in the backward pass. Those of
        another head are, in its own precision.

        Args:
            batch: the rows.
            f: takes float32 logits, (chunk, vocabulary), and targets, (chunk,); returns (chunk, ...).
        """
        plain = linear_cross_entropy.is_plain(self.inner, batch.inputs["input_ids"])
        states, layer = self._states(batch, plain)
        head = _head(layer, states)

        def chunk(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return f(head(part).float(), target)

        size = linear_cross_entropy.WIDE[states.device.type]
        parts = zip(torch.split(states, size), torch.split(batch.targets, size), strict=True)
        if torch.is_grad_enabled():
            again = partial(checkpoint, chunk, use_reentrant=False, preserve_rng_state=False)
            return torch.cat([again(*part) for part in parts])
        return torch.cat([chunk(*part) for part in parts])

    def logps(self, batch: Batch) -> torch.Tensor:
        """Return log p of each target in nats, float32, (targets,), with its gradient; see `per_target`.

        Below a frozen head in float32 on a CPU the gradient is known in the forward pass, and nothing is recomputed.
        """
        if not linear_cross_entropy.is_frozen_float32(self.inner, batch.inputs["input_ids"]):
            return -self.per_target(batch, _losses)
        states, layer = self._states(batch, plain=True)
        return linear_cross_entropy.log_probabilities(states, layer.weight, batch.targets)

    def losses_and_hits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return -log p of each target in nats, and 1 where it is the most probable token; float32, (targets,) each."""
        losses, hits = self.per_target(batch, _losses_and_hits).unbind(1)
        return losses, hits

    def scores(self, batch: Batch) -> torch.Tensor:
        """Return the outputs of the head that scores rows, float32, (targets, outputs); see `score_head`."""
        states = self.last_states(batch) if batch.states is None else batch.states
        with torch.autocast(states.device.type, enabled=False):
            scores: torch.Tensor = score_head.of(self.inner)(states.float())
        return scores

    def last_states(self, batch: Batch) -> torch.Tensor:
        """Return what the heads read at the targets, in the model's precision, (targets, width)."""
        with linear_cross_entropy.caught(self.inner.get_output_embeddings(), batch.places) as found:
            self._forward(batch.inputs)
        return found[0]

    def logits_at(self, inputs: dict[str, Any], places: torch.Tensor) -> torch.Tensor:
        """Return the logits at flat positions over all rows, (places, vocabulary), in the model's precision."""
        with head_only_at(self.inner, places):
            logits: torch.Tensor = self._forward(inputs).logits
        return logits

    def _states(
        self, batch: Batch, plain: bool, during: AbstractContextManager[Any] | None = None
    ) -> tuple[torch.Tensor, Any]:
        """Run a forward pass; return the head's input at the targets, and the head; or the logits there, and None."""
        if not plain:
            with during or nullcontext():
                return self.logits_at(batch.inputs, batch.places), None
        layer = linear_cross_entropy.layer_of(self.inner)
        with linear_cross_entropy.caught(layer, batch.places) as found, during or nullcontext():
            self._forward(batch.inputs)
        return found[0], layer

    def _forward(self, inputs: dict[str, Any]) -> Any:
        return self.net(**packed_attention.inputs(self.inner, inputs), use_cache=False)


def unwrapped(model: Any) -> Any:
    """Return the model inside a DDP wrapper."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


@contextmanager
def head_only_at(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Give the model's head only the hidden states at flat `positions` over all rows, int64, (positions,).

    A hook before the head works for every architecture, also those that scale or cap their logits. The model then
    returns (positions, vocabulary) instead of (rows, tokens, vocabulary).
    """

    def select(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (linear_cross_entropy.at(inputs[0], positions),)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _head(layer: Any, states: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what makes logits of a plain head's input; without a layer they are logits already."""
    if layer is None:
        return lambda part: part
    if layer.weight.device != states.device:
        return layer  # type: ignore[no-any-return]
    # cast once for all chunks: under autocast the weight is wider, and as large as the head
    weight, bias = layer.weight.to(states.dtype), None if layer.bias is None else layer.bias.to(states.dtype)
    return lambda part: linear(part, weight, bias)


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits, targets, reduction="none")


def _losses_and_hits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.stack([_losses(logits, targets), (logits.argmax(dim=-1) == targets).float()], dim=1)
