"""What every objective's section of a recipe says of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from loratune.config.section import Complaint, Section
from loratune.data.section import Data

if TYPE_CHECKING:
    import torch

    from loratune.models.batch import Batch
    from loratune.models.policy import Policy


class ObjectiveSection(Section):
    """What is minimised.

    Attributes:
        pairs: whether a sample is a chosen and a rejected row, else one row.
        values: names of the numbers `once` gives each sample.
        unit: of the loss.
    """

    pairs: ClassVar[bool] = False
    values: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "nats per trained token"

    @property
    def is_noisy(self) -> bool:
        """Whether something random is drawn for each token of each row."""
        return False

    def complaints(self, data: Data) -> Iterator[Complaint]:
        """Yield what this objective can't do with the rows of the recipe."""
        me = f"`objective: {self.model_dump()['type']}`"
        if self.pairs and data.format.type not in ("auto", "preference"):
            told = f"{me} compares two answers, and `data.format: {data.format.type}` reads one"
            yield Complaint(told, ("data", "format"), "use `preference`: rows of prompt, chosen and rejected")
        if not self.pairs and data.format.type == "preference":
            told = f"`data.format: preference` reads pairs, and {me} has no use for them"
            yield Complaint(told, ("data", "format"), "use `objective: dpo`")

    def once(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return numbers of each sample that the model of the start gives, (samples,) each, by the names in `values`.

        Asked before step 1, without gradients; what is returned comes back in `batch.values`.
        """
        return {}

    def count(self, batch: Batch) -> int:
        """Return what the summed loss of a micro-batch is divided by; the batch is not on a device yet."""
        raise NotImplementedError

    def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the summed loss of a micro-batch, float32, shape (), and other sums to be told, by name."""
        raise NotImplementedError
