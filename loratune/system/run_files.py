"""Names of the files that a run writes into its folder, and which inputs of a recipe would collide with them.

Files with other names are the user's: they are neither overwritten nor deleted.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from pathlib import Path, PurePosixPath

from loratune.system import files

CHECKPOINTS, MANIFEST = "checkpoints", "MANIFEST.json"
REFERENCE = "reference_logps.json"  # of an objective that compares with the model before step 1
RECORDS = ("run.json", "recipe.yaml", "metrics.jsonl", "ledger.jsonl", REFERENCE)  # written at the start
PAPERS = ("README.md", "loss.svg")  # written at the end
PREDICTIONS = "predictions.jsonl"

TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
TOKENIZER = (
    "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "vocab.bpe", "encoder.json", "merges.txt", "tekken.json", "tokenizer.model*", "*.model",
    "*.tiktoken", "*.spm",
)  # fmt: skip
PROCESSORS = (
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json",
)  # fmt: skip
TRAINED = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model.safetensors",
    "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json", "loratune.json",
)  # fmt: skip
STATE = ("optimizer.safetensors", "optimizer.json", "state.json")  # of a checkpoint, besides the trained weights

_PREDICTIONS = re.compile(r"predictions(-step-\d+)?\.jsonl")
_LEFT = re.compile(r"\.(staging|trash)-.+-[0-9a-f]{8}|\.replaced-(step-\d+|final)")


def is_predictions(name: str) -> bool:
    """Return whether this is the name of a file of predictions of a run or of a checkpoint."""
    return bool(_PREDICTIONS.fullmatch(name))


def is_left_over(name: str) -> bool:
    """Return whether this is a temporary name of a file or folder left behind by a kill."""
    return bool(_LEFT.fullmatch(name))


def is_result(name: str) -> bool:
    """Return whether the final files of a run may have this name, relative to its folder."""
    patterns = (MANIFEST, *TRAINED, *TOKENIZER, *TEMPLATES, *PROCESSORS, *PAPERS)
    return any(PurePosixPath(name).match(pattern) for pattern in patterns if pattern.count("/") == name.count("/"))


def is_saved(name: str) -> bool:
    """Return whether a checkpoint, or the final files beside it, may have a file of this name."""
    return name in STATE or (is_result(name) and name not in PAPERS)


def is_written(name: str) -> bool:
    """Return whether a run, or an evaluation of one, may write a file of this name, relative to its folder."""
    first = name.split("/")[0]
    ours = first == CHECKPOINTS or name in RECORDS or name == ".lock"
    return ours or is_predictions(name) or is_left_over(first) or is_result(name)


def meets(path: Path, output: Path) -> str | None:
    """Return how a path relates to a run folder, links followed: `is`, `holds`, `lies in`, or None."""
    given, run = Path(os.path.realpath(path)), Path(os.path.realpath(output))
    if given == run or _same(given, run):
        return "is"
    if any(_same(given, above) for above in run.parents):
        return "holds"
    return "lies in" if any(_same(run, above) for above in given.parents) else None


def _same(one: Path, other: Path) -> bool:
    """Return whether two paths are the same place, also with case-insensitive names or a second mount."""
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def is_run(folder: Path) -> bool:
    """Return whether a folder has a run, possibly a killed one."""
    return (folder / "run.json").is_file()


def protected(folder: Path) -> str | None:
    """Return what a protected folder is (nothing may be written into it); None for a run and any other folder."""
    from huggingface_hub import constants

    if folder == Path(constants.HF_HUB_CACHE).resolve():
        return "the hub's cache"
    if is_run(folder):  # one of full fine-tuning has a config.json, too
        return None
    if (folder / MANIFEST).is_file() and (folder / "state.json").is_file():
        return "a checkpoint"
    try:
        config = json.loads(files.text(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(config, dict) and ("model_type" in config or "architectures" in config)
    return "a base model" if known else None


def is_read(source: Path, output: Path) -> bool:
    """Return whether a file, folder or glob of rows includes files that a run writes into its folder."""
    if not glob.has_magic(str(source)) or source.exists():
        how = meets(source, output)
        return how in ("is", "holds") or (how == "lies in" and _is_of_run(source, output))
    names = [f"{PREDICTIONS}", *RECORDS, f"{CHECKPOINTS}/step-000001/state.json", "README.md", "tokenizer.json"]
    whole = PurePosixPath(os.path.normpath(source)).parts
    places = {Path(os.path.abspath(output)), Path(os.path.realpath(output))}
    return any(_matches((place / name).parts, whole) for place in places for name in names)


def is_among(path: Path, source: Path) -> bool:
    """Return whether a file, existing or not yet, belongs to a file, folder or glob."""
    if not glob.has_magic(str(source)) or source.exists():
        return meets(path, source) in ("is", "lies in")
    whole, folder = PurePosixPath(os.path.abspath(source)).parts, Path(os.path.realpath(path.parent))
    places = {Path(os.path.abspath(path)), folder / path.name}
    return any(_matches(place.parts, whole) for place in places) or any(
        _same(path, Path(file)) for file in glob.iglob(str(source), recursive=True)
    )


def _is_of_run(path: Path, output: Path) -> bool:
    return is_written(Path(os.path.relpath(os.path.realpath(path), os.path.realpath(output))).as_posix())


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return whether a path matches a glob pattern, part by part; `**` matches any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1)) or len(pattern) == 1
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
