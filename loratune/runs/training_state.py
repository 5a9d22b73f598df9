"""What a run needs besides its weights to resume bit for bit: the states of optimizer and random generators.

Nothing here is a pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from loratune.errors import TrainingError
from loratune.optim import adamw


def save_optimizer(optimizer: Any, folder: Path) -> None:
    """Write an optimizer's state: tensors to safetensors, the rest and its structure to JSON.

    Raises:
        TrainingError: when a number in it is not finite.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain = _without_tensors(optimizer.state_dict(), "", tensors)
    check_finite(tensors, "the optimizer's state")
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(plain), encoding="utf-8")


def check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """Check that all numbers to be saved are finite.

    Raises:
        TrainingError: naming the first tensor with a number that is not finite.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if floating and not bool(torch.stack([t.isfinite().all().cpu() for t in floating.values()]).all()):
        bad = next(name for name, tensor in floating.items() if not bool(tensor.isfinite().all()))
        raise TrainingError(
            f"{what} is not finite (`{bad}`): nothing was saved", "lower optimizer.lr, or set model.dtype: float32"
        )


def load_optimizer(optimizer: Any, folder: Path) -> None:
    """Restore moments and step counts; learning rates and other options stay those of the recipe.

    Raises:
        ValueError: when they are of another optimizer.
    """
    tensors = load_file(folder / "optimizer.safetensors")
    state = _with_tensors(json.loads((folder / "optimizer.json").read_text(encoding="utf-8")), tensors)
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if [group.keys() - {"params"} for group in state["param_groups"]] != [group.keys() for group in options]:
        raise ValueError("its optimizer is different")
    optimizer.load_state_dict(state)
    if adamw.is_paged(optimizer):
        adamw.page(optimizer)
    for group, wanted in zip(optimizer.param_groups, options, strict=True):
        group.update(wanted)


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return nested state as JSON, moving its tensors to `tensors` under their path; int keys and tuples are marked."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, _without_tensors(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_without_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    return value


def _with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _with_tensors(item, tensors) for key, item in content}
    items = [_with_tensors(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


@dataclass(frozen=True)
class Randomness:
    """The state of every random generator: cheap to copy after each step, converted to JSON only on a save.

    `cuda` is that of this process's own device, or None; other processes have their own.
    """

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        version, words, gauss = self.python
        _, keys, position, has_gauss, cached = self.numpy
        return {
            "python": [version, list(words), gauss],
            "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
            "torch": self.cpu.numpy().tobytes().hex(),
            "cuda": [self.cuda.numpy().tobytes().hex()] if self.cuda is not None else [],
        }


def randomness() -> Randomness:
    """Return the state of every random generator."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return Randomness(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)


def drawn() -> tuple[bytes, ...]:
    """Return the states of torch's generators only: unchanged as long as nothing is drawn on CPU and GPU."""
    now = randomness()
    return tuple(one.numpy().tobytes() for one in (now.cpu, now.cuda) if one is not None)


def set_random_state(state: dict[str, Any]) -> None:
    """Restore every random generator from a state of `Randomness.as_json`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        devices = state["cuda"]  # one; or all that an older version saved, of which there may be fewer now
        torch.cuda.set_rng_state(_bytes(devices[torch.cuda.current_device() % len(devices)]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
