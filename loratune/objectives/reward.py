"""A reward model: a head that scores a conversation, learned from preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from loratune.objectives.section import Figure, ObjectiveSection

if TYPE_CHECKING:
    import numpy as np
    import torch

    from loratune.data.dataset import Rows
    from loratune.models.batch import Batch
    from loratune.models.policy import Policy


class Reward(ObjectiveSection):
    """Score the chosen answer higher than the rejected one.

    With s the score of prompt and answer at their last token and m the pair's margin (`data.format.margin`, else 0),
    the loss of a pair is -log sigmoid(s+ - s- - m) + centre (s+ + s-)^2. Sources: Bradley & Terry 1952; Ouyang et al.
    2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2; centring: Eisenstein et al.
    2023, arXiv:2312.09244, eq. 2. The head starts at zero, so the first loss is log 2 where there is no margin.
    """

    type: Literal["reward"] = "reward"
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    pooled: ClassVar[bool] = True
    sample: ClassVar[str] = "pair"
    unit: ClassVar[str] = "per pair"
    generates: ClassVar[bool] = False
    figures: ClassVar[Mapping[str, Figure]] = {
        "accuracy": Figure("fraction of pairs", "higher"),
        "margin": Figure("difference of scores", "higher"),
        "score_chosen": Figure("score"),
        "score_rejected": Figure("score"),
    }
    centre: float = Field(0.0, ge=0, description="weight of the penalty on scores whose sum is not 0, such as 0.01")

    @property
    def outputs(self) -> int:
        """Outputs of the head: the score."""
        return 1

    def head(self) -> dict[str, Any]:
        """Return transformers' settings of a classifier with this head."""
        return {"problem_type": "regression", "id2label": {0: "score"}, "label2id": {"score": 0}}

    def measured(self, outputs: np.ndarray, rows: Rows) -> dict[str, tuple[float, float, float]]:
        """Return how often the chosen answer is the longer one (ties half): what a score of length would reach."""
        import numpy as np

        from loratune.objectives import metrics

        tokens = np.array([[row.count() for row in rows.sample(index).rows] for index in range(rows.samples)])
        longer = (np.sign(tokens[:, 0] - tokens[:, 1]) + 1) / 2
        return {"chosen is longer": (float(longer.mean()), *metrics.interval(longer.tolist()))}

    def each(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return loss, accuracy, difference of scores, and both scores, of each pair, (pairs,) each."""
        from torch.nn.functional import logsigmoid

        scores = batch.per_row(policy.scores(batch)[:, 0])
        chosen, rejected = scores[0::2], scores[1::2]
        wanted = batch.labels[:, 0].nan_to_num(0.0) if batch.labels.shape[1] else 0.0
        losses = -logsigmoid(chosen - rejected - wanted) + self.centre * (chosen + rejected).square()
        return {
            "loss": losses, "accuracy": (chosen > rejected).float(), "margin": chosen - rejected,
            "score_chosen": chosen, "score_rejected": rejected,
        }  # fmt: skip
