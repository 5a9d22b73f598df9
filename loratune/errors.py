"""Errors for the user, with the exit code of each class, and how a problem is printed.

LoratuneError                 1  unexpected
├── UsageError                2  a command was called with words that don't fit
├── RecipeError               2  the recipe can't be used
├── DataError                 2  a data file or row can't be used
├── ModelError                2  a base model, adapter or tokenizer can't be used
├── SetupError                3  this machine lacks something: an extra, a GPU, memory
├── TrainingError             4  the training itself failed: a non-finite loss
├── StorageError              5  nothing could be written, or no valid checkpoint found
├── RunFolderError            6  the run folder is in use, finished, or of another recipe
├── SafetyError               7  refused because it could run foreign code
└── Interrupted    129, 130, 143  a signal came; a checkpoint was saved first
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from loratune.redact import redact, redact_line


@dataclass(frozen=True)
class Place:
    """A location: a file (or `--set KEY`), with line and column counted from 1.

    `line` is 0 without a line; `text` is the source line, shown with a caret.
    """

    source: str
    line: int = 0
    column: int = 0
    text: str = ""

    def __str__(self) -> str:
        if not self.line:
            return self.source
        return f"{self.source}:{self.line}:{self.column}" if self.column else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One problem: what is wrong, where, and the remedy.

    Args:
        message: what is wrong, what was given and what is allowed; lower case, no final period.
        place: where, or None.
        hint: the remedy, one phrase.
    """

    message: str
    place: Place | None = None
    hint: str | None = None

    def __str__(self) -> str:
        """Render as `place: message`, then the source line with a caret and the hint below it; without secrets."""
        head = redact(f"{self.place}: {self.message}" if self.place else self.message)
        hint = redact(self.hint or "")
        if self.place is None or not self.place.text.strip():
            return f"{head}\n  {hint}" if hint else head
        text = "".join(
            c if c.isprintable() else " " for c in redact_line(self.place.text)
        ).rstrip()  # a tab is one column
        start = max(0, self.place.column - 61) if len(text) > 100 else 0  # keeps the caret visible on a long line
        number = str(self.place.line) if self.place.line else ""
        gutter = " " * len(number)
        caret = " " * (max(self.place.column, 1) - 1 - start) + "^"
        shown = text[start : start + 100]
        return "\n".join(
            [head, f" {gutter} |", f" {number} | {shown}", f" {gutter} | {caret}{' ' + hint if hint else ''}"]
        )


class LoratuneError(Exception):
    """An error for the user: one or more problems and an exit code."""

    exit_code = 1

    def __init__(self, problems: str | Problem | Sequence[Problem], hint: str | None = None):
        if isinstance(problems, str):
            problems = Problem(problems, hint=hint)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class UsageError(LoratuneError):
    """A command was called with invalid or conflicting arguments."""

    exit_code = 2


class RecipeError(LoratuneError):
    """The recipe can't be used; has every problem found in it."""

    exit_code = 2


class DataError(LoratuneError):
    """A data file, or rows of it, can't be used."""

    exit_code = 2


class ModelError(LoratuneError):
    """A base model, adapter or tokenizer can't be used."""

    exit_code = 2


class SetupError(LoratuneError):
    """This machine lacks something the recipe needs."""

    exit_code = 3


class TrainingError(LoratuneError):
    """The training itself failed, for example on a loss that isn't finite."""

    exit_code = 4


class StorageError(LoratuneError):
    """Nothing could be written, or no valid checkpoint was found."""

    exit_code = 5


class RunFolderError(LoratuneError):
    """The run folder is in use, or has a run that must not be overwritten or has another recipe."""

    exit_code = 6


class Interrupted(LoratuneError):
    """A signal asked the training to end; a checkpoint was saved first.

    Args:
        message: the signal, and where the training stopped.
        exit_code: 130 for SIGINT, 143 for the others.
        hint: how to resume.
    """

    def __init__(self, message: str, exit_code: int, hint: str | None = None):
        super().__init__(message, hint)
        self.exit_code = exit_code


class SafetyError(LoratuneError):
    """Refused, because it could run code that comes with a model, or refers to a file outside of its folder."""

    exit_code = 7


class BaseMismatchError(LoratuneError):
    """The base is not the one an adapter was trained on."""

    exit_code = 8


def shorten(text: str, limit: int = 60) -> str:
    """Return text for a message: one line, at most `limit` characters, no control characters."""
    text = " ".join(text[: 4 * limit].split())
    if not text.isprintable():  # such as an escape sequence of the terminal
        text = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """Return the known word that is closest to `word`, or None when none is close."""
    lower = {name.lower(): name for name in known}
    word = word[:100].lower().replace("-", "_")
    near = [name for name in lower if one_edit(word, name)]
    found = near[:1] or difflib.get_close_matches(word, list(lower), n=1, cutoff=0.6)
    return lower[word] if word in lower else lower[found[0]] if found else None


def one_edit(a: str, b: str) -> bool:
    """Return whether one inserted, deleted, replaced or swapped letter turns `b` into `a`."""
    short, long = sorted((a, b), key=len)
    same = next((i for i, (x, y) in enumerate(zip(short, long, strict=False)) if x != y), len(short))
    rest, other = short[same:], long[same:]
    swapped = rest[:2] == other[1::-1] and rest[2:] == other[2:]
    return rest == other[1:] or rest[1:] == other[1:] or swapped


def listed(words: Sequence[str], limit: int = 24) -> str:
    """Format words for a message: `a`, `b`, `c`."""
    shown = ", ".join(f"`{word}`" for word in words[:limit])
    return f"{shown} and {len(words) - limit} more" if len(words) > limit else shown
