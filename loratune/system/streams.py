"""stdin, stdout and stderr of the command line: they hide secrets, and no training ends with them."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

from loratune.errors import StorageError
from loratune.redact import redact

_ESCAPED = "loratune-escaped"  # how text is written that an encoding has no bytes for


class _Guarded(io.TextIOWrapper):
    """A stream of text that hides secrets in all that is written to it, and outlives what it leads to.

    A terminal that was closed, a full disk behind a log or a reader that has read enough end no training: what can't be
    written to stderr is dropped, from then on all of it. stdout carries results: losing one is an error, unless it is
    its reader that has gone.
    """

    lost: OSError | None = None  # why what was written went nowhere

    def write(self, text: str) -> int:
        try:
            super().write(redact(text))
        except OSError as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # what is still in the buffer goes there, now or when Python ends
        os.close(nowhere)
        self.lost = self.lost or error


def _unwritable(error: UnicodeError) -> tuple[bytes, int]:
    """Write what an encoding has no bytes for: of a file's name its own bytes, anything else as an escape."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    plain = [bytes([ord(one) - 0xDC00]) if "\udc80" <= one <= "\udcff" else _escape(one) for one in letters]
    return b"".join(plain), error.end


def _escape(letter: str) -> bytes:
    return letter.encode("ascii", "backslashreplace")


def close() -> None:
    """Write what is left to stdout; to be called when all is done, as libraries may pass over an error before.

    Raises:
        StorageError: when a result could not be written there.
    """
    sys.stdout.flush()
    lost = sys.stdout.lost if isinstance(sys.stdout, _Guarded) else None
    if lost is not None and not isinstance(lost, BrokenPipeError):
        raise StorageError(
            f"the result can't be written to stdout: {lost.strerror}", "the work itself is done; name a place with room"
        )


def guard() -> None:
    """Let stdout and stderr hide secrets, also in tracebacks and in what libraries print, and take any text.

    Streams that were closed before lead nowhere: else the next file that is opened would take their number, and get
    what is meant for them.
    """
    codecs.register_error(_ESCAPED, _unwritable)
    while (nowhere := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(nowhere)
    # for the rest of the process: nobody closes them
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else what is not UTF-8 would end in the middle of a read
    sys.stdout, sys.stderr = (
        _Guarded(open(number, "wb"), "utf-8", _ESCAPED) if stream is None else _guarded(stream)  # noqa: SIM115
        for number, stream in ((1, sys.stdout), (2, sys.stderr))
    )


def _guarded(stream: TextIO) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, _Guarded):
        return stream
    with suppress(OSError):
        stream.flush()
    return _Guarded(
        stream.buffer, stream.encoding, _ESCAPED, line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )  # fmt: skip
