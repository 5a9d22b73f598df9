"""The training that the fault tests disturb, and how two runs are compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from loratune.system import storage
from tests import tiny

SECTIONS: dict[str, Any] = {
    "method": {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "data": {"eval": "eval.jsonl", "packing": "off"},  # rows of a micro-batch are counted; packed in test_every_step
    "train": {"batch_size": 4, "micro_batch_size": 2, "epochs": 2, "save_every": 2, "eval_every": 3, "keep": 2},
}  # 12 steps of 2 micro-batches, 2 epochs


def write(folder: Path, base: Path, **sections: Any) -> Path:
    """Write recipe and rows into a folder; return the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {name: {**SECTIONS.get(name, {}), **value} for name, value in sections.items()}
    return tiny.write_recipe(folder, base, **{**SECTIONS, **merged})


def result(run: Path) -> dict[str, Any]:
    """Return everything of a finished run that must not differ by a bit."""
    facts = json.loads((run / "run.json").read_text())
    assert facts["status"] == "complete"
    assert storage.verify(run) is None
    names = ("number", "loss", "grad_norm", "lr", "rows", "tokens", "trained_tokens")
    steps = [[value.hex() if isinstance(value := e[n], float) else value for n in names] for e in events(run)]
    return {
        "steps": steps,
        "eval": [(e["number"], e["loss"].hex()) for e in events(run, "eval")],
        "adapter": hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "saved_step": facts["saved_step"],
    }


def events(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl of one kind."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for line in lines if line.endswith("}") and (event := json.loads(line))["kind"] == kind]


def saved(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def check_saved(run: Path) -> None:
    """Check that every checkpoint that stands under its own name is whole, and that something whole is there."""
    for folder in saved(run):
        assert storage.verify(folder, alone=True) is None, folder


def leftovers(run: Path) -> list[str]:
    """Return what should not lie in a run folder after its end."""
    hidden = [p for place in (run, run / "checkpoints") for p in place.glob(".*") if p.name != ".quarantine"]
    return sorted(str(path.relative_to(run)) for path in hidden)


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, or 0."""
    return int(saved(run)[-1].name[5:]) if saved(run) else 0
