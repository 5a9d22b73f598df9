"""The start report, printed before the first step, and what run.json records about a run."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from loratune.console import size
from loratune.data import batches, labels
from loratune.data.dataset import DAMAGED, Rows
from loratune.data.row_files import chosen
from loratune.events import Report
from loratune.kernels.layer_kinds import name_of
from loratune.models import base_model
from loratune.optim.schedules import warmup_steps
from loratune.recipe import Recipe
from loratune.runs.facts import Start
from loratune.system.version import VERSION
from loratune.training.layout_test import Packing
from loratune.training.memory_plan import Plan

VERSIONS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "safetensors")

LABELS = 24  # of which the rows are counted in the report


def start(recipe: Recipe, accelerator: Accelerator, trust: bool) -> Start:
    """Return what run.json records of a run before anything is loaded."""
    versions = {"loratune": VERSION, "python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cuda = accelerator.device.type == "cuda"
    return Start(
        recipe_sha256=recipe.hash(),
        seed=recipe.train.seed,
        device=torch.cuda.get_device_name() if cuda else f"CPU ({base_model.threads()} threads)",
        processes=accelerator.num_processes,
        versions=versions,
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        trust_remote_code=trust,
    )


def fingerprints(train: Rows, held_out: Rows | None) -> dict[str, str | None]:
    """Return a sha256 (hex) of training and held-out rows: contents, lengths, weights, order of classes."""

    def of(rows: Rows) -> str:
        digest = hashlib.sha256()
        for array in (rows.contents, rows.lengths, rows.weights):
            digest.update(np.ascontiguousarray(array).tobytes())
        if rows.classes:  # a hash of a row's content has their names; in another order they are other outputs
            digest.update(json.dumps(rows.classes).encode())
        return digest.hexdigest()

    return {"data": of(train), "eval": of(held_out) if held_out is not None else None}


def sources(recipe: Recipe) -> list[dict[str, Any]]:
    """Return path, bytes and modification time of every local data file, to name one that has changed."""
    named = [
        *((one.path, "train") for one in recipe.data.train),
        *((one.path, "eval") for one in recipe.data.eval or ()),
    ]
    local = [(Path(path), name) for path, name in named if Path(path).is_absolute()]
    found = []
    for path in dict.fromkeys(file for folder, name in local for file in chosen(folder, name).files):
        about = path.stat()
        found.append({"path": str(path), "bytes": about.st_size, "time": about.st_mtime})
    return found


def counts(rows: Rows) -> dict[str, Any]:
    """Return what run.json records of a set of rows."""
    return {**rows.counts.as_json(), "rows": len(rows), "formats": rows.formats, "unread": rows.unread}


def batching(recipe: Recipe, packing: Packing, rows: Rows, processes: int) -> dict[str, Any]:
    """Return how rows are packed or padded, for run.json and the start report."""
    if not packing.packed:
        return {"packed": False, "why_not": packing.why_not}
    if packing.layout == "shared":
        return {"packed": True, "by": packing.by, "shared": True, "saved": round(packing.saved, 4)}
    settings, capacity = recipe.train, rows.per_sample * recipe.data.max_length
    each, filled = batches.filling(rows, settings.batch_size, settings.seed, capacity, 0, processes)
    return {
        "packed": True, "by": packing.by, "shared": False, "why_not_shared": packing.why_not_shared,
        "missed": round(packing.missed, 4), "rows_per_pack": round(each, 2), "filled": round(filled, 4),
        "why_mask": packing.why_mask,
    }  # fmt: skip


def _about_rows(recipe: Recipe, rows: Rows) -> Iterator[str]:
    """Yield lines for the start report about the training rows, besides their number."""
    counts = rows.counts
    if recipe.data.format.type == "auto":
        yield "read as " + ", ".join(f"{name} ({number:,})" for name, number in rows.formats.items())
    changed = {
        "dropped, too long": counts.dropped,
        "skipped, not usable": counts.skipped,
        "truncated": counts.truncated,
        "split": counts.split,
        "split into one row per turn (the template changes earlier turns)": counts.by_turn,
        "dropped as duplicates": counts.deduplicated,
    }
    if any(changed.values()):
        told = ", ".join(f"{number:,} {what}" for what, number in changed.items() if number)
        yield f"of {counts.read:,} read: {told}; {counts.lost_tokens:,} tokens lost (ledger.jsonl)"
    if counts.duplicates > counts.deduplicated:
        yield f"{counts.duplicates:,} rows are identical to an earlier one (data.duplicates: drop removes them)"


def _tell_rows(report: Report, recipe: Recipe, rows: Rows, held_out: Rows | None) -> None:
    counts, word = rows.counts, "pairs " if rows.sample_word == "pair" else ""
    learns_tokens = counts.trained_tokens and not recipe.objective.pooled
    trained = f", {counts.trained_tokens:,} label tokens" if learns_tokens else ""
    report.field(
        "rows",
        f"{rows.samples:,} {word}to train on ({counts.tokens:,} tokens{trained})"
        + (f", {held_out.samples:,} held out" if held_out else "")
        + ("; unchanged since they were last read: from the cache" if rows.cached else ""),
    )
    if of_labels := labels.counted(recipe.data.format, rows):
        shown = ", ".join(f"{label} {number:,}" for label, number in list(of_labels.items())[:LABELS])
        more = f" and {len(of_labels) - LABELS:,} more labels" if len(of_labels) > LABELS else ""
        report.field("labels", shown + more)
    if rows.damaged or (held_out is not None and held_out.damaged):
        report.field("", DAMAGED, problem=True)
    for line in _about_rows(recipe, rows):
        report.field("", line)
    for line in rows.told(held_out):
        report.field("", line, problem=True)
    for line in counts.first:
        report.field("", line, problem=True)
    for one in (rows, held_out):
        if one is not None and one.unkept:
            report.field("", f"not cached for the next run: {one.unkept.splitlines()[0]}", problem=True)
            break


def _tell_batches(report: Report, recipe: Recipe, batching: dict[str, Any]) -> None:
    if batching.get("shared"):
        report.field("batches", f"packed with prefix sharing: {100 * batching['saved']:.0f} % fewer tokens to compute")
    elif batching["packed"]:
        report.field(
            "batches",
            f"packed: {batching['rows_per_pack']:.1f} rows per pack of at most {recipe.data.max_length:,} "
            f"tokens, {100 * batching['filled']:.0f} % filled"
            + (", separated by a mask" if batching["by"] == "mask" else "")
            + (f" ({batching['why_mask']})" if batching["why_mask"] else ""),
        )
        if batching["missed"]:
            report.field(
                "",
                f"{100 * batching['missed']:.0f} % fewer tokens would be computed with prefix sharing, but "
                f"{batching['why_not_shared']}",
            )
    else:
        report.field("batches", f"padded ({batching['why_not']})")


def tell_start(
    report: Report, recipe: Recipe, loaded: base_model.Loaded, net: Any, rows: Rows, held_out: Rows | None, steps: int,
    on_disk: int, plan: Plan, batching: dict[str, Any],
) -> None:  # fmt: skip
    """Print what is about to happen: model, rows, what is trained, and automatic choices."""
    report.field(
        "base",
        f"{recipe.model.base}: {name_of(loaded.dtype)}"
        f"{f', {loaded.quantization}' if loaded.quantization != 'none' else ''}, on {loaded.device}",
    )
    _tell_rows(report, recipe, rows, held_out)
    trainable, total = base_model.count_parameters(net)
    report.field(
        "method",
        f"{recipe.method.type}: {trainable:,} of {total:,} parameters trained "
        f"({100 * trainable / total:.2f} %), "
        f"{product(recipe)} of {size(on_disk)} on disk",
    )
    report.field("steps", f"{steps:,}, batch size {recipe.train.batch_size}")
    if steps <= (warmup := warmup_steps(recipe.train.warmup, steps)):
        report.field("", f"the warmup of {warmup:,} steps does not end before the run: see train.warmup")
    _tell_batches(report, recipe, batching)
    report.field("memory", plan.told())
    of_method = recipe.method.notes(loaded.model)
    for note in (
        *loaded.notes,
        plan.note,
        *of_method,
        *recipe.objective.notes(),
        recipe.optimizer.note(loaded.device.type),
    ):
        if note:
            report.field("note", note)


def product(recipe: Recipe) -> str:
    """Return the word for a run's output."""
    return recipe.method.output
