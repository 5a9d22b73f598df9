"""The base model and its tokenizer: where they come from, in what precision, quantized or not."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loratune import guard, templating
from loratune.encode import adds_bos_itself
from loratune.errors import ModelError, Place, Problem, SafetyError, SetupError, listed, shorten
from loratune.recipe import Fp4, Int8, Model, Nf4
from loratune.templates import TEMPLATES

_NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass
class Loaded:
    """A base model on its device, with its tokenizer and what a person must know about how it was loaded.

    `base_differs` names how the base differs from the one its adapter was trained on, where that was allowed.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)
    base_differs: tuple[str, ...] = ()


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory has run out, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def device() -> torch.device:
    """Return the device of this process: its own GPU (LOCAL_RANK under a launcher), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def computes_in_bf16(where: torch.device) -> bool:
    """Return whether a device has bfloat16 matrix instructions."""
    if where.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def dtype_of(name: str, where: torch.device, full: bool = False) -> torch.dtype:
    """Return the precision of the weights for a recipe's `dtype`.

    Under full fine-tuning `auto` is float32: with bfloat16 weights most updates would round to nothing.

    Raises:
        SetupError: for float16 without a GPU.
    """
    if name == "auto":
        return torch.bfloat16 if computes_in_bf16(where) and not full else torch.float32
    if name == "float16" and where.type == "cpu":
        raise SetupError("`model.dtype: float16` needs a GPU", "use float32 or bfloat16 on a CPU")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def load(section: Model, full: bool = False, where: torch.device | None = None, trust: bool = False) -> Loaded:
    """Load base model and tokenizer as the recipe says.

    Args:
        section: the recipe's `model`.
        full: whether every weight will be trained.
        where: the device; None for `device()`.
        trust: run code that comes with the model; only ever the user's word on the command line.

    Raises:
        ModelError: when there is no such model, or it can't be loaded.
        SetupError: when a package or the device it needs is missing.
        SafetyError: when it would have to run code, or open a pickle.
    """
    where = where or device()
    dtype = dtype_of(section.dtype, where, full)
    folder = local_folder(section)
    loaded = Loaded(None, load_tokenizer(section, folder, trust), where, dtype)
    arguments: dict[str, Any] = {}
    if section.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise SetupError("`model.attention: flash_attention_2` needs the package `flash-attn`", "use `auto`")
    if section.attention != "auto":
        arguments["attn_implementation"] = section.attention
    if section.quantization.type != "none":
        arguments["quantization_config"] = _bitsandbytes(section, dtype)
        arguments["device_map"] = {"": str(where)}
    model = _from_pretrained(section, folder, dtype, arguments, trust)
    if section.quantization.type == "none":
        model.to(where)
    if section.quantization.type in ("nf4", "fp4"):
        _mend_4bit_on_cpu(model, where)
    model.config.use_cache = False
    loaded.model = model
    return loaded


def load_tokenizer(section: Model, folder: str | None = None, trust: bool = False) -> Any:
    """Load the tokenizer of a base model; it pads on the left when asked to generate.

    Args:
        section: the recipe's `model`.
        folder: where its files lie, if not with the model.
        trust: as in `load`.

    Raises:
        ModelError: when there is none.
        SafetyError: when its files would run code or lead out of their folder.
    """
    from transformers import AutoTokenizer

    folder = folder or local_folder(section)
    _check(section, folder, trust)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=section.revision, trust_remote_code=trust)
    except Exception as error:  # its files come from elsewhere: they can fail in any way
        raise _unusable(section.base, error, "tokenizer") from None
    templates = tokenizer.chat_template or ()
    for template in templates.values() if isinstance(templates, dict) else [templates] if templates else ():
        check_template(template, tokenizer, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only ever masked
    return tokenizer


def check_template(template: str, tokenizer: Any, source: str) -> None:
    """Refuse a chat template that can harm, before it is used; `source` is the folder or file it comes from.

    Raises:
        SafetyError: when it takes too long, too much memory, or reaches out of its sandbox.
    """
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    templating.check(template, tokens, Place(source), cache() / "templates")


def with_template(tokenizer: Any, choice: str | None, arguments: Mapping[str, Any] | None = None) -> Any:
    """Give a tokenizer the chat template a recipe names (None: it keeps its own); it is saved with the tokenizer.

    Args:
        tokenizer: of the base model.
        choice: one of `TEMPLATES`, or the path of a file.
        arguments: values of variables the template asks for. They are written into it, so that whoever serves the
            adapter renders what was trained.

    Raises:
        SafetyError: when the template of a file takes too long, too much memory, or reaches out of its sandbox.
        ModelError: when the file can't be read, ChatML is asked of a tokenizer that has no token to end its turns, or
            the template never asks for an argument.
    """
    tokenizer = _chosen(tokenizer, choice)
    if not arguments:
        return tokenizer
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    words = set(re.findall(r"\w+", template))
    if unused := [name for name in arguments if not name.isidentifier() or name not in words]:
        raise ModelError(f"`data.chat_template_kwargs`: the chat template does not know {listed(unused)}")
    given = "".join(f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in arguments.items())
    tokenizer.chat_template = given + template
    return tokenizer


def _chosen(tokenizer: Any, choice: str | None) -> Any:
    if choice is None:
        return tokenizer
    if choice in TEMPLATES:
        if choice == "chatml" and "<|im_end|>" not in tokenizer.get_added_vocab():
            hint = "`chat_template: alpaca` ends turns with the end of text, which every base model has"
            raise ModelError("`data.chat_template: chatml`: this tokenizer has no token `<|im_end|>`", hint)
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos_itself(tokenizer) else "") + TEMPLATES[choice]
        return tokenizer
    try:
        tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(Problem(f"the chat template can't be read: {error}", Place(choice))) from None
    check_template(tokenizer.chat_template, tokenizer, choice)
    return tokenizer


def local_folder(section: Model) -> str:
    """Return the folder or hub id to load from; a .gguf file is turned into a folder of the cache first."""
    return str(from_gguf(Path(section.base))) if section.base.endswith(".gguf") else section.base


def folder_of(section: Model) -> Path:
    """Return the folder on this machine with the files of a base model that was loaded before.

    Raises:
        ModelError: when a hub model is not in the cache.
    """
    from huggingface_hub import snapshot_download

    folder = Path(local_folder(section))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(section.base, revision=section.revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise _unusable(section.base, error, "model") from None


def cache() -> Path:
    """Return the folder for what can be made again: $LORATUNE_CACHE, else loratune under the user's cache folder."""
    if os.environ.get("LORATUNE_CACHE"):
        return Path(os.environ["LORATUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loratune"


def from_gguf(file: Path) -> Path:
    """Dequantize a .gguf file to a safetensors folder in the cache, once; return the folder.

    The weights are written in bfloat16. The folder's name is the sha256 of the file, so that another file of the same
    name is never taken for it.

    Raises:
        SetupError: when the package `gguf` is missing.
        ModelError: when transformers can't read the file.
    """
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise SetupError("a .gguf base needs the package `gguf`", "pip install 'loratune[gguf]'")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    target = cache() / "gguf" / f"{file.stem}-{digest[:16]}"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        arguments: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.bfloat16}
        if "GgufConfig" in dir(transformers):  # newer releases keep the blocks packed unless told otherwise
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar can't be switched off
            model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), **arguments)
        if "quantization_config" in model.config:
            del model.config.quantization_config
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model.to(torch.bfloat16).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.rename(target)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if (target / "config.json").exists():  # another process was faster
            return target
        raise _unusable(str(file), error, "model") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def checkpoint_activations(model: Any, choice: str, where: torch.device) -> bool:
    """Switch gradient checkpointing on or off as `train.gradient_checkpointing` says; return whether it is on.

    Non-reentrant, so that inputs need no gradient and DDP sees each parameter once.
    """
    on = choice == "all" or (choice == "auto" and where.type == "cuda")
    if on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return on


def _from_pretrained(section: Model, folder: str, dtype: torch.dtype, arguments: dict[str, Any], trust: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, revision=section.revision, trust_remote_code=trust)
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, revision=section.revision, dtype=dtype, use_safetensors=True,
            trust_remote_code=trust, low_cpu_mem_usage=True, **arguments,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # its files come from elsewhere: they can fail in any way
        raise _unusable(section.base, error, "model") from None


def _check(section: Model, folder: str, trust: bool) -> None:
    """Check the files of a model before transformers sees them; those of a hub model are fetched first."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if Path(folder).is_dir():
        guard.check_folder(Path(folder), trust, section.attention)
        return
    files: dict[str, Path] = {}
    for name in guard.CONFIGS:
        try:
            files[name] = Path(hf_hub_download(folder, name, revision=section.revision))
        except (OSError, ValueError, EntryNotFoundError) as error:
            if name == "config.json" or not isinstance(error, EntryNotFoundError):
                raise _unusable(section.base, error, "model") from None  # unseen files are not loaded
    guard.check_configs(files, trust, section.attention)


def _unusable(base: str, error: Exception, what: str) -> ModelError | SafetyError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if "trust_remote_code" in str(error):
        remedy = "use one that transformers knows, or read that code and give --trust-remote-code"
        return SafetyError(Problem("the model wants to run code of its own", Place(base), remedy))
    if "does not appear to have a file named model.safetensors" in str(error):
        return SafetyError(Problem("it has no safetensors; a pickle can run code", Place(base), guard.CONVERT))
    hint = None
    if not Path(base).is_absolute():
        hint = "is it a hub id? a local folder is named relative to the recipe"
        if os.environ.get("HF_HUB_OFFLINE") == "1":
            hint = "HF_HUB_OFFLINE is set: only models in the local cache can be had"
    return ModelError(Problem(f"the {what} can't be loaded: {shorten(reason, 300)}", Place(base), hint))


def _bitsandbytes(section: Model, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(f"`model.quantization: {section.quantization.type}` needs the package `bitsandbytes`")
    from transformers import BitsAndBytesConfig

    quantization = section.quantization
    if isinstance(quantization, Int8):
        return BitsAndBytesConfig(load_in_8bit=True)
    assert isinstance(quantization, (Nf4, Fp4))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def _mend_4bit_on_cpu(model: Any, where: torch.device) -> None:
    """Keep 4-bit layers right on CPUs, where bitsandbytes 0.50 has two faults.

    A forward pass without gradients repacks the weights for a kernel that has no backward pass, so that training after
    an evaluation would silently stop learning: switched off. And on CPUs with AVX512-BF16 dequantization is wrong for a
    layer whose inputs are no multiple of the block size.

    Raises:
        ModelError: for such a layer.
    """
    import bitsandbytes as bnb

    if where.type != "cpu":
        return
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    for module in layers.values():
        module.support_avx512bf16_for_cpu = False
    wrong = [f"{name} ({m.in_features})" for name, m in layers.items() if m.in_features % m.weight.blocksize]
    if wrong and computes_in_bf16(where):
        raise ModelError(
            "4-bit weights come out wrong on this CPU in layers whose inputs are no multiple of 64: "
            + ", ".join(wrong[:4]),
            "leave `model.quantization` out, or use a GPU",
        )


def quiet() -> None:
    """Keep libraries from writing between our lines; what matters of theirs is told by us."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns; nothing here forks
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "huggingface_hub"):  # a missing optional kernel, retries while offline
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|accelerate)\b.*")


def count_parameters(model: Any) -> tuple[int, int]:
    """Return (trained, all) parameters of a model; a 4-bit weight counts as the matrix it stands for."""
    trained = total = 0
    for parameter in model.parameters():
        state = parameter.quant_state if type(parameter).__name__ == "Params4bit" else None
        number = state.shape.numel() if state is not None else parameter.numel()
        total += number
        trained += number if parameter.requires_grad else 0
    return trained, total
