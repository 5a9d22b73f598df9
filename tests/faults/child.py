"""A training in a process of its own that can be killed or starved: forked from a server that has imported torch once.

What goes wrong is planned by the test and done here, in the child: it wraps the functions by which files are written,
counts the calls that concern the run folder, and at one of them dies, or fails as a broken disk would.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.faults.warm", "tests.faults.child"])


@dataclass
class Plan:
    """What is to happen to a run.

    Attributes:
        folder: the run folder; calls elsewhere are not counted.
        kill_at: number (from 1) of the call at which the process dies.
        fail_at: number of the call that fails.
        error: errno of a call that fails.
        lasting: whether all calls from there on fail, too.
        trace: file that gets the name and path of each call.
        slow: seconds each write of a checkpoint takes longer.
        hook: name of a function of this module, called before the run.
    """

    folder: str = ""
    kill_at: int = 0
    fail_at: int = 0
    error: int = errno.EIO
    lasting: bool = False
    trace: str = ""
    slow: float = 0.0
    hook: str = ""


@dataclass
class Done:
    """How a run ended: its exit code (negative: killed by that signal), what it printed, and how long it took."""

    code: int
    told: str
    seconds: float


class Child:
    """A run that is going on."""

    def __init__(self, recipe: Path, *flags: str, plan: Plan | None = None):
        self.log = recipe.parent / f"told-{time.monotonic_ns()}.txt"
        self.began = time.monotonic()
        self.process = _SERVER.Process(
            target=_main, args=(["train", str(recipe), *flags], plan or Plan(), str(self.log), dict(os.environ))
        )
        self.process.start()

    def send(self, number: int) -> None:
        """Send a signal, where the process still lives."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, number)

    def wait(self, timeout: float = 300) -> Done:
        """Wait for the end of the run."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s:\n{self.told()}"
        return Done(self.process.exitcode, self.told(), time.monotonic() - self.began)

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def run(recipe: Path, *flags: str, plan: Plan | None = None) -> Done:
    """Run a recipe to its end."""
    return Child(recipe, *flags, plan=plan).wait()


def _main(arguments: list[str], plan: Plan, log: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import torch

    from loratune import cli

    torch.set_num_threads(1)
    if plan.folder:
        _Wrapped(plan).install()
    if plan.hook:
        globals()[plan.hook]()
    sys.argv = ["loratune", *arguments]
    began = time.monotonic()
    try:
        cli.main()
    except SystemExit as left:
        if left.code == 6:
            print(f"refused in {time.monotonic() - began:.3f} s")
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class _Wrapped:
    """The functions by which files are written, counted."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.count = 0
        self.trace = os.open(plan.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if plan.trace else None

    def at(self, name: str, path: Any) -> None:
        """Count one call; die or fail if it is its turn."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        if not str(path).startswith(self.plan.folder):
            return
        self.count += 1
        if self.trace is not None:
            os.write(self.trace, (json.dumps([name, str(path)]) + "\n").encode())
        if self.count == self.plan.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count == self.plan.fail_at or (self.plan.lasting and 0 < self.plan.fail_at <= self.count):
            raise OSError(self.plan.error, os.strerror(self.plan.error), str(path))

    def install(self) -> None:
        import safetensors.torch

        def wrap(owner: Any, name: str, which: int = 0) -> None:
            true: Callable[..., Any] = getattr(owner, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                self.at(name, args[which])
                return true(*args, **kwargs)

            setattr(owner, name, call)

        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir"):
            wrap(os, name)
        true_serialize = safetensors.torch.serialize_file

        def serialize(tensors: Any, path: Any, metadata: Any = None) -> None:
            time.sleep(self.plan.slow)
            self.at("write", path)
            true_serialize(tensors, path, metadata=metadata)

        safetensors.torch.serialize_file = serialize
        true_open = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set("wax+") & set(mode):
                return true_open(file, mode, *args, **kwargs)
            self.at("open", file)
            return _File(true_open(file, mode, *args, **kwargs), self, file)

        io.open = builtins.open = opened


class _File:
    """A file whose writes are counted, and cut in half where the process dies in one."""

    def __init__(self, file: Any, wrapped: _Wrapped, path: Any):
        self._file, self._wrapped, self._path = file, wrapped, path

    def write(self, text: Any) -> int:
        half = len(text) // 2
        self._file.write(text[:half])
        self._file.flush()
        self._wrapped.at("write", self._path)
        return half + int(self._file.write(text[half:]))

    def __enter__(self) -> _File:
        self._file.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.__exit__(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def slow_steps() -> None:
    """Make each micro-batch take a tenth of a second."""
    from loratune.objectives import Sft

    total = Sft.total

    def slowly(self: Any, model: Any, batch: Any) -> Any:
        time.sleep(0.1)
        return total(self, model, batch)

    Sft.total = slowly  # type: ignore[method-assign]


def no_memory() -> None:
    """Let memory run out in the third step, as the kernel says it."""
    import resource

    import torch

    from loratune.training.progress import RunReport

    record = RunReport.step

    def full(self: Any, step: Any) -> None:
        record(self, step)
        if step.number == 3:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
            torch.empty(1 << 30, dtype=torch.uint8)

    RunReport.step = full  # type: ignore[method-assign]


def blind_to_space() -> None:
    """Let the disk look endless, as under a quota that nobody can ask for."""
    from loratune.system import storage

    storage.check_space = lambda *_: None  # type: ignore[assignment]


def small_files() -> None:
    """Let no file grow beyond 20 kB."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
