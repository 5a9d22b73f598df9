"""What a training is made of, stage by stage: rows, base, memory, length; and all of it joined."""

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
    """

    encoder: Encoder
    train: Rows
    held_out: Rows | None


@dataclass(frozen=True)
class Base:
    """The base model, checked against rows and method.

    Attributes:
        loaded: the model, with notes for the start report.
        origin: written beside each adapter: the base's fingerprint, and the ends of turns.
        ends: tokens at which an answer ends.
        chat: whether turns of a conversation are trained.
    """

    loaded: Loaded
    origin: dict[str, Any]
    ends: tuple[int, ...]
    chat: bool


@dataclass(frozen=True)
class Memory:
    """What activations cost and what was decided.

    Attributes:
        cost: measured on short rows.
        layers: that can be computed again.
        plan: how many are, and the tokens of a micro-batch.
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
    """Everything one training needs, joined once; `facts` grows into run.json."""

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
    checkpoint_bytes: int  # of the last one; before that an estimate

    @property
    def net(self) -> Any:
        """The model."""
        return self.tuned.net

    @property
    def tokenizer(self) -> Any:
        """The base's, with the recipe's chat template."""
        return self.data.encoder.tokenizer

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def micro_batch_size(self) -> int | str:
        """Rows or packs at once; with a mask every token of a pack meets every other, so that one pack is enough."""
        chosen = self.recipe.train.micro_batch_size
        return 1 if self.packing.by == "mask" and chosen == "auto" else chosen
