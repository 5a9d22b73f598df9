"""Supervised fine-tuning: cross entropy of the label tokens, given everything before them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from loratune.objectives.section import ObjectiveSection

if TYPE_CHECKING:
    import torch

    from loratune.models.batch import Batch
    from loratune.models.policy import Policy


class Sft(ObjectiveSection):
    """Learn to write the label tokens: mean of -log p(token | everything before it)."""

    type: Literal["sft"] = "sft"
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="fraction (0-1) of each target spread over the whole vocabulary"
    )
    neftune: float = Field(
        0.0,
        ge=0,
        description="noise on the embeddings while training: uniform within neftune / sqrt(tokens x width) "
        "(arXiv:2310.05914, alg. 1)",
    )

    @property
    def is_noisy(self) -> bool:
        """Whether something random is drawn for each token of each row."""
        return self.neftune > 0

    def count(self, batch: Batch) -> int:
        """Return the number of label tokens in a micro-batch."""
        return len(batch.targets)

    def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the summed loss of a micro-batch in nats, float32, shape (), and no other sums.

        Smoothing and noise apply only while the model is in training mode, so that an evaluation measures the plain
        cross entropy.
        """
        if not policy.training:
            return policy.cross_entropy(batch), {}
        from loratune.models import embedding_noise

        noise = embedding_noise.noise(policy.inner, batch.inputs, self.neftune) if self.is_noisy else None
        return policy.cross_entropy(batch, self.label_smoothing, noise), {}
