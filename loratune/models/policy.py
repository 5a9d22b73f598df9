"""A model asked for the tokens that are trained, and for no others: its head runs nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from loratune.kernels import linear_cross_entropy


def unwrapped(model: Any) -> Any:
    """Return the model that a wrapper of several processes holds."""
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def summed_cross_entropy(
    model: Any, inputs: Mapping[str, Any], predicts: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0,
    during: AbstractContextManager[Any] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return the sum of -log p of each target in nats, float32, shape (); never more than a chunk of logits in float32.

    Args:
        model: maybe wrapped for several processes.
        inputs: what it is given, of one micro-batch.
        predicts: places where the next token is wanted, counted through all rows, int64, (targets,).
        targets: these tokens, (targets,).
        smoothing: part (0-1) of each target spread over the whole vocabulary.
        during: entered for the forward pass alone, such as noise on embeddings.
    """
    inner = unwrapped(model)
    if not linear_cross_entropy.is_fusible(inner, inputs["input_ids"]):
        with during or nullcontext():
            logits = logits_at(model, inputs, predicts)
        return linear_cross_entropy.cross_entropy_of_logits(logits, targets, smoothing)
    layer = linear_cross_entropy.layer_of(inner)
    with linear_cross_entropy.caught(layer, predicts) as found, during or nullcontext():
        model(**inputs, use_cache=False)
    return linear_cross_entropy.summed_cross_entropy(found[0], layer.weight, layer.bias, targets, smoothing)


def losses_and_hits(
    model: Any, inputs: Mapping[str, Any], predicts: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -log p of each target in nats, and 1 where it is the most probable token; float32, (targets,) each.

    The logits of a plain head are never all in memory; those of another are, in its own precision.
    """
    inner = unwrapped(model)
    # gradients of chunks would keep all of their logits
    if torch.is_grad_enabled() or not linear_cross_entropy.is_plain(inner, inputs["input_ids"]):
        return linear_cross_entropy.losses_and_hits(logits_at(model, inputs, predicts), None, targets)
    layer = linear_cross_entropy.layer_of(inner)
    with linear_cross_entropy.caught(layer, predicts) as found:
        model(**inputs, use_cache=False)
    return linear_cross_entropy.losses_and_hits(found[0], layer, targets)


def logits_at(model: Any, inputs: Mapping[str, Any], positions: torch.Tensor) -> torch.Tensor:
    """Return the logits at positions counted through all rows, (positions, vocabulary)."""
    with head_only_at(unwrapped(model), positions):
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


@contextmanager
def head_only_at(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Let the model's head see only the hidden states at `positions`, counted through all rows, int64, (positions,).

    A hook before the head works for every architecture, also those that scale or cap their logits afterwards; what
    the model returns is then (positions, vocabulary) instead of (rows, tokens, vocabulary).
    """

    def select(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (linear_cross_entropy.at(inputs[0], positions),)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
