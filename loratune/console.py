"""Terminal output: messages, progress and tables, formatted sizes and times.

Messages go to stderr, stdout is left to results. Secrets are redacted.
"""

from __future__ import annotations

import os
import sys
import textwrap
import unicodedata
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from loratune.events import Answered, Begun, Counted, Ended, Evaluated, Event, Saved, StepDone, Told
from loratune.redact import redact

LABEL = 9  # columns of a label
NARROW = 60  # terminal columns below which each figure has its own line
QUIET = 15  # seconds between two lines about long work without a terminal


def duration(seconds: float) -> str:
    """Format a time: `48 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Format a number of bytes: `84.0 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


class View:
    """Lines at the end of a terminal that are drawn over and over.

    Where the terminal has become narrower than a line meanwhile, it has wrapped it: lines are erased by the rows that
    they take now, so that a resize leaves no pieces behind. A terminal that cuts lines off instead loses a few above.

    Args:
        console: to draw on.
    """

    def __init__(self, console: Console):
        self._console = console
        self._shown: RenderableType | None = None
        self._widths: list[int] = []  # columns of each line that is there

    def draw(self, shown: RenderableType) -> None:
        """Show something in the place of what is there."""
        with self._console.capture() as captured:
            self._console.print(shown, soft_wrap=False, overflow="crop", crop=True)
        text = captured.get().rstrip("\n")
        self._write(self._erasing() + text)
        self._shown = shown
        self._widths = [Text.from_ansi(line).cell_len for line in text.split("\n")]

    def print(self, line: str, style: str | None = None) -> None:
        """Print a line above what is shown."""
        shown = self._shown
        self.erase()
        self._console.print(line, markup=False, style=style)
        if shown is not None:
            self.draw(shown)

    def erase(self) -> None:
        """Take what is shown away."""
        self._write(self._erasing())
        self._shown, self._widths = None, []

    def end(self) -> None:
        """Leave what is shown where it is, and go on below it."""
        if self._widths:
            self._write("\n")
        self._shown, self._widths = None, []

    def _erasing(self) -> str:
        """Return what moves the cursor to the first row of what is there and clears from there on."""
        if not self._widths:
            return ""
        rows = sum(max(1, -(-width // max(self._console.width, 1))) for width in self._widths)
        return "\r" + (f"\x1b[{rows - 1}A" if rows > 1 else "") + "\x1b[J"

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class Terminal:
    """Print the events of a call: the listener of the command line, used with `with`.

    Answers go to stdout, everything else to stderr; on a terminal running work has a live view.

    Args:
        console: to print on instead of stderr.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not os.environ.get("CI")
        self._bar: Progress | None = None  # of a count, or of the steps
        self._view = View(self.console)
        self._training = False
        self._told = 0.0  # seconds of the count at its last printed line
        self._begun = Begun(0, 0, 1)
        self._evaluations: list[tuple[int, float]] = []
        self._measured: dict[str, float] = {}  # metrics of the last evaluation
        self._best: tuple[int, float] | None = None
        self._steps, self._seconds = 0, 0.0
        self._last: StepDone | None = None

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        """Print an event."""
        match event:
            case Told():
                self._tell(event)
            case Counted():
                self._count(event)
            case Begun():
                self._begin(event)
            case StepDone():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
                self._show()
            case Answered():
                _write(event.text)
            case Ended():
                self._close()
                speed = f"{event.tokens_per_second:,.0f} tokens/s"
                what = f"{event.product} of {size(event.size)} in {event.folder}"
                self._print(f"done     {event.steps} steps in {duration(event.seconds)}, {speed}; {what}")
            case Saved():
                pass

    def _evaluated(self, event: Evaluated) -> None:
        self._evaluations.append((event.number, event.loss))
        self._measured = event.metrics
        if event.best:
            metric = self._begun.metric
            self._best = (event.number, event.loss if metric == "loss" else event.metrics[metric])
        best = " (best so far)" if event.best else ""
        self._print(f"step {event.number}: eval loss {event.loss:.4f}  {self._metrics(event)}".rstrip() + best)

    def _metrics(self, of: StepDone | Evaluated) -> str:
        """Return the metrics of an objective that are shown with the loss, formatted."""
        return "".join(f"{name} {of.metrics[name]:.2f}  " for name in self._begun.shown if name in of.metrics)

    def _print(self, line: str, style: str | None = None) -> None:
        self._view.print(redact(line), style)

    def _tell(self, told: Told) -> None:
        """Print a line; on a terminal a labelled one is wrapped at words and aligned behind its label.

        Below `NARROW` columns each figure has a line of its own. Elsewhere it is one line: logs are searched.
        """
        style = "yellow" if told.problem else None
        if told.label is None or not self.console.is_terminal:
            self._print(told.line, style)
            return
        width = self.console.width
        parts = told.text.split(", ") if width < NARROW else [told.text]
        parts = [f"{part}," for part in parts[:-1]] + parts[-1:]
        room = max(width - LABEL, 20)
        lines = [
            line
            for part in parts
            for line in textwrap.wrap(part, room, break_long_words=False, break_on_hyphens=False) or [""]
        ]
        for index, line in enumerate(lines):
            self._print(f"{told.label if index == 0 else '':{LABEL}}{line}", style)

    def _count(self, done: Counted) -> None:
        """Show the progress of work: on a terminal a bar, elsewhere a line now and then."""
        if not self.live:
            if not done.over and done.seconds - self._told > QUIET:
                self._told = done.seconds
                self._print(f"{done.what}: {_speed(done)}")
            elif done.over:
                self._told = 0.0
            return
        if done.over:
            self._close()
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(16), TextColumn("{task.fields[line]}"))
            self._bar = Progress(*columns, console=self.console)
            self._bar.add_task(done.what, total=None, line="")
        total = None if done.share is None else 1.0
        self._bar.update(self._bar.task_ids[0], total=total, completed=done.share or 0, line=_speed(done))
        self._view.draw(self._bar.get_renderable())

    def _begin(self, begun: Begun) -> None:
        self._begun, self._evaluations, self._best = begun, list(begun.evaluations), begun.best
        if not self.live:
            return
        self._bar = Progress(
            TextColumn("training"), BarColumn(16), MofNCompleteColumn(), TextColumn("steps,"), TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
        )  # fmt: skip
        self._bar.add_task("steps", total=begun.steps, completed=begun.number)
        self._training = True
        self._view.draw(self._bar.get_renderable())

    def _step(self, step: StepDone) -> None:
        self._steps, self._seconds, self._last = self._steps + 1, self._seconds + step.seconds, step
        if self._training:
            self._show()
        elif step.number % self._begun.every == 0 or step.number == step.steps:
            self._print(self._line(step))

    def _show(self) -> None:
        """Update the live view with the last step and evaluation."""
        if self._bar is not None and self._training and self._last is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._last.number)
            self._view.draw(Group(self._table(self._last), self._bar.get_renderable()))

    def _close(self) -> None:
        """End what is shown live: what was counted goes, the last step stays."""
        if self._training:
            self._view.end()
        else:
            self._view.erase()
        self._training, self._bar = False, None

    def _line(self, step: StepDone) -> str:
        left = self._seconds / self._steps * (step.steps - step.number)
        return (
            f"step {step.number}/{step.steps}  epoch {step.epoch:.2f}  loss {step.loss:.4f}  {self._metrics(step)}"
            f"lr {step.lr:.2e}  grad norm {step.grad_norm:.2f}  "
            + "".join(f"{speed} {name}  " for name, speed in _speeds(step).items())
            + f"{size(step.memory)}  {duration(left)} left"
        )

    def _table(self, step: StepDone) -> Table:
        """Return what the live view shows of a step: nothing in it is the same throughout a run.

        Two figures a line, and one below `NARROW` columns: lines that are this short are wrapped by few terminals.
        """
        figures: dict[str, str | Text] = {
            "loss": Text(f"{step.loss:.4f}", style="bold"),
            "eval loss": Text(f"{self._evaluations[-1][1]:.4f}" if self._evaluations else "not yet", style="bold"),
            **{
                label: f"{values[name]:.3f}" if name in values else "not yet"
                for name in self._begun.shown
                for label, values in ((name, step.metrics), (f"eval {name}", self._measured))
            },
            "epoch": f"{step.epoch:.2f}",
            "best" if self._begun.metric == "loss" else f"best {self._begun.metric}": (
                f"{self._best[1]:.4f}, step {self._best[0]}" if self._best else "not yet"
            ),
            "lr": f"{step.lr:.2e}",
            "grad norm": f"{step.grad_norm:.2f}",
            **_speeds(step),
            "step time": f"{step.seconds:.2f} s",
            "memory": size(step.memory),
        }
        rows = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
        cells: list[str | Text] = [cell for figure in figures.items() for cell in figure]
        each = 4 if self.console.width >= NARROW else 2
        for begin in range(0, len(cells), each):
            rows.add_row(*cells[begin : begin + each])
        return rows


def _speeds(step: StepDone) -> dict[str, str]:
    """Return tokens per second, by what they are: rows that are scored have no label tokens."""
    found = {"tokens/s": step.tokens, "label tokens/s": step.trained_tokens}
    return {name: f"{number / step.seconds:,.0f}" for name, number in found.items() if number}


def _speed(done: Counted) -> str:
    seconds = max(done.seconds, 1e-3)
    told = f"{done.count:,}, {done.count / seconds:,.0f}/s"
    return f"{told}, {duration(seconds * (1 - done.share) / done.share)} left" if done.share else told


def _write(text: str) -> None:
    """Write a piece of an answer to stdout; to a terminal without control characters."""
    if sys.stdout.isatty():
        text = "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in plain text, first column left, the others right."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join(
            [first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])
