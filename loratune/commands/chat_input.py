"""Input of a chat, one message at a time: typed or pasted on a terminal, or a line of a file or pipe."""

from __future__ import annotations

import importlib.util
import select
import signal
import sys
import threading
from types import FrameType

from loratune.errors import UsageError
from loratune.system import files

WAIT = 0.05  # seconds within which the next line of a paste arrives
PROMPT = "> "
LONGEST = 4 << 20  # characters of a message
_EDITS = importlib.util.find_spec("readline") is not None  # Python can be built without it


def interactive() -> bool:
    """Return whether input comes from a terminal."""
    return sys.stdin.isatty()


def edit_lines() -> None:
    """Enable line editing and history, and keep a paste together until Enter is pressed."""
    if _EDITS:
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def read() -> str | None:
    """Return the next message, or None at the end of input.

    Pasted lines are one message: with bracketed paste the terminal marks them, else lines that arrive within a moment
    count as pasted. Ctrl-C discards what was typed: the message is empty then.

    Raises:
        KeyboardInterrupt: at Ctrl-C on an empty line.
        UsageError: when it is not UTF-8, or longer than any model supports.
    """
    if not interactive():
        line = _read_line()
        return line.rstrip("\n") if line else None
    lines: list[str] = []
    typed: list[str] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _EDITS:  # saved here: once `input` has returned the line is lost
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
    sys.stderr.write(prompt)  # on stderr: answers may go to a file, and the prompt is no part of them
    sys.stderr.flush()
    line = _read_line()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _read_line() -> str:
    return _checked(sys.stdin.readline(LONGEST + 1))


def _checked(line: str) -> str:
    if len(line) > LONGEST:
        raise UsageError(f"a message of more than {LONGEST:,} characters", "is a line break missing in the input?")
    if not files.is_utf8(line):  # `cli.main` keeps other bytes as surrogates
        raise UsageError("the input is not UTF-8", "give it as UTF-8")
    return line
