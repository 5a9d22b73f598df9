"""LoRA and its variants through PEFT: low-rank matrices beside frozen weights.

Source: Hu et al. 2021, arXiv:2106.09685; QLoRA is the same over a quantized base (Dettmers et al. 2023,
arXiv:2305.14314).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from loratune.config.section import Complaint, Section, as_tuple
from loratune.errors import listed
from loratune.methods import targets, tensor_files
from loratune.models.section import Model

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def _targets(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except re.error as error:
            raise PydanticCustomError("expected", f"is no regular expression ({error})") from None
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise PydanticCustomError("expected", "must be `all-linear`, a list of module names, or a regular expression")


def _patterns(value: dict[str, Any]) -> dict[str, Any]:
    for word in value:
        try:
            re.compile(targets.whole(word))
        except re.error as error:
            hint = f" (a name is enough: `{word.strip('*.')}`)" if word.strip("*.") else ""
            raise PydanticCustomError("expected", f"`{word}` is no regular expression: {error}{hint}") from None
    return value


class Lora(Section):
    """Train low-rank matrices A (r x in) and B (out x r) beside frozen weights: W + s B A."""

    type: Literal["lora"] = "lora"
    r: int = Field(16, ge=1, le=4096, description="rank of the update: columns of B and rows of A")
    lora_alpha: float = Field(32, gt=0, description="scale of the update: s = lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="part (0-1) of A's inputs dropped while training")
    target_modules: Annotated[
        str | tuple[str, ...],
        BeforeValidator(_targets),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
    ] = Field(
        "all-linear",
        description="where A and B stand: `all-linear` (every linear layer but the head and routers), a list of names, "
        "or a regular expression over full names",
    )
    rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r): stable for high ranks (arXiv:2312.03732)")
    dora: bool = Field(False, description="train the norm of each weight column apart (DoRA, arXiv:2402.09353)")
    init: Literal["default", "gaussian", "pissa", "olora", "loftq", "eva"] = Field(
        "default",
        description="start of A and B: default (A Kaiming-uniform, B zero), gaussian, pissa (arXiv:2404.02948), "
        "olora (arXiv:2406.01775), loftq (arXiv:2310.08659, for a 4-bit base), eva (arXiv:2410.07170, looks at the "
        "training rows)",
    )
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=4096)]], AfterValidator(_patterns)] = Field(
        {}, description="other ranks for some modules: name or pattern -> r"
    )
    alpha_pattern: Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_patterns)] = Field(
        {}, description="other scales for some modules: name or pattern -> lora_alpha"
    )
    layers_to_transform: Annotated[tuple[int, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, description="numbers of the layers that get matrices, from 0 (default: all)"
    )
    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (), description="modules trained in full and saved with the adapter, such as `lm_head`"
    )
    trainable_token_indices: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = Field(
        (), description="rows of the embedding trained beside the matrices, by token id: for new tokens"
    )
    router: Literal["frozen", "trained"] = Field(
        "frozen",
        description="of a mixture of experts: what chooses the experts; trained: in full, and saved with the adapter",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which bias vectors are trained")

    def complaints(self, model: Model, optimizer: Section) -> Iterator[Complaint]:
        """Yield what this method can't do with other sections of the recipe, nor its own keys together."""
        yield from self.refused_over(model.quantization.type, "leave `model.quantization` out")
        if self.changes_base and self.dora:
            yield Complaint(f"`method.init: {self.init}` and `method.dora` don't combine", ("method", "dora"))
        if self.changes_base and self.rslora and (self.rank_pattern or self.alpha_pattern):
            key = "rank_pattern" if self.rank_pattern else "alpha_pattern"
            yield Complaint(f"`method.init: {self.init}` with `rslora` takes no patterns", ("method", key))

    def refused_over(self, quantization: str, without: str) -> Iterator[Complaint]:
        """Yield why it can't be trained over weights in a quantization.

        Args:
            quantization: of the base's linear layers: none, nf4, fp4, int8, or the name of another way.
            without: how to have a base that is not quantized.
        """
        key = ("method", "init")
        if self.init == "loftq" and quantization not in ("nf4", "fp4"):
            told = "`method.init: loftq` makes up for 4-bit rounding, and the base is not 4-bit"
            yield Complaint(told, key, "set `model.quantization: nf4`")
        if self.changes_base and quantization != "none":
            told = f"`method.init: {self.init}` changes the base, which {quantization} weights don't allow"
            yield Complaint(told, key, f"use `init: loftq`, or {without}")
        if self.init == "eva" and quantization == "int8":
            yield Complaint("`method.init: eva` is not known to work on an int8 base", key, "use `nf4`")

    @property
    def changes_base(self) -> bool:
        """Whether the start moves a part of the base into A and B, so that the base itself is changed in memory."""
        return self.init in ("pissa", "olora")

    def apply(
        self,
        model: PreTrainedModel,
        batches: Callable[[], Iterable[Mapping[str, Any]]],
        revision: str | None = None,
    ) -> PeftModel:
        """Freeze the base and put A and B beside the target modules.

        Args:
            model: the base model, quantized or not.
            batches: gives some batches of the training rows; asked only by `init: eva`.
            revision: of the base, written into the adapter.

        Raises:
            ModelError: when a target matches no module of this model, or a token id is not in its vocabulary.
        """
        from peft import get_peft_model

        from loratune.kernels import lora_linear, norm_swiglu

        targets.check(self, model)
        model.requires_grad_(False)  # not prepare_model_for_kbit_training: that copies norms and head to float32
        config = self._config(model)
        few_passes = self._slower(model) is None
        if few_passes:
            config._register_custom_module(lora_linear.MODULES)
        peft_model: PeftModel = get_peft_model(model, config, revision=revision)
        _in_float32(peft_model)
        if self.init == "eva":
            from peft import initialize_lora_eva_weights

            initialize_lora_eva_weights(peft_model, list(batches()), show_progress_bar=False)
        if self.init == "loftq":
            self._start_from_quantization_error(peft_model)
        if few_passes:
            lora_linear.join(peft_model)
        norm_swiglu.install(peft_model, again=few_passes)
        return peft_model

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Return what a person must know of the base after `apply`: what has no matrices, and what is slower."""
        reason = self._slower(model)
        slower = f"{reason}: the layers of the adapter are computed by PEFT, which takes more passes"
        return [*targets.notes(self, model), *([slower] if reason else [])]

    def _slower(self, model: Any) -> str | None:
        """Return why PEFT's own layers are left as they are, or None where `lora_linear` stands for them."""
        if self.dora:
            return "`method.dora`"
        if self.lora_dropout:
            return "`method.lora_dropout`"
        if self.bias != "none":
            return f"`method.bias: {self.bias}`"
        from loratune.kernels import lora_linear

        others = lora_linear.misfits(model)
        return f"the base has layers in {listed(others)}" if others else None

    def state(
        self, model: PeftModel, initial: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> dict[str, torch.Tensor]:
        """Return the tensors that are written to disk, under PEFT's names; `initial` as in `save`."""
        from peft import get_peft_model_state_dict

        state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
        return _minus_initial(state, initial) if initial else state

    def initial(self, model: PeftModel) -> dict[str, torch.Tensor]:
        """Return what the final save needs of the start: A and B, where they were taken out of the base."""
        return tensor_files.cast(self.state(model), None) if self.changes_base else {}

    def save(
        self, model: PeftModel, folder: Path, dtype: torch.dtype | None, initial: Mapping[str, torch.Tensor]
    ) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors.

        Args:
            model: the model that `apply` returned.
            folder: where to write; made when missing.
            dtype: of the tensors on disk; None keeps the precision of the training.
            initial: A and B at the start where `changes_base`: they are subtracted, W + s(BA - B0 A0), so that the
                adapter (then of rank 2r) stands on the base as it was loaded.
        """
        import copy

        from safetensors.torch import save_file

        config = copy.deepcopy(model.peft_config["default"])
        state = self.state(model, initial)
        if initial:
            grown = 2 * math.sqrt(0.5) if self.rslora else 2
            config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * grown
            config.rank_pattern = {k: 2 * v for k, v in config.rank_pattern.items()}
            config.alpha_pattern = {k: v * grown for k, v in config.alpha_pattern.items()}
        config.init_lora_weights = True  # a loaded adapter starts from its file
        config.inference_mode = True
        if os.path.isabs(config.base_model_name_or_path or ""):
            config.base_model_name_or_path = None  # a place on this machine, which nobody else has
        if isinstance(config.target_modules, set):  # the order of a set is another one in every process
            config.target_modules = sorted(config.target_modules)
        if isinstance(config.exclude_modules, set):
            config.exclude_modules = sorted(config.exclude_modules)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensor_files.cast(state, dtype), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)

    def load(self, model: PeftModel, folder: Path) -> None:
        """Put tensors saved by `save` (in the precision of the training) back into the model.

        Raises:
            ValueError: when they are of another adapter.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        state = load_file(folder / "adapter_model.safetensors")
        other = state.keys() ^ self.state(model).keys()  # PEFT passes over them
        if other:
            raise ValueError(f"`{min(other)}` is only on one side")
        set_peft_model_state_dict(model, state)

    def _config(self, model: PreTrainedModel) -> LoraConfig:
        from peft import LoraConfig

        alpha = {k: int(v) if v == int(v) else v for k, v in {"": self.lora_alpha, **self.alpha_pattern}.items()}
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=alpha.pop(""),
            lora_dropout=self.lora_dropout,
            target_modules=targets.names(self, model),
            exclude_modules=targets.excluded(self, model),
            use_rslora=self.rslora,
            use_dora=self.dora,
            # LoftQ's matrices come after PEFT's own start, see _start_from_quantization_error
            init_lora_weights=True if self.init in ("default", "loftq") else self.init,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=alpha,
            layers_to_transform=list(self.layers_to_transform) if self.layers_to_transform is not None else None,
            modules_to_save=targets.in_full(self, model) or None,
            trainable_token_indices=list(self.trainable_token_indices) or None,
            bias=self.bias,
        )
        targets.settle(self, config, model)
        return config

    def _start_from_quantization_error(self, model: PeftModel) -> None:
        """Set A and B to the best rank-r fit of what 4-bit rounding took from W. Source: arXiv:2310.08659, alg. 1."""
        import bitsandbytes as bnb
        import torch
        from peft.tuners.lora.bnb import Linear4bit

        # not PEFT's replace_lora_weights_loftq: it needs a GPU, and leaves the scale s out
        base = model.get_base_model()
        on_disk = tensor_files.Weights(str(base.config._name_or_path), base.base_model_prefix)
        with torch.no_grad():
            for name, module in base.named_modules():
                if not isinstance(module, Linear4bit):
                    continue
                weight = module.get_base_layer().weight
                rounded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
                lost = on_disk[f"{name}.weight"].to(rounded) - rounded  # (out, in)
                up, down = _best_of_rank(lost, module.r["default"])
                module.lora_A["default"].weight.copy_(down)
                module.lora_B["default"].weight.copy_(up / module.scaling["default"])


def _best_of_rank(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (rows, r) and A (r, columns), so that B A is the best fit of a matrix, equally large both.

    What rounding took has nearly equal singular values, which random projections tell apart slowly: with 32 more of
    them and eight passes the fit leaves 0.03 % more than the best one, in a tenth of the time or less (Halko et al.
    2011, arXiv:0909.4061, alg. 5.1). A small matrix is taken apart whole.
    """
    import torch

    tried = r + 32
    if min(matrix.shape) <= 8 * tried:
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.t()
    else:
        u, sigma, v = torch.svd_lowrank(matrix, q=tried, niter=8)
    root = sigma[:r].sqrt()
    return u[:, :r] * root, root[:, None] * v[:, :r].t()


def _in_float32(model: PeftModel) -> None:
    """Keep what is trained of a float16 base in float32, as PEFT does with A and B: their scaler asks for it."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype is torch.float16:
            parameter.data = parameter.data.float()


def _minus_initial(state: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return A, B of rank 2r with B' A' = B A - B0 A0."""
    import torch

    out: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        start = initial[name].to(tensor.device) if name in initial else tensor
        if ".lora_A." in name or ".lora_embedding_A" in name:
            out[name] = torch.cat([tensor, start], dim=0)
        elif ".lora_B." in name or ".lora_embedding_B" in name:
            out[name] = torch.cat([tensor, -start], dim=1)
        else:
            out[name] = tensor
    return out
