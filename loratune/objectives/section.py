"""The base class of all objectives' recipe sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from loratune.config.section import Complaint, Section, tag_of
from loratune.data.section import Data

if TYPE_CHECKING:
    import torch

    from loratune.models.batch import Batch
    from loratune.models.policy import Policy


class ObjectiveSection(Section):
    """An objective.

    Attributes:
        pairs: whether a sample is a pair of a chosen and a rejected row; else it is one row.
        values: names of the values that `once` returns for each sample.
        unit: of the loss.
    """

    pairs: ClassVar[bool] = False
    values: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "nats per label token"

    @property
    def is_noisy(self) -> bool:
        """Whether something random is drawn for each token of each row."""
        return False

    def complaints(self, data: Data) -> Iterator[Complaint]:
        """Yield why this objective does not combine with the recipe's `data`."""
        me = f"`objective: {tag_of(type(self))}`"
        if self.pairs and data.format.type not in ("auto", "preference"):
            told = f"{me} compares two answers, and `data.format: {data.format.type}` reads one"
            yield Complaint(told, ("data", "format"), "use `preference`: rows of prompt, chosen and rejected")
        if not self.pairs and data.format.type == "preference":
            told = f"`data.format: preference` reads pairs, which {me} does not use"
            yield Complaint(told, ("data", "format"), "use `objective: dpo`")

    def once(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return values of each sample under the model before step 1, (samples,) each, by the names in `values`.

        Called before step 1, without gradients; the results are in `batch.values` of every later batch.
        """
        return {}

    def count(self, batch: Batch) -> int:
        """Return the divisor of the summed loss of a micro-batch; the batch is not on a device yet."""
        raise NotImplementedError

    def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the summed loss of a micro-batch, float32, shape (), and other sums to report, by name."""
        raise NotImplementedError
