"""Checkpoints of a run folder: saving, finding, restoring and rotating them; and who may use the folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratune.errors import Place, Problem, RunFolderError, StorageError, listed
from loratune.runs import lock, outputs, training_state
from loratune.runs.facts import Facts
from loratune.system import run_files, storage


@dataclass(frozen=True)
class Progress:
    """Progress of a run: what a resume needs besides weights, optimizer and random states.

    Attributes:
        step: number of steps done.
        best_value, best_step: of the best evaluation so far.
        patience_value: reference of early stopping: an evaluation counts as better if it is better than this by
        `early_stopping.min_delta`.
        evaluations_without_better: since the last better one.
        pending: whether the evaluation after `step` is not done yet, as a signal interrupted it.
        metric: what evaluations are compared by: the loss, or a figure of the objective.
    """

    step: int
    best_value: float | None = None
    best_step: int | None = None
    patience_value: float | None = None
    evaluations_without_better: int = 0
    pending: bool = False
    metric: str = "loss"

    def evaluated(self, value: float, margin: float, metric: str = "loss", higher: bool = False) -> Progress:
        """Return the progress after an evaluation.

        Args:
            value: measured, finite.
            margin: by how much it must be better than `patience_value` to count as better.
            metric: what was measured; if another than before, earlier evaluations no longer count.
            higher: whether higher is better, not lower.
        """
        if metric != self.metric:
            return Progress(self.step, metric=metric).evaluated(value, margin, metric, higher)
        sign = -1 if higher else 1
        better = self.best_value is None or sign * value < sign * self.best_value
        progress = replace(self, best_value=value, best_step=self.step) if better else self
        if self.patience_value is None or sign * value < sign * self.patience_value - margin:
            return replace(progress, pending=False, patience_value=value, evaluations_without_better=0)
        return replace(progress, pending=False, evaluations_without_better=self.evaluations_without_better + 1)


_OLD_NAMES = {"best_loss": "best_value", "patience_loss": "patience_value"}


def _progress(state: Mapping[str, Any]) -> Progress:
    """Return a saved `Progress`, also of an older version, which had other names and could record nan as the best."""
    progress = Progress(**{_OLD_NAMES.get(name, name): value for name, value in state.items()})
    if progress.best_value is None or not math.isfinite(progress.best_value):
        return replace(progress, best_value=None, best_step=None, patience_value=None)
    return progress if progress.patience_value is not None else replace(progress, patience_value=progress.best_value)


@dataclass(frozen=True)
class Found:
    """A checkpoint that passes verification.

    Attributes:
        folder: of the checkpoint.
        progress: of the run then.
        seal: its manifest.
        finished: whether its run was complete.
        bad: a line about each newer checkpoint that fails verification.
    """

    folder: Path
    progress: Progress
    seal: dict[str, Any]
    finished: bool
    bad: list[str]


def status(folder: Path) -> str | None:
    """Return the state of a run folder's run: running, killed, interrupted, failed or complete; None without a run.

    A run with the status `running` whose lock nobody holds was killed.
    """
    known = storage.read_json(folder / "run.json").get("status")
    return "killed" if known == "running" and lock.holder(folder) is None else known


def check_free(folder: Path, resume: bool, overwrite: bool) -> None:
    """Check that a run folder, whose lock is held, may be used.

    Raises:
        RunFolderError: when it has a run and neither `resume` nor `overwrite` was asked for, or when it has files that
            are no run's, which are never overwritten.
    """
    known = storage.read_json(folder / "run.json").get("status")
    saved = _all(folder)
    if known is None and not (resume and saved) and folder.exists() and not _is_bare(folder):
        raise RunFolderError(Problem("not empty, and not a run", Place(str(folder)), "give another `output`"))
    check_foreign(folder)
    if resume or overwrite:
        return
    if known == "complete":
        hint = "give another `output`, --overwrite it, or --resume it with more epochs"
        raise RunFolderError(Problem("this run is finished", Place(str(folder)), hint))
    if known is not None and saved:
        was = "was killed" if known == "running" else f"is {known}"  # not running: we hold the lock
        raise RunFolderError(
            Problem(f"this folder holds a run that {was}", Place(str(folder)), "--resume it, or --overwrite it")
        )


def _is_bare(folder: Path) -> bool:
    """Return whether a folder is empty, or a run that was killed before it began."""

    def ours(path: Path) -> bool:
        if path.name == "checkpoints":
            return path.is_dir() and not any(path.iterdir())
        return path.name == lock.NAME or run_files.is_left_over(path.name)

    return folder.is_dir() and all(ours(path) for path in folder.iterdir())


def check_foreign(folder: Path, others: Collection[str] = ()) -> None:
    """Check that nothing in a run folder has the name of a result, unless a run wrote it by its manifest.

    Args:
        folder: of the run.
        others: names of further files that will be written.

    Raises:
        RunFolderError: when something has, as it would be overwritten.
    """
    own = storage.own(folder)
    places = (*folder.glob("*"), *folder.glob("additional_chat_templates/*"))
    names = [place.relative_to(folder).as_posix() for place in places]
    foreign = sorted(name for name in names if (run_files.is_result(name) or name in others) and name not in own)
    if foreign:
        told = f"{listed(foreign)} in this run folder was not written by the run, which would overwrite it"
        raise RunFolderError(Problem(told, Place(str(folder)), "move it away, or give another `output`"))


def make_run(folder: Path, facts: Facts, resume: bool) -> list[str]:
    """Write run.json, and delete what an earlier run left in the folder, unless it is resumed.

    Only files that a run wrote are deleted, and no link is followed.

    Returns:
        A line about each other file, which stays.

    Raises:
        StorageError: when it can't be written.
    """
    # first of all: after a kill, half an old run must not look complete
    storage.write_json(folder / "run.json", {**facts.as_json(), "status": "running"})
    kept: list[str] = []
    try:
        if not resume:
            kept = _start_over(folder)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "ledger.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(Problem(f"the run folder can't be created: {error.strerror}", Place(str(folder)))) from None
    return kept


def _start_over(folder: Path) -> list[str]:
    """Delete the files of an old run, which would be mistaken for those of the new one."""
    written = {folder / name for name in storage.own(folder)} | {folder / "metrics.jsonl"}
    written |= {file for file in folder.glob("predictions*.jsonl") if outputs.is_of_evaluation(file)}
    written |= {file for file in folder.glob(run_files.REFERENCE) if "key" in storage.read_json(file)}
    for file in sorted(written, key=lambda one: one.name == storage.MANIFEST):  # last, as it lists the others
        file.unlink(missing_ok=True)
    saved, kept = folder / "checkpoints", []
    if saved.is_symlink():
        where = saved.readlink()
        saved.unlink()
        return [f"`checkpoints` was a link to {where}: that folder is left alone, and the new run has its own"]
    for place in (*_all(folder), saved / "final"):
        if place.is_symlink():
            place.unlink()
        elif place.is_dir() and (rest := storage.discard(place)):
            kept.append(_told_of_rest(place, rest))
    for place in [*saved.glob(".quarantine/step-*")]:
        storage.take_away(place)
    storage.sweep(saved)
    return kept


def _told_of_rest(folder: Path, rest: Path) -> str:
    return f"{folder.name} held files that its run did not write: moved to {rest.relative_to(folder.parent.parent)}"


def path_of(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:06d}"


def _all(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [f for f in (run / "checkpoints").glob("step-*") if f.name[5:].isdecimal()]
    return sorted(found, key=lambda f: int(f.name[5:]))


def save(
    run: Path, progress: Progress, write_model: Callable[[Path], None], optimizer: Any, scaler: Any,
    random: list[dict[str, Any]], about: dict[str, Any],
) -> int:  # fmt: skip
    """Commit a checkpoint and return its bytes.

    Args:
        run: the run folder.
        progress: of the run.
        write_model: writes the trained tensors into a folder.
        optimizer: whose state is kept.
        scaler: of float16 training, or None.
        random: state of the random generators of each process.
        about: entries for the manifest.

    Raises:
        StorageError: when the disk is full or can't be written; earlier checkpoints are untouched.
        TrainingError: when the optimizer's state is not finite.
    """

    def write(folder: Path) -> None:
        write_model(folder)
        training_state.save_optimizer(optimizer, folder)
        state = {"progress": progress.__dict__, "random": random, "scaler": scaler.state_dict() if scaler else None}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    return storage.commit(path_of(run, progress.step), write, {"step": progress.step, **about})


def newest(run: Path) -> Found | None:
    """Return the newest checkpoint that passes verification; newer ones are moved to checkpoints/.quarantine.

    Raises:
        StorageError: when there are checkpoints but none passes; they are not moved then.
    """
    storage.sweep(run)
    storage.sweep(run / "checkpoints")
    bad: list[tuple[Path, str]] = []
    for folder in reversed(_all(run)):
        wrong = storage.verify(folder, alone=True)
        if wrong is not None:
            bad.append((folder, wrong))
            continue
        seal = storage.read_json(folder / storage.MANIFEST)
        progress = _progress(storage.read_json(folder / "state.json")["progress"])
        finished = progress.step >= seal["steps"] or storage.read_json(run / "run.json").get("status") == "complete"
        return Found(folder, progress, seal, finished, [_quarantine(*one) for one in bad])
    if bad:
        told = "; ".join(f"{folder.name} {wrong}" for folder, wrong in bad)
        raise StorageError(Problem(f"no valid checkpoint: {told}", Place(str(run)), "start over with --overwrite"))
    return None


def _quarantine(folder: Path, wrong: str) -> str:
    """Move a damaged checkpoint out of the way; return a line about it."""
    place = storage.set_apart(folder, folder.name)
    moved = f", moved to {place.relative_to(folder.parent.parent)}" if place else ""
    return f"{folder.name} {wrong}: not used{moved}"


def restore(folder: Path, optimizer: Any, scaler: Any, process: int) -> None:
    """Restore the optimizer's state, the scaler's and the random state of a process (from 0)."""
    training_state.load_optimizer(optimizer, folder)
    state = storage.read_json(folder / "state.json")
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    training_state.set_random_state(state["random"][process % len(state["random"])])


def rotate(run: Path, keep: int, progress: Progress) -> list[str]:
    """Delete all but the newest `keep` checkpoints; the one just saved and the best one always stay.

    Returns:
        A line about each that contained other files, which stay.

    Raises:
        StorageError: when one can't be deleted.
    """
    last, best = path_of(run, progress.step), path_of(run, progress.best_step or progress.step)
    found = _all(run)
    old = [folder for folder in found[:-keep] if folder not in (last, best)]
    rests = [(folder, storage.discard(folder)) for folder in old]
    return [_told_of_rest(folder, rest) for folder, rest in rests if rest]
