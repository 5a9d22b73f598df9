"""Full fine-tuning: every weight of the base model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from loratune.config.section import Complaint, Section
from loratune.methods import tensor_files
from loratune.models.section import Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Full(Section):
    """Train every weight. The output is a whole model in transformers' own layout."""

    type: Literal["full"] = "full"

    def complaints(self, model: Model, optimizer: Section) -> Iterator[Complaint]:
        """Yield what this method can't do with other sections of the recipe."""
        if model.dtype == "float16":
            yield Complaint(
                "`method: full` can't train float16 weights: small updates would round to nothing",
                ("model", "dtype"),
                "use bfloat16, or leave it out: float32 weights, with products in bfloat16 on a GPU that has it",
            )
        yield from self.refused_over(model.quantization.type, "leave `model.quantization` out")
        if "loraplus_lr_ratio" in optimizer.model_fields_set:
            yield Complaint(
                "`optimizer.loraplus_lr_ratio` is for LoRA's B matrices; `method: full` has none",
                ("optimizer", "loraplus_lr_ratio"),
            )

    def refused_over(self, quantization: str, without: str) -> Iterator[Complaint]:
        """Yield why it can't train weights in a quantization.

        Args:
            quantization: of the base's linear layers: none, nf4, fp4, int8, or the name of another way.
            without: how to have a base that is not quantized.
        """
        if quantization != "none":
            told = f"`method: full` trains every weight, and {quantization} weights can't be trained"
            yield Complaint(told, ("method",), f"use `method: lora`, or {without}")

    def apply(
        self,
        model: PreTrainedModel,
        batches: Callable[[], Iterable[Mapping[str, Any]]],
        revision: str | None = None,
    ) -> PreTrainedModel:
        """Make every parameter trainable and return the model."""
        model.requires_grad_(True)
        return model

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Return what a person must know about this method on a model: nothing."""
        return []

    def state(
        self, model: PreTrainedModel, initial: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, torch.Tensor]:
        """Return the tensors that are written to disk, each shared one once."""
        seen: set[int] = set()
        state: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                state[name] = tensor
        return state

    def initial(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Return what the final save will need of the start: nothing."""
        return {}

    def save(
        self, model: PreTrainedModel, folder: Path, dtype: torch.dtype | None, initial: Mapping[str, torch.Tensor]
    ) -> None:
        """Write config.json and model*.safetensors; `dtype` None keeps the precision of the training."""
        state = tensor_files.cast(model.state_dict(), dtype)
        config = model.config.dtype
        model.config.dtype = dtype or config
        model.save_pretrained(folder, state_dict=state)
        model.config.dtype = config

    def load(self, model: PreTrainedModel, folder: Path) -> None:
        """Put weights saved by `save` back into the model.

        Models whose tensors have other names on disk than in memory, such as the experts of a mixture, are read by
        transformers, which knows how; a second copy of the weights is in memory then.
        """
        import torch
        from safetensors.torch import load_file

        with torch.no_grad():
            state = {k: v for file in sorted(folder.glob("model*.safetensors")) for k, v in load_file(file).items()}
            targets = model.state_dict()
            if not state.keys() <= targets.keys():
                state = self._as_named_in_memory(model, folder)
            for name, tensor in state.items():
                targets[name].copy_(tensor)

    def _as_named_in_memory(self, model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
        read = type(model).from_pretrained(
            folder, config=model.config, dtype=model.dtype, use_safetensors=True, local_files_only=True
        )
        state: dict[str, torch.Tensor] = read.state_dict()
        return state
