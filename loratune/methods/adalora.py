"""AdaLoRA: during training, rank is removed from the layers that need little of it.

Source: Zhang et al. 2023, arXiv:2303.10512; importance and budget are computed by PEFT's `RankAllocator`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from loratune.config.section import Complaint, Section
from loratune.methods import targets, tensor_files
from loratune.methods.section import MethodSection
from loratune.methods.targets import Layers, Modules
from loratune.methods.tuned import Adapter, Setup, Tuned
from loratune.models.section import Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STATE = "adalora_state.safetensors"  # in a checkpoint, beside its adapter
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # attributes of the allocator, by parameter


class AdaLora(MethodSection):
    """Train W + (s / r) B diag(E) A; the least important rows are set to zero until `target_r` are left on average."""

    type: Literal["adalora"] = "adalora"
    has_b: ClassVar[bool] = True
    init_r: int = Field(12, ge=1, le=4096, description="rank of each layer at the start")
    target_r: int = Field(8, ge=1, le=4096, description="mean rank of the layers at the end")
    lora_alpha: float = Field(32, gt=0, description="scale s of the update")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="fraction (0-1) of A's inputs dropped while training")
    target_modules: Modules = Field(
        "all-linear",
        description="modules that get matrices: `all-linear` (every linear layer but the head and routers), a list of "
        "names, or a regular expression over full names",
    )
    layers_to_transform: Layers = Field(
        None, description="numbers of the layers that get matrices, from 0 (default: all)"
    )
    tinit: float = Field(0.1, ge=0, lt=1, description="fraction (0-1) of the steps before ranks are removed")
    tfinal: float = Field(0.3, ge=0, lt=1, description="fraction (0-1) of the steps after the ranks are final")
    delta_t: int = Field(1, ge=1, description="steps from one choice of ranks to the next")
    beta1: float = Field(0.85, gt=0, lt=1, description="decay (0-1) of the mean of each weight's importance")
    beta2: float = Field(0.85, gt=0, lt=1, description="decay (0-1) of the mean of the importance's uncertainty")
    orth_reg_weight: float = Field(
        0.5, ge=0, description="weight of the penalty |A A^T - I| + |B^T B - I| on the loss of each step (eq. 4)"
    )

    # fields of LoRA that `targets` reads and this method does not have
    rank_pattern: ClassVar[Mapping[str, int]] = {}
    alpha_pattern: ClassVar[Mapping[str, float]] = {}
    modules_to_save: ClassVar[tuple[str, ...]] = ()
    trainable_token_indices: ClassVar[tuple[int, ...]] = ()
    router: ClassVar[Literal["frozen"]] = "frozen"

    @property
    def dropout(self) -> float:
        """Fraction (0-1) of A's inputs that is dropped in training."""
        return self.lora_dropout

    def describe(self) -> str:
        """Return what is trained, in a few words."""
        return f"AdaLoRA r {self.init_r} to {self.target_r}, lora_alpha {self.lora_alpha:g}"

    def complaints(self, model: Model, optimizer: Section) -> Iterator[Complaint]:
        """Yield what this method can't do with other sections of the recipe, nor its own keys together."""
        yield from super().complaints(model, optimizer)
        if self.target_r > self.init_r:
            told = f"`method.target_r` {self.target_r} is larger than `method.init_r` {self.init_r}: ranks only fall"
            yield Complaint(told, ("method", "target_r"))
        if self.target_r == self.init_r:
            told = f"`method.target_r` is `method.init_r`, {self.init_r}: no rank would fall"
            yield Complaint(
                told, ("method", "target_r"), f"a larger `init_r`, or method: {{type: lora, r: {self.init_r}}}"
            )
        if self.tinit + self.tfinal >= 1:
            told = "`method.tinit` and `method.tfinal` leave no steps in which ranks could fall"
            yield Complaint(told, ("method", "tfinal"), "let them sum to less than 1")

    def apply(self, model: PreTrainedModel, setup: Setup) -> Tuned:
        """Freeze the base and add A, B and E to the target modules.

        Raises:
            ModelError: when a target matches no module of this model.
        """
        from peft import AdaLoraConfig, get_peft_model

        targets.check(self, model)
        model.requires_grad_(False)
        config = AdaLoraConfig(
            task_type="CAUSAL_LM", init_r=self.init_r, target_r=self.target_r, lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout, target_modules=targets.names(self, model),
            exclude_modules=targets.excluded(self, model),
            layers_to_transform=list(self.layers_to_transform) if self.layers_to_transform is not None else None,
            tinit=int(self.tinit * setup.steps), tfinal=int(self.tfinal * setup.steps), deltaT=self.delta_t,
            beta1=self.beta1, beta2=self.beta2, orth_reg_weight=self.orth_reg_weight, total_step=setup.steps,
        )  # fmt: skip
        return FallingRanks(get_peft_model(model, config, revision=setup.revision))

    def notes(self, model: PreTrainedModel) -> list[str]:
        """Return notes on which modules have matrices and which don't."""
        return targets.notes(self, model)


class FallingRanks(Adapter):
    """A model with AdaLoRA's matrices and PEFT's rank allocator."""

    def __init__(self, net: Any):
        super().__init__(net)
        self._config = net.peft_config["default"]
        self._allocator = net.base_model.rankallocator

    def penalty(self) -> torch.Tensor | None:
        """Return the mean distance of A A^T and B^T B from the identity over the matrices; eq. 4 of the paper."""
        import torch

        if not self._config.orth_reg_weight:
            return None
        apart = []
        for name, matrix in self.net.named_parameters():
            if matrix.requires_grad and (".lora_A." in name or ".lora_B." in name):
                product = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix  # (r, r)
                apart.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        total: torch.Tensor = self._config.orth_reg_weight * torch.stack(apart).mean()
        return total

    def after_step(self, step: int) -> None:
        """Update the importance of each weight from its gradient, and remove the least important ranks."""
        model, allocator, settled = self.net.base_model, self._allocator, self._config.total_step - self._config.tfinal
        if step == settled or (step > settled and not self._is_at_target()):
            # PEFT settles by what earlier steps told: there are none in a run of one step, nor may they be known where
            # a finished run goes on; and a resumed run that was made shorter never meets its step
            if not allocator.ipt:
                allocator.update_ipt(model.model)
            self._config.rank_pattern = allocator.mask_to_budget(model.model, allocator.target_bgt)
            allocator.reset_ipt()
        else:
            model.update_and_allocate(step)

    def _is_at_target(self) -> bool:
        """Return whether so few rows are left as there shall be at the end."""
        kept = self._config.rank_pattern
        return bool(kept) and sum(map(sum, kept.values())) <= self._allocator.target_bgt

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Let PEFT read all rows of the matrices, zero ones included."""
        pattern, self._config.rank_pattern = self._config.rank_pattern, None
        try:
            yield
        finally:
            self._config.rank_pattern = pattern

    def state(self, final: bool = False) -> dict[str, torch.Tensor]:
        """Return the tensors that `save` writes; at the end of a run without the rows that are zero."""
        if final:
            return super().state()
        with self._whole():
            return super().state()

    def config(self, final: bool) -> Any:
        """Return PEFT's configuration for the file."""
        config = super().config(final)
        pattern = config.rank_pattern if final else None
        config.rank_pattern = pattern and {name.replace(".default", ""): kept for name, kept in pattern.items()}
        return config

    def save(self, folder: Path, dtype: torch.dtype | None = None, final: bool = False) -> None:
        """Write the adapter, and into a checkpoint the state of the rank allocator; see `Tuned.save`."""
        from safetensors.torch import save_file

        super().save(folder, dtype, final)
        if not final:
            averages = {
                f"{kind}/{name}": tensor
                for kind in _AVERAGES
                for name, tensor in self._allocator.__dict__[kind].items()
            }
            pattern = json.dumps(self._config.rank_pattern)
            save_file(tensor_files.cast(averages, None), folder / STATE, metadata={"rank_pattern": pattern})

    def load(self, folder: Path) -> None:
        """Restore a checkpoint, with the state of the rank allocator.

        Raises:
            ValueError: when it is of another adapter.
        """
        from safetensors import safe_open

        with self._whole():
            super().load(folder)
        device = next(self.net.parameters()).device
        with safe_open(folder / STATE, framework="pt") as stream:
            self._config.rank_pattern = json.loads(stream.metadata()["rank_pattern"])
            self._allocator.reset_ipt()
            for key in stream.keys():  # noqa: SIM118
                kind, _, name = key.partition("/")
                self._allocator.__dict__[kind][name] = stream.get_tensor(key).to(device)
