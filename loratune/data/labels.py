"""Labels of rows: how often each occurs, and whether their verbalizers can be told apart."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations

import numpy as np

from loratune.data.dataset import Rows
from loratune.data.encode import Encoder
from loratune.data.formats import Patterns, RowError
from loratune.data.formats.section import FormatSection
from loratune.errors import DataError, Place, Problem, listed, shorten


def check_verbalizers(form: FormatSection, encoder: Encoder) -> list[str]:
    """Return notes on verbalizers one of which is the beginning of another.

    Raises:
        DataError: when two are the same tokens.
    """
    notes: dict[str, None] = {}
    for number in range(len(form.patterns)) if isinstance(form, Patterns) else ():
        assert isinstance(form, Patterns)
        for (one, short), (other, long) in permutations(_tokens(form, number, encoder).items(), 2):
            if short == long:
                raise DataError(
                    f"the tokens of the labels {listed([one, other])} are the same after pattern {number + 1}",
                    "give each another text in `data.format.verbalizers`",
                )
            if long[: len(short)] == short:
                what = f"the tokens of the label `{other}` begin with those of `{one}`"
                notes[f"{what}: by their sum, `{one}` is always the likelier"] = None
    return list(notes)


def _tokens(form: Patterns, pattern: int, encoder: Encoder) -> dict[str, list[int]]:
    """Return the label tokens of each verbalizer after a pattern; none where rows will say why."""
    made = form.read({**dict.fromkeys(form.columns, "x"), form.label: form.labels[0]})
    first = pattern * len(form.labels)
    try:
        rows = [encoder.encode(part, Place("data.format")) for part in made.parts[first : first + len(form.labels)]]
    except RowError:
        return {}
    return {label: row.ids[row.trained].tolist() for label, row in zip(form.labels, rows, strict=True)}


def counted(form: FormatSection, rows: Rows) -> dict[str, int]:
    """Return how many rows have each label or class, in the order of its number; empty for a format without."""
    if rows.classes:
        found = np.bincount(np.concatenate(rows.labels).astype(np.int64), minlength=len(rows.classes))
        return dict(zip(rows.classes, found.tolist(), strict=True))
    if not isinstance(form, Patterns):
        return {}
    found = np.stack(rows.labels).argmax(axis=1)
    return {label: int(np.sum(found == index)) for index, label in enumerate(form.labels)}


def check_seen(form: FormatSection, rows: Rows) -> list[str]:
    """Return notes on labels that no training row has, and on labels that may be the same.

    Raises:
        DataError: when all rows have the same label, or none has one.
    """
    numbers = counted(form, rows)
    unseen = [label for label, number in numbers.items() if not number]
    place = Place(rows.place(0).source)
    if numbers and len(unseen) == len(numbers):
        raise DataError(Problem(f"none of {rows.samples:,} training rows has a label", place))
    if len(unseen) == len(numbers) - 1 and rows.samples in numbers.values():
        only = next(label for label, number in numbers.items() if number)
        told = f"all {rows.samples:,} training rows have the label `{shorten(only)}`: it would be learned for any text"
        raise DataError(Problem(told, place, "add rows of other labels"))
    notes = [f"no training row has the label {listed([shorten(label) for label in unseen], 8)}"] if unseen else []
    if alike := _alike(numbers):
        notes.append(f"labels that differ in case or spaces alone are different classes: {'; '.join(alike)}")
    return notes


def _alike(labels: Iterable[str], most: int = 4) -> list[str]:
    """Return the first labels that differ in nothing but case and spaces, each group in one text."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(" ".join(label.casefold().split()), []).append(label)
    return [listed(some, 8) for some in groups.values() if len(some) > 1][:most]
