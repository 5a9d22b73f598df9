"""Which of the ways that only a GPU has are in use: those that a training tried on it and found right; none before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_used: set[tuple[str, torch.device]] = set()
_undo: list[Callable[[], None]] = []


def use(name: str, device: torch.device, undo: Callable[[], None] | None = None) -> None:
    """Let whatever asks for a kernel on a device use it from now on; `undo` is called when nothing is used any more."""
    _used.add((name, device))
    if undo is not None:
        _undo.append(undo)


def stop() -> None:
    """Let nothing be used any more."""
    _used.clear()
    while _undo:
        _undo.pop()()


def drop(name: str, device: torch.device) -> None:
    """Let a kernel no longer be used on a device."""
    _used.discard((name, device))


@contextmanager
def for_now() -> Iterator[None]:
    """Stop at the end of a training, so that a process is left as it was found."""
    try:
        yield
    finally:
        stop()


def uses(name: str, device: torch.device) -> bool:
    """Return whether a kernel is used on a device."""
    return (name, device) in _used
