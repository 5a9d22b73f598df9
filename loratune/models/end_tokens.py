"""End tokens of answers, in a model, its tokenizer and generation_config.json."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune.errors import listed
from loratune.models import safety
from loratune.system import storage

NAME = "generation_config.json"
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")


def of_model(net: Any, tokenizer: Any) -> tuple[int, ...]:
    """Return the end tokens of a model and its tokenizer."""
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return joined(eos_of({"eos_token_id": net.generation_config.eos_token_id}), own)


def eos_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the end tokens of a generation_config.json or config.json."""
    ids = config.get("eos_token_id")
    return tuple(one for one in (ids if isinstance(ids, list) else [ids]) if type(one) is int)


def joined(*sets: Iterable[int]) -> tuple[int, ...]:
    """Return the tokens of all sets, each once, in order."""
    return tuple(dict.fromkeys(token for one in sets for token in one))


def named(ends: Iterable[int], tokenizer: Any) -> dict[str, int]:
    """Return token ids by their text, as they are recorded beside an adapter."""
    return {str(tokenizer.convert_ids_to_tokens(end)): end for end in ends}


def notes(trained: Sequence[int], eos: Sequence[int], tokenizer: Any) -> list[str]:
    """Return notes on end tokens that a run trains and its base does not have."""
    if not trained:
        return ["no row ends with a special token: the model does not learn where to stop"]
    new, old = list(named(set(trained) - set(eos), tokenizer)), list(named(eos, tokenizer))
    if not new:
        return []
    told = f"answers are trained to end with {listed(new)}"
    return [f"{told}, those of the base with {listed(old)}: {NAME} lists all" if old else told]


def write_config(target: Path, base: Path, ends: Iterable[int]) -> None:
    """Write generation_config.json: that of the base, with all tokens at which an answer ends.

    Args:
        target: folder of an adapter or a full model; a generation_config.json there is rewritten.
        base: folder of the base model.
        ends: of the trained turns; they come first, for programs that use only one.
    """
    config, given = safety.read_object(base / "config.json"), {}
    if (base / NAME).is_file():
        given = safety.read_object(base / NAME)
    else:  # without the file transformers uses those of config.json, so they must be in the new one
        text = config.get("text_config")
        places = (config, text if isinstance(text, dict) else {})
        given = {name: place[name] for name in _IDS for place in reversed(places) if place.get(name) is not None}
    before, ends = eos_of(given), tuple(ends)
    if set(ends) <= set(before) and (base / NAME).is_file():
        shutil.copyfile(base / NAME, target / NAME)
    elif every := joined(ends, before):
        storage.write_json(target / NAME, {**given, "eos_token_id": list(every) if len(every) > 1 else every[0]})
