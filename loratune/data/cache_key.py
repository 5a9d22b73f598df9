"""The key of tokenized rows in the cache: a hash of everything they depend on, so that they are never stale."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from xxhash import xxh3_128

from loratune.data import row_files
from loratune.data.encode import Encoder
from loratune.data.section import Data, Source
from loratune.errors import DataError, Place, Problem
from loratune.system import files

# modules and packages whose code the rows depend on
_MODULES = ("config/section", "system/files")
_PACKAGES = ("tokenizers", "transformers", "jinja2", "pyarrow")


@dataclass(frozen=True)
class Input:
    """A data file at the start of a run: size in bytes, modification time (ns), hash of its bytes."""

    path: str
    size: int
    changed: int
    digest: str


def of(source: Source, name: str = "train") -> list[Input]:
    """Return the files of a source, each hashed; of a hub data set, those in the cache of `datasets`.

    Args:
        source: of rows.
        name: of the set of rows; see `row_files.chosen`.

    Raises:
        DataError: when there are none, or one can't be read.
    """
    path = Path(source.path)
    if path.is_absolute():
        return [_input(str(file)) for file in row_files.chosen(path, name).files]
    return [_input(file["filename"]) for file in row_files.hub(source).cache_files]


def _input(path: str) -> Input:
    digest = xxh3_128()
    try:
        with files.opened(path) as stream:
            before = os.fstat(stream.fileno())
            while part := stream.read(1 << 24):
                digest.update(part)
    except OSError as error:
        raise DataError(Problem(f"can't be read: {error.strerror}", Place(path))) from None
    return Input(path, before.st_size, before.st_mtime_ns, digest.hexdigest())


def check_unchanged(given: Sequence[Input]) -> None:
    """Check that no file has changed since it was hashed.

    Raises:
        DataError: when one has.
    """
    for one in given:
        now = os.stat(one.path) if os.path.exists(one.path) else None
        if now is None or (now.st_size, now.st_mtime_ns) != (one.size, one.changed):
            raise DataError(Problem("changed while it was read", Place(one.path), "run again when it is complete"))


def key(
    sources: Sequence[Source], given: Sequence[Sequence[Input]], data: Data, encoder: Encoder, name: str
) -> str | None:
    """Return a hash (hex) of everything that the rows of a set depend on, or None where that is unknown.

    Args:
        sources: of the set.
        given: the files of each source.
        data: how rows are read and fitted to `max_length`.
        encoder: with the tokenizer and its chat template.
        name: of the set.
    """
    if not all(given):  # a hub data set that is in memory only
        return None
    template = encoder.turns.template or ""
    tokenizer = encoder.tokenizer
    parts = {
        "code": _code(),
        "packages": {package: version(package) for package in _PACKAGES},
        "name": name,
        "sources": [source.model_dump() for source in sources],
        "files": [[(one.path, one.size, one.digest) for one in some] for some in given],
        "rules": data.model_dump_json(  # text, as the order of labels counts
            include={"format", "max_length", "on_long", "on_bad_row", "duplicates"}
        ),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": template,
        "today": date.today().isoformat() if "strftime_now" in template else "",  # the template may write the date
    }
    return xxh3_128(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _code() -> str:
    here = Path(__file__).parent
    code = [*sorted(here.rglob("*.py")), *(here.parent / f"{name}.py" for name in _MODULES)]
    return xxh3_128(b"\0".join(file.read_bytes() for file in code)).hexdigest()
