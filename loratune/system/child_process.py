"""A Python process beside this one that is asked on its standard input and answers on its standard output.

Python's own process pools either fork, which is not safe beside torch's threads, or import the caller's main module
again, and outlive a parent that is killed.
"""

from __future__ import annotations

import os
import sys
from typing import BinaryIO


def command(module: str) -> list[str]:
    """Return what starts a module of this package as a program."""
    return [sys.executable, "-m", module]


def environment(**more: str) -> dict[str, str]:
    """Return the environment in which it finds the modules this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part), **more}


def answers() -> BinaryIO:
    """Return, in the child, where its answers go; what a library prints goes to standard error instead."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return pipe
