"""How files get onto the disk whole or not at all: text, JSON, and folders sealed by a manifest.

A folder is written beside its place, each file is flushed to the disk, `MANIFEST.json` with the size and sha256 of
every file comes last, then the folder is renamed into place. So it is whole or isn't there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loratune.errors import Place, Problem, StorageError

SCHEMA = 1


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Raises:
        StorageError: when the disk is full or the folder can't be written.
    """
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with staged.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        staged.rename(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(path)))) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or return an empty one where the file is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def commit(target: Path, write: Callable[[Path], None], about: dict[str, Any]) -> None:
    """Let `write` fill a staging folder, seal it with a manifest and rename it to `target`.

    Raises:
        StorageError: when anything can't be written; `target` is then as it was.
    """
    staging = target.parent / f".staging-{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        staging.mkdir(parents=True)
        mode = staging.stat().st_mode & 0o666
        write(staging)
        files = {f.relative_to(staging).as_posix(): _seal(f) for f in sorted(staging.rglob("*")) if f.is_file()}
        for file in files:
            (staging / file).chmod(mode)  # safetensors leaves its files readable by their owner only
        manifest = staging / "MANIFEST.json"
        manifest.write_text(json.dumps({"schema": SCHEMA, **about, "files": files}, indent=1), encoding="utf-8")
        _fsync(manifest)
        _fsync(staging)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
        _fsync(target.parent)
    except OSError as error:
        raise StorageError(
            Problem(
                f"can't be written: {error.strerror or error}",
                Place(str(target)),
                "free some space; what was saved before is whole",
            )
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish(folder: Path, write: Callable[[Path], None], about: dict[str, Any]) -> None:
    """Commit the final files of a run beside its checkpoints, then move them into the run folder, the manifest last.

    Raises:
        StorageError: when anything can't be written.
    """
    staging = folder / "checkpoints" / "final"
    commit(staging, write, about)
    try:
        for file in sorted(staging.iterdir(), key=lambda f: f.name == "MANIFEST.json"):
            file.replace(folder / file.name)
        staging.rmdir()
    except OSError as error:
        raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(folder)))) from None


def verify(folder: Path) -> str | None:
    """Return what is wrong with a committed folder, or None when every file is as it was written."""
    manifest = read_json(folder / "MANIFEST.json")
    if not isinstance(manifest.get("files"), dict):
        return "has no whole MANIFEST.json"
    for name, seal in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"`{name}` is missing"
        if _seal(file, sync=False) != seal:
            return f"`{name}` is not as it was written"
    return None


def _seal(file: Path, sync: bool = True) -> dict[str, Any]:
    with file.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
