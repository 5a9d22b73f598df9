"""What became of every row that was read: one line each in ledger.jsonl, and the sums."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from loratune.errors import Place, Problem, StorageError

Fate = Literal["kept", "cut", "split", "by turn", "dropped", "duplicate", "skipped", "refused"]


@dataclass
class Counts:
    """Sums over the rows of a set: read = kept + dropped + skipped + deduplicated + refused + held out, always.

    `kept` counts rows that are trained on in whole or in part; `truncated`, `split` and `by_turn` are among them, and
    so are `duplicates` unless the recipe drops them.
    """

    read: int = 0
    kept: int = 0
    dropped: int = 0  # too long
    skipped: int = 0  # can't be read, and the recipe skips such rows
    deduplicated: int = 0
    refused: int = 0  # the reason why there will be no run
    held_out: int = 0
    truncated: int = 0
    split: int = 0
    by_turn: int = 0
    duplicates: int = 0
    lost_tokens: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    first: list[str] = field(default_factory=list)  # places of the first rows that were not kept whole

    @property
    def lost(self) -> int:
        """Number of rows of which nothing is trained, against the user's wish."""
        return self.dropped + self.skipped

    def as_json(self) -> dict[str, Any]:
        """Return the sums as JSON data."""
        return asdict(self)


class Ledger:
    """Collects the fate of each row of a set, on disk when there are many."""

    def __init__(self, name: str):
        self.name = name
        self.counts = Counts()
        # in memory until it is large; closed with the ledger
        self._lines: IO[str] = tempfile.SpooledTemporaryFile(16 << 20, "w+", encoding="utf-8")  # noqa: SIM115
        weakref.finalize(self, self._lines.close)

    def add(self, place: Place, fate: Fate, tokens: int = 0, lost: int = 0, reason: str = "") -> None:
        """Record a row.

        Args:
            place: where it stands.
            fate: what became of it.
            tokens: its length.
            lost: tokens of it that are not trained because of this.
            reason: why, where it was not kept whole.
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
        line = {"set": self.name, "place": str(place), "fate": fate, "tokens": tokens}
        self._lines.write(json.dumps({**line, **({"lost": lost, "reason": reason} if reason else {})}) + "\n")

    def append_to(self, path: Path) -> None:
        """Append the lines to a file.

        Raises:
            StorageError: when it can't be written.
        """
        try:
            self._lines.seek(0)
            with path.open("a", encoding="utf-8") as stream:
                shutil.copyfileobj(self._lines, stream)
        except OSError as error:
            raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(path)))) from None
