"""One run per folder: a lock that the kernel releases however its holder ends.

The lock is `flock` on a file in the run folder; the file names its holder. A file left behind by a killed process locks
nothing. Where a network file system has no `flock`, the file itself is the lock: it is created atomically, and taken
over if its holder was a process of this machine that is dead, or of an earlier boot.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loratune.errors import Place, Problem, RunFolderError, StorageError

NAME = ".lock"
_NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_TRIES = 5
_PAUSE = 0.02  # seconds: another process may be testing whether the lock is free


@contextmanager
def held(folder: Path) -> Iterator[str | None]:
    """Hold a folder's lock; create the folder, and delete it at the end if it is empty.

    Yields:
        A line about a previous holder that did not release it, or None.

    Raises:
        RunFolderError: when another process holds it, which is named, or the lock file is a link.
        StorageError: when the folder can't be created or written.
    """
    made = not folder.exists()
    try:
        handle, before = _take(folder)
    except OSError as error:
        if error.errno == errno.ELOOP and (folder / NAME).is_symlink():
            told = f"is a link to {os.readlink(folder / NAME)}, which is not followed"
            raise RunFolderError(Problem(told, Place(str(folder / NAME)), "remove it")) from None
        raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(folder)))) from None
    try:
        yield before
    finally:
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def holder(folder: Path) -> dict[str, Any] | None:
    """Return who holds a folder's lock (pid, host, boot, started), or None."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        who = _read(handle)
        return who if error.errno not in _NO_FLOCK or _lives(who) else None
    else:
        return None
    finally:
        os.close(handle)


def _take(folder: Path) -> tuple[int, str | None]:
    """Return the open lock file, and a line about a holder that died."""
    path = folder / NAME
    for attempt in range(100):  # a holder that ends deletes file and folder: then try again
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = _read(handle)
            if _is_at(handle, path):
                _write(handle)
                return handle, _left_by(before) if before else None
        except OSError as error:
            who = _read(handle)
            if error.errno in _NO_FLOCK:
                os.close(handle)
                return _take_without_flock(path)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                os.close(handle)
                raise
            if attempt >= _TRIES - 1 and _is_at(handle, path):
                os.close(handle)
                raise _in_use(folder, who) from None
        os.close(handle)
        time.sleep(_PAUSE)
    raise _in_use(folder, {})


def _take_without_flock(path: Path) -> tuple[int, str | None]:
    """Create the lock file atomically, by a hard link; take it over from a process that is certainly dead."""
    mine = path.with_name(f".staging-lock-{uuid.uuid4().hex[:8]}")
    handle = os.open(mine, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    before: str | None = None
    try:
        _write(handle)
        for _ in range(_TRIES):
            with contextlib.suppress(FileExistsError):
                os.link(mine, path)
                return handle, before
            who = _whole(path)
            if who is not None and _lives(who):
                break
            before = _left_by(who) if who else None  # an empty file comes from the attempt with `flock`
            stale = path.with_name(f".trash-lock-{uuid.uuid4().hex[:8]}")
            with contextlib.suppress(FileNotFoundError):
                path.rename(stale)
                if _whole(stale) != who:  # another process was faster: put it back
                    stale.rename(path)
                    break
                stale.unlink()
        os.close(handle)
        raise _in_use(path.parent, _whole(path) or {})
    finally:
        mine.unlink()


def _whole(path: Path) -> dict[str, Any] | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return _read(handle)
    finally:
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _read(handle: int) -> dict[str, Any]:
    try:
        value = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _write(handle: int) -> None:
    who = {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "started": _now()}
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(who) + "\n").encode(), 0)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _boot() -> str:
    """Return the id of this boot of the machine: after a reboot a pid means nothing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _lives(who: dict[str, Any]) -> bool:
    """Return whether a holder may be alive: if unknown, it counts as alive."""
    if not who or who.get("host") != socket.gethostname():
        return bool(who)
    if who.get("boot") != _boot():
        return False
    try:
        os.kill(int(who.get("pid", 0)), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):
        return True
    return True


def _told(who: dict[str, Any]) -> str:
    return f"process {who.get('pid', '?')} on {who.get('host', '?')}, since {who.get('started', '?')}"


def _left_by(who: dict[str, Any]) -> str:
    return f"taking over the lock of a run that was killed ({_told(who)})"


def _in_use(folder: Path, who: dict[str, Any]) -> RunFolderError:
    hint = "wait for it, or give another `output`"
    if who and who.get("host") != socket.gethostname():
        hint += f"; if that process is gone, delete {folder / NAME}"
    return RunFolderError(Problem(f"in use by {_told(who)}" if who else "in use", Place(str(folder)), hint))
