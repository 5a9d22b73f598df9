"""End tokens of answers: those that end a run's trained turns, its template's, and the base's own.

A chat template may end turns with another token than the end of text its base was trained with (`<|im_end|>` instead of
`<|endoftext|>`). The model learns to write that token, so every program that generates must stop at it: this one, and
others through generation_config.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from loratune.data.dataset import Rows
from loratune.data.encode import Encoder
from loratune.data.formats import Conversation, RowError
from loratune.errors import Place
from loratune.models import fingerprint
from loratune.models.end_tokens import joined

BEHIND = 4  # last trained tokens of a row to search: templates may write a line end after the end token
RARE = 0.01  # fraction (0-1) of the rows: a rarer last token comes from a cut row and ends no turn
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
_ASK, _SAY = {"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}
_USE = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_PROBES: tuple[tuple[dict[str, Any], ...], ...] = (
    (_ASK, _SAY),
    (_ASK, _SAY, _ASK, _SAY),  # a turn may end with the start of the next one
    (_ASK, _USE),
    (_ASK, _USE, {"role": "tool", "name": "look", "content": "So."}, _SAY),
)


def of_rows(rows: Rows, encoder: Encoder) -> tuple[int, ...]:
    """Return the special tokens that end the trained spans of rows, most frequent first, without those of cut rows.

    Only the last trained span of a row counts, as one turn may have several spans.
    """
    found: dict[int, int] = {}
    blank: dict[int, bool] = {}
    for tail, number in rows.store.tails(BEHIND).items():
        end = _end(tail, encoder, blank)
        if end is not None:
            found[end] = found.get(end, 0) + number
    least = RARE * sum(found.values())
    return tuple(sorted((end for end, number in found.items() if number >= least), key=lambda end: -found[end]))


def of_template(encoder: Encoder) -> tuple[int, ...]:
    """Return the tokens with which a tokenizer's chat template ends an answer and a call of a tool; () without one."""
    found: dict[int, None] = {}
    for messages in _PROBES if encoder.turns.template else ():
        trained = tuple(index == 1 for index in range(len(messages)))
        try:
            row = encoder.encode(Conversation(messages, trained), Place("chat template"))
        except RowError:
            continue  # it does not support tools, or has no token that ends turns
        last = int(np.flatnonzero(row.trained)[-1])
        if (end := _end(row.ids[: last + 1].tolist(), encoder, {})) is not None:
            found[end] = None
    return tuple(found)


def of_folder(folder: Path | None, encoder: Encoder) -> tuple[int, ...]:
    """Return the end tokens recorded beside an adapter or model, and those of its chat template.

    Without a record (an adapter of another program, or no folder) only the template's are known.
    """
    about = fingerprint.read(folder) if folder is not None else None
    return joined((about or {}).get("turn_ends", {}).values(), of_template(encoder))


def _end(tail: Iterable[int], encoder: Encoder, blank: dict[int, bool]) -> int | None:
    """Return the special token at the end of some tokens, ignoring white space after it, or None.

    `blank` caches which tokens are white space: cut rows end in as many ways as there are rows.
    """
    for token in reversed([one for one in tail if one >= 0]):
        if token in encoder.special:
            return int(token)
        if token not in blank:
            blank[token] = not encoder.tokenizer.decode([token]).strip()
        if not blank[token]:
            return None
    return None
