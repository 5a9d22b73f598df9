"""Preference rows made in code."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import tiny
from tests.conftest import Fit, Trained

WORDS = ["the", "cat", "dog", "tree", "house", "red", "blue", "sees", "runs"]


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of prompt, chosen and rejected as messages: a chosen answer begins with yes, a rejected one with no."""
    draw = random.Random(seed)

    def some() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 6)))

    return [
        {
            "prompt": [{"role": "user", "content": f"{number} {some()}"}],
            "chosen": [{"role": "assistant", "content": f"yes {some()}"}],
            "rejected": [{"role": "assistant", "content": f"no {some()}"}],
        }
        for number in range(number)
    ]


def fitted(fit: Fit, folder: Path, number: int = 32, **sections: Any) -> Callable[..., Trained]:
    """Return a function that trains on pairs like `fit`, by `objective: dpo`."""
    train = tiny.write_jsonl(folder / "pairs.jsonl", rows(number))
    held = tiny.write_jsonl(folder / "held.jsonl", rows(7, seed=5))

    def run(name: str = "a", **more: Any) -> Trained:
        known: dict[str, Any] = {"objective": "dpo", "data": {"train": str(train), "eval": str(held)}}
        return fit(name, **tiny.joined(known, sections, more))

    return run
