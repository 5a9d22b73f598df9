"""What every method's section of a recipe says of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from loratune.config.section import Complaint, Section
from loratune.models.section import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loratune.methods.tuned import Setup, Tuned

Output = Literal["adapter", "model"]


class MethodSection(Section):
    """A way to train.

    Attributes:
        output: what a run leaves behind.
        trains_base: whether the base's own weights are trained: they are float32 then, and never quantized.
        padded_only: whether rows must stand side by side, as each has something before it.
    """

    output: ClassVar[Output] = "adapter"
    trains_base: ClassVar[bool] = False
    padded_only: ClassVar[bool] = False

    @property
    def before_rows(self) -> int:
        """Virtual tokens that stand before each row in the model's output."""
        return 0

    def describe(self) -> str:
        """Return what is trained, in a few words."""
        raise NotImplementedError

    def complaints(self, model: Model, optimizer: Section) -> Iterator[Complaint]:
        """Yield what this method can't do with other sections of the recipe, nor its own keys together."""
        yield from self.refused_over(model.quantization.type, "leave `model.quantization` out")

    def refused_over(self, quantization: str, without: str) -> Iterator[Complaint]:
        """Yield why it can't be trained over weights in a quantization.

        Args:
            quantization: of the base's linear layers: none, nf4, fp4, int8, or the name of another way.
            without: how to have a base that is not quantized.
        """
        yield from ()

    def apply(self, model: PreTrainedModel, setup: Setup) -> Tuned:
        """Put on the base what is trained.

        Raises:
            ModelError: when it does not fit this model.
        """
        raise NotImplementedError

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Return what a person must know of the base after `apply`."""
        return []
