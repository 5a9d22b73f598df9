"""A head alone is trained, on top of a frozen model: for a classifier or a reward model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from loratune.config.section import Complaint
from loratune.methods import tensor_files
from loratune.methods.full import Whole
from loratune.methods.section import MethodSection, Output
from loratune.methods.tuned import Setup, Tuned

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Head(MethodSection):
    """Train the head that scores a row; the model below it is frozen. The output is a full model."""

    type: Literal["head"] = "head"
    output: ClassVar[Output] = "model"
    scores_rows: ClassVar[bool] = True
    frozen: ClassVar[bool] = True

    def describe(self) -> str:
        """Return what is trained, in a few words."""
        return "the head alone"

    def refused_over(self, quantization: str, without: str) -> Iterator[Complaint]:
        """Yield why it can't be trained on quantized weights: the output holds all weights."""
        if quantization != "none":
            told = f"`method: head` writes a full model, and {quantization} weights are not written"
            yield Complaint(told, ("method",), f"use `method: lora`, or {without}")

    def apply(self, model: PreTrainedModel, setup: Setup) -> Tuned:
        """Freeze all but the head."""
        from loratune.models import score_head

        model.requires_grad_(False)
        score_head.of(model).requires_grad_(True)
        return HeadAlone(model)


class HeadAlone(Whole):
    """A frozen model and its trained head; checkpoints hold the head."""

    def state(self, final: bool = False) -> dict[str, torch.Tensor]:
        """Return the tensors that `save` writes."""
        from loratune.models import score_head

        return super().state(final) if final else {score_head.WEIGHT: score_head.of(self.net).weight.detach()}

    def save(self, folder: Path, dtype: torch.dtype | None = None, final: bool = False) -> None:
        """Write the whole classifier at the end, else the head; see `Tuned.save`."""
        from safetensors.torch import save_file

        if final:
            super().save(folder, dtype, final)
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensor_files.cast(self.state(), dtype), folder / "model.safetensors", metadata={"format": "pt"})
