"""Columns and keys with content that are not read: counted by name, and reported once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from loratune.errors import shorten

NAMES = 100  # names that are counted: keys that are data themselves would be a new name in each row
OTHERS = "others"
_SHOWN = 12


def add(counts: dict[str, int], names: Iterable[str]) -> None:
    """Count the columns, and keys of messages, of a row that have content but are not read."""
    for name in names:
        key = name if name in counts or len(counts) < NAMES else OTHERS
        counts[key] = counts.get(key, 0) + 1


def lines(train: Mapping[str, int], held_out: Mapping[str, int]) -> Iterator[str]:
    """Yield a line for the training rows and one for the held-out rows, if something is not read.

    Args:
        train: number of rows by name.
        held_out: the same for held-out rows; empty if they were read with the training rows.
    """
    for what, counts in (("", train), ("of the held-out rows ", held_out)):
        if counts:
            shown = [f"`{shorten(name)}` ({number:,} rows)" for name, number in list(counts.items())[:_SHOWN]]
            more = len(counts) - len(shown)
            told = ", ".join([*shown, f"and {more:,} more"] if more else shown)
            yield f"{what}not read, though not empty: {told}"
