"""Child processes in Python that read requests from stdin and write answers to stdout.

Python's own process pools either fork, which is unsafe with torch's threads, or import the caller's main module again,
and outlive a parent that is killed.
"""

from __future__ import annotations

import os
import sys
from typing import BinaryIO


def command(module: str) -> list[str]:
    """Return the command that runs a module of this package as a program."""
    return [sys.executable, "-m", module]


def environment(**more: str) -> dict[str, str]:
    """Return an environment in which a child finds the same modules as this process."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part), **more}


def answers() -> BinaryIO:
    """Return, in the child, the stream for its answers; what libraries print goes to stderr instead."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return pipe
