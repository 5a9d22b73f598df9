"""Choose the files of a data folder by the names of splits, and report what is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# words in names of files and folders that mean a split, as in the library `datasets`
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = {word: split for split, words in _SPLITS.items() for word in words}
_BETWEEN = re.compile(r"[-._ 0-9]+")
_SHOWN = 3


@dataclass(frozen=True)
class Choice:
    """The files of a folder that are read, and lines to print about the choice."""

    files: tuple[Path, ...]
    told: tuple[str, ...] = ()


def choose(folder: Path, files: Sequence[Path], name: str) -> Choice:
    """Choose among the data files of a folder.

    Training rows are those not named for another split; held-out rows those of the validation split, else of the test
    split, else those not named for training. A folder without such files is read completely.

    Args:
        folder: as it was given.
        files: all its files that may have rows.
        name: of the set of rows: `train`, or another for held-out rows.
    """
    splits = {file: of(file.relative_to(folder)) for file in files}
    found = set(splits.values())
    if name == "train":
        wanted = {"train", None}
    else:
        wanted = next(({split} for split in ("validation", "test", None) if split in found), {"train"})
    chosen = tuple(file for file in files if splits[file] in wanted)
    if not chosen or (name != "train" and wanted == {"train"}):
        return Choice(tuple(files), (f"{folder}: all files are read, though named for {_kinds(splits, files)}",))
    left = [file for file in files if splits[file] not in wanted]
    if not left:
        return Choice(chosen)
    remedy = "set data.eval to evaluate on them" if name == "train" else "name a file or glob to read them"
    return Choice(chosen, (f"{_names(folder, left)} left out: named for {_kinds(splits, left)} ({remedy})",))


def of(path: Path) -> str | None:
    """Return the split a file is named for: from its name, else from its folders, innermost first."""
    for part in reversed(path.parts):
        for word in _BETWEEN.split(part.lower()):
            if word in _WORDS:
                return _WORDS[word]
    return None


def no_rows(folder: Path, hidden: Sequence[Path], papers: Sequence[Path]) -> Iterator[str]:
    """Yield a line on files of a folder that look like data but are none."""
    if hidden or papers:
        kinds = [kind for kind, files in (("hidden", hidden), ("text files next to rows", papers)) if files]
        yield f"{_names(folder, [*hidden, *papers])} left out: {' or '.join(kinds)}"


def _names(folder: Path, files: Sequence[Path]) -> str:
    """Return the folder, the names of some of its files, and the verb."""
    names = [str(file.relative_to(folder)) for file in files]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")
    return f"{folder}: {shown} {'is' if len(names) == 1 else 'are'}"


def _kinds(splits: dict[Path, str | None], left: Sequence[Path]) -> str:
    """Return the splits that files left out are named for."""
    kinds = sorted({splits[file] or "none" for file in left})
    return f"{'another split' if len(kinds) == 1 else 'other splits'}, {' and '.join(kinds)}"
