"""A classifier: a head with an output for each class, or one for a number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from loratune.config.section import Complaint
from loratune.data.formats import Labelled
from loratune.data.section import Data
from loratune.errors import DataError, listed
from loratune.objectives.section import Figure, ObjectiveSection

if TYPE_CHECKING:
    import numpy as np
    import torch

    from loratune.data.dataset import Rows
    from loratune.models.batch import Batch
    from loratune.models.policy import Policy

Kind = Literal["one", "several", "number"]
PROBLEMS: dict[Kind, str] = {  # transformers' words
    "one": "single_label_classification", "several": "multi_label_classification", "number": "regression",
}  # fmt: skip


class Classify(ObjectiveSection):
    """Predict the label of a text from its last token.

    With z the outputs of the head, the loss of a row is for `data.format.labels`

    - one: w_y (log sum_c exp(z_c) - z_y), y being its class and w the weights of the classes;
    - several: the mean over classes of w_c log(1 + exp(-z_c)) for its classes and log(1 + exp(z_c)) for the others;
    - number: (z - y)^2.

    Weights apply to training only. The head starts at zero, so that the first loss is log C or log 2 without weights.
    """

    type: Literal["classify"] = "classify"
    formats: ClassVar[tuple[str, ...]] = ("labelled",)
    pooled: ClassVar[bool] = True
    unit: ClassVar[str] = "per row"
    generates: ClassVar[bool] = False
    figures: ClassVar[Mapping[str, Figure]] = {
        "accuracy": Figure("fraction of rows", "higher"),
        "error": Figure("mean absolute error", "lower"),
    }
    class_weights: Literal["none", "balanced"] | dict[str, Annotated[float, Field(gt=0)]] = Field(
        "none",
        description="weight of each class in the loss: none, balanced (as if all were equally frequent), or a mapping "
        "from names to weights, 1 where a class is not in it",
    )
    _kind: Kind = PrivateAttr("one")
    _classes: tuple[str, ...] = PrivateAttr(())
    _weights: tuple[float, ...] = PrivateAttr(())

    def complaints(self, data: Data) -> Iterator[Complaint]:
        """Yield why this objective does not combine with the recipe's `data`."""
        yield from super().complaints(data)
        form = data.format
        if self.class_weights != "none" and isinstance(form, Labelled) and form.labels == "number":
            told = "`objective.class_weights` with `labels: number`: there are no classes"
            yield Complaint(told, ("objective", "class_weights"), "remove it")

    def of_rows(self, rows: Rows, data: Data) -> Classify:
        """Return the same with the classes of the training rows, and their weights.

        Raises:
            DataError: when `class_weights` names a class that there is not.
        """
        assert isinstance(data.format, Labelled)
        bound = self.model_copy()
        bound._kind, bound._classes = data.format.labels, rows.classes
        if isinstance(self.class_weights, dict):
            if unknown := [name for name in self.class_weights if name not in rows.classes]:
                told = (
                    f"`objective.class_weights` names {listed(unknown)}; the classes: {listed(list(rows.classes), 8)}"
                )
                raise DataError(told)
            bound._weights = tuple(self.class_weights.get(name, 1.0) for name in rows.classes)
        elif self.class_weights == "balanced":
            bound._weights = tuple(_balanced(rows).tolist())
        return bound

    @property
    def outputs(self) -> int:
        """Outputs of the head: one for each class, or one for a number."""
        return max(1, len(self._classes))

    def head(self) -> dict[str, Any]:
        """Return transformers' settings of a classifier with this head."""
        names = dict(enumerate(self._classes or ("LABEL_0",)))
        return {"problem_type": PROBLEMS[self._kind], "id2label": names, "label2id": {n: i for i, n in names.items()}}

    def of_head(self, settings: Mapping[str, Any]) -> Classify:
        """Return the same for a saved head: its kind and its classes."""
        bound = self.model_copy()
        kinds: dict[str, Kind] = {name: kind for kind, name in PROBLEMS.items()}
        bound._kind = kinds[settings["problem_type"]]
        bound._classes = tuple(settings["id2label"].values()) if bound._kind != "number" else ()
        return bound

    def measured(self, outputs: np.ndarray, rows: Rows) -> dict[str, tuple[float, float, float]]:
        """Return macro-F1, Matthews' coefficient and AUROC (of several classes macro-F1 and AUROC; of numbers R2)."""
        import numpy as np

        from loratune.objectives import metrics

        if self._kind == "number":
            wanted = np.array([labels[0] for labels in rows.labels])

            def explained(some: np.ndarray) -> float:
                spread = float(np.square(wanted[some] - wanted[some].mean()).sum())
                off = float(np.square(outputs[some, 0] - wanted[some]).sum())
                return 1 - off / spread if spread else float("nan")

            return {"R2": metrics.with_interval(explained, len(wanted))}
        there = self._there(rows)
        given = _chosen(outputs) if self._kind == "one" else outputs > 0
        found = {"macro F1": lambda some: metrics.macro_f1(there[some], given[some])}
        if self._kind == "one":
            found["MCC"] = lambda some: metrics.matthews(_confusion(there[some], outputs[some]))
        found["AUROC"] = lambda some: metrics.macro_auroc(there[some], outputs[some])
        return {name: metrics.with_interval(f, len(there)) for name, f in found.items()}

    def table(self, outputs: np.ndarray, rows: Rows) -> dict[str, Any]:
        """Return the names of the `classes`, and how often each (rows) was taken for each (columns), `confusion`."""
        if self._kind != "one":
            return {}
        found = _confusion(self._there(rows), outputs)
        return {"classes": self._classes, "confusion": tuple(map(tuple, found.tolist()))}

    def _there(self, rows: Rows) -> np.ndarray:
        """Return which classes each row has, bool, (rows, classes)."""
        import numpy as np

        there = np.zeros((rows.samples, self.outputs), dtype=bool)
        for index, labels in enumerate(rows.labels):
            there[index, labels.astype(np.int64)] = True
        return there

    def each(self, policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        """Return loss and accuracy (a number: absolute error) of each row, (rows,) each."""
        scores = batch.per_row(policy.scores(batch))
        if self._kind == "number":
            off = scores[:, 0] - batch.labels[:, 0]
            return {"loss": off.square(), "error": off.detach().abs()}
        weights = scores.new_tensor(self._weights) if self._weights and policy.training else None
        losses, right = (_of_one if self._kind == "one" else _of_several)(scores, batch.labels, weights)
        return {"loss": losses, "accuracy": right.float()}


def _of_one(
    scores: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of each row, (rows,), and whether the highest score is that of its class."""
    from torch.nn.functional import cross_entropy

    wanted = labels[:, 0].long()
    losses = cross_entropy(scores, wanted, reduction="none")
    return losses if weights is None else losses * weights[wanted], scores.argmax(-1) == wanted


def _of_several(
    scores: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the binary cross entropy of each row, (rows,), and whether exactly its classes have a score above 0."""
    from torch.nn.functional import binary_cross_entropy_with_logits

    wanted = several(labels, scores.shape[1])
    losses = binary_cross_entropy_with_logits(scores, wanted, pos_weight=weights, reduction="none")
    return losses.mean(-1), ((scores > 0) == (wanted > 0)).all(-1)


def several(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the classes of each row as zeros and ones, float32, (rows, classes), from their numbers (or NaN)."""
    wanted = labels.new_zeros(len(labels), classes + 1)
    numbers = labels.nan_to_num(classes).long()  # the last column takes what is none
    return wanted.scatter_(1, numbers, 1.0)[:, :classes]


def _confusion(there: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return how often each class (rows) was taken for each class (columns), int64, (classes, classes)."""
    from loratune.objectives import metrics

    return metrics.confusion(there.argmax(1), outputs.argmax(1), there.shape[1])


def _chosen(outputs: np.ndarray) -> np.ndarray:
    """Return the class with the highest output as zeros and a one, bool, (rows, classes)."""
    import numpy as np

    found: np.ndarray = np.arange(outputs.shape[1]) == outputs.argmax(1)[:, None]
    return found


def _balanced(rows: Rows) -> np.ndarray:
    """Return n / (C n_c) for each class, (classes,), of the labels that an epoch shows: each class weighs the same."""
    import numpy as np

    labels = rows.labels
    shown = np.repeat(rows.sample_weights, [len(some) for some in labels])
    numbers = np.bincount(np.concatenate(labels).astype(np.int64), shown, len(rows.classes))
    seen = np.where(numbers > 0, numbers, 1.0)
    found: np.ndarray = numbers.sum() / (len(numbers) * seen)
    return found
