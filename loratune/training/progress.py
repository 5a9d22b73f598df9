"""Progress of a training: its figures, and metrics.jsonl."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune.errors import Place, Problem, StorageError
from loratune.events import Begun, Evaluated, Event, Listener, Report, Step, StepDone
from loratune.redact import redact
from loratune.system import files, storage
from loratune.training.watcher import Watcher

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
    """Record the events of a training and pass them on; on processes other than the first nothing is passed or written.

    Args:
        hear: called with each event; None: lines go to Python's logging.
        active: whether this process passes events on and writes.
        metrics: the file that gets one JSON object per step and per evaluation; None for none.
        watcher: told of the figures of each step, for its notes.

    Attributes:
        train: step and loss of each step, in nats per label token.
        evaluation: step and eval loss of each evaluation, in the same unit.
        figures: the objective's figures of each evaluation, by step.
        seconds: spent in steps.
    """

    def __init__(
        self, hear: Listener | None = None, active: bool = True, metrics: Path | None = None,
        watcher: Watcher | None = None,
    ):  # fmt: skip
        super().__init__(hear, active)
        self.figures: dict[int, Mapping[str, Any]] = {}
        self._watcher = watcher or Watcher({})
        self.train: list[tuple[int, float]] = []
        self.evaluation: list[tuple[int, float]] = []
        self.seconds = 0.0
        self._metrics = metrics
        self._tokens = 0.0
        self._steps = 0  # of the whole run

    def tell(self, event: Event) -> None:
        """Record an event, then pass it on."""
        if isinstance(event, Begun):
            self._steps = event.steps
        elif isinstance(event, StepDone):
            self._count(event.number, event.loss, event.seconds, event.tokens)
            self._write({"kind": "step", **_without(event, "steps"), **event.metrics})
        elif isinstance(event, Evaluated):
            self.evaluation.append((event.number, event.loss))
            self.figures[event.number] = event.metrics
            self._write({"kind": "eval", **_without(event, "best"), **event.metrics})
        super().tell(event)
        if isinstance(event, StepDone):
            for line in self._watcher.see(event.number, event.metrics):
                self.note(line)

    def step(self, step: Step) -> None:
        """Report that a step is done."""
        self.tell(StepDone(steps=self._steps, memory=memory(), **step.__dict__))

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all steps, without padding and without the time of evaluation and saving."""
        return self._tokens / max(self.seconds, 1e-9)

    def _count(self, number: int, loss: float, seconds: float, tokens: float) -> None:
        self.train.append((number, loss))
        self.seconds += seconds
        self._tokens += tokens

    def _write(self, event: dict[str, Any]) -> None:
        if not self.active or self._metrics is None:
            return
        try:
            with self._metrics.open("a", encoding="utf-8") as stream:
                stream.write(redact(json.dumps(event)) + "\n")
        except OSError as error:
            raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(self._metrics)))) from None

    def go_on_from(self, step: int, evaluated: bool = True) -> None:
        """Continue the metrics of a run that is resumed after `step`; later lines are removed.

        Args:
            step: the last one done.
            evaluated: whether the evaluation after it is also done.

        Raises:
            StorageError: when the file with them can't be read.
        """
        if self._metrics is None:
            return
        if not self._metrics.exists():
            if self.active:
                self._metrics.unlink(missing_ok=True)  # a dangling link
            return
        last = {"step": step, "eval": step if evaluated else step - 1}
        try:
            text = files.read(self._metrics, METRICS).decode("utf-8", errors="replace")
        except OSError as error:
            raise StorageError(Problem(f"can't be read: {error.strerror}", Place(str(self._metrics)))) from None
        events = map(_event, text.splitlines())
        kept = [event for event in events if event and event["number"] <= last[event["kind"]]]
        for event in kept:
            if event["kind"] == "step":
                self._count(event["number"], event["loss"], event["seconds"], event["tokens"])
                self._watcher.see(event["number"], event)  # told then
            else:
                self.figures[event["number"]] = event
                self.evaluation.append((event["number"], event["loss"]))
        if self.active:
            storage.write_text(self._metrics, "".join(json.dumps(event) + "\n" for event in kept))


def _without(event: StepDone | Evaluated, name: str) -> dict[str, Any]:
    """Return the fields of an event except one and its metrics."""
    return {key: value for key, value in event.__dict__.items() if key not in (name, "metrics")}


def _event(line: str) -> dict[str, Any] | None:
    """Return the object of a line of metrics.jsonl, or None for a line cut off by a kill or a power failure."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kind = event.get("kind") if isinstance(event, dict) else None
    needed = {"step": ("number", "loss", "seconds", "tokens"), "eval": ("number", "loss")}.get(str(kind), ())
    return event if needed and all(type(event.get(name)) in (int, float) for name in needed) else None
