"""Noise on a model's embeddings during training (NEFTune).

Source: NEFTune, Jain et al. 2023, arXiv:2310.05914, alg. 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def noise(model: Any, inputs: Mapping[str, Any], alpha: float) -> Iterator[None]:
    """Add uniform noise within alpha / sqrt(tokens x width) to the embeddings of each row, padding not counted.

    Args:
        model: without a DDP wrapper.
        inputs: of the forward pass in this context; see `Batch`.
        alpha: scale of the noise.
    """

    def add(module: Any, given: Any, embedded: torch.Tensor) -> torch.Tensor:
        if "attention_mask" in inputs:
            tokens = inputs["attention_mask"].sum(dim=1).view(-1, 1, 1)  # (rows, 1, 1)
        else:
            lengths = inputs["cu_seq_lens_q"].diff()
            tokens = lengths.repeat_interleave(lengths, output_size=embedded.shape[1]).view(1, -1, 1)
        width: torch.Tensor = alpha / (tokens * embedded.shape[-1]) ** 0.5
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * width.to(embedded.dtype)

    hook = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
