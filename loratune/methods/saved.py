"""What a method writes to disk: the sum of its bytes, and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# dtype names of the safetensors header; only their length matters for the predicted size
_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def bytes_on_disk(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> int:
    """Return the size in bytes of the safetensors file that will hold `state` in `dtype`.

    The header is counted as well: for a small adapter it is a fair part of the file.
    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(state.items()):
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES.get(str(dtype), "F32"), "shape": list(tensor.shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + (length + 7) // 8 * 8 + end


def cast(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return contiguous CPU copies of floating tensors in `dtype` (None: as they are), each with memory of its own."""
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        for name, tensor in state.items()
    }
