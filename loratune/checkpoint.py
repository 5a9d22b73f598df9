"""The run folder: what is in it, how a checkpoint is saved, found again and rotated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune import states, storage
from loratune.errors import Place, Problem, RunFolderError, StorageError


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
    status = storage.read_json(folder / "run.json").get("status")
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
        states.save_optimizer(optimizer, folder)
        (folder / "state.json").write_text(json.dumps({"progress": progress.__dict__, "random": random}))

    target = path_of(run, progress.step)
    storage.commit(target, write, {"step": progress.step, **about})
    return target


def newest(run: Path) -> tuple[Path, Progress, list[str]] | None:
    """Return the newest checkpoint that verifies, its progress, and a line about each newer one that does not."""
    bad: list[str] = []
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        wrong = storage.verify(folder)
        if wrong is None:
            return folder, Progress(**storage.read_json(folder / "state.json")["progress"]), bad
        bad.append(f"{folder.name} {wrong}: not used")
    if bad:
        raise StorageError(
            Problem("no valid checkpoint: " + "; ".join(bad), Place(str(run)), "start again with --overwrite")
        )
    return None


def restore(folder: Path, optimizer: Any, process: int) -> None:
    """Put the optimizer's state and the random state of a process (from 0) back."""
    states.load_optimizer(optimizer, folder)
    random = storage.read_json(folder / "state.json")["random"]
    states.set_random_state(random[process % len(random)])


def rotate(run: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; the best one stays."""
    for folder in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        if best is None or folder != path_of(run, best):
            trash = folder.with_name(f".trash-{folder.name}")
            folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
