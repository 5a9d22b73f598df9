"""The rows of a run: reading, tokenizing, accounting for each in the ledger, and caching on disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from loratune.data import cache_key, row_cache, row_files, unread_columns, workers
from loratune.data.encode import Encoder, Row
from loratune.data.formats import Labelled
from loratune.data.ledger import Counts, Ledger
from loratune.data.prepare import Prepared
from loratune.data.row_cache import Store
from loratune.data.sample import Sample
from loratune.data.section import Data, Source
from loratune.errors import DataError, Place, Problem, StorageError, listed, shorten
from loratune.models import base_files

SHOWN = 5  # rows named in an error
DAMAGED = "rows in the cache were damaged: read again"

Progress = Callable[[int, float], None]


def _untold(rows: int, share: float) -> None:
    """Report no progress."""


@dataclass
class Rows:
    """Tokenized rows, or a subset of them: on disk, with 8 bytes each in memory.

    Attributes:
        store: the file that holds them.
        chosen: their indices in it, int64, shape (rows,).
        counts: what became of every row read.
        cached: whether they were found in the cache.
        damaged: whether the cached ones were damaged, and read again.
        unkept: why they could not be cached for the next run, or nothing.
        left_out: lines on files in their folders that were not read.
        values: known values of each sample by name, (samples,) each; see `reference.take`.
        pooled: whether the objective looks at the last token of each row, and at no label token.
        classes: names of the classes, in the order of their labels; none where the format has none.
        states: what the head reads at the last token of each row, float32, (rows, width); see `head_states.take`.
    """

    store: Store
    chosen: np.ndarray
    counts: Counts
    cached: bool = False
    damaged: bool = False
    unkept: str = ""
    left_out: tuple[str, ...] = ()
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    pooled: bool = False
    classes: tuple[str, ...] = ()
    states: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Row:
        row = self.store.row(int(self.chosen[index]))
        if self.classes:
            row = replace(row, labels=self._label_of[row.labels.astype(np.int64)])
        if self.pooled:
            row = replace(row, pooled=True, state=None if self.states is None else self.states[index])
        return row

    @cached_property
    def _label_of(self) -> np.ndarray:
        """The label of each class in the order they were first read; -1 for one that is not in `classes`."""
        known = {name: float(label) for label, name in enumerate(self.classes)}
        return np.array([known.get(name, -1.0) for name in self.store.about["classes"]], dtype=np.float32)

    @property
    def labels(self) -> list[np.ndarray]:
        """The labels of each sample, float32, (labels,) each."""
        return [self[index].labels for index in range(0, len(self), self.per_sample)]

    def place(self, index: int) -> Place:
        """Return where a row came from."""
        return self.store.place(int(self.chosen[index]))

    def first_beyond(self, limit: int) -> int | None:
        """Return the first row with a token id of `limit` or more, or None."""
        if self.store.largest < limit:
            return None
        return next((i for i in range(len(self)) if self[i].ids.max() >= limit), None)

    def last_tokens(self) -> set[int]:
        """Return the ids of the tokens that rows end with."""
        return {int(self.store.row(int(number)).ids[-1]) for number in self.chosen}

    @cached_property
    def lengths(self) -> np.ndarray:
        """Length of each row in tokens, shape (rows,)."""
        return np.take(self.store.lengths, self.chosen)

    @cached_property
    def weights(self) -> np.ndarray:
        """How often each row occurs per epoch, shape (rows,)."""
        return np.take(self.store.weights, self.chosen)

    @property
    def per_sample(self) -> int:
        """Rows of a sample: 1, or 2 for a pair of a chosen and a rejected answer."""
        found: int = self.store.about["per_sample"]
        return found

    @property
    def sample_word(self) -> str:
        """Word for a sample: row, or pair."""
        found: str = self.store.about["sample"]
        return found

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self) // self.per_sample

    def sample(self, index: int) -> Sample:
        """Return a sample: its rows and known values."""
        first = index * self.per_sample
        rows = tuple(self[row] for row in range(first, first + self.per_sample))
        return Sample(rows, {name: float(values[index]) for name, values in self.values.items()})

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens of each sample, its rows padded to the longest; shape (samples,)."""
        longest: np.ndarray = self.lengths.reshape(-1, self.per_sample).max(axis=1)
        return self.per_sample * longest

    @cached_property
    def sample_weights(self) -> np.ndarray:
        """How often each sample occurs per epoch, shape (samples,)."""
        return self.weights[:: self.per_sample]

    @cached_property
    def first_labels(self) -> np.ndarray:
        """The first label of each sample, float32, (samples,); NaN for one without."""
        return np.take(self.store.first_labels, self.chosen[:: self.per_sample])

    @property
    def contents(self) -> np.ndarray:
        """A hash of each row's content.

        Rows with the same content have the same, and so have the pieces of one row; shape (rows,).
        """
        return np.take(self.store.contents, self.chosen)

    @property
    def formats(self) -> dict[str, int]:
        """Rows read as each format."""
        formats: dict[str, int] = self.store.about["formats"]
        return formats

    @property
    def unread(self) -> dict[str, int]:
        """Columns, and keys of messages, that have content but are not read, with the number of rows of each."""
        found: dict[str, int] = self.store.about.get("unread", {})
        return found

    def told(self, held_out: Rows | None = None) -> list[str]:
        """Return lines on files and columns that are not read, and on doubtful rows.

        Also of held-out rows from files of their own.
        """
        other = held_out if held_out is not None and held_out.store is not self.store else None
        told = dict.fromkeys((*self.left_out, *(other.left_out if other else ())))
        notes = [*self.store.about.get("notes", ()), *(other.store.about.get("notes", ()) if other else ())]
        return [*told, *unread_columns.lines(self.unread, other.unread if other else {}), *notes]

    def take(self, indices: np.ndarray) -> Rows:
        """Return a subset of the rows; `indices` must contain both rows of a pair."""
        chosen = self.chosen[indices]
        tokens, trained = int(self.store.lengths[chosen].sum()), int(self.store.trained[chosen].sum())
        counts = replace(self.counts, tokens=tokens, trained_tokens=trained)
        samples = indices[:: self.per_sample] // self.per_sample
        values = {name: known[samples] for name, known in self.values.items()}
        states = None if self.states is None else self.states[indices]
        return replace(self, chosen=chosen, counts=counts, values=values, states=states)

    def append_ledger(self, path: Path) -> None:
        """Append a line for each row that was read to a file.

        Raises:
            StorageError: when it can't be written.
        """
        try:
            with self.store.ledger.open("rb") as lines, path.open("ab") as stream:
                shutil.copyfileobj(lines, stream)
        except OSError as error:
            raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(path)))) from None


def load(
    sources: Sequence[Source], data: Data, encoder: Encoder, progress: Progress = _untold, name: str = "train"
) -> Rows:
    """Read and tokenize all rows of some sources, or find them in the cache.

    Args:
        sources: where the rows come from.
        data: format, longest row, and what happens to rows that are too long, unusable or duplicates.
        encoder: of the base model's tokenizer.
        progress: called now and then with the number of rows read so far and the fraction (0-1) of the data.
        name: of the set, for the ledger and the choice of a folder's split.

    Raises:
        DataError: naming the first rows that can't be used, or when more are lost than `max_lost` allows, or when there
            are no rows at all.
        StorageError: when neither the cache nor the folder for temporary files can be written.
    """
    given = [cache_key.of(source, name) for source in sources]
    key = cache_key.key(sources, given, data, encoder, name)
    folder = base_files.cache() / "rows"
    damaged = False
    try:
        found = row_cache.find(folder, key) if key else None
    except row_cache.Damaged:
        found, damaged = None, True
    cached = found is not None
    unkept = ""
    if found is None:
        try:
            found = _read(sources, data, encoder, progress, name, row_cache.Writer(folder), key, given)
        except StorageError as error:  # a cache is a convenience
            unkept = str(error)
            writer = row_cache.Writer(Path(tempfile.gettempdir()), passing=True)
            found = _read(sources, data, encoder, progress, name, writer, None, given)
    counts = Counts(**found.about["counts"])
    _check_losses(counts, _Refused(), data)
    local = [Path(source.path) for source in sources if Path(source.path).is_absolute()]
    left_out = tuple(f"data: {line}" for path in local for line in row_files.chosen(path, name).told)
    return Rows(found, np.arange(len(found.lengths)), counts, cached, damaged, unkept, left_out)


def _read(
    sources: Sequence[Source], data: Data, encoder: Encoder, progress: Progress, name: str, writer: row_cache.Writer,
    key: str | None, given: Sequence[Sequence[cache_key.Input]],
) -> Store:  # fmt: skip
    """Read all rows into a new folder of the cache."""
    try:
        account = _Account(Ledger(name, writer.ledger), writer, data)
        size = sum(one.size for some in given for one in some)
        blocks = (block for source in sources for block in row_files.blocks(source, name))
        done = 0
        for block, prepared in workers.prepared(blocks, data, encoder, workers.number(size)):
            with row_cache.writing(writer.folder):
                for one in prepared:
                    account.add(one, block.weight)
            done += block.size
            progress(account.counts.read, min(1.0, done / max(size, 1)))
        for some in given:
            cache_key.check_unchanged(some)
        _check_losses(account.counts, account.refused, data)
        if not account.counts.kept:
            where = ", ".join(source.path for source in sources)
            counts = account.counts
            told = Problem(f"no rows left: {counts.read:,} read, {counts.lost:,} lost", Place(where))
            raise DataError([*map(Problem, counts.first), told])
        about = {
            "counts": account.counts.as_json(), "formats": account.formats, "unread": account.unread,
            "per_sample": data.format.rows_per_sample, "sample": data.format.sample, "notes": account.notes(),
            "classes": list(account.classes),
        }  # fmt: skip
        return writer.commit(about, key)
    except BaseException:
        writer.discard()
        raise


@dataclass
class _Refused:
    """Rows that prevent the run: their number, and the first of them."""

    unusable: int = 0
    long: int = 0
    first_unusable: list[Problem] = field(default_factory=list)
    first_long: list[Problem] = field(default_factory=list)


class _Account:
    """Record every row in the ledger, and pass the tokenized rows to the writer."""

    def __init__(self, ledger: Ledger, writer: row_cache.Writer, data: Data):
        self.counts = ledger.counts
        self.refused = _Refused()
        self.formats: dict[str, int] = {}
        self.unread: dict[str, int] = {}
        self.classes: dict[str, int] = {}  # in the order they are first read
        self._ledger, self._writer, self._data = ledger, writer, data
        self._seen, self._orders = _Seen(), _Seen()
        self._alike = self._swapped = 0
        self._first_swapped = ""

    def add(self, row: Prepared, weight: float) -> None:
        if row.format:
            self.formats[row.format] = self.formats.get(row.format, 0) + 1
        unread_columns.add(self.unread, row.unread)
        self._compare(row)
        again = bool(row.tokens) and self._seen.again(row.content)
        self.counts.duplicates += again
        if again and self._data.duplicates == "drop":
            self._ledger.add(row.place, "duplicate", row.tokens, row.tokens, "identical to an earlier row")
            return
        if row.fate == "refused":
            self._refuse(row)
        for piece in row.pieces:
            if row.classes is not None:  # of a lost row they count for nothing
                known = [self.classes.setdefault(name, len(self.classes)) for name in row.classes]
                piece = replace(piece, labels=np.array(known, dtype=np.float32))
            self.counts.tokens += len(piece.ids)
            self.counts.trained_tokens += piece.count()
            self._writer.add(piece, weight, row.content, self.counts.read)
        lost = row.tokens - sum(len(piece.ids) for piece in row.pieces)
        self._ledger.add(row.place, row.fate, row.tokens, lost, row.reason)

    def _compare(self, row: Prepared) -> None:
        """Count pairs without a difference, and those that say the contrary of an earlier one."""
        self._alike += row.alike
        if row.order is None:
            return
        if self._orders.has(row.order[1]):
            self._swapped += 1
            self._first_swapped = self._first_swapped or str(row.place)
        self._orders.again(row.order[0])

    def notes(self) -> list[str]:
        """Return lines on rows that were read and may be mistakes."""
        told = []
        if self._swapped:
            told.append(
                f"pairs that contradict an earlier one (same prompt, answers swapped): {self._swapped:,}; the first is "
                f"{self._first_swapped}"
            )
        if self._alike > 0.01 * self.counts.read:
            part = self._alike / self.counts.read
            told.append(f"{self._alike:,} of {self.counts.read:,} pairs ({part:.1%}) have two equal answers: skipped")
        return told

    def _refuse(self, row: Prepared) -> None:
        refused = self.refused
        refused.long += bool(row.tokens)
        refused.unusable += not row.tokens
        first = refused.first_long if row.tokens else refused.first_unusable
        if len(first) < SHOWN:
            first.append(Problem(row.reason, row.place))


class _Seen:
    """A set of 63-bit numbers in 8 bytes each: most in a sorted array, the newest in a Python set."""

    def __init__(self) -> None:
        self._old = np.empty(0, dtype=np.int64)
        self._new: set[int] = set()

    def has(self, number: int) -> bool:
        """Return whether a number was added before."""
        if number in self._new:
            return True
        at = np.searchsorted(self._old, number)
        return bool(at < len(self._old) and self._old[at] == number)

    def again(self, number: int) -> bool:
        """Return whether a number was added before, and add it."""
        if self.has(number):
            return True
        self._new.add(number)
        if len(self._new) == 1 << 16:
            self._old = np.sort(np.concatenate([self._old, np.fromiter(self._new, np.int64)]))
            self._new.clear()
        return False


def of(
    section: Data, seed: int, encoder: Encoder, progress: Progress = _untold, pooled: bool = False
) -> tuple[Rows, Rows | None]:
    """Return the training rows and the held-out rows (or None); see `load`.

    Args:
        section: the recipe's `data`.
        seed: for the choice of held-out rows.
        encoder: with the tokenizer.
        progress: called with the number of rows so far.
        pooled: see `Rows`.

    Raises:
        DataError: also when a row is in both and the recipe doesn't allow it.
    """
    found = replace(load(section.train, section, encoder, progress), pooled=pooled)
    found = replace(found, classes=_classes(found, section))
    if section.eval_fraction is not None:
        return hold_out(found, section.eval_fraction, seed)
    if section.eval is None:
        return found, None
    held_out = load(section.eval, section, encoder, progress, name="eval")
    held_out = with_classes(replace(held_out, pooled=pooled), found.classes)
    if section.overlap == "error":
        _check_apart(found, held_out)
    return found, held_out


def _classes(train: Rows, section: Data) -> tuple[str, ...]:
    """Return the names of the classes in the order of their labels: the recipe's, else sorted (integers by size)."""
    if not isinstance(section.format, Labelled) or section.format.labels == "number":
        return ()
    found = section.format.classes or sorted(
        train.store.about["classes"], key=lambda name: (not name.lstrip("-").isdecimal(), _as_int(name), name)
    )
    if len(found) < 2:
        place = Place(", ".join(source.path for source in section.train))
        told = f"`{shorten(found[0])}` is the only label" if found else "no row has a label"
        raise DataError(Problem(f"{told}: a classifier needs at least two classes", place))
    return tuple(found)


def _as_int(name: str) -> int:
    try:
        return int(name)
    except ValueError:
        return 0


def with_classes(rows: Rows, classes: tuple[str, ...]) -> Rows:
    """Return rows with labels in the order of these classes.

    Raises:
        DataError: when a row has another class.
    """
    found = replace(rows, classes=classes)
    if not classes or set(rows.store.about["classes"]) <= set(classes):
        return found
    names, known = rows.store.about["classes"], set(classes)
    of = ((index, rows.store.row(int(number)).labels.astype(int)) for index, number in enumerate(rows.chosen))
    wrong = {index: [names[label] for label in labels if names[label] not in known] for index, labels in of}
    if bad := {index: some for index, some in wrong.items() if some}:
        names = list(dict.fromkeys(shorten(name) for some in bad.values() for name in some))
        told = f"has a label that no training row has; unknown: {listed(names, 8)}"
        hint = "leave such rows out, or train on some"
        raise DataError([Problem(told, rows.place(index), hint) for index in list(bad)[:SHOWN]])
    return found


def hold_out(train: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Split off a fraction of the rows for evaluation; the choice depends on the seed only.

    Pieces of one row and duplicates stay together, else held-out rows would be in the training set, too.

    Args:
        train: all rows.
        fraction: of them (0-1) to hold out, at least one row and never all.
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
    moved = len(np.unique(train.store.records[out.chosen]))
    rest.counts.kept, rest.counts.held_out = train.counts.kept - moved, moved
    out.counts = Counts(read=moved, kept=moved, tokens=out.counts.tokens, trained_tokens=out.counts.trained_tokens)
    return rest, out


def _check_losses(counts: Counts, refused: _Refused, data: Data) -> None:
    shown = refused.first_unusable
    if refused.unusable > SHOWN:
        shown = [
            *shown,
            Problem(f"and {refused.unusable - SHOWN:,} more of {counts.read:,} rows can't be used"),
        ]
    if refused.long:
        shown = [
            *shown,
            *refused.first_long,
            Problem(
                f"{refused.long:,} of {counts.read:,} rows are longer than `data.max_length` "
                f"({data.max_length:,} tokens)",
                hint="raise data.max_length, or set data.on_long: drop"
                + ("" if data.format.whole else ", truncate or (plain text) split"),
            ),
        ]
    if not shown and counts.lost > data.max_lost * counts.read:
        part = counts.lost / counts.read
        shown = [Problem(line) for line in counts.first] + [
            Problem(
                f"{counts.lost:,} of {counts.read:,} rows would be lost ({part:.1%}); "
                f"`data.max_lost` allows {data.max_lost:.1%}",
                hint=f"fix them, raise data.max_length, or accept it with data.max_lost: {min(1, part + 0.005):.2g}",
            )
        ]
    if shown:
        raise DataError(shown)


def _check_apart(train: Rows, held_out: Rows) -> None:
    both = np.isin(held_out.contents, train.contents)
    if not both.any():
        return
    shown = []
    for i in np.flatnonzero(both)[:: held_out.per_sample][:SHOWN]:
        twin = int(np.flatnonzero(train.contents == held_out.contents[i])[-1])
        shown.append(Problem(f"is also a training row: {train.place(twin)}", held_out.place(int(i))))
    number = len(np.unique(held_out.store.records[held_out.chosen[both]]))
    shown.append(
        Problem(
            f"{number:,} of {held_out.counts.read:,} eval rows are also training rows: the eval loss would be too low",
            hint="remove them from one of the two, or set data.overlap: allow",
        )
    )
    raise DataError(shown)
