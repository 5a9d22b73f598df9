"""How a training goes: the live view or plain lines, and metrics.jsonl."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from loratune.console import Report, duration, size
from loratune.errors import Place, Problem, StorageError
from loratune.redact import redact
from loratune.system import files, storage
from loratune.training.loop import Step

METRICS = 1 << 30  # bytes of metrics.jsonl: millions of steps


def memory() -> int:
    """Return the peak memory of this process in bytes: of the GPU where there is one, else resident."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class RunReport(Report):
    """Prints how a training goes and records it; silent on processes other than the first.

    Args:
        active: whether this process prints and writes.
        metrics: the file that gets one JSON object per step and per evaluation; None for none.
    """

    def __init__(self, active: bool = True, metrics: Path | None = None):
        super().__init__(active)
        self.train: list[tuple[float, float]] = []
        self.evaluation: list[tuple[float, float]] = []
        self._metrics = metrics
        self._view: Live | None = None
        self._bar: Progress | None = None
        self._seconds = self._tokens = 0.0
        self._every = 1
        self._steps = 0

    @contextmanager
    def training(self, done: int, steps: int, every: int) -> Iterator[None]:
        """Show the run from step `done` to `steps`, a plain line every `every` steps off a terminal."""
        self._steps, self._every = steps, every
        if not self.live:
            yield
            return
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps,"), TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
        )  # fmt: skip
        self._bar.add_task("steps", total=steps, completed=done)
        with Live(self._bar, console=self.console, refresh_per_second=4) as self._view:
            yield
        self._view = None

    def step(self, step: Step) -> None:
        """Record a step and show it."""
        self.train.append((step.number, step.loss))
        self._seconds += step.seconds
        self._tokens += step.tokens
        self._write({"kind": "step", **step.__dict__, "memory": memory()})
        if self._bar is not None and self._view is not None:
            self._bar.update(self._bar.task_ids[0], completed=step.number)
            self._view.update(Group(self._table(step), self._bar))
        elif step.number % self._every == 0 or step.number == self._steps:
            self.note(self._line(step))

    def evaluated(self, step: int, loss: float, count: int, best: bool, seconds: float) -> None:
        """Record an evaluation and show it."""
        self.evaluation.append((step, loss))
        self._write({"kind": "eval", "number": step, "loss": loss, "trained_tokens": count, "seconds": seconds})
        self.note(f"step {step}: eval loss {loss:.4f}{' (best so far)' if best else ''}")

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all steps, padding, evaluation and saving not counted."""
        return self._tokens / max(self._seconds, 1e-9)

    @property
    def seconds(self) -> float:
        """Seconds spent in steps."""
        return self._seconds

    def _line(self, step: Step) -> str:
        left = self._seconds / max(len(self.train), 1) * (self._steps - step.number)
        return (
            f"step {step.number}/{self._steps}  epoch {step.epoch:.2f}  loss {step.loss:.4f}  lr {step.lr:.2e}  "
            f"grad norm {step.grad_norm:.2f}  {step.tokens / step.seconds:,.0f} tokens/s  "
            f"{step.trained_tokens / step.seconds:,.0f} label tokens/s  {size(memory())}  {duration(left)} left"
        )

    def _table(self, step: Step) -> Table:
        """Return what the live view shows of a step: nothing in it is the same throughout a run."""
        table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
        finite = [(loss, number) for number, loss in self.evaluation if math.isfinite(loss)]
        latest = f"{self.evaluation[-1][1]:.4f}" if self.evaluation else "not yet"
        best = f"{min(finite)[0]:.4f}, step {min(finite)[1]:.0f}" if finite else "not yet"
        table.add_row(
            "loss", Text(f"{step.loss:.4f}", style="bold"), "eval loss", Text(latest, style="bold"), "best", best
        )
        table.add_row("lr", f"{step.lr:.2e}", "grad norm", f"{step.grad_norm:.2f}", "epoch", f"{step.epoch:.2f}")
        table.add_row(
            "tokens/s", f"{step.tokens / step.seconds:,.0f}",
            "label tokens/s", f"{step.trained_tokens / step.seconds:,.0f}", "step time", f"{step.seconds:.2f} s",
        )  # fmt: skip
        table.add_row("memory", size(memory()))
        return table

    def _write(self, event: dict[str, Any]) -> None:
        if not self.active or self._metrics is None:
            return
        try:
            with self._metrics.open("a", encoding="utf-8") as stream:
                stream.write(redact(json.dumps(event)) + "\n")
        except OSError as error:
            raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(self._metrics)))) from None

    def go_on_from(self, step: int, evaluated: bool = True) -> None:
        """Take up the metrics of a run that is resumed after `step`; later ones are cut off.

        Args:
            step: the last one done.
            evaluated: whether the evaluation after it is done as well.

        Raises:
            StorageError: when the file with them can't be read.
        """
        if self._metrics is None:
            return
        if not self._metrics.exists():
            if self.active:
                self._metrics.unlink(missing_ok=True)  # a link to nowhere
            return
        last = {"step": step, "eval": step if evaluated else step - 1}
        try:
            text = files.read(self._metrics, METRICS).decode("utf-8", errors="replace")
        except OSError as error:
            raise StorageError(Problem(f"can't be read: {error.strerror}", Place(str(self._metrics)))) from None
        events = map(_event, text.splitlines())
        kept = [event for event in events if event and event["number"] <= last[event["kind"]]]
        for event in kept:
            (self.train if event["kind"] == "step" else self.evaluation).append((event["number"], event["loss"]))
            if event["kind"] == "step":
                self._seconds += event["seconds"]
                self._tokens += event["tokens"]
        if self.active:
            storage.write_text(self._metrics, "".join(json.dumps(event) + "\n" for event in kept))


def _event(line: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, or None for one that a kill or the power has cut."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kind = event.get("kind") if isinstance(event, dict) else None
    needed = {"step": ("number", "loss", "seconds", "tokens"), "eval": ("number", "loss")}.get(str(kind), ())
    return event if needed and all(type(event.get(name)) in (int, float) for name in needed) else None
