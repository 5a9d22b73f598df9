"""Open the argument of eval, merge and chat: a run folder, an adapter folder, or a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratune.config import decode, yaml_nodes
from loratune.errors import LoratuneError, ModelError, Place, Problem, SafetyError, UsageError, shorten
from loratune.methods import adapter_files
from loratune.methods.attach import attach
from loratune.models import base_files, base_model, fingerprint, quantization, safety, score_head, tokenizing
from loratune.models.section import Model, NoQuantization
from loratune.recipe import Recipe
from loratune.runs import checkpoint
from loratune.system import files, run_files  # fmt: skip
from loratune.system.paths import is_inside


@dataclass(frozen=True)
class Subject:
    """A model to use: its base, adapter and recipe.

    Attributes:
        name: as it was given.
        base: how its base model is loaded (for a full model: itself).
        adapter: folder with adapter_config.json, or None for a full model.
        original: the base of a fully fine-tuned model, if the run recorded it.
        recipe: of its run, or None.
        trust: run code that comes with the base model.
    """

    name: str
    base: Model
    adapter: Path | None
    original: Model | None
    recipe: Recipe | None
    trust: bool = False

    @property
    def folder(self) -> Path | None:
        """The folder with the record of its base: the adapter's, or the full model's."""
        return self.adapter or (Path(self.base.base) if Path(self.base.base).is_dir() else None)


def open_subject(name: str, base: str | None = None, trust: bool = False) -> Subject:
    """Find out what a name stands for.

    Args:
        name: run folder, adapter folder (a checkpoint is one, too), or model: folder, hub id or .gguf file.
        base: base model to use instead of the one that is written down.
        trust: run code that comes with the base model; only ever the user's word on the command line.

    Raises:
        ModelError: when it is none of these, or an adapter without a base.
    """
    folder = files.local(name)
    there = files.there(folder)
    known = _recipe(folder)
    if (folder / "adapter_config.json").is_file():
        section = _adapter_base(folder, known, base)
        return Subject(name, section, folder.resolve(), None, known, trust)
    if run_files.is_run(folder) and not (folder / "config.json").is_file():
        status = shorten(checkpoint.status(folder) or "unknown")
        raise ModelError(
            Problem(
                f"this run {'was' if status == 'killed' else 'is'} {status} and has no adapter yet",
                Place(name),
                "loratune train RECIPE --resume, or name a folder of its checkpoints",
            )
        )
    original = known.model if known else None
    if base is not None:
        original = original.model_copy(update={"base": _local(base)}) if original else _model(base)
    if there and not (folder / "config.json").is_file() and folder.suffix != ".gguf":
        raise ModelError(
            Problem(
                "no adapter_config.json and no config.json here", Place(name), "name a run, adapter or model folder"
            )
        )
    dtype = known.model.dtype if known else "auto"
    return Subject(name, _model(name, dtype), None, original, known, trust)


def open_adapter(name: str, base: str | None = None, trust: bool = False) -> tuple[Subject, Path]:
    """Open a name that must be an adapter; return the subject, and the adapter's folder.

    Raises:
        ModelError: as `open_subject`, and when there is no such folder: adapters are not loaded from the hub.
        UsageError: when it is a full model.
    """
    base_files.check_subject(name, hub=False)
    found = open_subject(name, base, trust)
    if found.adapter is None:
        raise UsageError(Problem("is a full model, not an adapter", Place(name), "name a run or an adapter folder"))
    return found, found.adapter


def load(subject: Subject, exact: bool = False, allow_mismatch: bool = False) -> base_model.Loaded:
    """Load a subject's base model with its adapter on top, ready to use.

    Args:
        subject: from `open_subject`.
        exact: in float32 on the CPU and not quantized, however it was trained: for a merge. Weights stored quantized
            are dequantized.
        allow_mismatch: accept another base than it was trained on.

    Returns:
        The model, with notes to print.

    Raises:
        ModelError: when the adapter doesn't fit the base.
        BaseMismatchError: when the base is another one.
    """
    loaded = load_base(subject, exact, allow_mismatch)
    if subject.adapter is not None:
        loaded.model = attach(loaded.model, subject.adapter, "default")
        loaded.model.eval()
    return loaded


def load_base(subject: Subject, exact: bool = False, allow_mismatch: bool = False) -> base_model.Loaded:
    """Load a subject's base model without its adapter, which is checked nevertheless; see `load`."""
    full = {"quantization": NoQuantization(), "dtype": "float32", "attention": "auto"}
    section = subject.base.model_copy(update=full) if exact else subject.base
    if subject.adapter is not None:
        adapter_files.check(subject.adapter)  # before the base is loaded, which takes minutes
    loaded = base_model.load(section, where=torch.device("cpu") if exact else None, trust=subject.trust)
    loaded.tokenizer = tokenizer(subject)
    if exact and loaded.quantization != "none":
        loaded.model = quantization.dequantized(loaded.model)
        loaded.notes = [
            f"the base's files hold {loaded.quantization} weights: the adapter is merged into their dequantized values"
        ]
    if subject.adapter is not None:
        check_base(subject, loaded, section, allow_mismatch)
    elif subject.folder is not None:
        for file in sorted(subject.folder.glob("model*.safetensors")):
            score_head.load(loaded.model, file)
    loaded.model.eval()
    return loaded


def check_base(subject: Subject, loaded: base_model.Loaded, section: Model, allow_mismatch: bool) -> None:
    """Compare a loaded base with the one a subject was trained on; add notes to it.

    Raises:
        BaseMismatchError: when it is another one that was not allowed.
    """
    if subject.folder is None:
        return
    tokenizer = loaded.tokenizer if subject.adapter is not None else None  # a full model has its own
    found = fingerprint.compare(subject.folder, section, allow_mismatch, tokenizer)
    loaded.notes += found.notes
    loaded.base_differs = found.differences


def tokenizer(subject: Subject) -> Any:
    """Return the tokenizer saved with the adapter, which may have another template, else the base's."""
    saved = subject.adapter if subject.adapter and (subject.adapter / "tokenizer_config.json").is_file() else None
    return tokenizing.load(subject.base, str(saved) if saved else None, subject.trust)


def head(subject: Subject) -> dict[str, Any]:
    """Return the settings of a subject's head that scores rows, as the run recorded them.

    Raises:
        ModelError: when there are none.
    """
    settings = fingerprint.head(subject.folder) if subject.folder else {}
    if not settings:
        raise ModelError(f"`{subject.name}` has no record of its head: its classes are not known")
    return settings


def classes(subject: Subject) -> tuple[str, ...]:
    """Return the names of a classifier's classes in the order of its outputs; none for a number or a reward."""
    settings = head(subject)
    return () if settings["problem_type"] == "regression" else tuple(settings["id2label"].values())


def _recipe(folder: Path) -> Recipe | None:
    """Return the recipe of a run folder, or of the run of a checkpoint folder."""
    for place in (folder, folder.parent.parent):
        path = place / "recipe.yaml"
        if run_files.is_run(place) and path.is_file():
            try:
                return decode.decode(Recipe, yaml_nodes.parse(yaml_nodes.read_text(path), str(path)))
            except LoratuneError:
                return None
    return None


def _adapter_base(folder: Path, known: Recipe | None, base: str | None) -> Model:
    if base is not None:
        section = known.model if known else _model(base)
        return section.model_copy(update={"base": _local(base)})
    if known is not None:
        return _still_there(known.model)
    config = safety.read_object(folder / "adapter_config.json")
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not name and (about := fingerprint.read(folder)) is not None:  # for a base without a hub id
        name, revision = about["base"].get("name"), about["base"].get("revision")
    if not isinstance(name, str) or not name:
        raise ModelError(Problem("the adapter does not name its base model", Place(str(folder)), "name it with --base"))
    if revision is not None and not is_inside(revision):
        raise SafetyError(
            Problem(
                f"the revision of its base `{shorten(str(revision))}` points outside its folder", Place(str(folder))
            )
        )
    if os.path.isabs(name):
        return _still_there(Model(base=name))
    return _model(name).model_copy(update={"revision": revision})


def _still_there(section: Model) -> Model:
    """Return the section of a recorded base; raise an error if its folder is gone."""
    if os.path.isabs(section.base) and not files.there(Path(section.base)):
        told = "no such folder: the base it was trained on was here"
        raise ModelError(Problem(told, Place(section.base), "give its new path with --base"))
    return section


def _model(name: str, dtype: str = "auto") -> Model:
    return Model.model_validate({"base": _local(name), "dtype": dtype})


def _local(name: str) -> str:
    path = files.local(name)
    if files.there(path):
        return str(path.resolve())
    base_files.check_name(name)
    return name
