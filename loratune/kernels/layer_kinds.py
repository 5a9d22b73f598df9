"""What a layer is: of bitsandbytes or plain, and the precision it computes in, by its name, too."""

from __future__ import annotations

from typing import Any

import torch


def is_of_bitsandbytes(layer: Any, name: str) -> bool:
    """Return whether a layer is bitsandbytes' of a name, without importing bitsandbytes for models that have none."""
    kind = type(layer)
    return kind.__name__ == name and kind.__module__.startswith("bitsandbytes.")


def precision(layer: Any) -> torch.dtype:
    """Return the precision a linear layer computes in, adapted or not; weights of 4 bits don't show it."""
    base = getattr(layer, "base_layer", layer)
    found: torch.dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
    return found


def name_of(dtype: torch.dtype) -> str:
    """Return a precision as recipes, configs and messages name it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
