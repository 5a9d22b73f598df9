"""Events of a call, for the terminal, metrics.jsonl and callers of the Python API.

The working code calls methods of a `Report`, which passes on an event for each call. The command line's listener prints
them (`console.Terminal`). From Python `on_event` gets them; without one, lines go to Python's logging under the name
`loratune`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from loratune.redact import redact


@dataclass(frozen=True)
class Told:
    """A line of text: what is done, how, or a warning.

    Attributes:
        text: the line, without secrets.
        problem: whether it is a warning.
        label: one word before the text, such as `batches` in the start report; empty for a continuation of the label
            above, None for a line without a label.
    """

    text: str
    problem: bool = False
    label: str | None = None

    @property
    def line(self) -> str:
        """The label, in nine columns, and the text."""
        return self.text if self.label is None else f"{self.label:9}{self.text}"


@dataclass(frozen=True)
class Counted:
    """Progress of long work without steps, such as reading rows; sent often.

    Attributes:
        what: description of the work.
        count: number done.
        share: fraction (0-1) that is done, or None if unknown.
        seconds: since it began.
        over: whether it has ended; `count` is final then.
    """

    what: str
    count: int
    share: float | None
    seconds: float
    over: bool = False


@dataclass(frozen=True)
class Begun:
    """The steps of a training begin.

    Attributes:
        number: steps done before, in a run that is resumed; else 0.
        steps: of the whole run.
        every: steps between two printed lines (`train.log_every`).
        evaluations: step and eval loss, in nats per label token, of earlier evaluations of a resumed run.
        shown: names of the metrics that are shown with the loss.
        metric: what the best evaluation is the best by: `loss`, or the name of a metric.
        best: step and value of the best evaluation of a resumed run so far, or None.
    """

    number: int
    steps: int
    every: int
    evaluations: tuple[tuple[int, float], ...] = ()
    shown: tuple[str, ...] = ()
    metric: str = "loss"
    best: tuple[int, float] | None = None


@dataclass(frozen=True)
class Step:
    """What the training loop knows of an optimizer step; each field is described at `StepDone`."""

    number: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    rows: int
    tokens: int
    trained_tokens: int
    computed: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepDone(Step):
    """An optimizer step is done, over all processes; these fields are in `metrics.jsonl`.

    Attributes:
        number: of the step, from 1.
        steps: of the whole run.
        epoch: epochs done so far, with fraction.
        loss: before the step, in nats per label token (`dpo`: per pair).
        grad_norm: L2 norm of the gradient before clipping.
        lr: learning rate of the first parameter group.
        rows: in this step.
        tokens: in this step, without padding.
        trained_tokens: in this step, those with a label; 0 where rows are scored, and have no label tokens.
        computed: tokens that went through the model: with padding, a shared prefix counted once.
        seconds: from the first micro-batch to the end of the optimizer's step.
        memory: peak memory of this process in bytes, of the GPU where there is one.
        metrics: other means of the objective, by name, such as `accuracy` of `dpo`.
    """

    steps: int = field(kw_only=True)
    memory: int = field(kw_only=True)


@dataclass(frozen=True)
class Evaluated:
    """The eval loss was measured.

    Attributes:
        number: of the step it was measured after.
        loss: in nats per label token (`dpo`: per pair).
        trained_tokens: it is the mean of (`dpo`: pairs).
        best: whether it is the best so far, by `train.best_metric`.
        seconds: it took.
        metrics: other means of the objective, by name, as in `StepDone`.
    """

    number: int
    loss: float
    trained_tokens: int
    best: bool
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint is on the disk.

    Attributes:
        number: of the step it was saved after.
        folder: of the checkpoint.
    """

    number: int
    folder: Path


@dataclass(frozen=True)
class Answered:
    """A piece of an answer, sent while it is generated.

    Attributes:
        text: the piece; a line end comes after the last one.
    """

    text: str


@dataclass(frozen=True)
class Ended:
    """A training is complete, and all its files are on the disk.

    Attributes:
        folder: the run folder.
        steps: number of steps.
        seconds: spent in steps.
        tokens_per_second: over all steps; padding, evaluation and saving are not counted.
        product: what was saved, `adapter` or `model`.
        size: of that, in bytes.
    """

    folder: Path
    steps: int
    seconds: float
    tokens_per_second: float
    product: str
    size: int


Event = Told | Counted | Begun | StepDone | Evaluated | Saved | Answered | Ended
Listener = Callable[[Event], None]
Progress = Callable[..., None]  # called with the number so far and, if known, the fraction (0-1) that is done


def log(event: Event) -> None:
    """Pass lines to Python's logging, the default listener; problems become warnings."""
    if isinstance(event, Told) and event.text:
        logging.getLogger("loratune").log(logging.WARNING if event.problem else logging.INFO, "%s", event.line)


class Report:
    """Pass events to a listener; silent on processes other than the first.

    Args:
        hear: called with each event; None: `log`.
        active: whether this process reports anything.

    Attributes:
        raised: the exception of the listener, or None. After one it is not called again.
    """

    def __init__(self, hear: Listener | None = None, active: bool = True):
        self.active = active
        self.raised: BaseException | None = None
        self._hear = hear or log

    def tell(self, event: Event) -> None:
        """Pass an event on. An exception of the listener is raised unchanged."""
        if not self.active or self.raised is not None:
            return
        try:
            self._hear(event)
        except BaseException as error:
            self.raised = error
            raise

    def hear_again(self) -> None:
        """Call the listener again after an interrupt, which may have occurred inside of it."""
        self.raised = None

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raise the listener's own exception at the end of a call, even if other code has replaced it."""
        try:
            yield
        except BaseException as error:
            if self.raised is None or error is self.raised:
                raise
        if self.raised is not None:
            raise self.raised

    def note(self, line: str) -> None:
        """Report a line."""
        self.tell(Told(redact(line)))

    def problem(self, line: str) -> None:
        """Report a warning."""
        self.tell(Told(redact(line), problem=True))

    def field(self, label: str, text: str, problem: bool = False) -> None:
        """Report a labelled text.

        Args:
            label: one word, or empty for a continuation of the label above.
            text: after the label.
            problem: whether it is a warning.
        """
        self.tell(Told(redact(text), problem, label))

    @contextmanager
    def counting(self, what: str) -> Iterator[Progress]:
        """Report how many of something are done.

        Yields the function to call with the number so far and, if known, the fraction (0-1) that is done.
        """
        began, last = time.perf_counter(), Counted(what, 0, None, 0.0)

        def done(count: int, share: float | None = None) -> None:
            nonlocal last
            last = Counted(what, count, share, time.perf_counter() - began)
            self.tell(last)

        try:
            yield done
        finally:
            self.tell(Counted(what, last.count, last.share, time.perf_counter() - began, over=True))
