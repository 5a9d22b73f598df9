"""Read files of a user: only regular ones, and only up to a size limit.

Reading a pipe without a writer never returns, a device such as `/dev/zero` has no end, and a name may be invalid for
the system. All of these raise an OSError with a `strerror`, like other unreadable files, so that callers need no
special cases.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from loratune.errors import Place, Problem, UsageError, shorten

TEXT = 32 << 20  # bytes of a text file: a config, an index, a list of files

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def opened(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: when there is none, or it can't be read; also for a folder, pipe, socket or device.
    """
    _check(path, _status(path))
    # non-blocking: it may have become a pipe
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check(path, os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read(path: str | Path, most: int = TEXT) -> bytes:
    """Read a whole regular file.

    Args:
        path: of the file.
        most: bytes; a longer file is an error.

    Raises:
        OSError: as `opened`, and when it is longer.
    """
    with opened(path) as stream:
        found = stream.read(most + 1)
    if len(found) > most:
        raise OSError(errno.EFBIG, f"is longer than {most:,} bytes", str(path))
    return found


def text(path: str | Path, most: int = TEXT) -> str:
    """Read a whole regular UTF-8 file; see `read`.

    Raises:
        OSError: as `read`.
        UnicodeDecodeError: when it is not UTF-8.
    """
    return read(path, most).decode("utf-8")


def local(name: str | Path) -> Path:
    """Return the path of a name on the command line, with `~` expanded if there is such a user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def there(path: Path) -> bool:
    """Return whether a path exists.

    Raises:
        UsageError: when that can't be determined: a name too long, a link to itself, a folder without permission.
    """
    try:
        about = _status(path)
        if stat.S_ISDIR(about.st_mode) and not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return False
        raise UsageError(Problem(f"can't be used: {error.strerror}", Place(shorten(shown(path), 400)))) from None
    return True


def odd(path: str | Path) -> str | None:
    """Return what a path is that is neither a regular file nor a folder: a pipe, a socket or a device; else None."""
    try:
        return _KINDS.get(stat.S_IFMT(_status(path).st_mode))
    except OSError:
        return None


def is_utf8(path: str | Path) -> bool:
    """Return whether a name is UTF-8: others can't be written into a recipe or a ledger."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(path: str | Path) -> str:
    """Return a path for a message, with backslash, x and two digits for bytes that are not UTF-8."""
    try:
        return os.fsencode(str(path)).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, which no file name contains
        return ascii(str(path))


def below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, links followed, each folder once, sorted by name.

    Raises:
        OSError: when a folder can't be read, as its files would silently be missing.
    """
    for place, _, names in _walk(folder):
        yield from (place / name for name in names)


def matching(pattern: str) -> list[Path]:
    """Return the regular files that match a pattern as of `glob`, sorted; `**` enters each folder once.

    Raises:
        OSError: when a folder below a `**` can't be read.
    """
    if pattern == "**" or pattern.endswith("/**"):
        pattern += "/*"
    before, stars, after = pattern.partition("**/")
    if not stars or (before and not before.endswith(os.sep)):
        return sorted(Path(name) for name in glob.glob(pattern) if os.path.isfile(name))
    roots = glob.glob(before) if before else [os.curdir]
    places = (place for root in sorted(roots) if os.path.isdir(root) for place, _, _ in _walk(Path(root), hidden=False))
    return sorted({file for place in places for file in matching(os.path.join(glob.escape(str(place)), after))})


def _walk(folder: Path, hidden: bool = True) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a folder as `os.walk` does, but each folder once, however many links lead to it, and with errors raised."""

    def stop(error: OSError) -> None:
        raise error

    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        about = os.stat(place)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        yield Path(place), folders, sorted(names)


def _status(path: str | Path) -> os.stat_result:
    try:
        return os.stat(path)
    except ValueError as error:  # a name with a NUL byte, or with half a character
        why = "its name is not UTF-8" if isinstance(error, UnicodeError) else "its name has a NUL byte"
        raise OSError(errno.EINVAL, why, ascii(str(path))) from None


def _check(path: str | Path, about: os.stat_result) -> None:
    if stat.S_ISDIR(about.st_mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(about.st_mode):
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "not a regular file")
        raise OSError(errno.EINVAL, f"{kind}, which may never end; write it to a file first", str(path))
