"""The ledger: what became of every row that was read, one line each in ledger.jsonl, and totals."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

from loratune.errors import Place
from loratune.redact import redact

Fate = Literal["kept", "cut", "split", "by turn", "dropped", "duplicate", "skipped", "refused"]


@dataclass
class Counts:
    """Totals over the rows of a set: read = kept + dropped + skipped + deduplicated + refused + held out, always.

    `kept` counts rows that are trained on in full or in part; it includes `truncated`, `split` and `by_turn`, and
    `duplicates` unless the recipe drops them.
    """

    read: int = 0
    kept: int = 0
    dropped: int = 0  # too long
    skipped: int = 0  # unusable, and the recipe skips such rows
    deduplicated: int = 0
    refused: int = 0  # these prevent the run
    held_out: int = 0
    truncated: int = 0
    split: int = 0
    by_turn: int = 0
    duplicates: int = 0
    lost_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    first: list[str] = field(default_factory=list)  # places of the first rows that were not kept in full

    @property
    def lost(self) -> int:
        """Number of rows that are lost although the user wants to train on them."""
        return self.dropped + self.skipped

    def as_json(self) -> dict[str, Any]:
        """Return the totals as JSON data."""
        return asdict(self)


class Ledger:
    """Record the fate of each row of a set: a line each in a text file, and totals.

    Args:
        name: of the set, written in each line.
        lines: the file for the lines.
    """

    def __init__(self, name: str, lines: IO[str]):
        self.name = name
        self.counts = Counts()
        self._lines = lines

    def add(self, place: Place, fate: Fate, tokens: int = 0, lost: int = 0, reason: str = "") -> None:
        """Record a row.

        Args:
            place: where it came from.
            fate: what became of it.
            tokens: length of the row.
            lost: tokens of it that are lost by this.
            reason: why, if it was not kept in full.
        """
        counts = self.counts
        counts.read += 1
        counts.lost_tokens += lost
        if fate == "dropped":
            counts.dropped += 1
        elif fate == "skipped":
            counts.skipped += 1
        elif fate == "refused":
            counts.refused += 1
        elif fate == "duplicate":
            counts.deduplicated += 1
        else:
            counts.kept += 1
            counts.truncated += fate == "cut"
            counts.split += fate == "split"
            counts.by_turn += fate == "by turn"
        if reason and len(counts.first) < 5:
            counts.first.append(f"{place}: {reason}")
        line: dict[str, Any] = {"set": self.name, "place": str(place), "fate": fate, "tokens": tokens}
        if reason:  # it may quote the row
            line |= {"lost": lost, "reason": redact(reason)}
        self._lines.write(json.dumps(line) + "\n")
