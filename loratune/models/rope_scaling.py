"""RoPE scaling of a .gguf file, which transformers ignores when it reads one.

A model with scaled positions (Llama 3.1 by a table of factors, others by a factor in the metadata) would silently be
another model without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loratune.errors import ModelError, Place, Problem

# Llama 3.1 and later write a table, not the parameters it comes from; only the factor ever differed.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_CONTEXTS = (8192,)
_KEYS = {
    "factor": "factor", "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow",
}  # fmt: skip


def complete(config: Any, file: Path) -> None:
    """Add the RoPE scaling of a .gguf file to the config of its model.

    Raises:
        ModelError: when the scaling can't be expressed in a config.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    values = {name: field.contents() for name, field in reader.fields.items() if ".rope." in name}
    said = {name.partition(".rope.scaling.")[2]: value for name, value in values.items() if ".rope.scaling." in name}
    tables = {tensor.name: tensor.data for tensor in reader.tensors if tensor.name.startswith("rope_f")}
    rope = dict(config.to_dict().get("rope_parameters") or {})
    if rope.get("rope_type", "default") != "default":
        return  # transformers has read it
    if "rope_freqs.weight" in tables and any(abs(float(one) - 1) > 1e-6 for one in tables["rope_freqs.weight"]):
        table = [float(one) for one in tables["rope_freqs.weight"]]
        found = llama3(table, rope["rope_theta"], said) if "rope_theta" in rope else None
    elif tables.keys() - {"rope_freqs.weight"}:
        found = None  # two tables, for short and for long rows
    elif said.get("type", "none") == "none":
        return
    else:
        known = said["type"] in ("linear", "yarn") and said.keys() <= {"type", "finetuned", *_KEYS}
        numbers = {new: said[key] for key, new in _KEYS.items() if key in said}
        found = {"rope_type": said["type"], **numbers} if known and rope else None
    if found is None:
        hint = "use the model's safetensors files"
        told = "its RoPE scaling can't be read from a .gguf file"
        raise ModelError(Problem(told, Place(str(file)), hint))
    config.rope_parameters = rope | found


def llama3(table: Sequence[float], theta: float, said: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rope parameters that produce a table of factors, or None where no known ones do.

    Args:
        table: divisor of each frequency, shape (head dimension / 2,).
        theta: base of the frequencies.
        said: the file's keys under `rope.scaling`.
    """
    given = said.get("original_context_length")
    for context in (*([given] if given else []), *_CONTEXTS):
        found = {"rope_type": "llama3", "factor": round(max(table), 4), **_LLAMA3}
        found["original_max_position_embeddings"] = int(context)
        if all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(table, factors(found, theta, len(table)), strict=True)):
            return found
    return None


def factors(rope: Mapping[str, Any], theta: float, count: int) -> list[float]:
    """Return llama3 scaling's divisor of each of `count` frequencies.

    Source: `apply_scaling` in the code of Llama 3.1.
    """
    out = []
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    for i in range(count):
        waves = context / (2 * math.pi * theta ** (i / count))  # rotations within the context
        part = min(max((waves - low) / (high - low), 0.0), 1.0)
        out.append(1 / ((1 - part) / rope["factor"] + part))
    return out
