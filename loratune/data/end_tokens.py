"""The tokens at which an answer ends: those that end the turns a run trained, its template's, and the base's own.

A chat template may end its turns with another token than the end of text its base was trained with (`<|im_end|>` beside
`<|endoftext|>`). The model learns to write that token, so whoever generates must stop at it: this program, and through
generation_config.json every other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loratune.data.dataset import Rows
from loratune.data.encode import Encoder
from loratune.data.formats import Conversation, RowError
from loratune.errors import Place, listed
from loratune.models import fingerprint, safety
from loratune.system import storage

NAME = "generation_config.json"
BEHIND = 4  # last trained tokens of a row that are looked at: templates write a line end behind the token
RARE = 0.01  # part (0-1) of the rows: what ends fewer is where a row was cut, not the end of a turn
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
_ASK, _SAY = {"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}
_USE = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_PROBES: tuple[tuple[dict[str, Any], ...], ...] = (
    (_ASK, _SAY),
    (_ASK, _SAY, _ASK, _SAY),  # a turn may end where the next one begins
    (_ASK, _USE),
    (_ASK, _USE, {"role": "tool", "name": "look", "content": "So."}, _SAY),
)


def of_rows(rows: Rows, encoder: Encoder) -> tuple[int, ...]:
    """Return the special tokens that end what is trained in rows, the most frequent first; those of cut rows left out.

    Only the last trained span of a row counts: a template may write one turn in several.
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
            continue  # it knows no tools, or ends its turns without a token of their own
        last = int(np.flatnonzero(row.trained)[-1])
        if (end := _end(row.ids[: last + 1].tolist(), encoder, {})) is not None:
            found[end] = None
    return tuple(found)


def of_folder(folder: Path | None, encoder: Encoder) -> tuple[int, ...]:
    """Return the ends that a run recorded beside its adapter or model, and those of the template it is asked with.

    Without a record (an adapter of another program, or no folder at all) the template alone tells.
    """
    about = fingerprint.read(folder) if folder is not None else None
    return joined((about or {}).get("turn_ends", {}).values(), of_template(encoder))


def of_model(net: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the end tokens that a model and its tokenizer name themselves."""
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return joined(eos_of({"eos_token_id": net.generation_config.eos_token_id}), own)


def notes(trained: Sequence[int], eos: Sequence[int], tokenizer: Any) -> list[str]:
    """Return what a person must know of the ends that a run trains, beside those its base has."""
    if not trained:
        return ["no row ends with a special token: the model does not learn where to stop"]
    new, old = list(named(set(trained) - set(eos), tokenizer)), list(named(eos, tokenizer))
    if not new:
        return []
    told = f"answers are trained to end with {listed(new)}"
    return [f"{told}, those of the base with {listed(old)}: {NAME} names all" if old else told]


def joined(*sets: Iterable[int]) -> tuple[int, ...]:
    """Return all tokens of some sets once each, in the order they come."""
    return tuple(dict.fromkeys(token for one in sets for token in one))


def named(ends: Iterable[int], tokenizer: Any) -> dict[str, int]:
    """Return tokens by their text, as they are written down beside an adapter."""
    return {str(tokenizer.convert_ids_to_tokens(end)): end for end in ends}


def eos_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the end tokens of a generation_config.json or config.json."""
    ids = config.get("eos_token_id")
    return tuple(one for one in (ids if isinstance(ids, list) else [ids]) if type(one) is int)


def write_config(target: Path, base: Path, ends: Iterable[int]) -> None:
    """Write generation_config.json: that of the base, with all tokens at which an answer ends.

    Args:
        target: folder of an adapter or a whole model; a generation_config.json there is written anew.
        base: folder of the base model.
        ends: of the trained turns; they come first, for readers that take one.
    """
    config, given = safety.read_object(base / "config.json"), {}
    if (base / NAME).is_file():
        given = safety.read_object(base / NAME)
    else:  # without the file transformers takes them from config.json, so they must be in the new one
        text = config.get("text_config")
        places = (config, text if isinstance(text, dict) else {})
        given = {name: place[name] for name in _IDS for place in reversed(places) if place.get(name) is not None}
    before, ends = eos_of(given), tuple(ends)
    if set(ends) <= set(before) and (base / NAME).is_file():
        shutil.copyfile(base / NAME, target / NAME)
    elif every := joined(ends, before):
        storage.write_json(target / NAME, {**given, "eos_token_id": list(every) if len(every) > 1 else every[0]})


def _end(tail: Iterable[int], encoder: Encoder, blank: dict[int, bool]) -> int | None:
    """Return the special token at the end of some tokens, white space behind it apart, or None where it is another.

    `blank` remembers which tokens are white space: rows that were cut end in as many ways as there are rows.
    """
    for token in reversed([one for one in tail if one >= 0]):
        if token in encoder.special:
            return int(token)
        if token not in blank:
            blank[token] = not encoder.tokenizer.decode([token]).strip()
        if not blank[token]:
            return None
    return None
