"""Search texts for a regular expression in bounded time, in a child process.

A pattern such as `(a+)+$` makes Python's `re` backtrack for an unbounded time, and nothing in the same process could
stop it.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from loratune.errors import SetupError, UsageError, shorten
from loratune.system import child_process

PATIENCE = 10.0  # seconds for all texts: a thousand answers of a thousand characters take 0.1
MEMORY = 1 << 30  # bytes for the child
SIMPLER = "a repetition within a repetition, such as (a+)+, can take forever: simplify it"


def check(pattern: str) -> None:
    """Check that a text is a regular expression, before anything is loaded.

    Raises:
        UsageError: when it is none, or takes too long to compile.
    """
    if not pattern:
        raise UsageError("--regex is empty")
    found(pattern, [""])


def found(pattern: str, texts: Sequence[str], patience: float = PATIENCE) -> list[str | None]:
    """Return a pattern's first match in each text: its first group, else the whole match; None without a match.

    Args:
        pattern: a regular expression of Python's `re`.
        texts: to search.
        patience: seconds for all of them.

    Raises:
        UsageError: when the pattern is invalid, or takes too long.
        SetupError: when no child process can be started.
    """
    shown = shorten(pattern, 100)
    try:
        done = _ask({"pattern": pattern, "texts": list(texts)}, patience)
    except subprocess.TimeoutExpired:
        raise UsageError(f"--regex `{shown}` takes more than {patience:g} s on {len(texts):,} texts", SIMPLER) from None
    except OSError as error:
        raise SetupError(f"no process can be started for --regex: {error.strerror}") from None
    if done.returncode:
        raise UsageError(f"--regex `{shown}` needs more than {MEMORY >> 30} GiB of memory")
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        raise UsageError(f"--regex `{shown}` is not a regular expression: {answer}")
    return [None if one is None else str(one) for one in answer]


def end(patterns: Sequence[str], texts: Sequence[str], patience: float = PATIENCE) -> bool:
    """Return whether patterns can be matched with texts within `patience` seconds; invalid ones are skipped.

    Raises:
        SetupError: when no child process can be started.
    """
    try:
        _ask({"patterns": list(patterns), "texts": list(texts)}, patience)
    except subprocess.TimeoutExpired:
        return False
    except OSError as error:
        raise SetupError(f"no process can be started for regular expressions: {error.strerror}") from None
    return True


def _ask(asked: dict[str, Any], patience: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        child_process.command("loratune.system.regex_match"), input=json.dumps(asked), capture_output=True, text=True,
        encoding="utf-8", env=child_process.environment(), timeout=patience, check=False,
    )  # fmt: skip


def _serve() -> None:
    """Search as requested on stdin; write the matches, or why the pattern is invalid, to stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    asked = json.load(sys.stdin)
    for one in asked.get("patterns", ()):
        with suppress(re.error, RecursionError, OverflowError):
            pattern = re.compile(one)
            for text in asked["texts"]:
                pattern.match(text)
    if "patterns" in asked:
        return
    try:
        pattern = re.compile(asked["pattern"])
    except (re.error, RecursionError, OverflowError) as error:
        print(json.dumps(str(error) or type(error).__name__))
        return
    answer: list[str | None] = []
    for text in asked["texts"]:
        match = pattern.search(text)
        group = None if match is None else match.group(1 if match.re.groups else 0)
        answer.append(None if group is None else group.strip())
    print(json.dumps(answer))


if __name__ == "__main__":
    _serve()
