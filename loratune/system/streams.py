"""stdin, stdout and stderr of the command line: they hide secrets, and a lost stream does not stop a training."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress
from typing import TextIO

from loratune.errors import StorageError
from loratune.redact import redact

_ESCAPED = "loratune-escaped"  # name of the error handler for text that an encoding can't represent


class _Guarded(io.TextIOWrapper):
    """A text stream that hides secrets in all output, and survives the loss of its target.

    A closed terminal, a full disk or a reader that has ended must not stop a training: if stderr can't be written, all
    further output to it is dropped. stdout carries results: losing one is an error, unless its reader has ended.
    """

    lost: OSError | None = None  # why output was lost

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
        os.dup2(nowhere, self.fileno())  # the rest of the buffer goes there, now or when Python ends
        os.close(nowhere)
        self.lost = self.lost or error


def _unwritable(error: UnicodeError) -> tuple[bytes, int]:
    """Encode text that an encoding can't represent: bytes of a file's name unchanged, anything else as an escape."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    plain = [bytes([ord(one) - 0xDC00]) if "\udc80" <= one <= "\udcff" else _escape(one) for one in letters]
    return b"".join(plain), error.end


def _escape(letter: str) -> bytes:
    return letter.encode("ascii", "backslashreplace")


def close() -> None:
    """Flush stdout; called at the very end, as libraries may ignore earlier errors.

    Raises:
        StorageError: when a result could not be written there.
    """
    sys.stdout.flush()
    lost = sys.stdout.lost if isinstance(sys.stdout, _Guarded) else None
    if lost is not None and not isinstance(lost, BrokenPipeError):
        raise StorageError(
            f"the result can't be written to stdout: {lost.strerror}",
            "the work itself is done; redirect it to a disk with space",
        )


def guard() -> None:
    """Make stdout and stderr hide secrets, also in tracebacks and output of libraries, and accept any text.

    Streams that were closed before are replaced by null devices: else the next opened file would get their file
    descriptor, and their output.
    """
    codecs.register_error(_ESCAPED, _unwritable)
    while (nowhere := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(nowhere)
    # never closed, for the rest of the process
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # else other bytes than UTF-8 would fail during a read
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
