"""Where a command may write: never into a checkpoint, a base model or the hub's cache."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from loratune.data.section import SUFFIXES
from loratune.errors import Place, Problem, UsageError, shorten
from loratune.recipe import Recipe
from loratune.system import files, run_files, storage

Input = tuple[str, str]  # option or key that names a file, folder or glob that is read, and its path

PREDICTIONS = run_files.PREDICTIONS
_STEP = re.compile(r"step-\d+")
_PAGE = b'<meta name="generator" content="loratune">'  # of each page that `inspect` writes
_MARKS = {"place", "prompt", "reference"}  # keys of each line of a file of predictions


def check(path: Path, option: str, base: str | None = None) -> None:
    """Check that a file or folder to be written is not inside of a protected folder.

    Args:
        path: of the file or folder.
        option: with which to choose another, for the hint.
        base: the base model in use, if it is known.

    Raises:
        UsageError: when it is in a checkpoint, a base or the hub's cache, or is a file of a run.
    """
    own = Path(base).resolve() if base is not None else None
    for folder in path.parent.resolve().joinpath(path.name).parents:
        kind = run_files.protected(folder)
        if kind is None and folder == own and not run_files.is_run(folder):
            kind = "a base model"
        if kind is not None:
            told = f"is in {kind}, which is never written to: {folder}"
            raise UsageError(Problem(told, Place(str(path)), f"choose another path with {option}"))
        name = path.parent.resolve().joinpath(path.name).relative_to(folder).as_posix()
        if run_files.is_run(folder) and run_files.is_written(name) and not run_files.is_predictions(name):
            told = f"has a name that the run in {folder} writes itself"
            raise UsageError(Problem(told, Place(str(path)), f"choose another path with {option}"))


def check_apart(path: Path, option: str, inputs: Sequence[Input]) -> None:
    """Check that a file to be written is not an input, nor would be read as rows the next time.

    Args:
        path: of the file.
        option: with which to choose another, for the hint.
        inputs: files, folders and globs; those not on this machine are ignored.

    Raises:
        UsageError: when it is.
    """
    for what, given in inputs:
        source = files.local(given)
        if not (source.is_absolute() or files.there(source) or glob.has_magic(given)):
            continue  # on the hub
        if run_files.is_among(path, source) and (
            not source.is_dir() or path.name.removesuffix(".gz").endswith(SUFFIXES)
        ):
            same = run_files.meets(path, source) == "is"
            told = f"is what {what} names" if same else f"is one of the files of {what} {shorten(given, 400)}"
            raise UsageError(Problem(told, Place(str(path)), f"choose another path with {option}"))


def inputs_of(recipe: Recipe) -> list[Input]:
    """Return what a recipe reads on this machine, with the key that names it."""
    found = [("`data.train`", source.path) for source in recipe.data.train]
    found += [("`data.eval`", source.path) for source in recipe.data.eval or ()]
    others = (("`data.chat_template`", recipe.data.chat_template), ("`model.base`", recipe.model.base))
    return [one for one in (*found, *((what, path) for what, path in others if path)) if os.path.isabs(one[1])]


def predictions(name: str, out: Path | None, base: str, inputs: Sequence[Input] = ()) -> Path:
    """Return the file for the predictions of an evaluation.

    Args:
        name: run, adapter or model, as it was given.
        out: file that was asked for; None: in the run folder, also for a checkpoint, with its step in the name; for
            other folders and models of the hub in the current folder.
        base: the base model in use.
        inputs: what is read; see `check_apart`.

    Raises:
        UsageError: when it would be in a checkpoint or a base, is another existing file, or is an input.
        StorageError: when it can't be written.
    """
    path = _by_default(files.local(name).resolve()) if out is None else files.local(out)
    check(path, "--out", base)
    check_apart(path, "--out", inputs)
    storage.check_place(path)
    if path.is_file() and not _are_predictions(path):
        raise UsageError(
            Problem("does not hold predictions, so it is not overwritten", Place(str(path)),
                    "name another file with --out")
        )  # fmt: skip
    return path


def check_page(path: Path) -> None:
    """Check that a page may be written: where there is no file, an empty file or an earlier page.

    Raises:
        UsageError: when another file is there, or it is in a checkpoint, a base or the hub's cache.
        StorageError: when it can't be written.
    """
    check(path, "--html")
    storage.check_place(path)
    if path.is_file():
        with files.opened(path) as stream:
            start = stream.read(1000)
        if start and _PAGE not in start:
            told = "does not hold a page of `inspect`, so it is not overwritten"
            raise UsageError(Problem(told, Place(str(path)), "name another file with --html"))


def _by_default(folder: Path) -> Path:
    run = folder.parent.parent
    if run_files.is_run(folder):
        return folder / PREDICTIONS
    if _STEP.fullmatch(folder.name) and folder.parent.name == "checkpoints" and run_files.is_run(run):
        return run / f"predictions-{folder.name}.jsonl"
    return Path.cwd() / PREDICTIONS


def is_of_evaluation(path: Path) -> bool:
    """Return whether a file in a run folder was written by an evaluation, by its name and its first line."""
    return run_files.is_predictions(path.name) and path.is_file() and _are_predictions(path)


def _are_predictions(path: Path) -> bool:
    """Return whether a file is empty, or its first line is one that an evaluation writes."""
    with files.opened(path) as stream:
        line = stream.readline(1 << 24)
    try:
        first = json.loads(line) if line.strip() else None
    except (ValueError, RecursionError):
        return False
    return first is None or (isinstance(first, dict) and first.keys() >= _MARKS)
