"""Prepare the rows of one block: read, tokenize, and fit them to the maximum length.

A pure function of the block, the tokenizer and the recipe's `data`, so that any process can do any block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np

from loratune.data.encode import Encoder, Row
from loratune.data.formats import (
    Alike,
    Auto,
    Chat,
    Completion,
    Conversation,
    Example,
    Group,
    Instruction,
    Labelled,
    Patterns,
    Plain,
    Preference,
    Rated,
    RowError,
    Text,
)  # fmt: skip
from loratune.data.ledger import Fate
from loratune.data.row_files import TEXT, Block, RawRow, bytes_of
from loratune.data.section import Data
from loratune.errors import Place

LONGEST = 4 << 20  # bytes of a conversation: a million tokens or more, whose mask takes up to a gigabyte to compute
MESSAGES = 2048  # messages of a conversation: for each, the template renders all before it


Reader = Chat | Instruction | Completion | Text | Preference | Rated | Labelled | Patterns


@dataclass(frozen=True)
class Prepared:
    """A row that was read, and the tokenized rows made of it.

    Attributes:
        place: where it came from.
        fate: what became of it; duplicates are detected later.
        reason: why it was not kept in full, or "".
        format: it was read in, or "" if unknown.
        tokens: its length before any cut.
        content: a 63-bit hash: the same for rows with the same tokens and masks.
        pieces: the rows to train on; none if it is lost.
        unread: columns, and keys of messages, that have content but are not read.
        alike: whether it is lost because its answers are the same.
        order: of a pair: a hash of its tokens, and one of the same with the answers swapped; else nothing.
        classes: names of its classes, which become labels once all are known; None where the format has none.
    """

    place: Place
    fate: Fate
    reason: str = ""
    format: str = ""
    tokens: int = 0
    content: int = 0
    pieces: tuple[Row, ...] = ()
    unread: tuple[str, ...] = ()
    alike: bool = False
    order: tuple[int, int] | None = None
    classes: tuple[str, ...] | None = None


def prepare(block: Block, data: Data, encoder: Encoder) -> list[Prepared]:
    """Return each row of a block, prepared, in order."""
    found: list[Prepared | None] = []
    read: list[tuple[Example, str, Place]] = []
    unread: list[tuple[str, ...]] = []
    for raw in block.rows():
        try:
            example, chosen = _example(raw, data)
            unread.append(tuple(chosen.unread(raw.value or {}, encoder.turns.template or "")))
            read.append((example, _type(example, chosen), raw.place))
            found.append(None)
        except RowError as error:
            found.append(_unusable(raw.place, error, data))
    parts = [_parts(example) for example, _, _ in read]
    of_parts = [(part, place) for some, (_, _, place) in zip(parts, read, strict=True) for part in some]
    rows = iter(encoder.batch(of_parts))
    tokenized = (
        replace(_fitted(*one, _together(one[0], [next(rows) for _ in some]), data), unread=left)
        for one, some, left in zip(read, parts, unread, strict=True)
    )
    return [next(tokenized) if one is None else one for one in found]


def _parts(example: Example) -> tuple[Conversation | Plain, ...]:
    """Return the parts of a row that are tokenized separately."""
    return example.parts if isinstance(example, Group) else (example,)


def _together(example: Example, encoded: Sequence[list[Row] | RowError]) -> list[Row] | RowError:
    """Return the rows of all parts of an example, with its labels, or the error of the first unusable part."""
    found: list[Row] = []
    for some in encoded:
        if isinstance(some, RowError):
            return some
        if isinstance(example, Group) and len(some) > 1:
            what = "the chat template renders earlier turns differently once others follow"
            return RowError("", f"has {example.what} of several turns: {what}; keep the last turn of each")
        found += some
    if isinstance(example, Group) and example.labels:
        found[0] = replace(found[0], labels=np.array(example.labels, dtype=np.float32))
    return found


def _example(raw: RawRow, data: Data) -> tuple[Example, Reader]:
    """Return a row as an example, and the format it was read with."""
    if raw.value is None:
        raise RowError("", raw.problem)
    chosen = data.format.recognise(raw.value) if isinstance(data.format, Auto) else data.format
    example = chosen.read(raw.value)
    for part in _parts(example):
        _check_size(part)
    return example, chosen


def _check_size(example: Conversation | Plain) -> None:
    if isinstance(example, Conversation):
        if (number := len(example.messages)) > MESSAGES:
            told = f"a conversation of {number:,} messages; at most {MESSAGES:,} are rendered"
            raise RowError("", f"{told}: split it into several rows")
        if (length := bytes_of((example.messages, example.tools))) > LONGEST:
            told = f"a conversation of {length:,} bytes; at most {LONGEST:,} are rendered"
            raise RowError("", f"{told}: split it into several rows")
    elif (length := sum(len(text) for text, _ in example.segments)) > TEXT:
        raise RowError("", f"a text of {length:,} characters; at most {TEXT:,} are read: split it into several rows")


def _type(example: Example, chosen: Reader) -> str:
    """Return the name of a row's format: prompt and completion may be messages."""
    if isinstance(example, Conversation) and isinstance(chosen, Completion):
        return Chat().type
    return chosen.type


def _unusable(place: Place, error: RowError, data: Data, format: str = "") -> Prepared:
    fate: Fate = "skipped" if data.on_bad_row == "skip" else "refused"
    return Prepared(place, fate, str(error), format, alike=isinstance(error, Alike))


def _fitted(example: Example, format: str, place: Place, encoded: list[Row] | RowError, data: Data) -> Prepared:
    if isinstance(encoded, RowError):
        return _unusable(place, encoded, data, format)
    group = example if isinstance(example, Group) else None
    if not (group and group.scored) and not all(row.count() for row in encoded):
        error = RowError("", "has no label token: nothing would be learned from it")
        return _unusable(place, error, data, format)
    if group and _some_are_same(encoded):
        error = Alike("", f"has two {group.what} with the same tokens: nothing would be learned from them")
        return _unusable(place, error, data, format)
    if group and _prompts_differ(group, encoded):
        why = "the chat template or the tokenizer writes the prompt differently before each"
        return _unusable(place, RowError("", f"has {group.what} to different prompt tokens: {why}"), data, format)
    fate, pieces = _fit(encoded, example, data)
    told = _TOLD.get(fate)
    longest = max(len(row.ids) for row in encoded)
    reason = f"{longest:,} tokens, {told.format(data.max_length)}" if told else ""
    tokens = sum(len(row.ids) for row in encoded)
    order = _order(*encoded) if data.format.sample == "pair" else None
    classes = group.classes if group else None
    content = _content(encoded, sorted(classes or ()))
    return Prepared(place, fate, reason, format, tokens, content, tuple(pieces), order=order, classes=classes)


def _prompts_differ(example: Group, encoded: Sequence[Row]) -> bool:
    """Return whether parts with the same prompt have different tokens before their first label token."""
    asked = [part.segments[:-1] if isinstance(part, Plain) else () for part in example.parts]
    tokens = [row.ids[: int(row.trained.argmax())].tobytes() for row in encoded]
    return len(set(zip(asked, tokens, strict=True))) > len(set(asked))


def _order(chosen: Row, rejected: Row) -> tuple[int, int]:
    """Return a 63-bit hash of the tokens of a pair, and that of the same pair with its answers swapped."""
    one, other = (
        int.from_bytes(hashlib.blake2b(row.ids.tobytes(), digest_size=8).digest(), "big") for row in (chosen, rejected)
    )
    return (3 * one + other) >> 3, (3 * other + one) >> 3  # below 2^66 before


def _content(encoded: Sequence[Row], classes: Sequence[str]) -> int:
    """Return a 63-bit hash of the tokens of a row, which of them are trained, its labels and classes."""
    digest = hashlib.blake2b(digest_size=8)
    for row in encoded:
        digest.update(np.ascontiguousarray(row.ids).data)
        digest.update(np.ascontiguousarray(row.trained).data)
        digest.update(row.labels.tobytes())
    for name in classes:
        digest.update(b"\0" + name.encode())
    return int.from_bytes(digest.digest(), "big") >> 1


# messages about a row that was not kept in full
_TOLD: dict[Fate, str] = {"refused": "at most {:,}", "dropped": "dropped", "cut": "truncated to {:,}", "split": "split"}


def _fit(encoded: Sequence[Row], example: Example, data: Data) -> tuple[Fate, list[Row]]:
    """Return the fate of a row (one, or one per turn) under `max_length`, and the rows left of it."""
    group, scored = isinstance(example, Group), isinstance(example, Group) and example.scored
    if all(len(row.ids) <= data.max_length for row in encoded):
        return ("kept" if group or len(encoded) == 1 else "by turn"), list(encoded)
    if data.on_long == "error":
        return "refused", []
    if group:  # an answer that is cut can't be compared with another, or judged
        return "dropped", []
    if data.on_long == "split" and isinstance(example, Plain) and example.divisible:
        return "split", _split(encoded[0], data.max_length)
    left = []
    for row in encoded:
        cut = replace(row, ids=row.ids[: data.max_length], trained=row.trained[: data.max_length])
        if len(row.ids) <= data.max_length or (data.on_long == "truncate" and (scored or cut.count())):
            left.append(cut)
    return ("cut" if left else "dropped"), left


def _some_are_same(rows: Sequence[Row]) -> bool:
    """Return whether two rows are the same tokens: texts may differ in what the template leaves out."""
    return any(np.array_equal(one.ids, other.ids) for one, other in combinations(rows, 2))


def _split(row: Row, max_length: int) -> list[Row]:
    """Cut a row into pieces of similar length: nothing is learned from a last piece of one token."""
    number = -(-len(row.ids) // max_length)
    cuts = [len(row.ids) * piece // number for piece in range(number + 1)]
    return [Row(row.ids[start:end], row.trained[start:end], row.place) for start, end in pairwise(cuts)]
