"""Write config.json and tokenizer_config.json with the key names of both transformers 4 and 5.

transformers 5 writes some settings under new names only (`rope_parameters` for `rope_theta` and `rope_scaling`, `dtype`
for `torch_dtype`). Programs that read the old names would silently use defaults, that is another model. So every key of
the base is kept, and what has a new name is written under its old name, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune.models import safety

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
GENERIC = "PreTrainedTokenizerFast"  # the class that every version can load: tokenizer.json unchanged
# keys taken from the written model, and keys that don't change what it computes
_OWN = ("architectures", "dtype", "torch_dtype")
_GONE = ("_name_or_path", "name_or_path", "quantization_config")
_VOLATILE = {*_OWN, *_GONE, "transformers_version", "use_cache", "return_dict", "output_attentions", "auto_map"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROTARY = ("gpt_neox", "gpt_neox_japanese")  # have their own names for the parts of `rope_parameters`


def write_config(target: Path, base: Path | None, config: Any, dtype: str) -> None:
    """Rewrite config.json of a model: with every key of its base's, and both names of what transformers 5 renamed.

    Args:
        target: folder with the config.json that transformers wrote.
        base: folder of the base model; None if there is no base config.
        config: of the model in memory; the written one must mean the same.
        dtype: of the weights in `target`, such as `bfloat16`.
    """
    written = safety.read_object(target / CONFIG)
    given = _same_model(safety.read_object(base / CONFIG), written) if base is not None else {}
    joined = _joined(given, written)
    joined |= {key: written[key] for key in _misread(joined, config) if key in written}
    both = _with_old_names(joined)
    chosen = joined if _misread(both, config) - _misread(joined, config) else both
    _set_dtype(chosen, dtype)
    write(target / CONFIG, {**chosen, "dtype": dtype, "torch_dtype": dtype})


def without_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the old names that duplicate `rope_parameters`, at every depth."""
    old = _old_rope(config)
    return {
        key: without_old_names(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
        if key not in old or value != old[key]
    }


def for_older_readers(folder: Path) -> None:
    """Rewrite a tokenizer_config.json of transformers 5 with the names of transformers 4, which both versions read."""
    config = safety.read_object(folder / TOKENIZER)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = GENERIC
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.pop("backend", None)
    write(folder / TOKENIZER, config)


def write(path: Path, config: Mapping[str, Any]) -> None:
    """Write a config as transformers does; its values come from the base, so secrets need not be removed."""
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _same_model(given: Mapping[str, Any], written: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a base's config for the written model, which may be the text part of a larger model."""
    kind = written.get("model_type")
    inner = given.get("text_config")
    if given.get("model_type") != kind and isinstance(inner, dict) and inner.get("model_type") == kind:
        return inner
    return given if given.get("model_type") == kind else {}


def _joined(given: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of both; where they differ, the base's value, except for keys that depend on the weights."""
    out = {key: value for key, value in given.items() if key not in _GONE or key in written}
    for key, value in written.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict) and key.endswith("_config"):
            out[key] = _joined(out[key], value)
        elif key in _OWN or (key not in out and key != "use_cache"):  # training turns the cache off
            out[key] = value
    return {key: value for key, value in out.items() if key not in _GONE[:2]}


def _with_old_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with transformers 4's names in addition to `rope_parameters`, at every depth."""
    out = {
        key: _with_old_names(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
    }
    return out | {key: value for key, value in _old_rope(out).items() if key not in out}


def _old_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_parameters` under the old names; empty where those can't express it."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    if isinstance(rope.get(_FULL), dict):
        old = _old_names(rope[_FULL])
        if isinstance(rope.get(_SLIDING), dict) and "rope_theta" in rope[_SLIDING]:
            old["rope_local_base_freq"] = rope[_SLIDING]["rope_theta"]
        return old
    if any(isinstance(value, dict) for value in rope.values()):
        return {}
    old = _old_names(rope)
    if config.get("model_type") in _ROTARY:
        old |= {"rotary_emb_base": rope.get("rope_theta"), "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    return old


def _old_names(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and `partial_rotary_factor` of one set of rope parameters."""
    outside = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in outside and value is not None}
    plain = scaling.get("rope_type", "default") == "default" and scaling.keys() <= {"rope_type", "type"}
    return {**{key: rope[key] for key in outside if key in rope}, "rope_scaling": None if plain else scaling}


def _misread(config: Mapping[str, Any], model: Any) -> set[str]:
    """Return the keys that transformers reads from a config with another value than the model has."""
    again = type(model).from_dict(json.loads(json.dumps(config))).to_dict()
    meant = json.loads(json.dumps(model.to_dict()))
    again = json.loads(json.dumps(again))
    return {key for key in meant.keys() - _VOLATILE if _lasting(again.get(key)) != _lasting(meant[key])}


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(one) for key, one in value.items() if key not in _VOLATILE}
    return value


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set the precision wherever it is named, under both names."""
    for value in config.values():
        if isinstance(value, dict):
            _set_dtype(value, dtype)
    if "dtype" in config or "torch_dtype" in config:
        config["dtype"] = config["torch_dtype"] = dtype
