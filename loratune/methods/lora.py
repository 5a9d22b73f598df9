"""LoRA and its variants through PEFT: low-rank matrices beside frozen weights.

Source: Hu et al. 2021, arXiv:2106.09685; QLoRA is the same over a quantized base (Dettmers et al. 2023,
arXiv:2305.14314).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from loratune.config.section import Complaint, Section, as_tuple
from loratune.errors import ModelError, Place, Problem, listed, shorten
from loratune.methods import adapter_files, targets, tensor_files
from loratune.methods.adapter_files import CONFIG
from loratune.methods.section import MethodSection
from loratune.methods.targets import Layers, Modules
from loratune.methods.tuned import Adapter, Setup, Tuned
from loratune.models import safety
from loratune.models.section import Model

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


def _patterns(value: dict[str, Any]) -> dict[str, Any]:
    for word in value:
        try:
            re.compile(targets.whole(word))
        except re.error as error:
            hint = f" (a name is enough: `{word.strip('*.')}`)" if word.strip("*.") else ""
            raise PydanticCustomError("expected", f"`{word}` is not a regular expression: {error}{hint}") from None
    return value


# fields of an adapter_config.json that are fields here, and their names here
_OF_PEFT = {
    "r": "r", "lora_alpha": "lora_alpha", "target_modules": "target_modules", "use_rslora": "rslora",
    "use_dora": "dora", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
    "layers_to_transform": "layers_to_transform", "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices", "bias": "bias",
}  # fmt: skip
# fields that change what an adapter computes, and that this method does not have
_NOT_HERE = ("alora_invocation_tokens", "layer_replication", "lora_bias", "target_parameters", "use_qalora")
HEAD = "base_model.model.score.weight"  # in the file: the head that scores rows, see models/score_head


class Lora(MethodSection):
    """Train low-rank matrices A (r x in) and B (out x r) next to frozen weights: W + s B A."""

    type: Literal["lora"] = "lora"
    scores_rows: ClassVar[bool] = True
    has_b: ClassVar[bool] = True
    r: int = Field(16, ge=1, le=4096, description="rank of the update: columns of B and rows of A")
    lora_alpha: float = Field(32, gt=0, description="scale of the update: s = lora_alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="fraction (0-1) of A's inputs dropped while training")
    target_modules: Modules = Field(
        "all-linear",
        description="modules that get A and B: `all-linear` (every linear layer but the head and routers), a list of "
        "names, or a regular expression over full names",
    )
    rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r): stable for high ranks (arXiv:2312.03732)")
    dora: bool = Field(False, description="train the norm of each weight column separately (DoRA, arXiv:2402.09353)")
    init: Literal["default", "gaussian", "pissa", "olora", "loftq", "eva"] = Field(
        "default",
        description="initial A and B: default (A Kaiming-uniform, B zero), gaussian, pissa (arXiv:2404.02948), "
        "olora (arXiv:2406.01775), loftq (arXiv:2310.08659, for a 4-bit base), eva (arXiv:2410.07170, uses the "
        "training rows)",
    )
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=4096)]], AfterValidator(_patterns)] = Field(
        {}, description="other ranks for some modules: name or pattern -> r"
    )
    alpha_pattern: Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_patterns)] = Field(
        {}, description="other scales for some modules: name or pattern -> lora_alpha"
    )
    layers_to_transform: Layers = Field(
        None, description="numbers of the layers that get matrices, from 0 (default: all)"
    )
    modules_to_save: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (), description="modules trained in full and saved with the adapter, such as `lm_head`"
    )
    trainable_token_indices: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = Field(
        (), description="rows of the embedding trained in addition to the matrices, by token id: for new tokens"
    )
    router: Literal["frozen", "trained"] = Field(
        "frozen",
        description="router of a mixture of experts; trained: in full, and saved with the adapter",
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which bias vectors are trained")
    continue_from: str | None = Field(
        None,
        min_length=1,
        description="adapter to continue training: a run or an adapter folder; rank, scale, modules and the like are "
        "those of the adapter",
    )

    @property
    def dropout(self) -> float:
        """Fraction (0-1) of A's inputs that is dropped in training."""
        return self.lora_dropout

    @property
    def forgets_by(self) -> str:
        """The key by which the model before step 1 is lost in training, or "": without A and B it would be another."""
        if self.continue_from is not None:
            return "continue_from"
        if self.bias != "none":
            return "bias"
        return "init" if self.init in ("pissa", "olora", "loftq") else ""

    def describe(self) -> str:
        """Return what is trained, in a few words."""
        scale = f"lora_alpha {self.lora_alpha:g}{', rsLoRA' if self.rslora else ''}"
        start = f"init {self.init}" if self.continue_from is None else f"from {Path(self.continue_from).name}"
        return f"{'DoRA' if self.dora else 'LoRA'} r {self.r}, {scale}, {start}"

    def continued(self, folder: Path) -> Lora:
        """Return this section with the fields of the adapter in a folder.

        Raises:
            ModelError: when it is no LoRA adapter, has what this method has not, or other values than given here.
        """
        place = Place(str(folder / CONFIG))
        config = safety.read_object(folder / CONFIG)
        if config.get("peft_type") != "LORA":
            kind = shorten(str(config.get("peft_type")))
            raise ModelError(Problem(f"is an adapter of type `{kind}`; only LoRA can be continued", place))
        if others := [key for key in _NOT_HERE if config.get(key)]:
            raise ModelError(Problem(f"`{others[0]}` is not supported", place, "continue a plain LoRA adapter"))
        known = {ours: config[name] for name, ours in _OF_PEFT.items() if config.get(name) not in (None, [], {})}
        if config.get("task_type") == "SEQ_CLS":  # its head comes from the objective
            for key in ("modules_to_save", "target_modules"):
                if isinstance(known.get(key), list):
                    known[key] = [name for name in known[key] if name not in ("classifier", "score")]
        given = self.model_dump(include=self.model_fields_set)
        own = {name: value for name, value in given.items() if name not in _OF_PEFT.values()}
        try:
            made = Lora.model_validate({**own, **known, "continue_from": str(folder)})
        except ValidationError as error:
            wrong = error.errors()[0]
            told = f"`{'.'.join(map(str, wrong['loc']))}` is not valid: {wrong['msg']}"
            raise ModelError(Problem(shorten(told, 300), place)) from None
        found = made.model_dump()
        for name in given.keys() & set(_OF_PEFT.values()):
            if given[name] != found[name]:
                told = f"`method.{name}`: the adapter has {shorten(str(found[name]))}"
                raise ModelError(Problem(told, place, f"remove `{name}`"))
        return made

    def complaints(self, model: Model, optimizer: Section) -> Iterator[Complaint]:
        """Yield why this method does not combine with other sections of the recipe, or its own keys with each other."""
        yield from super().complaints(model, optimizer)
        if self.continue_from is not None and self.init != "default":
            told = f"`method.init: {self.init}` is for a new adapter, and `continue_from` names one"
            yield Complaint(told, ("method", "init"), "remove `init`")
        if self.changes_base and self.dora:
            yield Complaint(f"`method.init: {self.init}` and `method.dora` don't combine", ("method", "dora"))
        if self.changes_base and self.rslora and (self.rank_pattern or self.alpha_pattern):
            key = "rank_pattern" if self.rank_pattern else "alpha_pattern"
            yield Complaint(f"`method.init: {self.init}` with `rslora` does not support patterns", ("method", key))

    def refused_over(self, quantization: str, without: str) -> Iterator[Complaint]:
        """Yield why it can't be trained on weights with this quantization."""
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
        """Whether the initialization moves a part of the base's weights into A and B, changing the base in memory."""
        return self.init in ("pissa", "olora")

    def apply(self, model: PreTrainedModel, setup: Setup) -> Tuned:
        """Freeze the base and add A and B to the target modules.

        Args:
            model: the base model, quantized or not.
            setup: of the training; its batches are used only by `init: eva`.

        Raises:
            ModelError: when a target matches no module of this model, a token id is not in its vocabulary, or the
                adapter to continue does not fit.
        """
        from peft import get_peft_model

        from loratune.kernels import lora_linear, norm_swiglu

        if self.continue_from is not None:
            adapter_files.check(Path(self.continue_from))
        targets.check(self, model)
        model.requires_grad_(False)  # not prepare_model_for_kbit_training: that copies norms and head to float32
        config = self._config(model)
        few_passes = self._slower(model) is None
        if few_passes:
            lora_linear.replace_layers(config)
        peft_model: PeftModel = get_peft_model(model, config, revision=setup.revision)
        _in_float32(peft_model)
        if self.init == "eva":
            from peft import initialize_lora_eva_weights

            initialize_lora_eva_weights(peft_model, list(setup.batches()), show_progress_bar=False)
        if self.init == "loftq":
            self._start_from_quantization_error(peft_model)
        if few_passes:
            lora_linear.join(peft_model)
        norm_swiglu.install(peft_model, again=few_passes)
        if self.changes_base:
            return OnChangedBase(peft_model)
        if self.continue_from is not None:
            _load_into(peft_model, Path(self.continue_from))
        return LoraAdapter(peft_model, off_is_start=not self.forgets_by)

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Return notes on the model after `apply`: which modules have no matrices, and what is slower."""
        reason = self._slower(model)
        slower = f"{reason}: the layers of the adapter are computed by PEFT, which is slower"
        found = [*targets.notes(self, model), *([slower] if reason else [])]
        if self.continue_from is not None and _starts_at_zero(model, Path(self.continue_from)):
            found.append("the head that scores rows starts at zero: the adapter has none for these outputs")
        return found

    def _slower(self, model: Any) -> str | None:
        """Return why PEFT's own layers are used, or None where `lora_linear` replaces them."""
        if self.dora:
            return "`method.dora`"
        if self.lora_dropout:
            return "`method.lora_dropout`"
        if self.bias != "none":
            return f"`method.bias: {self.bias}`"
        from loratune.kernels import lora_linear

        others = lora_linear.misfits(model)
        return f"the base has layers in {listed(others)}" if others else None

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
            # LoftQ's matrices are set after PEFT's initialization, see _start_from_quantization_error
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
        """Set A and B to the best rank-r fit of W's 4-bit rounding error. Source: arXiv:2310.08659, alg. 1."""
        import bitsandbytes as bnb
        import torch
        from peft.tuners.lora.bnb import Linear4bit

        # not PEFT's replace_lora_weights_loftq: it needs a GPU, and ignores the scale s
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


class LoraAdapter(Adapter):
    """LoRA's matrices A and B beside frozen weights."""

    def __init__(self, net: Any, off_is_start: bool = True):
        from loratune.kernels import lora_linear

        super().__init__(net, off_is_start)
        self._casts = lora_linear.Casts(net)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of a step: A and B are cast to the precision of the layers once, not in each micro-batch."""
        with self._casts.made():
            yield

    def config(self, final: bool) -> LoraConfig:
        """Return PEFT's configuration as it is to be written."""
        config = super().config(final)
        from loratune.models import score_head

        config.init_lora_weights = True  # a loaded adapter starts from its file
        if score_head.of(self.net) is not None:
            config.task_type = "SEQ_CLS"
        return config


class OnChangedBase(LoraAdapter):
    """LoRA whose initialization changed the base: before step 1, W + s B A equals the base's original weight.

    At the end s (B A - B0 A0) is saved, of rank 2r, so that it applies to the unchanged base.
    """

    def __init__(self, net: Any):
        super().__init__(net, off_is_start=False)
        self._initial = tensor_files.cast(super().state(), None)

    def state(self, final: bool = False) -> dict[str, torch.Tensor]:
        """Return the tensors that `save` writes."""
        state = super().state()
        return _minus_initial(state, self._initial) if final else state

    def config(self, final: bool) -> LoraConfig:
        """Return PEFT's configuration as it is to be written."""
        config = super().config(final)
        if final:
            grown = 2 * math.sqrt(0.5) if config.use_rslora else 2
            config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * grown
            config.rank_pattern = {k: 2 * v for k, v in config.rank_pattern.items()}
            config.alpha_pattern = {k: v * grown for k, v in config.alpha_pattern.items()}
        return config


def _load_into(model: PeftModel, folder: Path) -> None:
    """Load the tensors of an adapter into a new one of the same shape.

    A head that scores rows stays at zero unless the adapter has the same one.

    Raises:
        ModelError: when the file has others.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    state = load_file(folder / adapter_files.TENSORS)
    new = [HEAD] if _starts_at_zero(model, folder) else []
    if HEAD in state and not new and not _has_head(model):
        told = "has a head that scores rows, and this objective learns to write"
        raise ModelError(Problem(told, Place(str(folder)), "continue it with `objective: classify` or `reward`"))
    adapter_files.check_complete(model, folder, "default", new)
    zero = get_peft_model_state_dict(model, save_embedding_layers=False)
    set_peft_model_state_dict(model, {**state, **{name: zero[name] for name in new}})


def _has_head(model: Any) -> bool:
    from loratune.models import score_head

    return score_head.of(model) is not None


def _starts_at_zero(model: Any, folder: Path) -> bool:
    """Return whether the model has a head that the adapter in a folder lacks, or has for something else."""
    from loratune.models import fingerprint, score_head

    if not _has_head(model):
        return False
    return fingerprint.head(folder) != score_head.settings_of(score_head.config_of(model))


def _best_of_rank(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (rows, r) and A (r, columns) of equal norm, such that B A is the best fit of a matrix.

    A rounding error has nearly equal singular values, which random projections separate slowly: with 32 extra
    projections and eight passes the fit's error is 0.03 % larger than that of the best one, in a tenth of the time or
    less (Halko et al. 2011, arXiv:0909.4061, alg. 5.1). A small matrix gets a full SVD.
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
    """Convert trained float16 parameters to float32, as PEFT does with A and B: the gradient scaler needs it."""
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
