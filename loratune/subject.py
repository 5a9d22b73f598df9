"""What eval, merge and chat are pointed at: a run folder, an adapter folder, or a model."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from loratune import checkpoint, decode, model, nodes, recipe
from loratune.errors import LoratuneError, ModelError, Place, Problem
from loratune.recipe import Model, Recipe


@dataclass(frozen=True)
class Subject:
    """A model to use, taken apart.

    Attributes:
        name: as it was given.
        base: how its base model is loaded (for a whole model: itself).
        adapter: folder with adapter_config.json, or None for a whole model.
        original: the base a fully fine-tuned model came from, where the run knows it.
        recipe: of the run it came from, or None.
    """

    name: str
    base: Model
    adapter: Path | None
    original: Model | None
    recipe: Recipe | None


def open_subject(name: str, base: str | None = None) -> Subject:
    """Find out what a name stands for.

    Args:
        name: run folder, adapter folder (a checkpoint is one, too), or model: folder, hub id or .gguf file.
        base: base model to use instead of the one that is written down.

    Raises:
        ModelError: when it is none of these, or an adapter without a base.
    """
    folder = Path(name).expanduser()
    known = _recipe(folder)
    if (folder / "adapter_config.json").is_file():
        section = _adapter_base(folder, known, base)
        return Subject(name, section, folder.resolve(), None, known)
    if (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        status = checkpoint.status(folder) or "unknown"
        raise ModelError(
            Problem(
                f"this run {'was' if status == 'killed' else 'is'} {status} and has no adapter yet",
                Place(name),
                "loratune train RECIPE --resume, or name a folder of its checkpoints",
            )
        )
    if base is not None and not known:
        original: Model | None = _model(base)
    else:
        original = known.model if known else None
    if folder.exists() and not (folder / "config.json").is_file() and folder.suffix != ".gguf":
        raise ModelError(
            Problem(
                "no adapter_config.json and no config.json here", Place(name), "name a run, adapter or model folder"
            )
        )
    dtype = known.model.dtype if known else "auto"
    return Subject(name, _model(name, dtype), None, original, known)


def load(subject: Subject, exact: bool = False) -> model.Loaded:
    """Load a subject's base model with its adapter on top, ready to use.

    Args:
        subject: what `open_subject` returned.
        exact: in float32 on the CPU and never quantized, whatever it was trained on: for a merge.

    Raises:
        ModelError: when the adapter doesn't fit the base.
    """
    full = {"quantization": recipe.NoQuantization(), "dtype": "float32", "attention": "auto"}
    section = subject.base.model_copy(update=full) if exact else subject.base
    loaded = model.load(section, where=torch.device("cpu") if exact else None)
    loaded.tokenizer = tokenizer(subject)
    if subject.adapter is not None:
        loaded.model = attach(loaded.model, subject.adapter, "default")
    loaded.model.eval()
    return loaded


def tokenizer(subject: Subject) -> Any:
    """Return the tokenizer saved with the adapter, whose template may be another than the base's, else the base's."""
    saved = subject.adapter if subject.adapter and (subject.adapter / "tokenizer_config.json").is_file() else None
    return model.load_tokenizer(subject.base, str(saved) if saved else None)


def attach(net: Any, adapter: Path, name: str) -> Any:
    """Put an adapter on a base model (or one more on a PeftModel) under a name; return the PeftModel.

    Raises:
        ModelError: when its tensors don't fit the base, or there is no adapter.
    """
    from peft import PeftModel

    if not (adapter / "adapter_model.safetensors").is_file():
        raise ModelError(Problem("no adapter_model.safetensors here", Place(str(adapter))))
    try:
        if isinstance(net, PeftModel):
            missing = net.load_adapter(str(adapter), adapter_name=name)
        else:
            net = PeftModel.from_pretrained(net, str(adapter), adapter_name=name)
            missing = None
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(
            Problem(f"the adapter does not fit this base: {' '.join(lines[:2])}", Place(str(adapter)))
        ) from None
    if missing is not None and missing.unexpected_keys:
        raise ModelError(
            Problem(
                f"the adapter has tensors this base has no place for: {missing.unexpected_keys[0]}", Place(str(adapter))
            )
        )
    return net


def _recipe(folder: Path) -> Recipe | None:
    """Return the recipe of the run that a folder is, or lies in as a checkpoint."""
    for place in (folder, folder.parent.parent):
        path = place / "recipe.yaml"
        if (place / "run.json").is_file() and path.is_file():
            try:
                return decode.decode(Recipe, nodes.parse(path.read_bytes(), str(path)))
            except LoratuneError:
                return None
    return None


def _adapter_base(folder: Path, known: Recipe | None, base: str | None) -> Model:
    if base is not None:
        section = known.model if known else _model(base)
        return section.model_copy(update={"base": _local(base)})
    if known is not None:
        return known.model
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(Problem(f"adapter_config.json can't be read: {error}", Place(str(folder)))) from None
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(Problem("the adapter does not name its base model", Place(str(folder)), "name it with --base"))
    return _model(name).model_copy(update={"revision": config.get("revision")})


def _model(name: str, dtype: str = "auto") -> Model:
    return Model.model_validate({"base": _local(name), "dtype": dtype})


def _local(name: str) -> str:
    path = Path(name).expanduser()
    if path.exists():
        return str(path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep * 2 in name:
        raise ModelError(Problem("no such folder", Place(name)))
    return name
