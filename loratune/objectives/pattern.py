"""Pattern-exploiting training: a text is classified by which label's words are likeliest after a pattern."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from loratune.config.section import Complaint
from loratune.data.formats import Patterns
from loratune.data.section import Data
from loratune.objectives.section import Figure, ObjectiveSection

if TYPE_CHECKING:
    import torch

    from loratune.models.batch import Batch
    from loratune.models.policy import Policy

OF_PATTERN = "accuracy_pattern_"  # with the number of a pattern: a figure where there are several
_ACCURACY = Figure("fraction of rows", "higher")


class Pattern(ObjectiveSection):
    """Make the words of a row's label likelier after each pattern than those of the other labels.

    With s(l) = sum of log p of the tokens of the text of label l given the pattern, the loss of a row is the mean over
    patterns of -log softmax(s)[its label]. Source: Schick and Schutze 2021, arXiv:2001.07676, sec. 3.1, for masked
    models and texts of one token; here for texts of several tokens, with one model for all patterns.
    """

    type: Literal["pattern"] = "pattern"
    formats: ClassVar[tuple[str, ...]] = ("pattern",)
    unit: ClassVar[str] = "nats per row"
    generates: ClassVar[bool] = False
    figures: ClassVar[Mapping[str, Figure]] = {
        "accuracy": _ACCURACY,
        "logp_label": Figure("nats", "higher", shown=False),
    }
    normalise: Literal["sum", "mean"] = Field(
        "sum",
        description="score of a label: the sum of log p over its tokens, or their mean, which does not favour labels "
        "of few tokens",
    )

    def figure(self, name: str) -> Figure:
        """Return what is known of a figure."""
        return _ACCURACY if name.startswith(OF_PATTERN) else super().figure(name)

    def complaints(self, data: Data) -> Iterator[Complaint]:
        """Yield why this objective does not combine with the recipe's `data`."""
        yield from super().complaints(data)
        form, path = data.format, ("data", "format")
        if form.type == "auto":
            hint = (
                'write `format: {type: pattern, patterns: ["{text} It was"], verbalizers: {neg: " bad", pos: " good"}}`'
            )
            yield Complaint("`objective: pattern` needs patterns, and a text for each label", path, hint)
        elif isinstance(form, Patterns) and form.label in form.columns:
            told = f"a pattern names the column `{form.label}`: the label would be in the text"
            yield Complaint(told, (*path, "patterns"), "leave it out")

    def each(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return loss and figures of each row of the data, (samples,) each.

        `accuracy` is that of the label with the highest probability, averaged over patterns, `accuracy_pattern_1` and
        so on those of each pattern alone; `logp_label` is the score of the row's label, averaged over patterns.
        """
        import torch

        scores = batch.per_row(policy.logps(batch))
        if self.normalise == "mean":
            scores = scores / batch.per_row(torch.ones_like(batch.targets, dtype=torch.float32)).clamp(min=1)
        scores = scores.view(batch.samples, -1, batch.labels.shape[1])  # (samples, patterns, labels)
        given, its = batch.labels[:, None], batch.labels.argmax(-1, keepdim=True)
        logps = scores.log_softmax(-1)
        right = (scores.argmax(-1) == its).float()
        alone = {f"{OF_PATTERN}{number}": one for number, one in enumerate(right.unbind(1), 1)}
        return {
            "loss": -(given * logps).sum(-1).mean(1),
            "accuracy": (logps.exp().mean(1).argmax(-1) == its[:, 0]).float(),
            **(alone if len(alone) > 1 else {}),
            "logp_label": (given * scores).sum(-1).mean(1),
        }
