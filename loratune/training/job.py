"""The parts of a training, one class for each stage (rows, base, memory, length), and `Job`, which joins them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from loratune.data.dataset import Rows
from loratune.data.encode import Encoder
from loratune.methods.tuned import Tuned
from loratune.models.base_model import Loaded
from loratune.recipe import Recipe
from loratune.runs.facts import Facts
from loratune.training.activation_memory import Cost
from loratune.training.layout_test import Packing
from loratune.training.memory_plan import Plan
from loratune.training.progress import RunReport


@dataclass(frozen=True)
class Data:
    """The rows, tokenized.

    Attributes:
        encoder: with the tokenizer and the recipe's chat template.
        train: rows to train on.
        held_out: rows to evaluate on, or None.
        notes: on the labels, for the start report.
    """

    encoder: Encoder
    train: Rows
    held_out: Rows | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Base:
    """The base model, checked against rows and method.

    Attributes:
        loaded: the model, with notes for the start report.
        origin: written beside each adapter: the base's fingerprint and the end-of-turn tokens.
        ends: tokens at which an answer ends.
        chat: whether turns of a conversation are trained.
    """

    loaded: Loaded
    origin: dict[str, Any]
    ends: tuple[int, ...]
    chat: bool


@dataclass(frozen=True)
class Memory:
    """Memory of activations, and the plan made from it.

    Attributes:
        cost: measured on short rows.
        layers: that can be checkpointed.
        plan: how many of them are, and the tokens of a micro-batch.
    """

    cost: Cost
    layers: list[Any]
    plan: Plan


@dataclass(frozen=True)
class Length:
    """How long a run is: optimizer steps per epoch and in all."""

    per_epoch: int
    steps: int


@dataclass
class Job:
    """Everything one training needs; `facts` is written to run.json."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    report: RunReport
    facts: Facts
    data: Data
    base: Base
    tuned: Tuned
    optimizer: Any
    packing: Packing
    memory: Memory
    length: Length
    checkpoint_bytes: int  # of the last checkpoint; before the first one an estimate

    @property
    def net(self) -> Any:
        """The model."""
        return self.tuned.net

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, with the recipe's chat template."""
        return self.data.encoder.tokenizer

    @property
    def first(self) -> bool:
        """Whether this is the first process, which alone writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def micro_batch_size(self) -> int | str:
        """Rows or packs at once; one pack where a mask separates rows, as all pairs of tokens are computed then."""
        chosen = self.recipe.train.micro_batch_size
        return 1 if self.packing.by == "mask" and chosen == "auto" else chosen
