"""Preference learning: of two answers to a prompt one was chosen. DPO and its variants, ORPO, SimPO, CPO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from loratune.config.section import Complaint
from loratune.data.section import Data
from loratune.objectives.compared import Compared
from loratune.objectives.section import Figure, ObjectiveSection, Watch

if TYPE_CHECKING:
    import torch

    from loratune.models.batch import Batch
    from loratune.models.policy import Policy


@dataclass(frozen=True)
class Answers:
    """What a loss knows of the answers of some pairs, (pairs,) each.

    Attributes:
        chosen: log p of the chosen answer in nats, summed over its label tokens.
        rejected: the same of the rejected one.
        chosen_tokens: label tokens of the chosen answer, at least 1.
        rejected_tokens: the same of the rejected one.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def chosen_mean(self) -> torch.Tensor:
        """Log p of the chosen answer per token."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> torch.Tensor:
        """Log p of the rejected answer per token."""
        return self.rejected / self.rejected_tokens


FIGURES = {
    "accuracy": Figure("fraction of pairs", "higher"),
    "margin": Figure("in the terms of the loss", "higher"),
    "logp_chosen": Figure("nats per token", "higher"),
    "logp_rejected": Figure("nats per token", "lower", shown=False),
}
WATCHED = {
    "logp_chosen": Watch(
        1.0,
        "the chosen answers themselves get less likely; `objective.sft_weight`, a lower `optimizer.lr` or a higher "
        "`objective.beta` holds them",
    )
}


class Pairwise(ObjectiveSection):
    """An objective on pairs; a subclass defines `losses`. The mean is over pairs."""

    formats: ClassVar[tuple[str, ...]] = ("preference",)
    sample: ClassVar[str] = "pair"
    unit: ClassVar[str] = "per pair"
    figures: ClassVar[Mapping[str, Figure]] = FIGURES

    def losses(self, answers: Answers, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and the margin of each pair, and other values to report, (pairs,) each.

        The margin is above 0 where the chosen answer is preferred, in the terms of the loss.
        """
        raise NotImplementedError

    def each(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return loss, margin, accuracy and log p per token of each pair, (pairs,) each."""
        import torch

        tokens = batch.per_row(torch.ones_like(batch.targets, dtype=torch.float32))
        answers = _answers(policy, batch, tokens.clamp(min=1))
        losses, margin, others = self.losses(answers, batch)
        return {
            "loss": losses, "margin": margin, "accuracy": (margin > 0).float(),
            "logp_chosen": answers.chosen_mean, "logp_rejected": answers.rejected_mean, **others,
        }  # fmt: skip


class Dpo(Compared, Pairwise):
    """Make the chosen answer more probable than the rejected one, relative to the model before step 1 or a named one.

    With d = log p/p0 of the chosen answer - log p/p0 of the rejected one, p0 being that model and log p summed over the
    tokens of an answer, and e = label_smoothing, the loss of a pair is for

    - sigmoid: -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d). Source: Rafailov et al. 2023, arXiv:2305.18290,
      eq. 7; with e above 0 it is conservative DPO (Mitchell 2023).
    - robust: (-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e). Source: Chowdhury et al. 2024,
      arXiv:2403.00409.
    - hinge: max(0, 1 - beta d). Source: Zhao et al. 2023, arXiv:2305.10425.
    - ipo: (d - 1 / (2 beta))^2, with log p/p0 per token, as TRL has it of the authors. Source: Azar et al. 2023,
      arXiv:2310.12036, eq. 17.
    - apo_zero: 1 - sigmoid(beta log p/p0 of chosen) + sigmoid(beta log p/p0 of rejected). Source: D'Oosterlinck et al.
      2024, arXiv:2408.06266.

    `sft_weight` times -log p per token of the chosen answer is added. Source: Pang et al. 2024, arXiv:2404.19733.
    """

    type: Literal["dpo"] = "dpo"
    values: ClassVar[tuple[str, ...]] = ("reference_chosen", "reference_rejected")
    figures: ClassVar[Mapping[str, Figure]] = {
        **FIGURES, "reward_chosen": Figure("beta log p/p0", "higher", shown=False),
        "reward_rejected": Figure("beta log p/p0", "lower", shown=False),
    }  # fmt: skip
    watched: ClassVar[Mapping[str, Watch]] = WATCHED
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero"] = Field("sigmoid", description="form of the loss")
    beta: float = Field(0.1, gt=0, description="weight of the penalty on deviating from the reference")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="fraction (0-0.5) of the pairs that are the wrong way round (sigmoid and robust)"
    )
    sft_weight: float = Field(
        0.0, ge=0, description="weight of the cross entropy of the chosen answer, against its probability falling"
    )

    def complaints(self, data: Data) -> Iterator[Complaint]:
        """Yield why this objective does not combine with the recipe's `data`, or its own keys with each other."""
        yield from super().complaints(data)
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            told = f"`objective.label_smoothing` has no effect on `loss: {self.loss}`"
            yield Complaint(told, ("objective", "label_smoothing"), "remove it, or use `loss: sigmoid` or `robust`")
        if self.loss == "robust" and not self.label_smoothing:
            told = "`objective.loss: robust` without `label_smoothing` is `sigmoid`"
            yield Complaint(told, ("objective", "loss"), "set `label_smoothing`, such as 0.1")

    def once(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return log p of each answer under the reference, in nats, (samples,) each."""
        logps = batch.per_row(policy.logps(batch))
        return {"reference_chosen": logps[0::2], "reference_rejected": logps[1::2]}

    def losses(self, answers: Answers, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return loss, margin beta d, and the rewards beta log p/p0 of both answers; `ipo`: all per token."""
        from torch.nn.functional import logsigmoid, relu

        chosen = answers.chosen - batch.values["reference_chosen"]
        rejected = answers.rejected - batch.values["reference_rejected"]
        if self.loss == "ipo":
            chosen, rejected = chosen / answers.chosen_tokens, rejected / answers.rejected_tokens
        margin, smooth = self.beta * (chosen - rejected), self.label_smoothing
        if self.loss == "hinge":
            losses = relu(1 - margin)
        elif self.loss == "ipo":
            losses = (chosen - rejected - 1 / (2 * self.beta)).square()
        elif self.loss == "apo_zero":
            losses = 1 - (self.beta * chosen).sigmoid() + (self.beta * rejected).sigmoid()
        elif self.loss == "robust":
            losses = (smooth * logsigmoid(-margin) - (1 - smooth) * logsigmoid(margin)) / (1 - 2 * smooth)
        else:
            losses = -(1 - smooth) * logsigmoid(margin) - smooth * logsigmoid(-margin)
        if self.sft_weight:
            losses = losses - self.sft_weight * answers.chosen_mean
        return losses, margin, {"reward_chosen": self.beta * chosen, "reward_rejected": self.beta * rejected}


class Orpo(Pairwise):
    """Fine-tune on the chosen answer and make its odds larger than those of the rejected one, without a reference.

    Loss of a pair: -m+ - weight log sigmoid(log odds+ - log odds-), m being log p per token of an answer and log odds =
    m - log(1 - exp(m)). Source: Hong et al. 2024, arXiv:2403.07691, eq. 4 to 7.
    """

    type: Literal["orpo"] = "orpo"
    weight: float = Field(0.1, gt=0, description="weight of the odds ratio against the cross entropy")

    def losses(self, answers: Answers, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return loss and margin: the difference of the log odds."""
        from torch.nn.functional import logsigmoid

        margin = _log_odds(answers.chosen_mean) - _log_odds(answers.rejected_mean)
        return -answers.chosen_mean - self.weight * logsigmoid(margin), margin, {}


class Simpo(Pairwise):
    """Make the chosen answer more probable per token than the rejected one by a margin, without a reference.

    Loss of a pair: -log sigmoid(beta (m+ - m-) - gamma), m being log p per token of an answer. Source: Meng et al.
    2024, arXiv:2405.14734, eq. 6.
    """

    type: Literal["simpo"] = "simpo"
    watched: ClassVar[Mapping[str, Watch]] = WATCHED
    beta: float = Field(2.0, gt=0, description="scale of the difference of log p per token")
    gamma: float = Field(0.5, ge=0, description="margin by which the scaled difference should exceed 0")
    sft_weight: float = Field(
        0.0, ge=0, description="weight of the cross entropy of the chosen answer, against its probability falling"
    )

    def losses(self, answers: Answers, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return loss and margin: the scaled difference of log p per token."""
        from torch.nn.functional import logsigmoid

        margin = self.beta * (answers.chosen_mean - answers.rejected_mean)
        return -logsigmoid(margin - self.gamma) - self.sft_weight * answers.chosen_mean, margin, {}


class Cpo(Pairwise):
    """Make the chosen answer more probable than the rejected one and fine-tune on it, without a reference.

    Loss of a pair: -log sigmoid(beta (log p+ - log p-)) - sft_weight m+, m being log p per token. Source: Xu et al.
    2024, arXiv:2401.08417.
    """

    type: Literal["cpo"] = "cpo"
    watched: ClassVar[Mapping[str, Watch]] = WATCHED
    beta: float = Field(0.1, gt=0, description="scale of the difference of log p")
    sft_weight: float = Field(1.0, ge=0, description="weight of the cross entropy of the chosen answer")

    def losses(self, answers: Answers, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Return loss and margin: the scaled difference of log p."""
        from torch.nn.functional import logsigmoid

        margin = self.beta * (answers.chosen - answers.rejected)
        return -logsigmoid(margin) - self.sft_weight * answers.chosen_mean, margin, {}


def _answers(policy: Policy, batch: Batch, tokens: torch.Tensor) -> Answers:
    """Return log p of the answers of each pair; rows are chosen and rejected in turn, `tokens` of each row."""
    logps = batch.per_row(policy.logps(batch))
    return Answers(logps[0::2], logps[1::2], tokens[0::2], tokens[1::2])


def _log_odds(mean: torch.Tensor) -> torch.Tensor:
    """Return m - log(1 - exp(m)) for m <= 0, exact near 0, where 1 - exp(m) would be rounded to 0."""
    import torch

    mean = mean.clamp(max=-1e-7)  # an answer of probability 1 has infinite odds
    near = mean > -math.log(2)
    of_near = torch.log(-torch.expm1(torch.where(near, mean, -1.0)))
    of_far = torch.log1p(-torch.exp(torch.where(near, -1.0, mean)))
    return mean - torch.where(near, of_near, of_far)
