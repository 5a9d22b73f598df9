"""Which of the ways that only a GPU has are in use: those that a training tried on it and found right; none before."""

from __future__ import annotations

import torch

_used: set[tuple[str, torch.device]] = set()


def use(name: str, device: torch.device) -> None:
    """Let whatever asks for a kernel on a device use it from now on."""
    _used.add((name, device))


def stop() -> None:
    """Let nothing be used any more."""
    _used.clear()


def uses(name: str, device: torch.device) -> bool:
    """Return whether a kernel is used on a device."""
    return (name, device) in _used
