"""The data of a run: read, tokenized, counted, ordered and cut into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from loratune import rows
from loratune.encode import Encoder, Row
from loratune.errors import DataError, Place, Problem
from loratune.formats import Example, Plain, RowError
from loratune.recipe import Data, Recipe, Source

WINDOW = 16  # batches whose rows are sorted by length together
AUTO_TOKENS = {"cpu": 4096, "cuda": 16384}  # tokens, padding included, of a micro-batch of `auto`


@dataclass
class Counts:
    """What became of the rows that were read: read = kept + dropped + held out, always."""

    read: int = 0
    kept: int = 0
    dropped: int = 0
    held_out: int = 0
    truncated: int = 0
    split: int = 0
    by_turn: int = 0  # conversations that became one row per turn
    tokens: int = 0
    trained_tokens: int = 0
    first: list[str] = field(default_factory=list)  # places of the first rows that were dropped or cut

    def note(self, place: Place, what: str) -> None:
        """Remember the place of a row that was not kept whole."""
        if len(self.first) < 5:
            self.first.append(f"{place}: {what}")


@dataclass
class Rows:
    """Tokenized rows in flat arrays: 5 bytes per token, whatever the number of rows.

    Attributes:
        ids, trained: of all rows, one behind the other, shape (tokens,).
        starts: where each row begins, and the end of the last, shape (rows + 1,).
        places: where each row came from.
        weights: how often each row is seen per epoch, shape (rows,).
    """

    ids: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    places: list[Place]
    weights: np.ndarray
    counts: Counts

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
        return _pack([(self[int(i)], float(self.weights[int(i)])) for i in indices], replace(self.counts))


def load(
    sources: Sequence[Source],
    data: Data,
    encoder: Encoder,
    progress: Callable[[int], None] = lambda count: None,
) -> Rows:
    """Read and tokenize all rows of some sources.

    Args:
        sources: where the rows come from.
        data: format, longest row and what happens to a longer one.
        encoder: of the base model's tokenizer.
        progress: called now and then with the number of rows read so far.

    Raises:
        DataError: naming the first rows that can't be read, have no trained token, or are too long under
            `on_long: error`; or when there are no rows at all.
    """
    counts = Counts()
    kept: list[tuple[Row, float]] = []
    problems: list[Problem] = []
    long: list[Problem] = []
    for source in sources:
        for raw in rows.read(source):
            counts.read += 1
            if counts.read % 256 == 0:
                progress(counts.read)
            try:
                if raw.value is None:
                    raise RowError("", raw.problem)
                example = data.format.read(raw.value)
                encoded = encoder.rows(example, raw.place)
                for row in encoded:
                    _check_trained(row)
            except RowError as error:
                problems.append(Problem(str(error), raw.place))
                continue
            counts.by_turn += len(encoded) > 1
            fitted = [[r] if len(r.ids) <= data.max_length else _fit(r, example, data, counts, long) for r in encoded]
            counts.dropped += data.on_long != "error" and not any(fitted)
            counts.truncated += any(fitted) and not all(fitted)  # some of its turns are lost
            kept += [(piece, source.weight) for pieces in fitted for piece in pieces]
    if problems or long:
        raise _data_error(problems, long, counts.read, data.max_length)
    counts.kept = counts.read - counts.dropped
    if not kept:
        where = ", ".join(source.path for source in sources)
        raise DataError(Problem(f"no rows left: {counts.read} read, {counts.dropped} dropped", Place(where)))
    return _pack(kept, counts)


def of(
    recipe: Recipe, encoder: Encoder, progress: Callable[[int], None] = lambda count: None
) -> tuple[Rows, Rows | None]:
    """Return a recipe's rows to train on and those held out (or None); see `load`."""
    section = recipe.data
    found = load(section.train, section, encoder, progress)
    if section.eval_fraction is not None:
        return hold_out(found, section.eval_fraction, recipe.train.seed)
    return found, load(section.eval, section, encoder, progress) if section.eval else None


def hold_out(train: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split off a part of the rows for evaluation; the choice depends on the seed only.

    Args:
        train: all rows.
        fraction: part of them (0-1) to hold out, at least one row and never all.
        seed: of the recipe.

    Raises:
        DataError: when there are fewer than two rows.
    """
    if len(set(train.places)) < 2:
        raise DataError("`data.eval_fraction` needs at least two rows", "give `data.eval`, or more rows")
    # pieces of one row stay on one side, else the eval rows would not be new
    names, whose = np.unique([str(place) for place in train.places], return_inverse=True)
    number = min(max(1, round(fraction * len(names))), len(names) - 1)
    chosen = np.random.default_rng([seed, 0xE7A1]).permutation(len(names))[:number]
    held = np.isin(whose, chosen)
    rest, out = train.take(np.flatnonzero(~held)), train.take(np.flatnonzero(held))
    rest.counts.kept, rest.counts.held_out = train.counts.kept - number, number
    out.counts.read, out.counts.kept = number, number
    return rest, out


def _check_trained(row: Row) -> None:
    if row.count() == 0:
        raise RowError("", "has no trained token: nothing would be learned from it")


def _fit(row: Row, example: Example, data: Data, counts: Counts, long: list[Problem]) -> list[Row]:
    """Return what is left of a row that is longer than `max_length`, and count it."""
    length = len(row.ids)
    if data.on_long == "error":
        long.append(Problem(f"{length:,} tokens, {data.max_length:,} fit", row.place))
        return []
    if data.on_long == "split" and isinstance(example, Plain) and example.divisible:
        counts.split += 1
        counts.note(row.place, f"{length:,} tokens, split")
        number = -(
            -length // data.max_length
        )  # pieces, about equally long: a last one of one token would teach nothing
        cuts = [length * piece // number for piece in range(number + 1)]
        return [Row(row.ids[start:end], row.trained[start:end], row.place) for start, end in pairwise(cuts)]
    cut = Row(row.ids[: data.max_length], row.trained[: data.max_length], row.place)
    if data.on_long == "drop" or cut.count() == 0:
        counts.note(row.place, f"{length:,} tokens, dropped")
        return []
    counts.truncated += 1
    counts.note(row.place, f"{length:,} tokens, cut to {data.max_length:,}")
    return [cut]


def _data_error(problems: list[Problem], long: list[Problem], read: int, max_length: int) -> DataError:
    shown = problems[:5]
    if len(problems) > 5:
        shown.append(Problem(f"and {len(problems) - 5:,} more of {read:,} rows can't be used"))
    shown += long[:5]
    if long:
        shown.append(
            Problem(
                f"{len(long):,} of {read:,} rows are longer than `data.max_length` ({max_length:,} tokens)",
                hint="raise data.max_length, or set data.on_long: drop, truncate or (plain text) split",
            )
        )
    return DataError(shown)


def _pack(kept: list[tuple[Row, float]], counts: Counts) -> Rows:
    lengths = np.array([len(row.ids) for row, _ in kept], dtype=np.int64)
    packed = Rows(
        ids=np.concatenate([row.ids for row, _ in kept]),
        trained=np.concatenate([row.trained for row, _ in kept]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        places=[row.place for row, _ in kept],
        weights=np.array([weight for _, weight in kept]),
        counts=counts,
    )
    counts.tokens = int(lengths.sum())
    counts.trained_tokens = sum(row.count() for row, _ in kept)
    return packed


# ---------------------------------------------------------------- order and batches


def rows_per_epoch(weights: np.ndarray) -> int:
    """Return how many rows one epoch shows, each row counted as often as its weight says."""
    return sum(_shown(weight, count) for weight, count in zip(*np.unique(weights, return_counts=True), strict=True))


def _shown(weight: float, count: int) -> int:
    """Return how often an epoch shows the rows of a weight, all together: at least once, however small the weight."""
    return max(1, int(weight * count + 0.5))


def epoch_order(lengths: np.ndarray, weights: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of one epoch: a pure function of the data, the seed and the epoch.

    Rows are shuffled, then sorted by length within windows of 16 batches, so that a batch pads little; then the batches
    are shuffled. A weight of 2.5 shows a row twice, and every other row of its source a third time.

    Args:
        lengths: of each row in tokens, shape (rows,).
        weights: how often each row is seen per epoch, shape (rows,).
        batch_size: rows per batch; the last may be smaller.
        seed: of the recipe.
        epoch: number of the epoch, from 0.

    Returns:
        Row numbers of each batch, longest row first.
    """
    random = np.random.default_rng([seed, epoch])
    drawn = []
    for weight in np.unique(weights):
        members = np.flatnonzero(weights == weight)
        whole, rest = divmod(_shown(weight, len(members)), len(members))
        drawn += [members] * whole + [random.permutation(members)[:rest]]
    order = random.permutation(np.concatenate(drawn))
    window = WINDOW * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[cut : cut + batch_size] for cut in range(0, len(part), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


@dataclass(frozen=True)
class Batch:
    """The rows of one step, cut into micro-batches.

    Attributes:
        micro: rows of each micro-batch of this process, longest first.
        epoch: how many epochs will have been seen after this step.
        rows: number of rows over all processes.
    """

    micro: list[list[Row]]
    epoch: float
    rows: int


def batches(
    data: Rows,
    batch_size: int,
    micro_batch_size: int | str,
    seed: int,
    steps: int,
    start: int = 0,
    device: str = "cpu",
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Yield the batches of a run from step `start` (from 0) to step `steps`.

    The batches don't depend on `micro_batch_size`, `rank` or `world`: each process gets its part of the same rows.
    """
    per_epoch = -(-rows_per_epoch(data.weights) // batch_size)
    epoch, order = -1, []
    for step in range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = epoch_order(data.lengths, data.weights, batch_size, seed, epoch)
        chosen = order[step % per_epoch]
        mine = [data[int(i)] for i in chosen[rank::world]]
        if not mine:  # fewer rows than processes: this one repeats a row and learns nothing from it
            row = data[int(chosen[0])]
            mine = [Row(row.ids, np.zeros_like(row.trained), row.place)]
        yield Batch(split(mine, micro_batch_size, AUTO_TOKENS[device]), (step + 1) / per_epoch, len(chosen))


def split(chosen: list[Row], micro_batch_size: int | str, tokens: int) -> list[list[Row]]:
    """Cut rows (longest first) into micro-batches of so many rows, or for `auto` of so many tokens with padding."""
    if isinstance(micro_batch_size, int):
        return [chosen[cut : cut + micro_batch_size] for cut in range(0, len(chosen), micro_batch_size)]
    parts: list[list[Row]] = []
    while chosen:
        fits = max(1, tokens // len(chosen[0].ids))
        parts.append(chosen[:fits])
        chosen = chosen[fits:]
    return parts


def in_length_order(data: Rows, micro_batch_size: int | str, device: str) -> list[list[Row]]:
    """Return all rows once, in micro-batches of similar length: for an evaluation."""
    order = np.argsort(-data.lengths, kind="stable")
    size: Any = micro_batch_size
    return split([data[int(i)] for i in order], size, AUTO_TOKENS[device])
