"""What is printed: messages, progress and tables, sizes and times in words.

Messages go to stderr, stdout is left to results. Secrets are redacted.
"""

from __future__ import annotations

import os
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from loratune.redact import redact

LABEL = 9  # columns of a label
NARROW = 60  # columns of a terminal below which each figure has a line of its own
QUIET = 15  # seconds between two lines about long work where there is no terminal


def duration(seconds: float) -> str:
    """Write a time: `48 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Write a number of bytes: `84.0 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


class Report:
    """Prints messages and progress; silent on processes other than the first.

    Args:
        active: whether this process prints.
    """

    def __init__(self, active: bool = True):
        self.console = Console(stderr=True, quiet=not active, highlight=False, soft_wrap=True)
        self.active = active
        self.live = active and self.console.is_terminal and not os.environ.get("CI")

    def note(self, line: str) -> None:
        """Print a line."""
        self.console.print(redact(line), markup=False)

    def problem(self, line: str) -> None:
        """Print a line that must not be missed."""
        self.console.print(redact(line), markup=False, style="yellow")

    def field(self, label: str, text: str, problem: bool = False) -> None:
        """Print a labelled text; on a terminal it is wrapped at words and aligned behind its label.

        Below `NARROW` columns each figure has a line of its own. Elsewhere it is one line: logs are searched.

        Args:
            label: of one word, or empty for what belongs to the label above.
            text: what stands behind it.
            problem: whether it must not be missed.
        """
        lines = [redact(text)]
        if self.console.is_terminal:
            width = self.console.width
            parts = lines[0].split(", ") if width < NARROW else lines
            parts = [f"{part}," for part in parts[:-1]] + parts[-1:]
            room = max(width - LABEL, 20)
            lines = [
                line
                for part in parts
                for line in textwrap.wrap(part, room, break_long_words=False, break_on_hyphens=False) or [""]
            ]
        style = "yellow" if problem else None
        for index, line in enumerate(lines):
            self.console.print(f"{label if index == 0 else '':{LABEL}}{line}", markup=False, style=style)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[..., None]]:
        """Show how many of something are done, on a terminal as a bar, elsewhere as a line now and then.

        Yields the function to call with the number so far and, where it is known, the part (0-1) that is done.
        """
        began = told = time.perf_counter()

        def line(count: int, share: float | None) -> str:
            seconds = max(time.perf_counter() - began, 1e-3)
            done = f"{what}: {count:,}, {count / seconds:,.0f}/s"
            left = seconds * (1 - share) / share if share else None
            return done if left is None else f"{done}, {duration(left)} left"

        def plain(count: int, share: float | None = None) -> None:
            nonlocal told
            if time.perf_counter() - told > QUIET:
                told = time.perf_counter()
                self.note(line(count, share))

        if not self.live:
            yield plain
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[line]}"))
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=None, line="")

            def show(count: int, share: float | None = None) -> None:
                total = None if share is None else 1.0
                bar.update(task, total=total, completed=share or 0, line=line(count, share).removeprefix(f"{what}: "))

            yield show


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in plain text, first column left, the others right."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join(
            [first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        ).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])
