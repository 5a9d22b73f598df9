"""The base class of all methods' recipe sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from loratune.config.section import Complaint, Section, tag_of
from loratune.models.section import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loratune.methods.tuned import Setup, Tuned

Output = Literal["adapter", "model"]


class MethodSection(Section):
    """A training method.

    Attributes:
        output: word for a run's output.
        trains_base: whether the base's own weights are trained; they are float32 then, and never quantized.
        padded_only: whether rows must be padded and not packed, as virtual tokens precede each.
        scores_rows: whether it trains the head that scores rows, where the objective has one.
        frozen: whether nothing below that head is trained.
        has_b: whether it has B matrices, whose learning rate `optimizer.loraplus_lr_ratio` sets.
    """

    output: ClassVar[Output] = "adapter"
    trains_base: ClassVar[bool] = False
    padded_only: ClassVar[bool] = False
    scores_rows: ClassVar[bool] = False
    frozen: ClassVar[bool] = False
    has_b: ClassVar[bool] = False

    @property
    def dropout(self) -> float:
        """Fraction (0-1) of what it adds that is dropped in training; under the recipe's key `lora_dropout`."""
        return 0.0

    @property
    def before_rows(self) -> int:
        """Virtual tokens that stand before each row in the model's output."""
        return 0

    @property
    def forgets_by(self) -> str:
        """The key by which the model before step 1 is lost in training, or "" where it can be restored."""
        return ""

    def describe(self) -> str:
        """Return what is trained, in a few words."""
        raise NotImplementedError

    def complaints(self, model: Model, optimizer: Section) -> Iterator[Complaint]:
        """Yield why this method does not combine with other sections of the recipe, or its own keys with each other."""
        yield from self.refused_over(model.quantization.type, "leave `model.quantization` out")
        if not self.has_b and "loraplus_lr_ratio" in optimizer.model_fields_set:
            told = f"`optimizer.loraplus_lr_ratio` is for LoRA's B matrices; `method: {tag_of(type(self))}` has none"
            yield Complaint(told, ("optimizer", "loraplus_lr_ratio"))

    def refused_over(self, quantization: str, without: str) -> Iterator[Complaint]:
        """Yield why it can't be trained on weights with this quantization.

        Args:
            quantization: of the base's linear layers: none, nf4, fp4, int8, or the name of another method.
            without: remedy: how to get a base that is not quantized.
        """
        yield from ()

    def apply(self, model: PreTrainedModel, setup: Setup) -> Tuned:
        """Add or select the trained parameters of a base.

        Raises:
            ModelError: when the method does not fit this model.
        """
        raise NotImplementedError

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Return notes for the start report on the model after `apply`."""
        return []
