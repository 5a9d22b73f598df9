"""The base class of all objectives' recipe sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from loratune.config.section import Complaint, Section, tag_of
from loratune.data.formats import Preference, made
from loratune.data.section import Data

if TYPE_CHECKING:
    import numpy as np
    import torch

    from loratune.data.dataset import Rows
    from loratune.data.sample import Sample
    from loratune.models.batch import Batch
    from loratune.models.policy import Policy


NUMBER = "#"  # after the name of a figure: the number of samples that it is of


@dataclass(frozen=True)
class Figure:
    """What an objective reports besides its loss.

    Attributes:
        unit: such as nats, or a fraction (0-1).
        better: which direction is better, or "" where neither is.
        partial: whether it is of some samples only.
        shown: whether it is printed with the loss; all figures are in metrics.jsonl.
    """

    unit: str
    better: Literal["higher", "lower", ""] = ""
    partial: bool = False
    shown: bool = True


@dataclass(frozen=True)
class Watch:
    """A figure of the steps whose fall is told once.

    Attributes:
        fall: in the figure's unit, from the first step on, above which it is told.
        told: what the fall means, and a remedy.
    """

    fall: float
    told: str


class ObjectiveSection(Section):
    """An objective.

    Attributes:
        formats: names of the data formats it learns from; without one in the recipe the first is used.
        pooled: whether it looks at the last token of each row, and at no label token.
        sample: word for what the loss is a mean over in a batch: row, or pair.
        values: names of the values that `once` returns for each sample.
        probed: names of the values that `probe` returns, of which a step has one mean each.
        unit: of the loss.
        figures: what it reports besides the loss, by name, in the order in which they are printed.
        watched: figures of the steps that should not fall by much.
        generates: whether it learns to write answers, which `eval` generates and compares; else `eval` reports its loss
            and figures.
    """

    formats: ClassVar[tuple[str, ...]] = ("auto", "chat", "instruction", "completion", "text")
    pooled: ClassVar[bool] = False
    sample: ClassVar[str] = "row"
    values: ClassVar[tuple[str, ...]] = ()
    probed: ClassVar[tuple[str, ...]] = ()
    unit: ClassVar[str] = "nats per label token"
    figures: ClassVar[Mapping[str, Figure]] = {}
    watched: ClassVar[Mapping[str, Watch]] = {}
    generates: ClassVar[bool] = True

    @property
    def is_noisy(self) -> bool:
        """Whether something random is drawn for each token of each row."""
        return False

    @property
    def measures(self) -> dict[str, Figure]:
        """Return the loss and the figures by which evaluations can be compared, as one direction is better."""
        loss = {"loss": Figure(self.unit, "lower")}
        return loss | {name: figure for name, figure in self.figures.items() if figure.better}

    def figure(self, name: str) -> Figure:
        """Return what is known of a figure."""
        return self.figures[name]

    def complaints(self, data: Data) -> Iterator[Complaint]:
        """Yield why this objective does not combine with the recipe's `data`."""
        if data.format.type not in (*self.formats, "auto"):
            told = f"`objective: {tag_of(type(self))}` does not learn from rows of `data.format: {data.format.type}`"
            yield Complaint(told, ("data", "format"), f"use `format: {self.formats[0]}`, or another objective")
        read = made(self.formats[0]) if data.format.type == "auto" else data.format
        if read is None:  # it needs keys of its own
            return
        if read.whole and data.on_long == "truncate":
            format = f"`data.format: {tag_of(type(read))}`"
            told = f"`data.on_long: truncate` would cut answers of {format}, which are compared whole"
            yield Complaint(told, ("data", "on_long"), "use drop, or a larger `data.max_length`")
        if isinstance(read, Preference) and read.margin and not self.pooled:
            told = f"`objective: {tag_of(type(self))}` does not use `data.format.margin`"
            yield Complaint(told, ("data", "format", "margin"), "remove it; a reward model uses it")

    def of_rows(self, rows: Rows, data: Data) -> Self:
        """Return the same with what it must know of the training rows.

        Raises:
            DataError: when nothing can be learned from such rows.
        """
        return self

    def notes(self) -> list[str]:
        """Return notes for the start report, after `of_rows`."""
        return []

    def once(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return values of each sample under the reference, (samples,) each, by the names in `values`.

        Called before step 1, without gradients; the results are in `batch.values` of every later batch.
        """
        return {}

    def probes(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return further samples, made of all samples of a step or an evaluation in their order, for `probe`."""
        return []

    def probe(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return values of each of some `probes`, (samples,) each, by the names in `probed`.

        Called before the losses of a step or an evaluation, without gradients. The mean over all probes, whatever the
        micro-batches and processes, is in `batch.values` of each sample; it is 0 where there are none.
        """
        return {}

    @property
    def outputs(self) -> int:
        """Outputs of the head that scores a row at its last token; 0 where the language model's own head is used."""
        return 0

    def head(self) -> dict[str, Any]:
        """Return transformers' settings of a sequence classifier with this head, such as the names of its classes."""
        return {}

    def of_head(self, settings: Mapping[str, Any]) -> Self:
        """Return the same for a saved head with these settings, as `head` returns them."""
        return self

    def table(self, outputs: np.ndarray, rows: Rows) -> dict[str, Any]:
        """Return the names of the `classes` and the table `confusion`, or nothing; arguments as in `measured`."""
        return {}

    def measured(self, outputs: np.ndarray, rows: Rows) -> dict[str, tuple[float, float, float]]:
        """Return metrics of all rows together, by name: each with the ends of its 95 % bootstrap interval.

        Args:
            outputs: of the head, float32, (rows, outputs).
            rows: that were evaluated.
        """
        return {}

    def count(self, batch: Batch) -> int:
        """Return the divisor of the summed loss of a micro-batch: its samples with a target.

        The batch is not on a device yet. Padding samples of an idle process have no target.
        """
        return len(set(batch.sample[batch.row].tolist()))

    def each(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return `loss` and the `figures` of each sample, float32, (samples,) each.

        A figure is NaN for a sample that it is not of, such as the reward of bad answers for a good one.
        """
        raise NotImplementedError

    def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the summed loss of a micro-batch, float32, shape (), and sums of the figures, by name.

        A figure that is not of all samples has its number of samples under its name and `NUMBER`.
        """
        import torch

        real = batch.per_sample(torch.ones_like(batch.targets, dtype=torch.float32)) > 0
        found = self.each(policy, batch)
        loss = found.pop("loss")
        sums: dict[str, torch.Tensor] = {}
        for name, values in found.items():
            of = real & ~values.isnan()
            sums[name] = torch.where(of, values.detach(), 0.0).sum()
            if self.figure(name).partial:
                sums[name + NUMBER] = of.float().sum()
        return (loss * real).sum(), sums
