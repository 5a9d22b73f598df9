"""Supervised fine-tuning: cross entropy of the trained tokens, given everything before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from loratune.config.section import Section

if TYPE_CHECKING:
    import torch

    from loratune.data.prefix_sharing import Layout, Row


class Sft(Section):
    """Learn to write the trained tokens: sum of -log p(token | everything before it) over their count."""

    type: Literal["sft"] = "sft"
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="part (0-1) of each target spread over the whole vocabulary"
    )
    neftune: float = Field(
        0.0,
        ge=0,
        description="noise on the embeddings while training: uniform within neftune / sqrt(tokens x width) "
        "(arXiv:2310.05914, alg. 1)",
    )

    def collate(self, rows: Sequence[Row], layout: Layout = "padded") -> dict[str, Any]:
        """Make one micro-batch of rows; see `data.collate`."""
        from loratune.data.collate import collate

        return collate(rows, layout)

    @property
    def is_noisy(self) -> bool:
        """Whether something random is drawn for each token of each row."""
        return self.neftune > 0

    def count(self, batch: dict[str, Any]) -> int:
        """Return the number of trained tokens in a micro-batch."""
        return len(batch["predicts"])

    def total(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Return the summed loss of a micro-batch in nats, float32, shape ().

        Smoothing and noise apply only while the model is in training mode, so that an evaluation measures the plain
        cross entropy.
        """
        from loratune.data.collate import inputs
        from loratune.models import policy

        smoothing = self.label_smoothing if model.training else 0.0
        noise = self._noise(policy.unwrapped(model), batch)
        return policy.summed_cross_entropy(model, inputs(batch), batch["predicts"], batch["targets"], smoothing, noise)

    def scores(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return sums per row of a padded micro-batch, each of shape (rows,), for an evaluation.

        The logits of a plain head are never all in memory; those of another are, in its own precision.

        Returns:
            -log p of the trained tokens in nats; how many of them are the most probable token; how many there are.
        """
        import torch

        from loratune.data.collate import inputs
        from loratune.models import policy

        losses, right = policy.losses_and_hits(model, inputs(batch), batch["predicts"], batch["targets"])
        row = batch["predicts"] // batch["labels"].shape[1]
        zeros = torch.zeros(len(batch["labels"]), device=losses.device)
        return (
            zeros.index_add(0, row, losses),
            zeros.index_add(0, row, right),
            zeros.index_add(0, row, torch.ones_like(losses)),
        )

    @contextmanager
    def _noise(self, model: Any, batch: dict[str, Any]) -> Iterator[None]:
        if not (self.neftune and model.training):
            yield
            return
        import torch

        def add(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            if "attention_mask" in batch:
                tokens = batch["attention_mask"].sum(dim=1).view(-1, 1, 1)  # (rows, 1, 1)
            else:
                lengths = batch["cu_seq_lens_q"].diff()
                tokens = lengths.repeat_interleave(lengths, output_size=embedded.shape[1]).view(1, -1, 1)
            width: torch.Tensor = self.neftune / (tokens * embedded.shape[-1]) ** 0.5
            return embedded + torch.empty_like(embedded).uniform_(-1, 1) * width.to(embedded.dtype)

        hook = model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()
