"""Rated answers made in code: rows of the format `kto`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import pairs, tiny
from tests.conftest import Fit, Trained


def rows(number: int, seed: int = 0, bad: int = 2) -> list[dict[str, Any]]:
    """Return rows of prompt, completion and label; every `bad`-th is a bad answer, which begins with no."""
    return [
        {
            "prompt": row["prompt"], "completion": row["rejected" if index % bad == 0 else "chosen"],
            "label": index % bad != 0,
        }
        for index, row in enumerate(pairs.rows(number, seed))
    ]  # fmt: skip


def fitted(fit: Fit, folder: Path, number: int = 32, bad: int = 2, **sections: Any) -> Callable[..., Trained]:
    """Return a function that trains on rated answers like `fit`, by `objective: kto`."""
    train = tiny.write_jsonl(folder / "rated.jsonl", rows(number, bad=bad))
    held = tiny.write_jsonl(folder / "held.jsonl", rows(7, seed=5))

    def run(name: str = "a", **more: Any) -> Trained:
        known: dict[str, Any] = {"objective": "kto", "data": {"train": str(train), "eval": str(held)}}
        return fit(name, **tiny.joined(known, sections, more))

    return run
