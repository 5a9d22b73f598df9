"""Load the base model: device, precision and quantization."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loratune.errors import SetupError
from loratune.kernels.layer_kinds import name_of
from loratune.models import base_files, quantization, tokenizing
from loratune.models.section import Model
from loratune.system import limits

_NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass
class Loaded:
    """A base model on its device, with its tokenizer and notes on how it was loaded.

    `base_differs` names how the base differs from the one its adapter was trained on, where that was allowed;
    `quantization` is that of its linear layers: none, nf4, fp4, int8, or the name of another method; `virtual_tokens`
    is how many its adapter puts before each row.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)
    base_differs: tuple[str, ...] = ()
    quantization: str = "none"
    virtual_tokens: int = 0


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means out of memory, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@contextmanager
def or_out_of_memory(hint: str) -> Iterator[None]:
    """Turn out-of-memory on a GPU or CPU into an error with a remedy; also a decorator.

    Raises:
        SetupError: when memory runs out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SetupError(f"out of memory on {device()}", hint) from None


_DROPOUT = ("attention_dropout", "dropout", "activation_dropout")  # fractions (0-1) in layers of transformers


def turn_off_dropout(model: Any) -> bool:
    """Set all dropout of a model to 0; return whether there was any."""
    found = False
    for module in model.modules():
        for name in ("p",) if isinstance(module, torch.nn.Dropout) else _DROPOUT:
            if isinstance(value := getattr(module, name, None), float) and value > 0:
                found = True
                setattr(module, name, 0.0)
    return found


def is_true(value: str) -> bool:
    """Return whether the value of an environment variable means true, as accelerate reads it."""
    return value.lower() in ("1", "true", "yes", "on", "y", "t")


def device() -> torch.device:
    """Return the device of this process: its own GPU (LOCAL_RANK under a launcher), else the CPU.

    `accelerate launch --cpu` requests the CPU with ACCELERATE_USE_CPU.
    """
    if torch.cuda.is_available() and not is_true(os.environ.get("ACCELERATE_USE_CPU", "")):
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

    For full fine-tuning `auto` is float32: with bfloat16 weights most updates would be rounded away.

    Raises:
        SetupError: for float16 without a GPU.
    """
    if name == "auto":
        return torch.bfloat16 if computes_in_bf16(where) and not full else torch.float32
    if name == "float16" and where.type == "cpu":
        raise SetupError("`model.dtype: float16` needs a GPU", "use float32 or bfloat16 on a CPU")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def precision_notes(asked: str, dtype: torch.dtype, where: torch.device, full: bool) -> list[str]:
    """Return notes on the precision a base is loaded in.

    Args:
        asked: the recipe's `model.dtype`.
        dtype: the precision it is loaded in.
        where: the device.
        full: whether every weight will be trained.
    """
    name = name_of(dtype)
    if asked == "auto" and dtype is not dtype_of("auto", where, full):
        return [f"{name}, as when the run started; here `model.dtype: auto` would choose another"]
    if computes_in_bf16(where):
        return []
    if dtype is torch.bfloat16:
        return ["bfloat16 is slow on this device (no instructions for it): `model.dtype: auto` would be float32"]
    if asked == "auto" and where.type == "cuda" and not full:
        return ["this GPU has no bfloat16 instructions, so `auto` is float32; `model.dtype: float16` halves the memory"]
    return []


def as_begun(section: Model, dtype: str | None) -> Model:
    """Return the section with `auto` replaced by the precision a resumed run began with, if there is one.

    `auto` depends on the device: a run resumed on another machine would silently change its precision.
    """
    if dtype is None or section.dtype != "auto":
        return section
    return section.model_copy(update={"dtype": dtype})


def threads() -> int:
    """Return how many threads torch should use on a CPU: OMP_NUM_THREADS, where that is set.

    Else the number of cores, or fewer where the process is limited to less CPU time. torch does not know a container's
    limit, and threads that are throttled make the others wait.
    """
    now = torch.get_num_threads()
    return now if "OMP_NUM_THREADS" in os.environ else min(now, limits.cores())


def exact_products() -> None:
    """Make a GPU multiply in the full precision of the dtype, against torch's defaults.

    float32 stays float32 (TF32 keeps 10 of 23 mantissa bits), and products of 16-bit matrices are accumulated in
    float32.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def load(
    section: Model, full: bool = False, where: torch.device | None = None, trust: bool = False, tokenizer: Any = None
) -> Loaded:  # fmt: skip
    """Load base model and tokenizer as the recipe says.

    Args:
        section: the recipe's `model`.
        full: whether every weight will be trained.
        where: the device; None for `device()`.
        trust: run code that comes with the model; set only by the user on the command line.
        tokenizer: of this model, if it is loaded already.

    Raises:
        ModelError: when there is no such model, or it can't be loaded.
        SetupError: when a package or the device it needs is missing.
        SafetyError: when it would have to run code, or open a pickle.
    """
    where = where or device()
    dtype = dtype_of(section.dtype, where, full)
    exact_products()
    torch.set_num_threads(threads())
    folder = base_files.local_folder(section)
    if tokenizer is None:
        tokenizer = tokenizing.load(section, folder, trust)
    else:
        base_files.check(section, folder, trust)
    loaded = Loaded(None, tokenizer, where, dtype)
    arguments: dict[str, Any] = {}
    if section.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise SetupError("`model.attention: flash_attention_2` needs the package `flash-attn`", "use `auto`")
    if section.attention != "auto":
        arguments["attn_implementation"] = section.attention
    config = _config(section, folder, trust)
    stored = quantization.stored_as(config)
    arguments |= quantization.arguments(section, dtype, stored)
    if stored or section.quantization.type != "none":
        arguments["device_map"] = {"": str(where)}
    model = _from_pretrained(section, folder, config, dtype, arguments, trust)
    if "device_map" not in arguments:
        model.to(where)
    loaded.quantization = quantization.kind_of(model)
    quantization.compute_in(model, dtype)
    if where.type == "cpu":
        quantization.mend_on_cpu(model, computes_in_bf16(where))
    loaded.notes += quantization.note(model, loaded.quantization, section.quantization.type)
    model.config.use_cache = False
    loaded.model = model
    return loaded


def _config(section: Model, folder: str, trust: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, revision=section.revision, trust_remote_code=trust)
    except Exception as error:  # foreign files can fail in any way
        raise base_files.unusable(section.base, error, "model") from None


def _from_pretrained(
    section: Model, folder: str, config: Any, dtype: torch.dtype, arguments: dict[str, Any], trust: bool
) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, revision=section.revision, dtype=dtype, use_safetensors=True,
            trust_remote_code=trust, low_cpu_mem_usage=True, **arguments,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise base_files.unusable(section.base, error, "model") from None


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the numbers of (trained, all) parameters of a model; a 4-bit weight counts as its full matrix."""
    trained = total = 0
    for parameter in model.parameters():
        state = parameter.quant_state if type(parameter).__name__ == "Params4bit" else None
        number = state.shape.numel() if state is not None else parameter.numel()
        total += number
        trained += number if parameter.requires_grad else 0
    return trained, total
