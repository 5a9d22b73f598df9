"""A reference model that the recipe names: another adapter of the base, or another model. Checked, loaded, freed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratune.console import size
from loratune.data import model_limits
from loratune.data.dataset import Rows
from loratune.errors import ModelError, Place, Problem, shorten
from loratune.events import Report
from loratune.kernels.layer_kinds import name_of
from loratune.methods import adapter_files
from loratune.methods.attach import attach
from loratune.models import base_files, base_model, fingerprint, generate, tokenizing
from loratune.models.base_model import Loaded
from loratune.models.policy import Policy
from loratune.models.section import Model
from loratune.recipe import Recipe
from loratune.runs import training_state
from loratune.training import reference_store

HINT = "it lies in memory beside the model until step 1: use a smaller one, quantize, or `reference: start`"


@dataclass(frozen=True)
class Named:
    """A reference model that the recipe names, not loaded yet.

    Attributes:
        name: as a recipe has it: an absolute path or a hub id.
        model: how it, or the base of its adapter, is loaded: in the precision of the training.
        adapter: folder of the adapter on that base, or None for a model of its own.
    """

    name: str
    model: Model
    adapter: Path | None

    @property
    def shown(self) -> str:
        """Its hub id, or the last two parts of its path."""
        return "/".join(Path(self.name).parts[-2:])


def named(recipe: Recipe, name: str, loaded: Loaded) -> Named:
    """Return the reference of that name; `loaded` is the base of the training."""
    asked = recipe.model.model_copy(update={"dtype": name_of(loaded.dtype)})
    if (Path(name) / adapter_files.CONFIG).is_file():
        return Named(name, asked, Path(name))
    return Named(name, asked.model_copy(update={"base": name, "revision": None}), None)


def check(reference: Named, tokenizer: Any, rows: list[Rows], trust: bool) -> tuple[str, tuple[str, ...]]:
    """Check that a reference can give log p of these rows; return a sha256 (hex) of it, and notes.

    No weights are loaded.

    Args:
        reference: what the recipe names; a model of the hub is downloaded.
        tokenizer: of the training, whose token ids are in the rows.
        rows: to train on and to evaluate on.
        trust: run code that comes with the model.

    Raises:
        ModelError: when it is missing or damaged, or its token ids mean other tokens.
        BaseMismatchError: when the adapter is of another base.
        SafetyError: when its files would run code.
    """
    if reference.adapter is not None:
        adapter_files.check(reference.adapter)
        hint = "name an adapter of this base as `objective.reference`"
        notes = fingerprint.compare(reference.adapter, reference.model, False, None, hint).notes
        return reference_store.adapter_sha256(reference.adapter), notes
    theirs = tokenizing.load(reference.model, None, trust)
    for some in rows:
        _check_vocabulary(tokenizer, theirs, some.store.used.tolist(), Place(reference.name))
    base_files.fetch(reference.model)
    return fingerprint.of_base(reference.model).sha256, ()


def _check_vocabulary(ours: Any, theirs: Any, used: list[int], place: Place) -> None:
    """Check that the token ids in use are the same tokens for both tokenizers.

    Raises:
        ModelError: naming the first that is not.
    """
    pairs = zip(used, ours.convert_ids_to_tokens(used), theirs.convert_ids_to_tokens(used), strict=True)
    other = [one for one in pairs if one[1] != one[2]]
    if other:
        number, mine, its = other[0]
        told = f"`{shorten(str(its))}`" if its is not None else "no token"
        raise ModelError(
            Problem(
                f"its tokenizer has other token ids than the base's: {len(other):,} of {len(used):,} in use, first "
                f"{number:,}, which is `{shorten(str(mine))}` for the base and {told} here",
                place,
                "name a model of the same family as `objective.reference`",
            )
        )


@contextmanager
def opened(reference: Named, rows: list[Rows], where: torch.device, trust: bool, report: Report) -> Iterator[Policy]:
    """Load a reference, yield it, and forget it; random states are as before, as training goes on from them.

    Args:
        reference: that passed `check`.
        rows: that it will be asked about.
        where: the device.
        trust: run code that comes with the model.
        report: to print to.

    Raises:
        ModelError: when it can't be loaded.
        DataError: when a row is too long for it.
        SetupError: when memory runs out.
    """
    random = training_state.randomness()
    try:
        with base_model.or_out_of_memory(HINT):
            net = base_model.load(reference.model, where=where, trust=trust).model
            if reference.adapter is not None:
                net = attach(net, reference.adapter, "default")
            before = generate.virtual_tokens(net)
            for some in rows:
                model_limits.check(net, some, "shorter rows (`data.max_length`), or another reference", before)
            taken = sum(part.nbytes for part in (*net.parameters(), *net.buffers()))
            report.field("note", f"the reference takes {size(taken)} beside the model until step 1")
            base_model.turn_off_dropout(net)
            yield Policy(net.requires_grad_(False).eval(), virtual_tokens=before)
    finally:
        training_state.set_random_state(random.as_json())


def free() -> None:
    """Give the memory of a forgotten reference back."""
    gc.collect()
    torch.cuda.empty_cache()
