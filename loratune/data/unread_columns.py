"""What stands in the rows and nobody reads: counted by name, and told once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from loratune.errors import shorten

NAMES = 100  # counted one by one: keys that are data of their own would be a name a row
OTHERS = "others"
_SHOWN = 12


def add(counts: dict[str, int], names: Iterable[str]) -> None:
    """Count the columns, and keys of messages, of a row that hold something and are read by nobody."""
    for name in names:
        key = name if name in counts or len(counts) < NAMES else OTHERS
        counts[key] = counts.get(key, 0) + 1


def lines(train: Mapping[str, int], held_out: Mapping[str, int]) -> Iterator[str]:
    """Yield a line for the training rows and one for the held-out rows, where something is not read.

    Args:
        train: number of rows by name.
        held_out: the same of the held-out rows; empty where they were read with the training rows.
    """
    for what, counts in (("", train), ("of the held-out rows ", held_out)):
        if counts:
            shown = [f"`{shorten(name)}` ({number:,} rows)" for name, number in list(counts.items())[:_SHOWN]]
            more = len(counts) - len(shown)
            told = ", ".join([*shown, f"and {more:,} more"] if more else shown)
            yield f"{what}not read, though something stands there: {told}"
