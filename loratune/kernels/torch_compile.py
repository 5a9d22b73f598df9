"""torch's compiler: imported only when something compiled is called, and used where it saves time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch

from loratune.errors import SetupError
from loratune.kernels import elementwise, norm_swiglu

LONG = 1e17  # floating-point operations of a training on a GPU from which compiling saves time: roughly ten minutes


@contextmanager
def later() -> Iterator[None]:
    """Delay what `torch.compile` does with functions until they are called.

    bitsandbytes compiles some when it is imported, and PEFT imports it wherever it is installed. That takes more than a
    second of the start, for functions that a training may never call.
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


def is_wanted(wish: str, device: str, operations: float, begun: bool | None = None, done: bool = False) -> bool:
    """Return whether a training compiles its elementwise operations.

    Args:
        wish: the recipe's `train.compile`.
        device: `cpu` or `cuda`. On a CPU it gains nothing, so `auto` never compiles there.
        operations: approximate floating-point operations of the whole training.
        begun: whether a resumed run began compiled; `auto` keeps to that, as the last digits differ.
        done: whether our own kernels replace already what would be compiled.
    """
    if wish != "auto":
        return wish == "on"
    return begun if begun is not None else device == "cuda" and operations >= LONG and not done


def install(net: Any, dtype: torch.dtype, wish: str, tell: Callable[[str], None]) -> tuple[bool, str]:
    """Compile the operations between a model's matrix products, and compare them with the plain ones.

    Args:
        net: the model, with its adapter.
        dtype: of its states.
        wish: the recipe's `train.compile`.
        tell: called with a line before something slow.

    Returns:
        Whether they are compiled now, and a note for the user.

    Raises:
        SetupError: when it was asked for and torch can't compile here, or the results differ.
    """
    needed = norm_swiglu.found(net)
    if not needed:
        return False, "nothing is compiled: its norms and activations are trained, or of unknown kinds"
    tell("compile  norms and activations: this may take a minute")
    wrong = None
    for kind, width, device in sorted(needed, key=str):
        try:
            other = elementwise.differs(kind, width, dtype, device)
            wrong = f"`{other}` gives different values" if other else None
        except Exception as error:  # of the compiler and all that it calls
            wrong = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        if wrong:
            break
    if not wrong:
        norm_swiglu.switch(net, "compiled", needed)
        return True, ""
    if wish == "on":
        hint = "use `auto` or `off`; torch's compiler needs a C++ compiler, and on a GPU the package `triton`"
        raise SetupError(f"`train.compile: on`: torch can't compile here: {wrong}", hint)
    return False, f"nothing is compiled: torch can't compile here ({wrong})"
