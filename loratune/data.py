"""The rows of a run: read, tokenized, each accounted for, and kept in flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from loratune import rows
from loratune.encode import Encoder, Row
from loratune.errors import DataError, Place, Problem
from loratune.formats import Auto, Example, Plain, RowError
from loratune.ledger import Counts, Fate, Ledger
from loratune.recipe import Data, Recipe, Source

SHOWN = 5  # rows named in an error


@dataclass
class Rows:
    """Tokenized rows in flat arrays: 5 bytes per token, whatever the number of rows.

    Attributes:
        ids, trained: of all rows, one behind the other, shape (tokens,).
        starts: where each row begins, and the end of the last, shape (rows + 1,).
        places: where each row came from.
        weights: how often each row is seen per epoch, shape (rows,).
        contents: a number for what each row says: rows that were read from the same words have the same, and so have
            the pieces of one row; shape (rows,).
        ledger: what became of every row read.
    """

    ids: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    places: list[Place]
    weights: np.ndarray
    contents: np.ndarray
    counts: Counts
    ledger: Ledger
    formats: dict[str, int]  # rows read as each format

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Row:
        cut = slice(self.starts[index], self.starts[index + 1])
        return Row(self.ids[cut], self.trained[cut], self.places[index])

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row in tokens, shape (rows,)."""
        return np.diff(self.starts)

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """Return some of the rows as a set of its own."""
        kept = [_Kept(self[int(i)], float(self.weights[int(i)]), int(self.contents[int(i)])) for i in indices]
        return pack(kept, replace(self.counts), self.ledger, self.formats)


@dataclass(frozen=True)
class _Kept:
    row: Row
    weight: float
    content: int


def load(
    sources: Sequence[Source],
    data: Data,
    encoder: Encoder,
    progress: Callable[[int], None] = lambda count: None,
    name: str = "train",
) -> Rows:
    """Read and tokenize all rows of some sources, and account for each.

    Args:
        sources: where the rows come from.
        data: format, longest row, and what happens to rows that are too long, bad or said twice.
        encoder: of the base model's tokenizer.
        progress: called now and then with the number of rows read so far.
        name: of the set, for the ledger.

    Raises:
        DataError: naming the first rows that can't be used, or when more are lost than `max_lost` allows, or when there
            are no rows at all.
    """
    ledger = Ledger(name)
    kept: list[_Kept] = []
    problems: list[Problem] = []
    long: list[Problem] = []
    seen: set[int] = set()
    formats: dict[str, int] = {}
    for source in sources:
        for number, raw in enumerate(rows.read(source)):
            if number == source.max_rows:
                break
            if ledger.counts.read and ledger.counts.read % 256 == 0:
                progress(ledger.counts.read)
            try:
                example = _example(raw, data, formats)
                encoded = encoder.rows(example, raw.place)
                for row in encoded:
                    _check_trained(row)
            except RowError as error:
                if data.on_bad_row == "error":
                    problems.append(Problem(str(error), raw.place))
                ledger.add(raw.place, "skipped" if data.on_bad_row == "skip" else "refused", reason=str(error))
                continue
            tokens = sum(len(row.ids) for row in encoded)
            content = _content(encoded)
            again = content in seen
            seen.add(content)
            ledger.counts.duplicates += again
            if again and data.duplicates == "drop":
                ledger.add(raw.place, "duplicate", tokens, tokens, "says what an earlier row said")
                continue
            fate, pieces = _fit(encoded, example, data)
            length = max(len(row.ids) for row in encoded)
            told = _TOLD.get(fate)
            reason = f"{length:,} tokens, {told.format(data.max_length)}" if told else ""
            if fate == "refused":
                long.append(Problem(reason, raw.place))
            ledger.add(raw.place, fate, tokens, tokens - sum(len(piece.ids) for piece in pieces), reason)
            kept += [_Kept(piece, source.weight, content) for piece in pieces]
    _check_losses(ledger.counts, problems, long, data)
    if not kept:
        where = ", ".join(source.path for source in sources)
        raise DataError(Problem(f"no rows left: {ledger.counts.read} read, {ledger.counts.lost} lost", Place(where)))
    return pack(kept, ledger.counts, ledger, formats)


def of(
    recipe: Recipe, encoder: Encoder, progress: Callable[[int], None] = lambda count: None
) -> tuple[Rows, Rows | None]:
    """Return a recipe's rows to train on and those held out (or None); see `load`.

    Raises:
        DataError: also when a row stands in both and the recipe doesn't allow it.
    """
    section = recipe.data
    found = load(section.train, section, encoder, progress)
    if section.eval_fraction is not None:
        return hold_out(found, section.eval_fraction, recipe.train.seed)
    if section.eval is None:
        return found, None
    held_out = load(section.eval, section, encoder, progress, name="eval")
    if section.overlap == "error":
        _check_apart(found, held_out)
    return found, held_out


def hold_out(train: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split off a part of the rows for evaluation; the choice depends on the seed only.

    Pieces of one row and rows that say the same stay on one side, else the eval rows would not be new.

    Args:
        train: all rows.
        fraction: part of them (0-1) to hold out, at least one row and never all.
        seed: of the recipe.

    Raises:
        DataError: when there are fewer than two different rows.
    """
    _, first, whose = np.unique(train.contents, return_index=True, return_inverse=True)
    whose = np.argsort(np.argsort(first))[whose]  # numbered in the order they were read
    groups = len(first)
    if groups < 2:
        raise DataError("`data.eval_fraction` needs at least two rows", "give `data.eval`, or more rows")
    number = min(max(1, round(fraction * groups)), groups - 1)
    held = np.isin(whose, np.random.default_rng([seed, 0xE7A1]).permutation(groups)[:number])
    rest, out = train.take(np.flatnonzero(~held)), train.take(np.flatnonzero(held))
    moved = len(set(out.places))
    rest.counts.kept, rest.counts.held_out = train.counts.kept - moved, moved
    out.counts = Counts(read=moved, kept=moved, tokens=out.counts.tokens, trained_tokens=out.counts.trained_tokens)
    return rest, out


def pack(kept: Sequence[_Kept], counts: Counts, ledger: Ledger, formats: dict[str, int]) -> Rows:
    """Return rows as flat arrays, their tokens counted."""
    lengths = np.array([len(one.row.ids) for one in kept], dtype=np.int64)
    counts.tokens = int(lengths.sum())
    counts.trained_tokens = sum(one.row.count() for one in kept)
    return Rows(
        ids=np.concatenate([one.row.ids for one in kept]),
        trained=np.concatenate([one.row.trained for one in kept]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        places=[one.row.place for one in kept],
        weights=np.array([one.weight for one in kept]),
        contents=np.array([one.content for one in kept], dtype=np.int64),
        counts=counts,
        ledger=ledger,
        formats=formats,
    )


def _example(raw: rows.RawRow, data: Data, formats: dict[str, int]) -> Example:
    if raw.value is None:
        raise RowError("", raw.problem)
    chosen = data.format.recognise(raw.value) if isinstance(data.format, Auto) else data.format
    example = chosen.read(raw.value)
    formats[chosen.type] = formats.get(chosen.type, 0) + 1
    return example


def _content(encoded: Sequence[Row]) -> int:
    """Return a 63-bit number for the tokens of a row and which of them are trained."""
    digest = hashlib.blake2b(digest_size=8)
    for row in encoded:
        digest.update(row.ids.tobytes())
        digest.update(row.trained.tobytes())
    return int.from_bytes(digest.digest(), "big") >> 1


def _check_trained(row: Row) -> None:
    if row.count() == 0:
        raise RowError("", "has no trained token: nothing would be learned from it")


# what is told of a row that was not kept whole
_TOLD: dict[Fate, str] = {"refused": "{:,} fit", "dropped": "dropped", "cut": "cut to {:,}", "split": "split"}


def _fit(encoded: Sequence[Row], example: Example, data: Data) -> tuple[Fate, list[Row]]:
    """Return what becomes of a row (one, or one per turn) under `max_length`, and what is left of it."""
    if all(len(row.ids) <= data.max_length for row in encoded):
        return ("kept" if len(encoded) == 1 else "by turn"), list(encoded)
    if data.on_long == "error":
        return "refused", []
    if data.on_long == "split" and isinstance(example, Plain) and example.divisible:
        return "split", _split(encoded[0], data.max_length)
    left = []
    for row in encoded:
        cut = Row(row.ids[: data.max_length], row.trained[: data.max_length], row.place)
        if len(row.ids) <= data.max_length or (data.on_long == "truncate" and cut.count()):
            left.append(cut)
    return ("cut" if left else "dropped"), left


def _split(row: Row, max_length: int) -> list[Row]:
    """Cut a row into pieces of about one length: a last one of one token would teach nothing."""
    number = -(-len(row.ids) // max_length)
    cuts = [len(row.ids) * piece // number for piece in range(number + 1)]
    return [Row(row.ids[start:end], row.trained[start:end], row.place) for start, end in pairwise(cuts)]


def _check_losses(counts: Counts, problems: list[Problem], long: list[Problem], data: Data) -> None:
    shown = problems[:SHOWN]
    if len(problems) > SHOWN:
        shown.append(Problem(f"and {len(problems) - SHOWN:,} more of {counts.read:,} rows can't be used"))
    shown += long[:SHOWN]
    if long:
        shown.append(
            Problem(
                f"{len(long):,} of {counts.read:,} rows are longer than `data.max_length` ({data.max_length:,} tokens)",
                hint="raise data.max_length, or set data.on_long: drop, truncate or (plain text) split",
            )
        )
    if not shown and counts.lost > data.max_lost * counts.read:
        part = counts.lost / counts.read
        shown = [Problem(line) for line in counts.first] + [
            Problem(
                f"{counts.lost:,} of {counts.read:,} rows would be lost ({part:.1%}); "
                f"`data.max_lost` allows {data.max_lost:.1%}",
                hint=f"mend them, raise data.max_length, or accept it with data.max_lost: {min(1, part + 0.005):.2g}",
            )
        ]
    if shown:
        raise DataError(shown)


def _check_apart(train: Rows, held_out: Rows) -> None:
    both = np.isin(held_out.contents, train.contents)
    if not both.any():
        return
    where = {int(content): place for content, place in zip(train.contents, train.places, strict=True)}
    first = np.flatnonzero(both)[:SHOWN]
    shown = [
        Problem(f"stands in the training rows too: {where[int(held_out.contents[i])]}", held_out.places[i])
        for i in first
    ]
    number = len({str(held_out.places[i]) for i in np.flatnonzero(both)})
    shown.append(
        Problem(
            f"{number:,} of {held_out.counts.read:,} eval rows are trained on: the eval loss would flatter",
            hint="take them out of one of the two, or set data.overlap: allow",
        )
    )
    raise DataError(shown)
