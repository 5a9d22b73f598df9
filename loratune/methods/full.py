"""Full fine-tuning: every weight of the base model is trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from loratune.config.section import Complaint, Section
from loratune.methods import tensor_files
from loratune.methods.section import MethodSection, Output
from loratune.methods.tuned import Setup, Tuned
from loratune.models.section import Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Full(MethodSection):
    """Train every weight. The output is a full model in transformers' own layout."""

    type: Literal["full"] = "full"
    output: ClassVar[Output] = "model"
    trains_base: ClassVar[bool] = True
    scores_rows: ClassVar[bool] = True

    @property
    def forgets_by(self) -> str:
        """The key by which the model before step 1 is lost in training."""
        return "type"

    def describe(self) -> str:
        """Return what is trained, in a few words."""
        return "full fine-tuning"

    def complaints(self, model: Model, optimizer: Section) -> Iterator[Complaint]:
        """Yield why this method does not combine with other sections of the recipe."""
        if model.dtype == "float16":
            yield Complaint(
                "`method: full` can't train float16 weights: small updates would round to nothing",
                ("model", "dtype"),
                "use bfloat16, or leave it out: float32 weights, matrix products in bfloat16 on a GPU that supports it",
            )
        yield from super().complaints(model, optimizer)

    def refused_over(self, quantization: str, without: str) -> Iterator[Complaint]:
        """Yield why it can't train quantized weights."""
        if quantization != "none":
            told = f"`method: full` trains every weight, and {quantization} weights can't be trained"
            yield Complaint(told, ("method",), f"use `method: lora`, or {without}")

    def apply(self, model: PreTrainedModel, setup: Setup) -> Tuned:
        """Make every parameter trainable, but of the head of the language model where another one is used."""
        from loratune.models import score_head

        model.requires_grad_(True)
        for parameter in score_head.unused(model):
            parameter.requires_grad_(False)
        return Whole(model)


class Whole(Tuned):
    """A model whose weights are all trained and saved."""

    def state(self, final: bool = False) -> dict[str, torch.Tensor]:
        """Return the tensors that `save` writes; shared ones only once."""
        from loratune.models import score_head

        seen = {parameter.data_ptr() for parameter in score_head.unused(self.net)}
        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.net.state_dict().items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                state[name] = tensor
        return state

    def save(self, folder: Path, dtype: torch.dtype | None = None, final: bool = False) -> None:
        """Write config.json and model*.safetensors; see `Tuned.save`."""
        from loratune.models import score_head

        net = self.net if score_head.of(self.net) is None else score_head.as_classifier(self.net)
        state = tensor_files.cast(net.state_dict(), dtype)
        config = net.config.dtype
        net.config.dtype = dtype or config
        net.save_pretrained(folder, state_dict=state)
        net.config.dtype = config

    def load(self, folder: Path) -> None:
        """Restore weights saved by `save`.

        Models whose tensors have other names on disk than in memory, such as mixtures of experts, are read by
        transformers, which knows the mapping; this needs a second copy of the weights in memory.
        """
        import torch
        from safetensors.torch import load_file

        with torch.no_grad():
            state = {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in load_file(file).items()}
            targets = self.net.state_dict()
            if not state.keys() <= targets.keys():
                state = self._as_named_in_memory(folder)
            for name, tensor in state.items():
                targets[name].copy_(tensor)

    def _as_named_in_memory(self, folder: Path) -> dict[str, torch.Tensor]:
        read = type(self.net).from_pretrained(
            folder, config=self.net.config, dtype=self.net.dtype, use_safetensors=True, local_files_only=True
        )
        state: dict[str, torch.Tensor] = read.state_dict()
        return state
