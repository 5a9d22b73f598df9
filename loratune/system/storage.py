"""Write files atomically: text, JSON, and folders sealed by a manifest.

A folder is written under a temporary name, each file is flushed to the disk, `MANIFEST.json` with the size and sha256
of every file is written last, then the folder is renamed. So it is complete or does not exist. The manifest also has a
sha256 of itself, so that a flipped byte in it is detected.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loratune.errors import Place, Problem, StorageError
from loratune.redact import redact
from loratune.system import files, run_files
from loratune.system.paths import is_inside

SCHEMA = 2
MANIFEST = run_files.MANIFEST
_APART = ".quarantine"  # folder in `checkpoints` for damaged checkpoints and leftover files
_NO_SEAL = "0" * 64
_MARGIN = 64 * 1024  # bytes for folders and partly filled blocks


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, with secrets removed.

    Raises:
        StorageError: when the disk is full or the folder can't be written.
    """
    check_place(path)
    staged = _beside(path, "staging")
    try:
        with staged.open("w", encoding="utf-8") as stream:
            stream.write(redact(text))
            stream.flush()
            os.fsync(stream.fileno())
        staged.rename(path)
    except OSError as error:
        raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(path)))) from None
    finally:
        _forget(staged)  # also on a signal


def check_place(path: Path) -> None:
    """Check that a text file can be written at a path, before its content is computed.

    Raises:
        StorageError: when a folder or device is there, or the folder around it is not, or may not be written.
    """
    if os.path.isdir(path):
        raise StorageError(Problem("can't be written: is a folder", Place(str(path)), "name a file"))
    if (kind := files.odd(path)) is not None:  # a rename would replace `/dev/null` by a file
        raise StorageError(Problem(f"can't be written: is {kind}, not a file", Place(str(path)), "name a file"))
    if not os.path.isdir(path.parent):
        raise StorageError(Problem("can't be written: no such folder", Place(str(path.parent)), "create it first"))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(Problem("can't be written: its folder is not writable", Place(str(path))))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file is none."""
    try:
        value = json.loads(files.text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def json_sha256(value: Any) -> str:
    """Return the sha256 (hex) of a value as JSON with sorted keys."""
    return _hash(json.dumps(value, sort_keys=True))


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def check_space(folder: Path, needed: int, what: str, hint: str) -> None:
    """Check that a disk has room before anything is written to it.

    Args:
        folder: on that disk; it exists.
        needed: bytes.
        what: that will need them, for the message.
        hint: a remedy besides freeing space.

    Raises:
        StorageError: when there is less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + _MARGIN:
        told = f"{_megabytes(needed)} are needed for {what}, {_megabytes(free)} are free"
        raise StorageError(Problem(told, Place(str(folder)), hint))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def commit(target: Path, write: Callable[[Path], None], about: dict[str, Any], replace: bool = True) -> int:
    """Let `write` fill a staging folder, seal it with a manifest and rename it to `target`.

    Args:
        target: where the folder will be.
        write: fills the folder it is given.
        about: further entries of the manifest.
        replace: whether an existing folder is replaced; else it must be empty or missing.

    Returns:
        Bytes written.

    Raises:
        StorageError: when anything can't be written; `target` is unchanged then.
    """
    staging = _beside(target, "staging")
    try:
        staging.mkdir(parents=True)
        mode = staging.stat().st_mode & 0o666
        write(staging)
        files = {f.relative_to(staging).as_posix(): _seal(f) for f in sorted(staging.rglob("*")) if f.is_file()}
        for file in files:
            (staging / file).chmod(mode)  # safetensors makes its files readable by the owner only
        (staging / MANIFEST).write_text(_sealed({"schema": SCHEMA, **about, "files": files}), encoding="utf-8")
        _fsync(staging / MANIFEST)
        for folder in (*(f for f in staging.rglob("*") if f.is_dir()), staging):
            _fsync(folder)
        _move(staging, target, replace)
        _fsync(target.parent)
        return sum(int(seal["bytes"]) for seal in files.values())
    except Exception as error:
        reason = why_not_written(error)
        if reason is None:
            raise
        hint = "free some space; earlier saves are intact"
        raise StorageError(Problem(f"can't be written: {reason}", Place(str(target)), hint)) from None
    finally:
        _forget(staging)


def _move(staging: Path, target: Path, replace: bool) -> None:
    """Rename a folder to its target; an existing one is moved aside first, and moved back if that fails."""
    if not (replace and target.exists()):
        staging.rename(target)  # also replaces an empty folder
        return
    aside = target.with_name(f".replaced-{target.name}")
    take_away(aside)
    target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        aside.rename(target)
        raise
    take_away(aside)


def sweep(folder: Path) -> None:
    """Clean up after a killed process: delete partly written files, move back a folder that was moved aside."""
    for left in [file for file in folder.glob(".*") if run_files.is_left_over(file.name)]:
        target = left.with_name(left.name.removeprefix(".replaced-"))
        if left.name.startswith(".staging-"):
            _forget(left)
        elif target == left:
            take_away(left, left.name.removeprefix(".trash-")[:-9])
        elif target.exists():
            take_away(left)
        else:
            left.rename(target)


def discard(folder: Path) -> Path | None:
    """Delete a checkpoint, with a rename first, so that a partly deleted folder never looks complete.

    Returns:
        Where files are now that were not written with it, or None if all is deleted.

    Raises:
        StorageError: when it can't be renamed.
    """
    trash = _beside(folder, "trash")
    try:
        folder.rename(trash)
    except OSError as error:
        raise StorageError(Problem(f"can't be deleted: {error.strerror}", Place(str(folder)))) from None
    return take_away(trash, folder.name)


def take_away(folder: Path, name: str | None = None) -> Path | None:
    """Delete the files that were written into a folder, and the folder if nothing else is in it.

    A link is deleted, never followed. What can't be deleted stays until the next start.

    Args:
        folder: with a manifest; if that is damaged or missing, its files are recognised by their names.
        name: under which the rest is moved to `.quarantine`; None: it stays.

    Returns:
        Where the rest is, or None if nothing is left.
    """
    if folder.is_symlink() or not folder.is_dir():
        _forget(folder)
        return None
    named = set(files_of(folder))
    for place, folders, names in os.walk(folder, topdown=False):  # follows no links
        with contextlib.suppress(OSError):
            for file in sorted(names, key=lambda one: one == MANIFEST):  # last, as it lists the others
                path = Path(place, file)
                known = path.relative_to(folder).as_posix()
                if known == MANIFEST or (known in named if named else run_files.is_saved(known)):
                    path.unlink()
            for inner in folders:
                if not Path(place, inner).is_symlink() and not any(Path(place, inner).iterdir()):
                    Path(place, inner).rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
    if not folder.exists() or name is None:
        return folder if folder.exists() else None
    return set_apart(folder, name) or folder


def set_apart(folder: Path, name: str) -> Path | None:
    """Move a folder of `checkpoints` to `.quarantine`; return its new path, or None if that fails."""
    place = folder.parent / _APART / name
    number = 1
    while os.path.lexists(place):
        number += 1
        place = place.with_name(f"{name}-{number}")
    try:
        place.parent.mkdir(exist_ok=True)
        folder.rename(place)
    except OSError:
        return None
    return place


def publish(folder: Path, write: Callable[[Path], None], about: dict[str, Any]) -> None:
    """Commit the final files of a run beside its checkpoints, then move them into the run folder, the manifest last.

    Files of the folder's earlier manifest that the new one does not list are deleted.

    Raises:
        StorageError: when anything can't be written.
    """
    staging = folder / "checkpoints" / "final"
    before = own(folder)
    commit(staging, write, about)
    now = set(files_of(staging))
    try:
        for name in sorted(before - now - {MANIFEST}):
            (folder / name).unlink(missing_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # from here on it would list other files
        for name in (*sorted(now), MANIFEST):
            (folder / name).parent.mkdir(exist_ok=True)
            (staging / name).replace(folder / name)
        take_away(staging)
        _fsync(folder)
    except OSError as error:
        raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(folder)))) from None


def own(folder: Path) -> set[str]:
    """Return the final files of a run folder that a run wrote, also if it was killed while moving them there."""
    named = {*files_of(folder), *files_of(folder / "checkpoints" / "final")}
    known = (folder / MANIFEST).is_file() and {MANIFEST, *run_files.PAPERS}
    return {name for name in {*named, *(known or ())} if _is_there(folder / name)}


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.is_file()


def files_of(folder: Path) -> list[str]:
    """Return the files in a folder's manifest, none outside of the folder; empty without a manifest."""
    sealed = read_json(folder / MANIFEST).get("files")
    names = [name for name in sealed if is_inside(name)] if isinstance(sealed, dict) else []
    return [name for name in names if (folder / name).parent.resolve().is_relative_to(folder.resolve())]


def verify(folder: Path, alone: bool = False) -> str | None:
    """Return what is wrong with a committed folder, or None when every file is as it was written.

    Args:
        folder: that `commit` made.
        alone: whether other files in it are an error.
    """
    try:
        text = files.text(folder / MANIFEST)
        manifest = json.loads(text)
        seal, sealed = manifest["seal"], manifest["files"]
        whole = text.count(seal) == 1 and _hash(text.replace(seal, _NO_SEAL)) == seal and isinstance(sealed, dict)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        return f"has no complete {MANIFEST}"
    for name, known in sealed.items():
        file = folder / name
        if not is_inside(name) or not file.resolve().is_relative_to(folder.resolve()):
            return f"`{name}` points outside its folder"
        if not file.is_file():
            return f"`{name}` is missing"
        try:
            same = file.stat().st_size == known["bytes"] and _seal(file, sync=False) == known
        except OSError as error:
            return f"`{name}` can't be read: {error.strerror}"
        if not same:
            return f"`{name}` has changed since it was written"
    if alone:
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder).as_posix()
            if file.is_file() and name != MANIFEST and name not in sealed:
                return f"`{name}` was not written with it"
    return None


def why_not_written(error: Exception) -> str | None:
    """Return why writing to the disk failed, or None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"([^:]+) \(os error \d+\)", str(error))  # the message of safetensors and tokenizers
    return found[1].strip() if found else None


def _sealed(value: dict[str, Any]) -> str:
    """Return JSON with the sha256 of its own text, computed with zeros in place of the hash."""
    text = json.dumps({**value, "seal": _NO_SEAL}, indent=1)
    assert text.count(_NO_SEAL) == 1
    return text.replace(_NO_SEAL, _hash(text))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _seal(file: Path, sync: bool = True) -> dict[str, Any]:
    with files.opened(file) as stream:
        if sync:
            os.fsync(stream.fileno())
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _beside(path: Path, what: str) -> Path:
    if path.name in ("", ".."):  # `.`, for one
        path = path.resolve()
    return path.with_name(f".{what}-{path.name}-{uuid.uuid4().hex[:8]}")


def _forget(path: Path) -> None:
    """Delete a file or folder; if that fails it stays until the next start cleans up."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
