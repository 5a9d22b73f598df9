"""One micro-batch: what a model is given, and where it is asked what comes next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """Rows of some samples as tensors; made by `data.collate` only.

    Attributes:
        inputs: of the model's forward pass, by name; `input_ids` is (rows, tokens), or (1, tokens) where packed.
        places: where in the model's output the next token is wanted, counted through all rows, virtual tokens too;
            int64, (targets,). Found when the batch is made, as a GPU would have to be waited for.
        targets: the tokens wanted there, int64, (targets,).
        row: the row each of them belongs to, int64, (targets,).
        sample: the sample each row belongs to, int64, (rows,).
        samples: how many there are.
        tokens: how many the rows have, without padding.
        values: numbers that each sample brings along, float32, (samples,) each.
    """

    inputs: dict[str, Any]
    places: torch.Tensor
    targets: torch.Tensor
    row: torch.Tensor
    sample: torch.Tensor
    samples: int
    tokens: int
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def computed(self) -> int:
        """Tokens that go through the model: padding counts, a prefix that rows share counts once."""
        return int(self.inputs["input_ids"].numel())

    def to(self, device: torch.device) -> Batch:
        """Return the same with its tensors on a device."""

        def moved(values: dict[str, Any]) -> dict[str, Any]:
            return {
                name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in values.items()
            }

        parts = {"places": self.places, "targets": self.targets, "row": self.row, "sample": self.sample}
        return replace(self, inputs=moved(self.inputs), values=moved(self.values), **moved(parts))

    def per_sample(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums over each sample of values of its targets, (targets,) -> (samples,)."""
        return values.new_zeros(self.samples).index_add(0, self.sample[self.row], values)

    def per_row(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums over each row of values of its targets, (targets, ...) -> (rows, ...)."""
        return values.new_zeros(len(self.sample), *values.shape[1:]).index_add(0, self.row, values)
