"""The base model: on which device, in what precision, quantized or not."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loratune import bases, cgroup, tokenizing
from loratune.errors import ModelError, SetupError
from loratune.recipe import Fp4, Int8, Model, Nf4

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


def as_begun(section: Model, dtype: str | None) -> Model:
    """Return the section with `auto` made the precision a run was begun in, or as it is where none was begun.

    `auto` looks at the device: resumed on another machine it would quietly become another training.
    """
    if dtype is None or section.dtype != "auto":
        return section
    return section.model_copy(update={"dtype": dtype})


def threads() -> int:
    """Return how many threads torch is to compute with on a CPU: those of OMP_NUM_THREADS, where that is set.

    Else no more than there are cores, or than the process is given time of: torch knows nothing of a container's limit,
    and threads that have to stop wait for one another.
    """
    now = torch.get_num_threads()
    return now if "OMP_NUM_THREADS" in os.environ else min(now, cgroup.cores())


def exact_products() -> None:
    """Have a GPU multiply as exactly as the dtype says, whatever torch does by itself.

    float32 stays float32 (TF32 keeps 10 bits of 23), and the parts of a product of half precision are added up in
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
        trust: run code that comes with the model; only ever the user's word on the command line.
        tokenizer: of this model, where it is loaded already.

    Raises:
        ModelError: when there is no such model, or it can't be loaded.
        SetupError: when a package or the device it needs is missing.
        SafetyError: when it would have to run code, or open a pickle.
    """
    where = where or device()
    dtype = dtype_of(section.dtype, where, full)
    exact_products()
    torch.set_num_threads(threads())
    folder = bases.local_folder(section)
    if tokenizer is None:
        tokenizer = tokenizing.load(section, folder, trust)
    else:
        bases.check(section, folder, trust)
    loaded = Loaded(None, tokenizer, where, dtype)
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
        raise bases.unusable(section.base, error, "model") from None


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


def count_parameters(model: Any) -> tuple[int, int]:
    """Return (trained, all) parameters of a model; a 4-bit weight counts as the matrix it stands for."""
    trained = total = 0
    for parameter in model.parameters():
        state = parameter.quant_state if type(parameter).__name__ == "Params4bit" else None
        number = state.shape.numel() if state is not None else parameter.numel()
        total += number
        trained += number if parameter.requires_grad else 0
    return trained, total
