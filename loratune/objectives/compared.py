"""The base class of objectives that compare with another model: the one before step 1, or one that the recipe names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from loratune.objectives.section import ObjectiveSection

if TYPE_CHECKING:
    import torch

    from loratune.models.batch import Batch
    from loratune.models.policy import Policy

START, LIVE = "start", "live"


class Compared(ObjectiveSection):
    """An objective with a reference model: its `values` are those of `once` under that model."""

    reference: str = Field(
        START,
        min_length=1,
        description="model to compare with: start (as before step 1, its values computed once), live (the same, with "
        "the adapter off at each step: for very many rows and one epoch), or an adapter of the same base, or another "
        "model of the same vocabulary: run, folder or hub id",
    )

    @property
    def named(self) -> str | None:
        """The run, folder or hub id of the reference, or None where it is the model before step 1."""
        return None if self.reference in (START, LIVE) else self.reference

    @property
    def is_live(self) -> bool:
        """Whether the values are computed at each step, with the adapter off."""
        return self.reference == LIVE

    def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `ObjectiveSection.total`; values that are not in the batch are computed with the adapter off."""
        return super().total(policy, self._known(policy, batch))

    def _known(self, policy: Policy, batch: Batch) -> Batch:
        if not self.is_live or all(name in batch.values for name in self.values):
            return batch
        import torch

        # without the wrapper of several processes: it waits for gradients, and there are none
        with torch.no_grad(), policy.alone().reference() as before:
            return replace(batch, values={**batch.values, **self.once(before, batch)})
