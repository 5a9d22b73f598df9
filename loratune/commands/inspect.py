"""`loratune inspect`: show rows as the model sees them, every token, with the trained ones marked."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from loratune.data import chat_template, dataset, labels
from loratune.data.dataset import Rows
from loratune.data.encode import Encoder, Row
from loratune.data.formats.section import FormatSection
from loratune.errors import UsageError
from loratune.events import Listener, Report
from loratune.recipe import Recipe
from loratune.system import startup


@dataclass(frozen=True)
class Piece:
    """Adjacent tokens of one kind: their text, their number, whether they are trained or special."""

    text: str
    tokens: int
    trained: bool
    special: bool


@dataclass(frozen=True)
class Shown:
    """A row in pieces.

    Attributes:
        number: from 1, among the rows kept; those of one data row have the same.
        place: where it came from.
        tokens: its length.
        trained_tokens: of them, those with a label; 0 where the row is scored as a whole.
        pieces: in order.
        answer: which of several rows made of one: of a pair `chosen` or `rejected`, of patterns their number and the
            label; of a labelled text its label; else empty.
    """

    number: int
    place: str
    tokens: int
    trained_tokens: int
    pieces: tuple[Piece, ...]
    answer: str = ""


@dataclass(frozen=True)
class Inspection:
    """Some training rows of a recipe as the model will see them, and counts over all of them.

    Attributes:
        rows: number of rows; a pair is one.
        tokens: in all rows.
        trained_tokens: of them, those with a label; 0 where rows are scored as a whole.
        longest: tokens of the longest row (of pairs: of the longest answer with its prompt).
        shown: the rows that were asked for, in pieces; of a pair the chosen answer, then the rejected one, and of a row
            with a label one for each pattern and label.
        unread: column that is not read -> number of rows that have it.
        pairs: whether rows are pairs of a chosen and a rejected answer.
    """

    rows: int
    tokens: int
    trained_tokens: int
    longest: int
    shown: tuple[Shown, ...]
    unread: dict[str, int]
    pairs: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the inspection as JSON data."""
        shown = [{**row.__dict__, "pieces": [piece.__dict__ for piece in row.pieces]} for row in self.shown]
        return {**self.__dict__, "shown": shown}


def inspect(
    recipe: Recipe, row: int | None = None, random: bool = False, number: int = 3, trust_remote_code: bool = False,
    on_event: Listener | None = None,
) -> Inspection:  # fmt: skip
    """Read and tokenize a recipe's training rows, as `train` does, and show some of them in pieces.

    Args:
        recipe: from `load_recipe`; of its base model only the tokenizer is loaded.
        row: number of the one row (or pair) to show, from 1; None for the first `number`.
        random: show `number` rows drawn with the recipe's seed instead of the first.
        number: how many rows (or pairs) to show.
        trust_remote_code: run code that comes with the base model's tokenizer.
        on_event: called with each event; None: lines go to Python's logging. What it raises comes out as it is.

    Returns:
        The rows, and counts over all of them.

    Raises:
        UsageError: when there is no such row.
        DataError: when the rows can't be used, as in `train`, or the objective learns nothing from them.
    """
    report = Report(on_event)
    with startup.quiet(), report.unchanged():
        tokenizer = chat_template.tokenizer_of(recipe.model, recipe.data, trust_remote_code)
        encoder, form = Encoder(tokenizer), recipe.data.format
        notes = labels.check_verbalizers(form, encoder)
        with report.counting("reading rows") as progress:
            rows, held_out = dataset.of(
                recipe.data, recipe.train.seed, encoder, progress, pooled=recipe.objective.pooled
            )
        recipe.objective.of_rows(rows, recipe.data)
        if rows.damaged or (held_out is not None and held_out.damaged):
            report.problem(dataset.DAMAGED)
        for line in (*rows.told(held_out), *notes, *labels.check_seen(form, rows)):
            report.problem(line)
        shown = tuple(
            one
            for index in _chosen(
                rows.samples, row, number, recipe.train.seed if random else None, rows.sample_word == "pair"
            )
            for one in take_apart(rows, index, form, encoder)
        )
        counts, longest = rows.counts, int(rows.lengths.max())
        trained = 0 if rows.pooled else counts.trained_tokens
        return Inspection(rows.samples, counts.tokens, trained, longest, shown, rows.unread, rows.sample_word == "pair")


def _chosen(rows: int, row: int | None, number: int, seed: int | None, pairs: bool) -> Sequence[int]:
    """Return the indices (from 0) of the rows (or pairs) to show; see `inspect`."""
    if row is not None:
        if not 1 <= row <= rows:
            raise UsageError(f"no {'pair' if pairs else 'row'} {row}: there are {rows:,}, counted from 1")
        return [row - 1]
    if seed is not None:
        return [int(index) for index in np.random.default_rng(seed).permutation(rows)[:number]]
    return range(min(number, rows))


def take_apart(rows: Rows, index: int, form: FormatSection, encoder: Encoder) -> Iterator[Shown]:
    """Yield the row or rows of a sample, with tokens joined into pieces of one kind."""
    sample = rows.sample(index)
    for answer, row in zip(form.names(sample.labels.tolist(), rows.classes), sample.rows, strict=True):
        row = replace(row, trained=np.zeros_like(row.trained)) if row.pooled else row
        pieces = tuple(
            Piece(encoder.tokenizer.decode(ids, skip_special_tokens=False), len(ids), trained, special)
            for ids, trained, special in _runs(row, encoder)
        )
        yield Shown(index + 1, str(row.place), len(row.ids), row.count(), pieces, answer)


def _runs(row: Row, encoder: Encoder) -> Iterator[tuple[list[int], bool, bool]]:
    """Yield runs of tokens of one kind, so that characters of several tokens are decoded together."""
    run: list[int] = []
    kind = (False, False)
    for token, trained in zip(row.ids.tolist(), row.trained.tolist(), strict=True):
        now = (bool(trained), token in encoder.special)
        if run and (now != kind or now[1]):
            yield run, *kind
            run = []
        run.append(token)
        kind = now
    if run:
        yield run, *kind


def as_text(inspection: Inspection, colour: bool) -> str:
    """Return the rows for a terminal: label tokens in green, or in [[ ]] without colour."""
    part = f" ({100 * inspection.trained_tokens / max(inspection.tokens, 1):.1f} %)"
    lines = [f"{_counted(inspection)}, {_tokens(inspection, part)}, longest {inspection.longest:,}"]
    for row in inspection.shown:
        lines += ["", f"{_named(row)}  {row.place}  {_tokens(row)}", ""]
        lines.append("".join(_coloured(piece) if colour else _bracketed(piece) for piece in _joined(row.pieces)))
    return "\n".join(lines)


def _counted(inspection: Inspection) -> str:
    return f"{inspection.rows:,} {'pairs' if inspection.pairs else 'rows'}"


def _tokens(of: Inspection | Shown, part: str = "") -> str:
    """Return how many tokens there are, and how many with a label; `part` follows these."""
    if not of.trained_tokens:
        return f"{of.tokens:,} tokens" + ", each row scored at its last" * isinstance(of, Inspection)
    return f"{of.tokens:,} tokens, {of.trained_tokens:,} label token{'s' * (of.trained_tokens > 1)}{part}"


def _named(row: Shown) -> str:
    word = "pair" if row.answer in ("chosen", "rejected") else "row"
    return f"{word} {row.number} {row.answer}".rstrip()


def _joined(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield pieces, with adjacent ones of the same `trained` joined; special tokens show by their text."""
    text, tokens, trained = "", 0, False
    for piece in pieces:
        if tokens and piece.trained != trained:
            yield Piece(text, tokens, trained, False)
            text, tokens = "", 0
        text, tokens, trained = text + piece.text, tokens + piece.tokens, piece.trained
    if tokens:
        yield Piece(text, tokens, trained, False)


def _coloured(piece: Piece) -> str:
    return f"\x1b[32;1m{piece.text}\x1b[0m" if piece.trained else f"\x1b[2m{piece.text}\x1b[0m"


def _bracketed(piece: Piece) -> str:
    return f"[[{piece.text}]]" if piece.trained else piece.text


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="loratune"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #111; }}
pre {{ font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f9;
  padding: 1rem; border-radius: 8px; }}
.t {{ background: #c9f2d0; }} .s {{ color: #6b21a8; font-size: 85%; }} .place {{ color: #555; font-size: 90%; }}
</style></head><body><h1>{title}</h1>
<p>{summary}. Label tokens are <span class="t">marked</span>, <span class="s">special tokens</span> are violet.</p>
{rows}</body></html>
"""


def as_html(inspection: Inspection, title: str) -> str:
    """Return the rows as a self-contained HTML page."""
    blocks = []
    for row in inspection.shown:
        body = "".join(
            f'<span class="{"t " * p.trained}{"s" * p.special}">{html.escape(p.text)}</span>' for p in row.pieces
        )
        place = f"{html.escape(row.place)}: {_tokens(row)}"
        blocks.append(f'<h2>{html.escape(_named(row))}</h2><p class="place">{place}</p><pre>{body}</pre>')
    summary = f"{_counted(inspection)}, {_tokens(inspection)}, longest row {inspection.longest:,} tokens"
    return _PAGE.format(title=html.escape(title), summary=summary, rows="\n".join(blocks))
