"""Which GPU kernels are in use: those that passed the self-test of a training; none before that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_used: set[tuple[str, torch.device]] = set()
_undo: list[Callable[[], None]] = []


def use(name: str, device: torch.device, undo: Callable[[], None] | None = None) -> None:
    """Turn on a kernel on a device; `undo` is called when all are turned off."""
    _used.add((name, device))
    if undo is not None:
        _undo.append(undo)


def stop() -> None:
    """Turn off all kernels."""
    _used.clear()
    while _undo:
        _undo.pop()()


def drop(name: str, device: torch.device) -> None:
    """Turn off a kernel on a device."""
    _used.discard((name, device))


@contextmanager
def for_now() -> Iterator[None]:
    """Turn off all kernels at the end of a training, so that the process is left as it was."""
    try:
        yield
    finally:
        stop()


def uses(name: str, device: torch.device) -> bool:
    """Return whether a kernel is used on a device."""
    return (name, device) in _used
