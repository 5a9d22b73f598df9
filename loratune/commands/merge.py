"""`loratune merge`: merge an adapter into its base, and compare the result with base + adapter before it is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratune.commands import opened_model
from loratune.data import turn_ends
from loratune.data.encode import Encoder
from loratune.errors import ModelError, Place, Problem, StorageError, UsageError
from loratune.events import Listener, Report
from loratune.kernels.layer_kinds import name_of
from loratune.methods import adapter_files
from loratune.models import (
    base_files,
    base_model,
    config_files,
    end_tokens,
    fingerprint,
    model_folder,
    safety,
    tokenizing,
)
from loratune.runs import model_card, outputs
from loratune.system import files, startup, storage  # fmt: skip
from loratune.system.version import VERSION

# Largest difference of two logits, relative to the largest logit, that rounding causes: measured on merges of trained
# adapters, see docs/checks.md.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ON_DISK = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float32}

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "2, 4, 6, 8,",
    "Translate to German: good morning",
)


@dataclass(frozen=True)
class Merge:
    """A merged model.

    Attributes:
        folder: of the model.
        dtype: precision of its weights: `bfloat16`, `float16` or `float32`.
        difference: largest difference between a logit of base + adapter and the same logit of the merged model.
        relative: that difference over the largest logit of base + adapter, 0 for none.
        agreement: part (0-1) of positions whose most probable token is the same.
        base_differs: how the base differs from the one the adapter was trained on, where that was allowed.
    """

    folder: Path
    dtype: str
    difference: float
    relative: float
    agreement: float
    base_differs: tuple[str, ...] = ()


HINT = "a merge holds the base in float32, 4 bytes a weight, in main memory: close other programs"


def merge(
    name: str | Path, out: str | Path, dtype: str = "auto", base: str | None = None, tolerance: float | None = None,
    allow_base_mismatch: bool = False, trust_remote_code: bool = False, on_event: Listener | None = None,
) -> Merge:  # fmt: skip
    """Merge an adapter into its base model: W + s B A, in float32, rounded once.

    An adapter that was trained on a quantized base is merged into the full-precision base.

    Args:
        name: run folder or adapter folder.
        out: folder for the merged model; must not exist, or be empty.
        dtype: precision of the merged weights; auto: that of the base on disk.
        base: base model to use instead of the recorded one.
        tolerance: largest difference of a logit relative to the largest logit; None: by dtype.
        allow_base_mismatch: merge into another base than it was trained on; recorded beside the merged model.
        trust_remote_code: run code that comes with the base model.
        on_event: called with each event; None: lines go to Python's logging. What it raises comes out as it is.

    Returns:
        The merge and how far it is from base + adapter on a few prompts.

    Raises:
        UsageError: when `out` is not empty or is inside of a checkpoint or base, or there is no adapter to merge.
        ModelError: when the merged model differs by more than the tolerance; nothing is left behind then.
        StorageError: when the folder can't be written.
    """
    report = Report(on_event)
    with startup.quiet(), startup.computing(), report.unchanged(), base_model.or_out_of_memory(HINT):
        target = files.local(out)
        _check(target, dtype)
        what, folder = opened_model.open_adapter(str(name), base, trust_remote_code)
        adapter_files.check_mergeable(folder)
        outputs.check(target, "--out", what.base.base)
        # in float32: the sum W + s B A is rounded once, at the end
        loaded = opened_model.load(what, True, allow_base_mismatch)
        for line in loaded.notes:
            report.problem(line)
        wanted = _dtype(dtype, base_files.folder_of(what.base))
        prompts = [ids for ids in (loaded.tokenizer(p).input_ids for p in PROMPTS) if ids]
        with_adapter = _logits(loaded.model, prompts)
        merged = _fold(loaded.model, folder)
        _round(merged, wanted)
        after = _logits(merged, prompts)
        differences = _differences(with_adapter, after, TOLERANCE[wanted] if tolerance is None else tolerance, report)
        merged.to(wanted)
        ends = turn_ends.of_folder(folder, Encoder(loaded.tokenizer))
        done = Merge(target, name_of(wanted), *differences, loaded.base_differs)
        _write(done, merged, loaded.tokenizer, wanted, what, ends)
        return done


def _check(target: Path, dtype: str) -> None:
    """Check the arguments before anything is loaded."""
    if files.there(target) and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(Problem("is not an empty folder", Place(str(target)), "name a new one with --out"))
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise UsageError(f"--dtype must be one of auto, bfloat16, float16, float32, given `{dtype}`")


def _differences(
    wanted: Sequence[torch.Tensor], found: Sequence[torch.Tensor], limit: float, tell: Report
) -> tuple[float, float, float]:
    """Return the largest difference of a logit, the same relative to the largest logit, and top-1 agreement (0-1).

    Args:
        wanted: logits of base and adapter for each prompt, (1, tokens, vocabulary).
        found: the same of the merged model.
        limit: largest relative difference.
        tell: called with a line on them.

    Raises:
        ModelError: when they differ by more, or are no numbers.
    """
    difference = max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))
    relative = difference / max(float(a.abs().max()) for a in wanted)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(wanted, found, strict=True)])
    agreement = float(same.mean())
    line = (
        f"largest logit difference {difference:.2e} ({relative:.1e} of the largest logit; {limit:.0e} allowed), "
        f"same next token at {100 * agreement:.1f} % of {len(same)} positions"
    )
    if not relative <= limit:
        hint = "merge in float32, or allow more with --tolerance"
        raise ModelError(f"the merged model is not base + adapter: {line}", hint)
    tell.note(f"verified: {line}")
    return difference, relative, agreement


def _dtype(name: str, base: Path) -> torch.dtype:
    """Return the precision of the merged weights: as asked for; for auto that of most weights of the base on disk.

    A config may name none, or another. It is used only if the files are quantized: it names the compute precision.
    """
    if name != "auto":
        return _DTYPES[name]
    config = safety.read_object(base / config_files.CONFIG)
    numbers: dict[str, int] = {}
    for file in safety.weight_files(base):
        for entry in safety.header_of(file).tensors.values():
            numbers[entry.dtype] = numbers.get(entry.dtype, 0) + math.prod(entry.shape)
    most = max(numbers, key=lambda one: numbers[one])
    if most in _ON_DISK and "quantization_config" not in config:
        return _ON_DISK[most]
    return _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)


def _fold(net: Any, adapter: Path) -> Any:
    try:
        return net.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(Problem(f"the adapter can't be merged: {error}", Place(str(adapter)))) from None


@torch.no_grad()
def _round(merged: Any, dtype: torch.dtype) -> None:
    """Round weights to the precision of the file, still stored as float32.

    The comparison then measures the merge, not arithmetic in a lower precision.
    """
    for tensor in merged.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))


@torch.no_grad()
def _logits(net: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Return logits of each prompt, float32, shape (tokens, vocabulary)."""
    return [net(input_ids=torch.tensor([ids])).logits[0].float() for ids in prompts]


def _write(
    done: Merge, merged: Any, tokenizer: Any, dtype: torch.dtype, what: opened_model.Subject, ends: Sequence[int]
) -> None:
    merged.config.dtype, target = dtype, done.folder
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(target)))) from None
    needed = sum(p.numel() * p.itemsize for p in merged.parameters())
    storage.check_space(target.parent, needed, "the merged model", "free some space, or name another folder with --out")

    def write(folder: Path) -> None:
        base, source = base_files.folder_of(what.base), _tokenizer_source(what, tokenizer)
        merged.save_pretrained(folder)
        model_folder.complete(folder, base, merged.config, done.dtype, tokenizer, source, what.trust)
        end_tokens.write_config(folder, base, ends)
        storage.write_text(folder / "README.md", _card(done, tokenizer, what, ends))

    about = {"merged": True, "base_differs": list(done.base_differs), "trust_remote_code": what.trust}
    storage.commit(target, write, about, replace=False)


def _card(done: Merge, tokenizer: Any, what: opened_model.Subject, ends: Sequence[int]) -> str:
    assert what.adapter is not None
    known = storage.read_json(what.adapter / "run.json").get("chat")
    chat = bool(tokenizer.chat_template) if known is None else bool(known)
    about = {**done.__dict__, "version": VERSION}
    title, base = done.folder.resolve().name, what.base.base
    return model_card.merged(title, what.adapter.name, base, about, chat, list(end_tokens.named(ends, tokenizer)))


def _tokenizer_source(what: opened_model.Subject, tokenizer: Any) -> Path:
    """Return where the merged model's tokenizer files come from: the base, unless the adapter has another tokenizer."""
    base, adapter = base_files.folder_of(what.base), what.adapter
    if adapter is None or not (adapter / config_files.TOKENIZER).is_file():
        return base
    of_base = fingerprint.of_tokenizer(tokenizing.load(what.base, trust=what.trust))
    return base if of_base["sha256"] == fingerprint.of_tokenizer(tokenizer)["sha256"] else adapter
