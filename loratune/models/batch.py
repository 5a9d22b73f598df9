"""One micro-batch: the inputs of the model, and the positions and targets of its predictions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from loratune.kernels.offload import to_device


@dataclass(frozen=True)
class Batch:
    """Rows of some samples as tensors; made by `data.collate` only.

    Attributes:
        inputs: of the model's forward pass, by name; `input_ids` is (rows, tokens), or (1, tokens) where packed.
        places: flat positions in the model's output (over all rows, with virtual tokens) at which a target is
            predicted, int64, (targets,). Computed with the batch, as on a GPU it would need a synchronisation.
        targets: the tokens to predict there, int64, (targets,).
        row: the row of each target, int64, (targets,).
        sample: the sample of each row, int64, (rows,).
        samples: number of samples.
        tokens: number of tokens, without padding.
        labels: what the data row of each sample says besides its texts, float32, (samples, most labels), NaN after the
            last one of a sample.
        states: the head's input at each target, float32, (targets, width), where it is known; else None.
        values: known values of each sample by name, float32, (samples,) each.
    """

    inputs: dict[str, Any]
    places: torch.Tensor
    targets: torch.Tensor
    row: torch.Tensor
    sample: torch.Tensor
    samples: int
    tokens: int
    labels: torch.Tensor
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    states: torch.Tensor | None = None

    @property
    def computed(self) -> int:
        """Number of tokens that go through the model: with padding, a shared prefix counted once."""
        return int(self.inputs["input_ids"].numel())

    def to(self, device: torch.device) -> Batch:
        """Return the same with its tensors on a device, copied without waiting for it."""

        def moved(values: dict[str, Any]) -> dict[str, Any]:
            return {
                name: to_device(value, device) if isinstance(value, torch.Tensor) else value
                for name, value in values.items()
            }

        names = ("places", "targets", "row", "sample", "labels")
        parts = moved({name: getattr(self, name) for name in names})
        parts["states"] = None if self.states is None else to_device(self.states, device)
        return replace(self, inputs=moved(self.inputs), values=moved(self.values), **parts)

    def per_sample(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values of targets over each sample, (targets,) -> (samples,)."""
        return values.new_zeros(self.samples).index_add(0, self.sample[self.row], values)

    def per_row(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values of targets over each row, (targets, ...) -> (rows, ...)."""
        return values.new_zeros(len(self.sample), *values.shape[1:]).index_add(0, self.row, values)
