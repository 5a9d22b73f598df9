"""Safety checks of model and adapter folders from elsewhere: what is never opened, downloaded or run.

Tensors are read from safetensors files only. A config that would import code, download a kernel or name a file outside
of its folder is refused before transformers or PEFT read it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.errors import ModelError, Place, Problem, SafetyError, listed, shorten
from loratune.system import files
from loratune.system.paths import is_inside

MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
MAX_DEPTH = 100  # of lists and objects in a config
CONFIGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json",
    "preprocessor_config.json", "special_tokens_map.json", "adapter_config.json", "model.safetensors.index.json",
)  # fmt: skip
CONVERT = "convert them to safetensors in an isolated environment"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_OPENED = (".json", ".safetensors", ".jinja", ".model", ".txt", ".gguf")
_ATTENTION = ("attn_implementation", "attn_implementation_internal")
_EXPERTS = ("experts_implementation", "experts_implementation_internal")
_KNOWN_ATTENTION = ("eager", "sdpa", "flex_attention")
_KNOWN_EXPERTS = ("eager", "grouped_mm", "batched_mm")
# keys of config.json that make transformers use code, kernels or files from elsewhere; `auto_map` is checked apart
_CODE = ("custom_generate", "custom_pipelines", "fusion_config", "kernel_config", "use_kernels", "allow_all_kernels")
_FILES = ("transformers_weights", "fast_tokenizer_files", "tokenizer_file", "vocab_file", "merges_file")
_QUANTIZED = (
    "bitsandbytes",
    "bitsandbytes_4bit",
    "bitsandbytes_8bit",
    "gptq",
    "awq",
    "compressed-tensors",
    "fp8",
    "mxfp4",
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: bytes [start, end) of the data, with a dtype such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, int]


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: the offset of its data, and its tensors by name."""

    begin: int
    tensors: dict[str, Entry]


def header_of(file: Path) -> Header:
    """Read the header of a safetensors file. Source: https://github.com/huggingface/safetensors#format.

    Raises:
        ValueError: when it is none.
        OSError: when it can't be read.
    """
    with files.opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{file.name} is not a safetensors file, or truncated")
        try:
            plain = json.loads(stream.read(length))
            tensors = {name: _entry(value) for name, value in plain.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError(f"{file.name} has a damaged header") from None
    if any(not 0 <= start <= end <= size - 8 - length for start, end in (one.offsets for one in tensors.values())):
        raise ValueError(f"{file.name} is truncated, or its header is damaged")
    return Header(8 + length, tensors)


def _entry(value: dict[str, Any]) -> Entry:
    shape, (start, end) = tuple(value["shape"]), value["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)):
        raise ValueError("a number")
    if not isinstance(value["dtype"], str) or end - start > 16 * math.prod(shape):
        raise ValueError("a dtype")
    return Entry(value["dtype"], shape, (start, end))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model, as transformers chooses them.

    Raises:
        ValueError: when there are none, or the index is damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        if not found:
            raise ValueError("no *.safetensors here")
        return found
    return [folder / name for name in sorted(_shards(read_object(index)))]


def check_folder(folder: Path, trust: bool = False, attention: str = "auto") -> None:
    """Check a local model or adapter folder before anything in it is opened.

    Args:
        folder: with config.json or adapter_config.json.
        trust: the user allows the model's own code to run.
        attention: as in the recipe; anything but `auto` replaces what config.json asks for.

    Raises:
        SafetyError: when something in it would run or download code, is a pickle, or refers to a file outside.
        ModelError: when a config is not a JSON object.
    """
    try:
        _check_links(folder)
        names = {file.name for file in folder.iterdir()}
    except OSError as error:
        raise ModelError(Problem(f"can't be read: {error.strerror}", Place(str(folder)))) from None
    if frozen := sorted(name for name in names if name == ".metadata" or name.endswith(".distcp")):
        _refuse(folder, f"a distributed checkpoint (`{frozen[0]}`) is a pickle, which can run code", CONVERT)
    pickles = sorted(name for name in names if Path(name).suffix in _PICKLES)
    if pickles and not any(name.endswith(".safetensors") for name in names):
        _refuse(folder, f"the weights are a pickle (`{shorten(pickles[0])}`), which can run code", CONVERT)
    check_configs({name: folder / name for name in CONFIGS if name in names}, trust, attention)


def check_configs(files: dict[str, Path], trust: bool, attention: str = "auto") -> None:
    """Check configs, given by name and path; see `check_folder`."""
    for name, path in files.items():
        if name in ("special_tokens_map.json", "model.safetensors.index.json"):
            problems = _bad_shards(read_object(path)) if name.endswith(".index.json") else iter(())
        elif name == "adapter_config.json":
            if "config.json" in files:
                _refuse(
                    path, "an adapter in a model's folder would be loaded with the model", "merge the two, or use one"
                )
            continue  # see `adapter_files.check`
        else:
            problems = _bad_keys(read_object(path), trust, attention)
        if found := [Problem(message, Place(str(path)), hint) for message, hint in problems]:
            raise SafetyError(found)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: when it is none.
    """
    try:
        value = json.loads(files.text(path))
        if _depth(value) > MAX_DEPTH:
            raise RecursionError(f"nested deeper than {MAX_DEPTH} levels")
    except OSError as error:
        raise ModelError(Problem(f"can't be read: {error.strerror}", Place(str(path)))) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(Problem(f"is not JSON: {error}", Place(str(path)))) from None
    if not isinstance(value, dict):
        raise ModelError(Problem("is not a JSON object", Place(str(path))))
    return value


def _depth(value: Any) -> int:
    """Return the nesting depth of lists and objects, as later code walks them recursively."""
    depth, level = 0, [value]
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
    return depth


def _check_links(folder: Path) -> None:
    """Refuse links out of their folder, except to `blobs` beside it, where the hub's cache keeps its files."""
    home = folder.resolve()
    if home.parent.name == "snapshots" and (home.parent.parent / "blobs").is_dir():
        home = home.parent.parent
    inner = [folder / "additional_chat_templates"]
    for file in [*folder.iterdir(), *(f for one in inner if one.is_dir() for f in one.iterdir())]:
        if file.suffix in _OPENED and (kind := files.odd(file)):
            raise ModelError(Problem(f"is {kind}, not a file", Place(str(file)), "replace it with the file itself"))
        if file.is_symlink() and (file in inner or file.suffix in _OPENED):
            try:
                leads = file.resolve()
            except (OSError, RuntimeError):  # a link to itself
                leads = Path("/")
            if not leads.is_relative_to(home):
                _refuse(file, "is a link that points outside its folder", "replace it with the file itself")


def _shards(index: dict[str, Any]) -> set[Any]:
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ValueError("model.safetensors.index.json has no weight_map")
    return {name if isinstance(name, str) else json.dumps(name) for name in weights.values()}


def _bad_shards(index: dict[str, Any]) -> Iterator[tuple[str, str]]:
    try:
        names = sorted(_shards(index))
    except ValueError:
        return  # reported when it is read
    for name in names:
        if not is_inside(name):
            yield f"`weight_map` points outside its folder: `{shorten(name)}`", "get it from its original source"
        elif not name.endswith(".safetensors"):
            yield f"`weight_map` names a file that is not safetensors: `{shorten(name)}`", CONVERT


def _bad_keys(config: Any, trust: bool, attention: str) -> Iterator[tuple[str, str]]:
    """Yield what in a config would run or download code or refer to a file outside, at any depth, with the remedy."""
    if isinstance(config, list):
        for item in config:
            yield from _bad_keys(item, trust, attention)
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        bare = str(key).lstrip("_")
        if key == "auto_map" and value and not trust:
            yield (
                f"`auto_map` names the model's own code: {listed(_names(value), 2)}",
                "read that code, then give --trust-remote-code; or remove the key: transformers may support the model",
            )
        elif bare in _ATTENTION and not _known(value, _attention_here(attention)):
            yield (
                f"`{key}` asks for an external attention kernel: {listed(_names(value), 2)}",
                "remove the key, or set `model.attention: sdpa`",
            )
        elif bare in _EXPERTS and not _known(value, _KNOWN_EXPERTS):
            yield f"`{key}` asks for an external kernel: {listed(_names(value), 2)}", "remove the key"
        elif bare in _CODE and value:
            yield f"`{key}` runs or fetches code", "remove the key"
        elif key == "quantization_config" and isinstance(value, dict) and not _is_known_quantization(value):
            method = shorten(str(value.get("quant_method")))
            yield f"its weights are quantized with `{method}`, which is not supported", "use the model it was made from"
        elif key in _FILES:
            for name in value if isinstance(value, list) else [value]:
                if name is not None and not is_inside(name):
                    yield f"`{key}` points outside its folder: `{shorten(str(name))}`", "remove the key"
        elif key == "chat_template" and isinstance(value, list):
            for one in value:
                if isinstance(one, dict) and not is_inside(one.get("name")):
                    yield (
                        f"a chat template's name points outside its folder: `{shorten(str(one.get('name')))}`",
                        "rename it",
                    )
        yield from _bad_keys(value, trust, attention)


def _names(value: Any) -> list[str]:
    if isinstance(value, (dict, list)):
        return [name for item in (value.values() if isinstance(value, dict) else value) for name in _names(item)]
    return [] if value is None else [shorten(str(value))]


def _known(value: Any, known: Sequence[str]) -> bool:
    return all(name.removeprefix("paged|") in known for name in _names(value))


def _attention_here(attention: str) -> tuple[str, ...]:
    """Return the kernels a config may ask for: transformers downloads flash attention if it is not installed."""
    installed = importlib.util.find_spec("flash_attn") is not None
    return (*_KNOWN_ATTENTION, *(["flash_attention_2"] if installed or attention != "auto" else []))


def _is_known_quantization(value: dict[str, Any]) -> bool:
    method = value.get("quant_method") or ("bitsandbytes" if any(key.startswith("load_in_") for key in value) else None)
    return method in _QUANTIZED


def _refuse(place: Path, message: str, hint: str) -> None:
    raise SafetyError(Problem(message, Place(str(place)), hint))
