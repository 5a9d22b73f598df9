"""What a signal does to a training: leave at once while nothing is trained yet, and after a checkpoint later on.

SIGINT is Ctrl-C, SIGTERM and SIGUSR1 are a scheduler's words (Slurm: `--signal=USR1@120`), SIGHUP is a terminal or a
connection that was closed; under nohup it is ignored, as that asks for. The exit code is 130 for SIGINT, 129 for SIGHUP
and 143 for the other two, so that a job script has one code to look for.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loratune.errors import Interrupted

LISTENED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
CODES = {signal.SIGINT: 130, signal.SIGHUP: 129}
# a launcher passes on what the terminal has sent to every process already: that is one signal, not two
SAME = 1.0  # seconds
# what is raised inside a weak reference's callback or a `__del__` never gets out of it: the signal is sent once more
AGAIN = 0.01  # seconds, by which such a callback is over


def _handled() -> tuple[signal.Signals, ...]:
    """Return the signals to listen to: all but a SIGHUP that this process was started to ignore."""
    return tuple(n for n in LISTENED if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


def exit_code(number: int) -> int:
    """Return the exit code of a run that a signal ended."""
    return CODES.get(signal.Signals(number), 143)


class Leave(KeyboardInterrupt):
    """A signal came while nothing was trained yet; no `except Exception` on the way may hold it up."""


class Asked(Exception):
    """A signal came between two micro-batches: what is at hand is to be given up."""


class Signals:
    """What has been asked of this process.

    Attributes:
        number: the first signal that came, or 0.
        training: whether one is only noted, for the loop to find; before that it leaves at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.training = False
        self._when = 0.0

    def poll(self) -> None:
        """Raise `Asked` when a signal has come."""
        if self.number:
            raise Asked

    def note(self, number: int, frame: Any) -> None:
        """Take up a signal: the handler. A second one ends the process wherever it is."""
        if self.number:
            if time.monotonic() - self._when > SAME:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.number, self._when = number, time.monotonic()
        if not self.training:
            raise Leave

    def again(self) -> None:
        """Send the signal once more, the `Leave` of which was lost."""
        number, self.number = self.number, 0
        threading.Timer(AGAIN, os.kill, (os.getpid(), number)).start()


@contextmanager
def listening() -> Iterator[Signals]:
    """Listen to signals; outside of the main thread, where Python lets nobody listen, none ever comes."""
    asked = Signals()
    before: dict[int, Any] = {}
    hook = sys.unraisablehook

    def lost(what: Any) -> None:
        if isinstance(what.exc_value, Leave):
            asked.again()
        else:
            hook(what)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, asked.note) for number in _handled()}
        sys.unraisablehook = lost
    try:
        yield asked
    finally:
        if before:
            sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def at_once() -> Iterator[None]:
    """Let a signal end the process on the spot: for imports, in the middle of which an exception may get lost."""

    def leave(number: int, frame: Any) -> None:
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        os._exit(exit_code(number))

    before = {number: signal.signal(number, leave) for number in _handled()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted(number: int, step: int) -> Interrupted:
    """Return the error that ends a run after a signal; `step` is the last one done and saved."""
    name = signal.Signals(number).name
    if not step:
        return Interrupted(f"{name}: stopped before the first step: nothing to save", exit_code(number))
    return Interrupted(
        f"{name}: stopped after step {step}, a checkpoint is saved", exit_code(number), "go on with --resume"
    )


def never() -> None:
    """Poll nothing."""


def at_any(accelerator: Any, asked: Signals) -> int:
    """Return the signal that came to any of the processes, or 0: all must stop at the same step."""
    import torch

    number = asked.number
    if accelerator.num_processes > 1:
        number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
    return number
