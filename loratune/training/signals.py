"""Signals: a training stops at once before its first step, and later after a checkpoint.

SIGINT is Ctrl-C. SIGTERM and SIGUSR1 come from a scheduler (Slurm: `--signal=USR1@120`). SIGHUP means that a terminal
or connection was closed; under nohup it is ignored, as intended. The exit code is 130 for SIGINT, 129 for SIGHUP and
143 for the other two, so that a job script has one code to check.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loratune.errors import Interrupted

LISTENED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
CODES = {signal.SIGINT: 130, signal.SIGHUP: 129}
# a launcher forwards what the terminal has sent to every process already: that counts as one signal, not two
SAME = 1.0  # seconds
# an exception raised in a weak reference's callback or a `__del__` is lost, and one raised while a thread is started
# leaves a thread that nobody ends, for which the process would wait: the signal is sent once more, a little later
AGAIN = 0.01  # seconds after which such a call has ended
_STARTS_A_THREAD = (threading.Thread.start.__code__, ThreadPoolExecutor.submit.__code__)


def _handled() -> tuple[signal.Signals, ...]:
    """Return the signals to handle: all, but SIGHUP only if this process was not started to ignore it."""
    return tuple(n for n in LISTENED if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN)


def exit_code(number: int) -> int:
    """Return the exit code of a run ended by a signal."""
    return CODES.get(signal.Signals(number), 143)


class Leave(KeyboardInterrupt):
    """A signal came before training began. Not an `Exception`, so that no `except Exception` catches it."""


class Asked(Exception):
    """A signal came between two micro-batches: the step in progress is abandoned."""


class Signals:
    """The signal that this process has received.

    Attributes:
        number: the first signal that came, or 0.
        training: whether a signal is only noted, for the loop to see; before that it raises `Leave` at once.
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
        """Handle a signal. A second one ends the process wherever it is."""
        if self.number:
            if time.monotonic() - self._when > SAME:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.number, self._when = number, time.monotonic()
        if not self.training:
            if _starts_a_thread(frame):
                self.again()
            else:
                raise Leave

    def again(self) -> None:
        """Send the signal again: its `Leave` was lost, or would have come at a bad moment."""
        number, self.number = self.number, 0

        def send() -> None:
            time.sleep(AGAIN)
            os.kill(os.getpid(), number)

        # not a `threading.Thread`: what was interrupted may hold the lock that starting one takes
        _thread.start_new_thread(send, ())


def _starts_a_thread(frame: FrameType | None) -> bool:
    """Return whether the code that a signal interrupted is starting a thread."""
    while frame is not None:
        if frame.f_code in _STARTS_A_THREAD:
            return True
        frame = frame.f_back
    return False


@contextmanager
def listening() -> Iterator[Signals]:
    """Handle signals; outside of the main thread, where Python allows no handlers, none arrives."""
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
    """Let a signal end the process immediately: for imports, during which an exception may get lost."""

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
    """Return the error that ends a run after a signal; `step` is the last one saved."""
    name = signal.Signals(number).name
    if not step:
        return Interrupted(f"{name}: stopped before the first step: nothing to save", exit_code(number))
    return Interrupted(
        f"{name}: stopped after step {step}, a checkpoint is saved", exit_code(number), "continue with --resume"
    )


def never() -> None:
    """Do nothing: the `poll` of a loop that must not be interrupted within a step."""


def at_any(accelerator: Any, asked: Signals) -> int:
    """Return the signal that any of the processes received, or 0: all must stop at the same step."""
    import torch

    number = asked.number
    if accelerator.num_processes > 1:
        number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
    return number
