"""Rows of a text and a label, made in code."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import tiny
from tests.conftest import Fit, Trained

FORMAT: dict[str, Any] = {
    "type": "pattern", "patterns": ["{text} It was", "Review: {text}\nSentiment:"],
    "verbalizers": {"neg": " bad", "pos": " good"},
}  # fmt: skip
WORDS = ["cat", "dog", "tree", "house", "red", "blue"]


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows whose text says what its label is."""
    draw = random.Random(seed)
    labels = [("neg", "pos")[index % 2] for index in range(number)]
    said = {"neg": "awful", "pos": "lovely"}
    return [
        {"text": f"{said[label]} {draw.choice(WORDS)} {seed}.{index}", "label": label}
        for index, label in enumerate(labels)
    ]


def fitted(fit: Fit, folder: Path, number: int = 32, **sections: Any) -> Callable[..., Trained]:
    """Return a function that trains on labelled rows like `fit`, by `objective: pattern`."""
    train = tiny.write_jsonl(folder / "labelled.jsonl", rows(number))
    held = tiny.write_jsonl(folder / "held.jsonl", rows(8, seed=5))

    def run(name: str = "a", **more: Any) -> Trained:
        known: dict[str, Any] = {
            "objective": "pattern", "data": {"train": str(train), "eval": str(held), "format": FORMAT},
        }  # fmt: skip
        return fit(name, **tiny.joined(known, sections, more))

    return run
