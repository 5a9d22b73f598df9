"""Quantized weights: how a base is quantized when loaded, and what the layers of a loaded model hold.

A base may be stored quantized already. So how a run treats quantized weights is decided by the loaded model, never by
the recipe alone.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from loratune.console import size
from loratune.errors import ModelError, Place, Problem, SetupError, listed
from loratune.kernels.layer_kinds import is_of_bitsandbytes, name_of
from loratune.models.section import Fp4, Int8, Model, Nf4

_TELL = 0.05  # fraction (0-1) of the weights that may stay unquantized without a note: norms, odd layers


def stored_as(config: Any) -> str | None:
    """Return how a model's files are quantized, by its config: nf4, fp4, int8, the name of another method, or None."""
    found = config.to_dict().get("quantization_config")
    if not found:
        return None
    if found.get("load_in_4bit"):
        return str(found.get("bnb_4bit_quant_type", "fp4"))
    return "int8" if found.get("load_in_8bit") else str(found.get("quant_method"))


def arguments(section: Model, dtype: torch.dtype, stored: str | None) -> dict[str, Any]:
    """Return the arguments for transformers to quantize the linear layers as the recipe says.

    Args:
        section: the recipe's `model`.
        dtype: the layers compute in.
        stored: how the files are quantized already, from `stored_as`.

    Raises:
        ModelError: when the files are quantized by another method than the recipe's.
        SetupError: without bitsandbytes.
    """
    wanted = section.quantization
    if wanted.type == "none" or wanted.type == stored:
        return {}
    if stored is not None:
        raise ModelError(
            Problem(
                f"`model.quantization: {wanted.type}`, but its files are already quantized as `{stored}`",
                Place(section.base),
                "leave `model.quantization` out, or use the model it was made from",
            )
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SetupError(f"`model.quantization: {wanted.type}` needs the package `bitsandbytes`")
    from transformers import BitsAndBytesConfig

    if isinstance(wanted, Int8):
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    assert isinstance(wanted, (Nf4, Fp4))
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=wanted.type,
        bnb_4bit_use_double_quant=wanted.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": four_bits}


def kind_of(model: Any) -> str:
    """Return how the layers of a loaded model are quantized: none, nf4, fp4, int8, or the name of another method."""
    for module in model.modules():
        if is_of_bitsandbytes(module, "Linear4bit"):
            return str(module.weight.quant_type)
        if is_of_bitsandbytes(module, "Linear8bitLt"):
            return "int8"
    packed = any(p.itemsize == 1 or not p.is_floating_point() for p in model.parameters())
    return (stored_as(model.config) or "low-bit") if packed else "none"


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Set the precision that 4-bit layers compute in, whatever the files say."""
    for module in model.modules():
        if is_of_bitsandbytes(module, "Linear4bit"):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def mend_on_cpu(model: Any, has_bf16: bool) -> None:
    """Work around two faults of bitsandbytes 0.50 in 4-bit layers on CPUs.

    A forward pass without gradients repacks the weights for a kernel that has no backward pass, so that training after
    an evaluation would silently stop learning: this is turned off. On CPUs with AVX512-BF16 dequantization is wrong for
    a
    layer whose inputs are no multiple of the block size.

    Args:
        model: on a CPU.
        has_bf16: whether this CPU has AVX512-BF16 or AMX.

    Raises:
        ModelError: for such a layer.
    """
    layers = {name: module for name, module in model.named_modules() if is_of_bitsandbytes(module, "Linear4bit")}
    for module in layers.values():
        module.support_avx512bf16_for_cpu = False
    wrong = [f"{name} ({m.in_features})" for name, m in layers.items() if m.in_features % m.weight.blocksize]
    if wrong and has_bf16:
        raise ModelError(
            "4-bit weights give wrong results on this CPU in layers whose inputs are not a multiple of 64: "
            + ", ".join(wrong[:4]),
            "leave `model.quantization` out, or use a GPU",
        )


def note(model: Any, kind: str, wanted: str) -> list[str]:
    """Return notes on quantized weights: that the files were quantized already, and what is not quantized.

    bitsandbytes replaces linear layers; the experts of a mixture, kept in one tensor, stay unquantized.

    Args:
        model: as it was loaded.
        kind: of its layers, from `kind_of`.
        wanted: what the recipe asks for.
    """
    if kind == "none":
        return []
    told = [] if wanted == kind else [f"the base's files hold {kind} weights: it is used unchanged"]
    whole = sum(p.numel() * p.itemsize for p in model.parameters())
    known = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    left = {
        name: p.numel() * p.itemsize
        for name, p in model.named_parameters()
        if p.itemsize > 1 and p.dim() > 1 and id(p) not in known
    }
    bytes_left = sum(left.values())
    if bytes_left > _TELL * whole:
        names = sorted({".".join(word for word in name.split(".")[-3:] if not word.isdigit()) for name in left})
        told.append(
            f"{kind} is for linear layers: {size(bytes_left)} of the model's {size(whole)} "
            f"({100 * bytes_left / whole:.0f} %) stay in {name_of(model.dtype)}: {listed(names)}"
        )
    return told


def largest_dequantized(model: Any, dtype: torch.dtype) -> int:
    """Return the bytes of the largest weight that must be dequantized for a product in `dtype`, or 0."""
    layers = (
        module
        for module in model.modules()
        if is_of_bitsandbytes(module, "Linear4bit") or is_of_bitsandbytes(module, "Linear8bitLt")
    )
    return max((module.in_features * module.out_features for module in layers), default=0) * dtype.itemsize


def dequantized(model: Any) -> Any:
    """Return a model with dequantized linear layers, as if it had never been quantized."""
    plain = model.dequantize()
    plain._weight_conversions = None  # else `save_pretrained` would try to write quantized files again
    return plain
