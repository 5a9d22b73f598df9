"""Files with the values of a reference model for each sample: in the run folder for a resume, in the cache for others.

Both are JSON with a key, a hash of everything that decides the values, and a hash of their content; a damaged file
is not used. A float32 is written with all its digits, so that what is read is what was computed, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from loratune.data import row_cache
from loratune.data.dataset import Rows
from loratune.errors import StorageError
from loratune.methods import Lora, adapter_files
from loratune.models import base_files
from loratune.system import files, storage
from loratune.training.job import Job

MOST = 1 << 34  # bytes of a file: some 300 million values
Values = dict[str, dict[str, np.ndarray]]  # by set of rows, then by name; float32, (samples,) each

_NAME = re.compile(r"([0-9a-f]{64}|\.staging-.+)(\.json)?(-[0-9a-f]{8})?")


def run_key(job: Job) -> str:
    """Return a hash (hex) of everything of a recipe and its inputs that the values in its run folder depend on."""
    setup, recipe = job.facts.prepared, job.recipe
    parts = {
        "rows": setup.fingerprints, "dtype": setup.dtype, "quantization": setup.quantization,
        "method": recipe.method.model_dump(mode="json"), "objective": recipe.objective.type,
        "seed": recipe.train.seed,
    }  # fmt: skip
    return storage.json_sha256(parts)


def cache_key(job: Job, sets: dict[str, Rows], layout: str) -> str:
    """Return a hash (hex) of everything that values in the cache depend on; runs that differ in the rest share them.

    Rows count with their tokens and label tokens, so a template counts by what it makes of them. A method counts only
    where the model before step 1 is not the base. Precision, device, layout, attention and kernels count, as in 16 bits
    they change the first digits after the point of a sequence's log p, and the loss before step 1 would not be that of
    equal models. The sizes of micro-batches, the number of processes and torch's compiler do not count: they follow
    from the free memory and change the last digits only.
    """
    setup, recipe = job.facts.prepared, job.recipe
    config = job.base.loaded.model.config
    parts = {
        "rows": {name: [rows.store.digest, _sha256(rows.chosen), rows.per_sample] for name, rows in sets.items()},
        "model": _model(job), "objective": [recipe.objective.type, recipe.objective.values],
        "dtype": [setup.dtype, setup.quantization, str(job.accelerator.mixed_precision)],
        "device": job.accelerator.device.type, "layout": layout, "attention": str(config._attn_implementation),
        "kernels": setup.kernels, "versions": job.facts.start.versions,
    }  # fmt: skip
    return storage.json_sha256(parts)


def _model(job: Job) -> dict[str, Any]:
    """Return what tells the reference model: of the one before step 1 the base, and what was added to it."""
    prints, method = job.facts.prepared.fingerprints, job.recipe.method
    if "reference" in prints:
        return {"named": prints["reference"]}
    base = {"base": prints["base"]}
    if method.trains_base or not method.forgets_by:
        return base
    if isinstance(method, Lora) and method.continue_from is not None:
        return base | {"adapter": adapter_sha256(Path(method.continue_from))}
    return base | {"method": method.model_dump(mode="json"), "seed": job.recipe.train.seed}


def adapter_sha256(folder: Path) -> str:
    """Return a sha256 (hex) of an adapter: its config and its tensors."""
    digest = hashlib.sha256()
    for name in (adapter_files.CONFIG, adapter_files.TENSORS):
        with files.opened(folder / name) as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def write(file: Path, key: str, found: Values) -> None:
    """Write values to a file, atomically.

    Raises:
        StorageError: when it can't be written.
    """
    known = {name: {value: array.tolist() for value, array in of.items()} for name, of in found.items()}
    storage.write_json(file, {"key": key, "sha256": storage.json_sha256(known), **known})


def read(file: Path, key: str, sets: dict[str, Rows]) -> Values | None:
    """Return the values in a file, or None where there are none, they are damaged, or those of another key."""
    try:
        known = json.loads(files.text(file, MOST))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(known, dict) or known.pop("key", None) != key:
        return None
    if known.pop("sha256", None) != storage.json_sha256(known):
        return None
    return {
        name: {value: np.array(numbers, dtype=np.float32) for value, numbers in known[name].items()} for name in sets
    }


def folder() -> Path:
    """Return the folder of values in the cache."""
    return base_files.cache() / "reference"


def find(key: str, sets: dict[str, Rows]) -> Values | None:
    """Return values in the cache, or None; record that they are in use."""
    file = folder() / f"{key}.json"
    found = read(file, key, sets)
    if found is not None:
        with suppress(OSError):
            os.utime(file)
    return found


def keep(key: str, found: Values) -> str:
    """Write values to the cache, and delete what was unused for a month; return why that failed, or nothing."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        _tidy(folder())
        write(folder() / f"{key}.json", key, found)
    except (OSError, StorageError) as error:  # a cache is a convenience
        return str(error).splitlines()[0]
    return ""


def _tidy(parent: Path) -> None:
    """Delete files that were unused for a month, and what a killed process left a day ago; other names are kept."""
    for file in parent.iterdir():
        if file.is_symlink() or not file.is_file() or not _NAME.fullmatch(file.name):
            continue
        age = time.time() - file.stat().st_mtime
        if age > (86400 if file.name.startswith(".") else row_cache.UNUSED):
            file.unlink(missing_ok=True)
