"""What a person types or pastes on a terminal, one message at a time; each line of a file or a pipe is one."""

from __future__ import annotations

import importlib.util
import select
import signal
import sys
import threading
from types import FrameType

from loratune.errors import UsageError
from loratune.system import files

WAIT = 0.05  # seconds within which the next line of a paste is there
PROMPT = "> "
LONGEST = 4 << 20  # characters of a message
_EDITS = importlib.util.find_spec("readline") is not None  # a Python can be built without it


def interactive() -> bool:
    """Return whether somebody types."""
    return sys.stdin.isatty()


def edit_lines() -> None:
    """Let a person edit lines and go back to earlier ones, and keep what is pasted together until Enter is pressed."""
    if _EDITS:
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def read() -> str | None:
    """Return the next message, or None at the end of input.

    Lines that are there at once were pasted, and are one message: with bracketed paste the terminal says so, else what
    comes within a moment counts. Ctrl-C takes back what was typed: the message is empty then.

    Raises:
        KeyboardInterrupt: at Ctrl-C, where nothing was typed.
        UsageError: when it is not UTF-8, or longer than anything a model reads.
    """
    if not interactive():
        line = _read_line()
        return line.rstrip("\n") if line else None
    lines: list[str] = []
    typed: list[str] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _EDITS:  # only now: once `input` has returned the line is gone
            import readline

            typed.append(readline.get_line_buffer())
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, interrupt) if main else None
    try:
        lines.append(_line(PROMPT))
        while select.select([sys.stdin], [], [], WAIT)[0]:
            lines.append(_line(""))
    except EOFError:
        if not lines:
            return None
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        if not any([*lines, *typed]):
            raise
        return ""
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    return "\n".join(lines)


def _line(prompt: str) -> str:
    if sys.stdout.isatty():
        return _checked(input(prompt))
    sys.stderr.write(prompt)  # answers go to a file: the prompt is no part of them
    sys.stderr.flush()
    line = _read_line()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _read_line() -> str:
    return _checked(sys.stdin.readline(LONGEST + 1))


def _checked(line: str) -> str:
    if len(line) > LONGEST:
        raise UsageError(f"a message of more than {LONGEST:,} characters", "does a line end in the input?")
    if not files.is_utf8(line):  # `cli.main` has bytes that are none kept apart
        raise UsageError("what was read is not UTF-8", "give it as UTF-8")
    return line
