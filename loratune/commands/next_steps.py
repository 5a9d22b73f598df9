"""Suggested commands after a training, an evaluation or a merge: only those that would not fail."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratune.methods import adapter_files
from loratune.models import fingerprint, tokenizer_files
from loratune.system import storage


def of_run(run: Path, names: Sequence[str]) -> list[str]:
    """Return the commands of some names for a finished run folder; none for anything else."""
    facts = storage.read_json(run / "run.json")
    if facts.get("status") != "complete":
        return []
    merged = run.with_name(f"{run.name}-merged")
    fits = {
        "eval": bool((facts.get("data") or {}).get("eval")),
        "chat": _answers(run, facts),
        "merge": (run / adapter_files.CONFIG).is_file() and adapter_files.is_mergeable(run) and not merged.exists(),
    }
    lines = [f"loratune {name} {shown(run)}" for name in names if fits[name]]
    return [f"{line} --out {shown(merged)}" if line.startswith("loratune merge ") else line for line in lines]


def _answers(run: Path, facts: dict[str, Any]) -> bool:
    """Return whether `loratune chat` has an answer: of a model that learned turns, or of a classifier."""
    from loratune.models import score_head

    outputs = list(fingerprint.head(run).get("id2label", {}).values())
    return outputs != [score_head.REWARD] if outputs else facts.get("chat") is True


def of_merged(folder: Path) -> list[str]:
    """Return the commands for a merged model: chat, if it has a chat template."""
    return [f"loratune chat {shown(folder)}"] if tokenizer_files.template_of(folder) else []


def shown(path: Path) -> str:
    """Return a path quoted for a shell, relative if it is in the current folder."""
    whole, here = Path(os.path.abspath(path)), Path.cwd()
    return shlex.quote(str(whole.relative_to(here) if whole.is_relative_to(here) else whole))
