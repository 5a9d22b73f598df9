"""Fingerprint of an adapter's base model and tokenizer, and its comparison with another.

The fingerprint is of the files: quantization and precision in memory don't change it, and a copy is the same base. It
is computed tensor by tensor (name, dtype, shape, bytes), so it does not depend on how tensors are distributed over
files. Of a large tensor only a sample is read: 100 GB need some thousand reads of 4 KiB.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.errors import BaseMismatchError, ModelError, Place, Problem, listed, shorten
from loratune.models import base_files, config_files, safety
from loratune.models.section import Model
from loratune.system import files, storage

NAME = "loratune.json"
SCHEMA = 1
WHOLE = 64 << 20  # bytes of a model up to which all of it is read
SMALL = 256 << 10  # bytes of a tensor up to which all of it is read: norms and biases
SAMPLE = 4 << 10  # bytes read at each place of a larger one
PLACES = 5  # from its first to its last bytes
SHOWN = 6  # differences named in a message

# what programs write into config.json about themselves, and what does not change what the model computes
_VOLATILE = {
    "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "_attn_implementation", "attn_implementation", "architectures",
    "_attn_implementation_autoset", "auto_map",
}  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of a base model.

    Attributes:
        config: config.json without what programs write about themselves.
        parts: part of the model, such as `model.layers.3` -> sha256 (hex) of its tensors.
    """

    config: dict[str, Any]
    parts: dict[str, str]

    @property
    def sha256(self) -> str:
        """One digest (hex) of all of it."""
        return storage.json_sha256({"schema": SCHEMA, "config": self.config, "parts": self.parts})

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return {"sha256": self.sha256, "config": self.config, "parts": self.parts}

    def differences(self, other: Fingerprint) -> list[str]:
        """Return the differences from `other`, each as `config ...` or `tensors of ...`, this one's value first."""
        found = []
        for key in sorted(self.config.keys() | other.config.keys()):
            mine, its = (json.dumps(one.config.get(key), sort_keys=True) for one in (self, other))
            if mine != its:
                found.append(f"config `{shorten(key)}` is {shorten(mine)}, was {shorten(its)}")
        parts = sorted(self.parts.keys() | other.parts.keys(), key=_in_layer_order)
        wrong = [part for part in parts if self.parts.get(part) != other.parts.get(part)]
        if wrong:
            found.append(f"the tensors of {listed(wrong, SHOWN)} differ")
        return found


def of_base(section: Model) -> Fingerprint:
    """Compute the fingerprint of a base model that is on this machine.

    Args:
        section: with a folder, a .gguf file, or a hub id whose files are in the cache.

    Raises:
        ModelError: when there are no complete safetensors files.
    """
    return of_folder(base_files.folder_of(section))


def of_folder(folder: Path) -> Fingerprint:
    """Compute the fingerprint of a folder with config.json and safetensors files; see `of_base`."""
    try:
        config = safety.read_object(folder / "config.json")
        headers = {file: safety.header_of(file) for file in safety.weight_files(folder)}
        whole = sum(file.stat().st_size for file in headers) <= WHOLE
        seen: dict[str, dict[str, str]] = {}
        for file, header in headers.items():
            with files.opened(file) as stream:
                for name, entry in header.tensors.items():
                    start, end = entry.offsets
                    digest = hashlib.sha256(f"{entry.dtype} {entry.shape} ".encode())
                    for place, size in _places(start, end, whole):
                        digest.update(os.pread(stream.fileno(), size, header.begin + place))
                    seen.setdefault(_part(name), {})[name] = digest.hexdigest()
    except (OSError, ValueError) as error:
        raise ModelError(Problem(f"the fingerprint can't be computed: {error}", Place(str(folder)))) from None
    return Fingerprint(
        _lasting(config_files.without_old_names(config)),
        {part: storage.json_sha256(tensors) for part, tensors in sorted(seen.items())},
    )


def of_tokenizer(tokenizer: Any) -> dict[str, str]:
    """Return digests (hex) of a fast tokenizer (`sha256`) and of its chat template (`template`)."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}  # of the last call
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return {"sha256": storage.json_sha256([kept, special]), "template": storage.json_sha256(tokenizer.chat_template)}


def record(section: Model, tokenizer: Any) -> dict[str, Any]:
    """Return the record that is written beside an adapter: the fingerprint of its base, and the base's location."""
    base = {"name": section.base, "revision": section.revision, **of_base(section).as_json()}
    return {"schema": SCHEMA, "base": base, "tokenizer": of_tokenizer(tokenizer)}


def write(folder: Path, about: dict[str, Any]) -> None:
    """Write a `record` beside an adapter."""
    (folder / NAME).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def head(folder: Path) -> dict[str, Any]:
    """Return the settings of the head that scores rows beside an adapter or model, or nothing where none is recorded.

    Raises:
        ModelError: when the file is damaged.
    """
    settings = (read(folder) or {}).get("head") or {}
    return {**settings, "id2label": {int(k): str(v) for k, v in settings["id2label"].items()}} if settings else {}


def read(folder: Path) -> dict[str, Any] | None:
    """Return what `write` wrote, or None if there is nothing.

    Raises:
        ModelError: when the file is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        about = json.loads(files.text(path))
        base = Fingerprint(about["base"]["config"], about["base"]["parts"])
        whole = about["schema"] == SCHEMA and base.sha256 == about["base"]["sha256"]
        if not whole or not {"sha256", "template"} <= about["tokenizer"].keys():
            raise ValueError("its digest does not match")
        if not all(type(token) is int and token >= 0 for token in about.get("turn_ends", {}).values()):
            raise ValueError("`turn_ends` are not token ids")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        hint = "an adapter without this file can be used; its base is not checked then"
        raise ModelError(Problem(f"is damaged ({error})", Place(str(path)), hint)) from None
    return dict(about)


@dataclass(frozen=True)
class Comparison:
    """Result of comparing a base with the one an adapter was trained on.

    Attributes:
        differences: of another base that was allowed.
        notes: lines to print.
    """

    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def compare(
    folder: Path, section: Model, allow: bool, tokenizer: Any = None,
    remedy: str = "name the right one, or continue with --allow-base-mismatch: this is recorded",
) -> Comparison:  # fmt: skip
    """Compare a base (and a tokenizer) with the record of an adapter or a full model.

    Another tokenizer is reported and not refused: the weights still fit, and it may be intended.

    Args:
        folder: of the adapter.
        section: the base.
        allow: accept another base.
        tokenizer: the one in use; None to compare none.
        remedy: said where it is another one.

    Raises:
        BaseMismatchError: when the base is another one.
        ModelError: when there is nothing to compare, as a file is damaged.
    """
    about = read(folder)
    if about is None:
        return Comparison(notes=(f"{folder.name} has no {NAME}: its base can't be checked",))
    notes = []
    if tokenizer is not None:
        now = of_tokenizer(tokenizer)
        for key, what in (("sha256", "tokenizer"), ("template", "chat template")):
            if now[key] != about["tokenizer"][key]:
                notes.append(f"the {what} differs from the one {folder.name} was trained with")
    was = Fingerprint(about["base"]["config"], about["base"]["parts"])
    differences = tuple(of_base(section).differences(was))
    if not differences:
        return Comparison(notes=tuple(notes))
    told = "; ".join(differences[:SHOWN])
    if not allow:
        raise BaseMismatchError(
            Problem(
                f"this is not the base it was trained on (`{shorten(str(about['base']['name']))}`): {told}",
                Place(section.base),
                remedy,
            )
        )
    return Comparison(differences, (f"not the base it was trained on, as allowed: {told}", *notes))


def _places(start: int, end: int, whole: bool) -> list[tuple[int, int]]:
    """Return (offset, bytes) of the parts of a tensor to read, as offsets into the data of its file."""
    if whole or end - start <= SMALL:
        return [(start, end - start)]
    step = (end - start - SAMPLE) // (PLACES - 1)
    return [(start + number * step, SAMPLE) for number in range(PLACES - 1)] + [(end - SAMPLE, SAMPLE)]


def _part(name: str) -> str:
    """Return the part of a model that a tensor is of: its name up to the layer number, else without its last word."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name.rpartition(".")[0] or name


def _in_layer_order(part: str) -> list[tuple[int, str]]:
    return [(int(word), "") if word.isdigit() else (-1, word) for word in part.split(".")]


def _lasting(config: Any) -> Any:
    """Return a config without its volatile keys and without nulls, which mean defaults."""
    if isinstance(config, list):
        return [_lasting(item) for item in config]
    if not isinstance(config, dict):
        return config
    return {key: _lasting(value) for key, value in config.items() if key not in _VOLATILE and value is not None}
