"""The run folder: what is in it, and how a checkpoint is committed, verified and found again.

A checkpoint is written to a staging folder, each file is flushed to the disk, `MANIFEST.json` with the size and sha256
of every file comes last, then the folder is renamed into place. So a folder `step-000200` is whole or isn't there.
Nothing in it is a pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from loratune.errors import Place, Problem, RunFolderError, StorageError
from loratune.secrecy import redact
from loratune.section import is_inside

SCHEMA = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what the loop needs beside weights, optimizer and random states to go on."""

    step: int
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_better: int = 0


def check_free(folder: Path, resume: bool, overwrite: bool) -> None:
    """Check that a run folder may be used.

    Raises:
        RunFolderError: when it holds a run and neither `resume` nor `overwrite` was asked for, or when it holds
            something else: what is no run is never overwritten.
    """
    status = read_json(folder / "run.json").get("status")
    if status is None and not resume and folder.exists() and not _is_bare(folder):
        raise RunFolderError(Problem("this is no run and not empty", Place(str(folder)), "give another `output`"))
    if resume or overwrite:
        return
    if status == "complete":
        hint = "give another `output`, --overwrite it, or --resume it with more epochs"
        raise RunFolderError(Problem("this run is finished", Place(str(folder)), hint))
    if status is not None and list((folder / "checkpoints").glob("step-*")):
        raise RunFolderError(
            Problem(f"a run that is {status} lies here", Place(str(folder)), "--resume it, or --overwrite it")
        )


def _is_bare(folder: Path) -> bool:
    """Return whether a folder is empty, or a run that was killed before it began."""
    return folder.is_dir() and all(f.name == "checkpoints" and not any(f.iterdir()) for f in folder.iterdir())


def make_run(folder: Path, resume: bool) -> None:
    """Make the run folder; what an earlier run left there is taken away, unless it is resumed.

    Raises:
        StorageError: when it can't be made.
    """
    try:
        if not resume:
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            for pattern in (
                "metrics.jsonl",
                "loss.svg",
                "README.md",
                "MANIFEST.json",
                "*.safetensors*",
                "*config.json",
            ):
                for file in folder.glob(pattern):
                    file.unlink()
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(Problem(f"the run folder can't be made: {error.strerror}", Place(str(folder)))) from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file without secrets, whole or not at all.

    Raises:
        StorageError: when the disk is full or the folder can't be written.
    """
    staged = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with staged.open("w", encoding="utf-8") as stream:
            stream.write(redact(text))
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
        if not is_inside(name) or not file.resolve().is_relative_to(folder.resolve()):
            return f"`{name}` leads out of its folder"
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


# ---------------------------------------------------------------- checkpoints


def path_of(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(
    run: Path, progress: Progress, write_model: Callable[[Path], None], optimizer: Any,
    random: list[dict[str, Any]], about: dict[str, Any],
) -> Path:  # fmt: skip
    """Commit a checkpoint: the model's trained tensors, optimizer, random state of each process, and progress."""

    def write(folder: Path) -> None:
        write_model(folder)
        _save_optimizer(optimizer, folder)
        (folder / "state.json").write_text(json.dumps({"progress": progress.__dict__, "random": random}))

    target = path_of(run, progress.step)
    commit(target, write, {"step": progress.step, **about})
    return target


def newest(run: Path) -> tuple[Path, Progress, list[str]] | None:
    """Return the newest checkpoint that verifies, its progress, and a line about each newer one that does not."""
    bad: list[str] = []
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        wrong = verify(folder)
        if wrong is None:
            return folder, Progress(**read_json(folder / "state.json")["progress"]), bad
        bad.append(f"{folder.name} {wrong}: not used")
    if bad:
        raise StorageError(
            Problem("no valid checkpoint: " + "; ".join(bad), Place(str(run)), "start again with --overwrite")
        )
    return None


def restore(folder: Path, optimizer: Any, process: int) -> None:
    """Put the optimizer's state and the random state of a process (from 0) back."""
    _load_optimizer(optimizer, folder)
    states = read_json(folder / "state.json")["random"]
    set_random_state(states[process % len(states)])


def rotate(run: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; the best one stays."""
    for folder in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        if best is None or folder != path_of(run, best):
            trash = folder.with_name(f".trash-{folder.name}")
            folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def _save_optimizer(optimizer: Any, folder: Path) -> None:
    """Write an optimizer's state: tensors into safetensors, the rest and the shape of it all into JSON."""
    tensors: dict[str, torch.Tensor] = {}
    plain = _without_tensors(optimizer.state_dict(), "", tensors)
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(plain), encoding="utf-8")


def _load_optimizer(optimizer: Any, folder: Path) -> None:
    """Put moments and step counts back; rates and the other options stay those of the recipe.

    Raises:
        ValueError: when they are of another optimizer.
    """
    tensors = load_file(folder / "optimizer.safetensors")
    state = _with_tensors(json.loads((folder / "optimizer.json").read_text(encoding="utf-8")), tensors)
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if [group.keys() - {"params"} for group in state["param_groups"]] != [group.keys() for group in options]:
        raise ValueError("its optimizer is another one")
    optimizer.load_state_dict(state)
    for group, wanted in zip(optimizer.param_groups, options, strict=True):
        group.update(wanted)


def _without_tensors(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return nested state as JSON, moving its tensors to `tensors` under their path; int keys and tuples are marked."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, dict):
        items = [[key, _without_tensors(item, f"{path}/{key}", tensors)] for key, item in value.items()]
        return {"dict": items}
    if isinstance(value, (list, tuple)):
        items = [_without_tensors(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    return value


def _with_tensors(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _with_tensors(item, tensors) for key, item in content}
    items = [_with_tensors(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def random_state() -> dict[str, Any]:
    """Return the state of every random generator as JSON."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random generator back to a state of `random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_bytes(one) for one in state["cuda"]])


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
