"""Check that rows fit a model: token ids within its embedding, lengths within its positions."""

from __future__ import annotations

from typing import Any

import numpy as np

from loratune.data.dataset import Rows
from loratune.errors import DataError, Place, Problem
from loratune.models import generate


def check(net: Any, rows: Rows, remedy: str, before: int = 0) -> str | None:
    """Check that a model can process rows; return a note on rows longer than its positions.

    Args:
        net: the model.
        rows: to train on or to evaluate on.
        remedy: for a row that is too long.
        before: virtual tokens before each row, which take positions.

    Raises:
        DataError: when a token id is outside of the embedding, or a row is longer than a table of position embeddings.
    """
    known = net.get_input_embeddings().weight.shape[0]
    if (first := rows.first_beyond(known)) is not None:
        told = f"token {int(rows[first].ids.max()):,} has no embedding: the model has {known:,}"
        hint = "the tokenizer's vocabulary is larger than the model's: is it of another model?"
        raise DataError(Problem(told, Place(str(rows.place(first))), hint))
    whole = generate.positions(net)
    if whole is None:
        return None
    limit = max(0, whole - before)
    long = np.flatnonzero(rows.lengths > limit)
    if not len(long):
        return None
    told = f"{len(long):,} of {len(rows):,} rows are longer than the model's {limit:,} positions"
    if before:
        told = (
            f"{len(long):,} of {len(rows):,} rows are longer than {limit:,} positions: {before:,} of the "
            f"model's {whole:,} are taken by virtual tokens"
        )
    if generate.has_learned_positions(net):
        first = int(long[0])
        told = f"{told}; this one has {int(rows.lengths[first]):,} tokens"
        raise DataError(Problem(told, Place(str(rows.place(first))), remedy))
    return told
