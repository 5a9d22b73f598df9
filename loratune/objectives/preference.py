"""Preference learning: of two answers to a prompt one was chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from loratune.objectives.section import ObjectiveSection

if TYPE_CHECKING:
    import torch

    from loratune.models.batch import Batch
    from loratune.models.policy import Policy


class Dpo(ObjectiveSection):
    """Make the chosen answer more probable than the rejected one, relative to the model before step 1.

    Loss of a pair: -log sigmoid(beta (log p/p0 of chosen - log p/p0 of rejected)), p0 being that model, summed over
    the tokens of an answer. Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """

    type: Literal["dpo"] = "dpo"
    pairs: ClassVar[bool] = True
    unit: ClassVar[str] = "per pair"
    values: ClassVar[tuple[str, ...]] = ("reference_chosen", "reference_rejected")
    beta: float = Field(0.1, gt=0, description="weight of the penalty on deviating from the model before step 1")

    def once(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return log p of each answer under the model before step 1, in nats, (samples,) each."""
        chosen, rejected = _answers(policy, batch)
        return {"reference_chosen": chosen, "reference_rejected": rejected}

    def count(self, batch: Batch) -> int:
        """Return the number of pairs with a label token."""
        return len(set(batch.sample[batch.row].tolist()))

    def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the summed loss of the pairs, and sums of their rewards beta log p/p0, margins and accuracies."""
        import torch
        from torch.nn.functional import logsigmoid

        chosen, rejected = _answers(policy, batch)
        rewards = self.beta * torch.stack(
            [chosen - batch.values["reference_chosen"], rejected - batch.values["reference_rejected"]]
        )
        margin = rewards[0] - rewards[1]
        real = batch.per_sample(torch.ones_like(batch.targets, dtype=torch.float32)) > 0  # no padding samples
        sums = {
            "reward_chosen": rewards[0], "reward_rejected": rewards[1], "margin": margin,
            "accuracy": (margin > 0).float(),
        }  # fmt: skip
        return -(logsigmoid(margin) * real).sum(), {name: (one.detach() * real).sum() for name, one in sums.items()}


def _answers(policy: Policy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p of the chosen and the rejected answers, in nats, (samples,) each."""
    logps = batch.per_row(policy.logps(batch))  # (rows,): chosen and rejected in turn
    return logps[0::2], logps[1::2]
