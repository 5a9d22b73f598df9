"""A base with its trained parameters: the interface between a method and the training loop and checkpoints."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.methods import tensor_files
from loratune.methods.adapter_files import TENSORS

if TYPE_CHECKING:
    import torch

    from loratune.models.policy import Policy


@dataclass(frozen=True)
class Setup:
    """What a method may know of the training when it is applied to a base.

    Attributes:
        steps: optimizer steps of the whole run.
        tokenizer: of the base, with the recipe's chat template.
        batches: returns some batches of the training rows, padded, with labels.
        revision: of the base, written into an adapter.
    """

    steps: int
    tokenizer: Any = None
    batches: Callable[[], Iterable[Mapping[str, Any]]] = list
    revision: str | None = None


class Tuned:
    """A base with its trained parameters; methods subclass it.

    Attributes:
        net: the model.
        virtual_tokens: before each row in the model's output.
        off_is_start: whether `off` restores the model before step 1.
    """

    virtual_tokens: int = 0
    off_is_start: bool = False

    def __init__(self, net: Any):
        self.net = net

    @contextmanager
    def off(self) -> Iterator[None]:
        """Turn off the trained parameters: run the base alone."""
        raise NotImplementedError(f"{type(self).__name__} can't be switched off")
        yield

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of the forward and backward passes of a step, in which no weight changes."""
        yield

    def penalty(self) -> torch.Tensor | None:
        """Return a term added once to the loss of a step, shape (), or None; the printed loss is without it."""
        return None

    def after_step(self, step: int) -> None:
        """Called after each optimizer step (from 1), before gradients are set to None."""

    def state(self, final: bool = False) -> dict[str, torch.Tensor]:
        """Return the tensors that `save` writes."""
        raise NotImplementedError

    def save(self, folder: Path, dtype: torch.dtype | None = None, final: bool = False) -> None:
        """Write the trained parameters in the format of other programs.

        Args:
            folder: where to write; created if missing.
            dtype: of the tensors on disk; None keeps the precision of the training.
            final: whether this is the result of the run; else a checkpoint for `load`.
        """
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Restore the parameters of a checkpoint.

        Raises:
            ValueError: when it is of another method or model.
        """
        raise NotImplementedError

    def policy(self, net: Any = None) -> Policy:
        """Return the model as objectives use it; `net` is the model in a DDP wrapper."""
        from loratune.models.policy import Policy

        return Policy(self.net if net is None else net, self.off if self.off_is_start else None, self.virtual_tokens)


class Adapter(Tuned):
    """A PEFT model; only its adapter is saved, under PEFT's names.

    Args:
        net: the PeftModel.
        off_is_start: see `Tuned`.
    """

    def __init__(self, net: Any, off_is_start: bool = True):
        super().__init__(net)
        self.off_is_start = off_is_start

    @contextmanager
    def off(self) -> Iterator[None]:
        """Run the base alone."""
        with self.net.disable_adapter():
            yield

    def state(self, final: bool = False) -> dict[str, torch.Tensor]:
        """Return the tensors that `save` writes, under PEFT's names."""
        from peft import get_peft_model_state_dict

        state: dict[str, torch.Tensor] = get_peft_model_state_dict(self.net, save_embedding_layers=False)
        return state

    def config(self, final: bool) -> Any:
        """Return PEFT's configuration as it is to be written."""
        return copy.deepcopy(self.net.peft_config["default"])

    def save(self, folder: Path, dtype: torch.dtype | None = None, final: bool = False) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors; see `Tuned.save`."""
        from safetensors.torch import save_file

        config, state = self.config(final), self.state(final)
        config.inference_mode = True
        if os.path.isabs(config.base_model_name_or_path or ""):
            config.base_model_name_or_path = None  # a path on this machine
        for name in ("target_modules", "exclude_modules"):  # the order of a set differs between processes
            value = config.to_dict().get(name)
            if isinstance(value, set):
                setattr(config, name, sorted(value))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensor_files.cast(state, dtype), folder / TENSORS, metadata={"format": "pt"})
        config.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Restore tensors saved by `save` (in the precision of the training).

        Raises:
            ValueError: when they are of another adapter.
        """
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        state = load_file(folder / TENSORS)
        other = state.keys() ^ self.state().keys()  # PEFT ignores them
        if other:
            raise ValueError(f"`{min(other)}` is not in both checkpoint and model")
        set_peft_model_state_dict(self.net, state)
