"""torch's compiler, imported when something compiled is called and not before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch


@contextmanager
def later() -> Iterator[None]:
    """Put off what `torch.compile` does with functions until they are called.

    bitsandbytes compiles some as it is imported, and PEFT imports it wherever it is installed: more than a second of a
    start, for functions that a training may never call.
    """
    compile_now = torch.compile
    torch.compile = partial(_later, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _later(compile_now: Callable[..., Any], function: Any = None, **settings: Any) -> Any:
    if function is None:
        return partial(_later, compile_now, **settings)
    if isinstance(function, torch.nn.Module):
        return compile_now(function, **settings)
    compiled: list[Callable[..., Any]] = []

    @wraps(function)
    def first(*args: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(compile_now(function, **settings))
        return compiled[0](*args, **named)

    return first
