"""KTO: learn from answers that are marked good or bad one by one, without pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, PrivateAttr, WithJsonSchema
from pydantic_core import PydanticCustomError

from loratune.data.section import Data
from loratune.errors import DataError, Place, Problem
from loratune.objectives.section import Figure, ObjectiveSection, Watch

if TYPE_CHECKING:
    import torch

    from loratune.data.dataset import Rows
    from loratune.data.sample import Sample
    from loratune.models.batch import Batch
    from loratune.models.policy import Policy

EVEN = (1.0, 4 / 3)  # weight x number of the good rows over that of the bad ones, as the paper has it


def _weight(value: Any) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    raise PydanticCustomError("expected", "must be a number above 0, or `auto`")


Weight = Annotated[
    float | Literal["auto"],
    PlainValidator(_weight),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "auto"}]}),
]


class Kto(ObjectiveSection):
    """Make good answers more probable and bad ones less, relative to the model before step 1; rows need no pairs.

    With r = log p/p0 of an answer, p0 being that model and log p summed over the tokens of the answer, the loss of a
    row is weight (1 - sigmoid(beta (r - z0))) for a good one and weight (1 - sigmoid(beta (z0 - r))) for a bad one. z0
    is the larger of 0 and the mean of log p/p0 of prompts with the answers to others, over a step; it has no gradient.
    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8.
    """

    type: Literal["kto"] = "kto"
    formats: ClassVar[tuple[str, ...]] = ("kto",)
    values: ClassVar[tuple[str, ...]] = ("reference",)
    probed: ClassVar[tuple[str, ...]] = ("kl",)
    unit: ClassVar[str] = "per row"
    figures: ClassVar[Mapping[str, Figure]] = {
        "accuracy": Figure("fraction of rows", "higher"),
        "logp_desirable": Figure("nats per token", "higher", partial=True),
        "kl": Figure("nats", "lower"),
        "reward_desirable": Figure("beta log p/p0", "higher", partial=True, shown=False),
        "reward_undesirable": Figure("beta log p/p0", "lower", partial=True, shown=False),
        "logp_undesirable": Figure("nats per token", "lower", partial=True, shown=False),
    }
    watched: ClassVar[Mapping[str, Watch]] = {
        "logp_desirable": Watch(
            1.0,
            "the good answers themselves get less likely; a lower `optimizer.lr` or a higher `objective.beta` helps",
        )
    }
    beta: float = Field(0.1, gt=0, description="weight of the penalty on deviating from the model before step 1")
    desirable_weight: Weight = Field(
        1.0, description="weight of the good rows; auto: such that in all they weigh as much as the bad ones"
    )
    undesirable_weight: Weight = Field(
        1.0,
        description="weight of the bad rows; auto: such that in all they weigh as much as the good ones; where both "
        "are auto, the more frequent kind has 1",
    )
    _counts: tuple[int, int] = PrivateAttr((1, 1))  # good and bad rows of an epoch

    def of_rows(self, rows: Rows, data: Data) -> Kto:
        """Return the same with the numbers of good and bad rows, for weights that are `auto`.

        Raises:
            DataError: when there are none of one kind.
        """
        is_good = rows.first_labels > 0.5
        good = is_good.any()
        if is_good.all() or not good:
            kind, other, hint = (
                ("true", "false", "use `objective: sft`, which learns from good answers alone, or add bad ones")
                if good else ("false", "true", "add good answers: from bad ones alone nothing to write is learned")
            )  # fmt: skip
            told = f"all {rows.samples:,} rows to train on are labelled {kind}, none {other}"
            raise DataError(Problem(told, Place(", ".join(source.path for source in data.train)), hint))
        bound = self.model_copy()
        bound._counts = tuple(max(1, round(rows.sample_weights[of].sum())) for of in (is_good, ~is_good))
        return bound

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the good and the bad rows, after `of_rows`."""
        (good, bad), one, other = self._counts, self.desirable_weight, self.undesirable_weight
        if one == "auto" and other == "auto":
            return max(1.0, bad / good), max(1.0, good / bad)
        if one == "auto":
            return float(other) * bad / good, float(other)
        return float(one), float(one) * good / bad if other == "auto" else float(other)

    def notes(self) -> list[str]:
        """Return a note on weights that were chosen, or that let one kind of rows count much more."""
        (good, bad), (of_good, of_bad) = self._counts, self.weights
        told = f"{good:,} good rows of weight {of_good:.3g}, {bad:,} bad ones of weight {of_bad:.3g}"
        if "auto" in (self.desirable_weight, self.undesirable_weight):
            return [told]
        ratio = of_good * good / (of_bad * bad)
        if EVEN[0] - 1e-9 <= ratio <= EVEN[1] + 1e-9:
            return []
        key = "undesirable_weight" if ratio > 1 else "desirable_weight"
        return [f"{told}: {ratio:.2g} to 1 in all, and 1 to 1.33 is usual; set `objective.{key}: auto`"]

    def once(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return log p of each answer under the model before step 1, in nats, (samples,)."""
        return {"reference": batch.per_row(policy.logps(batch))}

    def probes(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the prompt of each sample with the answer of the sample before it, if that is another answer.

        They are cut to the longest row of these samples.
        """
        from dataclasses import replace

        import numpy as np

        longest = max((len(sample.rows[0].ids) for sample in samples), default=0)
        found = []
        for index, sample in enumerate(samples):
            own, other = sample.rows[0], samples[index - 1].rows[0]
            first, answer = _answer(own)[0], slice(*_answer(other))
            if np.array_equal(own.ids[slice(*_answer(own))], other.ids[answer]):
                continue
            ids = np.concatenate([own.ids[:first], other.ids[answer]])[:longest]
            trained = np.concatenate([np.zeros(first, dtype=bool), other.trained[answer]])[:longest]
            found.append(replace(sample, rows=(replace(own, ids=ids, trained=trained),), values={}))
        return found

    def probe(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return log p/p0 of each answer to another prompt, in nats, (samples,)."""
        logps = batch.per_row(policy.logps(batch))
        with policy.reference() as before:
            return {"kl": logps - batch.per_row(before.logps(batch))}

    def each(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return loss, accuracy, rewards and log p per token of each row, and z0, (rows,) each."""
        import torch

        tokens = batch.per_row(torch.ones_like(batch.targets, dtype=torch.float32)).clamp(min=1)
        logps = batch.per_row(policy.logps(batch))
        good, zero = batch.labels[:, 0] > 0.5, batch.values["kl"].clamp(min=0)
        gained = logps - batch.values["reference"]
        wanted = torch.where(good, gained - zero, zero - gained)
        of_good, of_bad = self.weights
        # 1 - sigmoid(x) = sigmoid(-x), without the rounding of the difference
        losses = torch.where(good, of_good, of_bad) * (-self.beta * wanted).sigmoid()
        found = {"loss": losses, "accuracy": (wanted > 0).float(), "kl": zero}
        for name, values in (("reward", self.beta * gained.detach()), ("logp", logps.detach() / tokens)):
            found[f"{name}_desirable"] = torch.where(good, values, torch.nan)
            found[f"{name}_undesirable"] = torch.where(good, torch.nan, values)
        return found


def _answer(row: Any) -> tuple[int, int]:
    """Return begin and end of the trained tokens of a row."""
    import numpy as np

    trained = np.flatnonzero(row.trained)
    return int(trained[0]), int(trained[-1]) + 1
