"""Checks of an adapter's two files, before and after PEFT loads them: PEFT itself ignores missing tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import ModelError, Place, Problem, SafetyError, UsageError, listed, shorten
from loratune.models import safety

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
# keys that make PEFT import modules, unpickle files, or build more than the file has tensors for
_CODE = {
    "auto_mapping": "imports the module it names",
    "megatron_config": "imports the module that `megatron_core` names",
    "runtime_config": "does not belong in a saved adapter",
    "layer_replication": "copies layers of the base",
}
_FETCHING = (
    "MULTITASK_PROMPT_TUNING",
    "XLORA",
    "CPT",
    "CARTRIDGE",
)  # other files, named in the config
_OTHERS = ("arrow_config", "monteclora_config", "use_bdlora")  # need more than one file, or a running training
_NUMBERS = {"LORA": ("r", "lora_alpha"), "ADALORA": ("init_r", "lora_alpha"), "PROMPT_TUNING": ("num_virtual_tokens",)}
_UNPICKLED = ("cache_file", "covariance_file")
_FIRST = re.compile(r"\.lora_(?:embedding_)?A(?:\.weight)?$")
_SECOND = re.compile(r"\.lora_(?:embedding_)?B(?:\.weight)?$")


def check(folder: Path) -> None:
    """Check an adapter's files before PEFT reads them, without a base.

    Raises:
        ModelError: naming what is damaged, not finite, or without effect.
        SafetyError: when it is a pickle, or its config would run or download code or refer to a file outside.
    """
    safety.check_folder(folder)
    config = safety.read_object(folder / CONFIG)
    problems = [Problem(message, Place(str(folder / CONFIG)), "an adapter does not need it: remove the key")
                for message in _hooks(config)]  # fmt: skip
    if problems:
        raise SafetyError(problems)
    _check_config(config, Place(str(folder / CONFIG)))
    if not (folder / TENSORS).is_file():
        if (folder / _PICKLE).exists():
            hint = "convert it to safetensors in an isolated environment"
            raise SafetyError(Problem(f"`{_PICKLE}` is a pickle, which can run code", Place(str(folder)), hint))
        raise ModelError(Problem(f"no {TENSORS} here", Place(str(folder))))
    _check_tensors(_read(folder / TENSORS), config, Place(str(folder / TENSORS)))


def is_mergeable(folder: Path) -> bool:
    """Return whether an adapter can be merged into the base's weights: virtual tokens can't, nor is a head merged."""
    config = safety.read_object(folder / CONFIG)
    return config.get("peft_type") != "PROMPT_TUNING" and config.get("task_type") != "SEQ_CLS"


def check_mergeable(folder: Path) -> None:
    """Check that an adapter can be merged into the base's weights.

    Raises:
        UsageError: when it can't.
    """
    if safety.read_object(folder / CONFIG).get("task_type") == "SEQ_CLS":
        told = "has a head that scores rows beside its matrices, which the base has no place for"
        raise UsageError(Problem(told, Place(str(folder)), "use it with its base, as its README.md shows"))
    if not is_mergeable(folder):
        told = "is a soft prompt, which precedes each row: it can't be merged into the base's weights"
        raise UsageError(Problem(told, Place(str(folder)), "use it with its base: loratune chat, or PEFT"))


def changes_biases(folder: Path) -> bool:
    """Return whether an adapter has bias vectors: PEFT overwrites the base's own with them."""
    return safety.read_object(folder / CONFIG).get("bias") not in (None, "none")


def check_complete(net: PeftModel, folder: Path, name: str, new: Collection[str] = ()) -> None:
    """Check that the file has exactly the tensors this model needs of an adapter.

    Args:
        net: with the adapter.
        folder: of the file.
        name: of the adapter in the model.
        new: tensors of the model that the file may lack, or have for something else.

    Raises:
        ModelError: naming the first that are missing, too many, or of another shape.
    """
    from peft import get_peft_model_state_dict

    found = safety.header_of(folder / TENSORS).tensors
    wanted = get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=False)
    allowed = get_peft_model_state_dict(
        net, adapter_name=name, save_embedding_layers=True
    )  # PEFT may save them as well
    missing, more = sorted(wanted.keys() - found.keys() - set(new)), sorted(found.keys() - allowed.keys())
    other = [key for key in found.keys() & allowed.keys() - set(new) if found[key].shape != tuple(allowed[key].shape)]
    problems = [
        Problem(f"{what}: {listed([shorten(key, 120) for key in keys], 3)}", Place(str(folder / TENSORS)), hint)
        for what, keys, hint in (
            ("lacks tensors that this base and its config require", missing, "is it complete, and is this its base?"),
            ("has tensors that this base or its config does not have", more, "is this its base?"),
            ("has tensors of another shape than the base requires", sorted(other), "is this its base?"),
        )
        if keys
    ]
    if problems:
        raise ModelError(problems)


def _hooks(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in adapter_config.json would run or download code."""
    for key, what in _CODE.items():
        if config.get(key):
            yield f"`{key}` {what}"
    if config.get("megatron_core") not in (None, "", "megatron.core"):
        yield "`megatron_core` names a module to import"
    text = config.get("peft_type") == "PROMPT_TUNING" and config.get("prompt_tuning_init", "RANDOM") != "RANDOM"
    if config.get("peft_type") in _FETCHING or text:
        yield f"an adapter of type `{config['peft_type']}` loads other files that its config names"
    for key, value in config.items():
        if isinstance(value, dict) and any(value.get(name) for name in _UNPICKLED):
            yield f"`{key}` names a file that is a pickle"
        if key in ("tokenizer_kwargs", "auto_map", "trust_remote_code", "base_model_class", "parent_library") and value:
            yield f"`{key}` runs or fetches code"


def _check_config(config: Mapping[str, Any], place: Place) -> None:
    from dataclasses import fields

    from peft import AdaLoraConfig, LoraConfig, PromptTuningConfig

    kinds: dict[Any, Any] = {"LORA": LoraConfig, "ADALORA": AdaLoraConfig, "PROMPT_TUNING": PromptTuningConfig}
    kind = str(config.get("peft_type"))
    if kind not in kinds:
        read = listed(list(kinds))
        raise ModelError(Problem(f"is an adapter of type `{shorten(kind)}`; supported: {read}", place))
    if used := [key for key in _OTHERS if config.get(key)]:
        raise ModelError(Problem(f"`{used[0]}` is not supported", place, "use a plain LoRA adapter"))
    names = {field.name for field in fields(kinds[kind])}
    if unknown := sorted(key for key, value in config.items() if key not in names and value):
        hint = "it may change what the adapter does: a newer PEFT may know it"
        raise ModelError(Problem(f"the installed PEFT does not know {listed(unknown, 3)}", place, hint))
    for key in _NUMBERS[kind]:
        value, kinds_of = config.get(key), (int, float) if key == "lora_alpha" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds_of) or not 0 < value < math.inf:
            wanted = "a number" if key == "lora_alpha" else "an integer"
            raise ModelError(Problem(f"`{key}` must be {wanted} above 0, given `{shorten(str(value))}`", place))
    if kind == "ADALORA":
        _check_kept(config, place)
    if kind == "PROMPT_TUNING":
        for key, allowed in (("task_type", ("CAUSAL_LM",)), ("num_transformer_submodules", (None, 1))):
            if config.get(key) not in allowed:
                told = f"`{key}` {shorten(str(config.get(key)))}: only soft prompts of causal LMs are supported"
                raise ModelError(Problem(told, place))


def _check_kept(config: Mapping[str, Any], place: Place) -> None:
    """Check that AdaLoRA's `rank_pattern` says of each of `init_r` rows of a matrix whether it is left."""
    pattern = config.get("rank_pattern")
    if not pattern:
        return
    told = f"`rank_pattern` must hold a list of `init_r` ({config['init_r']:,}) booleans for each matrix"
    if not isinstance(pattern, dict):
        raise ModelError(Problem(told, place))
    for name, kept in pattern.items():
        whole = isinstance(kept, list) and all(isinstance(one, bool) for one in kept)
        if not whole or len(kept) != config["init_r"]:  # PEFT first makes room for `init_r` rows, however many
            raise ModelError(Problem(f"{told}; `{shorten(str(name), 120)}` does not", place))


def _read(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        safety.header_of(file)
        return dict(load_file(file))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = shorten(str(error), 200)
        raise ModelError(
            Problem(f"can't be read: {reason}", Place(str(file)), "copy it again from its source")
        ) from None


def _check_tensors(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], place: Place) -> None:
    """Refuse an adapter without matrices, with non-finite numbers, with other ranks, or without any effect."""
    if whole := sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point()):
        raise ModelError(Problem(f"has tensors that are not floating-point: {listed(whole, 3)}", place))
    if broken := sorted(name for name, tensor in tensors.items() if not bool(tensor.float().isfinite().all())):
        raise ModelError(Problem(f"has values that are not finite: {listed(broken, 3)}", place, "its training failed"))
    second = [name for name in tensors if _SECOND.search(name)]
    ranks = {int(tensor.shape[0]) for name, tensor in tensors.items() if _FIRST.search(name) and tensor.ndim}
    asked = {rank for rank in _ranks(config) if rank not in ranks}
    if ranks and asked and max(asked) > max(ranks):  # else PEFT would first allocate it, whatever its size
        raise ModelError(Problem(f"the config asks for rank {max(asked)}, the tensors have {max(ranks)}", place))
    if not tensors:
        raise ModelError(Problem("has no tensors in it", place))
    if config["peft_type"] == "PROMPT_TUNING":
        _check_prompt(tensors, config, place)
    if config["peft_type"] == "ADALORA" and not any(bool(t.any()) for name, t in tensors.items() if "lora_E" in name):
        raise ModelError(Problem("changes nothing: every E is zero", place, "it was not trained, or not fully saved"))
    rest = [n for n in tensors if not _FIRST.search(n) and not _SECOND.search(n) and "lora_magnitude_vector" not in n]
    alone = not rest or config["peft_type"] == "ADALORA"  # whose E is nothing without B
    if second and alone and not any(bool(tensors[name].any()) for name in second):
        hint = "it was not trained, or not fully saved"
        raise ModelError(Problem("changes nothing: every B matrix is zero", place, hint))


def _check_prompt(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], place: Place) -> None:
    """Check that the vectors are as many, and as wide, as the config says: PEFT first makes room for these."""
    if "prompt_embeddings" not in tensors:
        raise ModelError(Problem("has no `prompt_embeddings`", place, "is it complete?"))
    found = tuple(tensors["prompt_embeddings"].shape)
    asked = (config["num_virtual_tokens"], config.get("token_dim"))
    if len(found) != 2 or found[0] != asked[0] or asked[1] not in (None, found[1]):
        told = f"`prompt_embeddings` has the shape {found}, the config asks for {asked[0]:,} virtual tokens"
        told += "" if asked[1] is None else f" of {shorten(str(asked[1]))} numbers"
        raise ModelError(Problem(told, place))


def _ranks(config: Mapping[str, Any]) -> list[int]:
    """Return the ranks in a config; AdaLoRA lists for each matrix which rows are left."""
    pattern = config.get("rank_pattern")
    named = list(pattern.values()) if isinstance(pattern, dict) else []
    if config.get("peft_type") == "ADALORA":
        return [sum(kept) for kept in named if isinstance(kept, list)] or [config["init_r"]]
    return [rank for rank in (config.get("r"), *named) if isinstance(rank, int)]
