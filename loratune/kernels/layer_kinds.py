"""Whether a layer is one of bitsandbytes, the precision it computes in, and names of precisions."""

from __future__ import annotations

from typing import Any

import torch


def is_of_bitsandbytes(layer: Any, name: str) -> bool:
    """Return whether a layer is of a class of bitsandbytes, without importing it for models that don't use it."""
    kind = type(layer)
    return kind.__name__ == name and kind.__module__.startswith("bitsandbytes.")


def precision(layer: Any) -> torch.dtype:
    """Return the precision a linear layer computes in, with LoRA or without; the dtype of 4-bit weights is another."""
    base = getattr(layer, "base_layer", layer)
    found: torch.dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
    return found


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a precision in recipes, configs and messages: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
