"""Tensors on disk: sizes of safetensors files, and reading and copying of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.errors import ModelError, Place, Problem

if TYPE_CHECKING:
    import torch

# dtype names in a safetensors header; only their length matters for the predicted size
_NAMES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def bytes_on_disk(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> int:
    """Return the size in bytes of the safetensors file that will hold `state` in `dtype`.

    The header is included: for a small adapter it is a noticeable part of the file.
    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(state.items()):
        start, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {
            "dtype": _NAMES.get(str(dtype), "F32"),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + (length + 7) // 8 * 8 + end


def cast(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return contiguous CPU copies of floating-point tensors in `dtype` (None: unchanged), sharing no memory."""
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        for name, tensor in state.items()
    }


class Weights:
    """A base model's tensors as they are on disk, read one at a time.

    Args:
        name: local folder, or hub id of a model in the local cache.
        prefix: of the module names that some files omit, such as `model`.

    Raises:
        ModelError: when a tensor is read that does not exist.
    """

    def __init__(self, name: str, prefix: str):
        from huggingface_hub import snapshot_download
        from safetensors import safe_open

        folder = Path(name)
        if not folder.is_dir():
            folder = Path(snapshot_download(name, local_files_only=True))
        self._name, self._prefix = name, prefix
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stream:
                self._files |= dict.fromkeys(stream.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        for key in (name, name.removeprefix(f"{self._prefix}.")):
            if key in self._files:
                with safe_open(self._files[key], framework="pt") as stream:
                    tensor: torch.Tensor = stream.get_tensor(key)
                    return tensor
        raise ModelError(
            Problem(f"no tensor `{name}` in its safetensors files", Place(self._name), "use `init: default`")
        )
