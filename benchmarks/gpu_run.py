"""One base from a recipe to an answer on this machine's device, by the commands alone.

    python benchmarks/gpu_run.py FOLDER

A process for each kind, and all commands in it: on a machine whose start takes 20 s, 18 starts are most of the time.
Trained straight, and stopped half-way and resumed; evaluated, merged and asked. Widths are such that a paged optimizer
has something to page: bitsandbytes leaves what has fewer than 100,000 numbers where it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import gpu
import yaml

KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "nf4-paged": {"model": {"quantization": "nf4"}, "optimizer": {"type": "paged_adamw_8bit"}},
    "checkpointed": {"train": {"gradient_checkpointing": "all"}},
}
SHAPE = gpu.SHAPES["tiny"] | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}


def steps(folder: Path) -> list[float]:
    """Return the loss of each step of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


def adapter_apart(one: Path, other: Path) -> float:
    """Return the largest difference between the tensors of two adapters."""
    from safetensors.torch import load_file

    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def main() -> None:
    """Take each kind through all commands; a line that begins with `= ` tells how each went."""
    place = Path(sys.argv[1])
    if len(sys.argv) > 2:
        sys.exit(0 if went(sys.argv[2], place) else 1)
    place.mkdir(parents=True, exist_ok=True)
    gpu.write_model(place / "base", SHAPE)
    gpu.write_rows(place / "rows.jsonl", 128, (16, 96), SHAPE["vocab_size"])
    gpu.write_rows(place / "held.jsonl", 8, (16, 96), SHAPE["vocab_size"], seed=1)
    at_once = len(KINDS) if (os.cpu_count() or 1) >= 8 else 1  # nothing here is timed against anything
    left, running, failed = list(KINDS), {}, []
    while left or running:
        while left and len(running) < at_once:
            kind = left.pop(0)
            running[kind] = subprocess.Popen([sys.executable, __file__, str(place), kind], stdin=subprocess.DEVNULL)
        for kind in [kind for kind, process in running.items() if process.poll() is not None]:
            failed += [kind] if running.pop(kind).returncode else []
        time.sleep(0.1)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def went(kind: str, place: Path) -> bool:
    """Take one kind through all commands and tell how it went; return whether all of it did."""
    folder = place / kind
    folder.mkdir()
    recipe: dict[str, Any] = {
        "model": {"base": str(place / "base"), "dtype": "bfloat16"},
        "method": {"type": "lora", "r": 64, "lora_alpha": 64},
        "data": {"train": str(place / "rows.jsonl"), "eval": str(place / "held.jsonl"), "format": "text"},
        "optimizer": {"type": "adamw", "lr": 1e-3},
        "train": {"batch_size": 16, "max_steps": 8, "schedule": "constant", "warmup": 0, "save_every": 4},
        "output": "straight",
    }
    for name, section in KINDS[kind].items():
        recipe[name] |= section
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    os.chdir(folder)
    from typer.testing import CliRunner

    from loratune import cli

    said, right = [], True

    def do(name: str, *words: str) -> None:
        nonlocal right
        began = time.perf_counter()
        done = CliRunner().invoke(cli.app, words)
        print(f"--- {kind}: {name}\n{done.output[-4000:]}", flush=True)
        if done.exception and not isinstance(done.exception, SystemExit):
            traceback.print_exception(done.exception)
        right = right and done.exit_code == 0
        told = "" if done.exit_code == 0 else f" FAILED ({str(done.exception)[:140]})"
        said.append(f"{name} {time.perf_counter() - began:.1f} s{told}")

    do("train", "train", "recipe.yaml")
    do("half", "train", "recipe.yaml", "--set", "output=parts", "--set", "train.max_steps=4")
    do("resume", "train", "recipe.yaml", "--set", "output=parts", "--resume")
    do("eval", "eval", "parts", "--data", str(place / "held.jsonl"))
    do("merge", "merge", "parts", "--out", "merged")
    do("chat", "chat", "parts", "--prompt", "w5 w6 w7", "--max-new-tokens", "8")
    try:
        facts = json.loads((folder / "parts" / "run.json").read_text(encoding="utf-8"))
        one, two = steps(folder / "straight"), steps(folder / "parts")
        off = adapter_apart(folder / "straight", folder / "parts")
        widest = max(abs(a - b) for a, b in zip(one, two, strict=True))
        alike = f"{widest:.1e} apart" if widest else "the same to the bit"
        by = facts["batching"].get("by") or "nothing"
        about = f"= {kind} on {facts['device']}, {facts['dtype']}, packed by {by}: loss {one[0]:.4f} to {one[-1]:.4f};"
        print(f"{about}\n=   resumed: losses {alike}, adapter {off:.1e} apart", flush=True)
    except (OSError, ValueError, KeyError, IndexError) as error:
        print(f"= {kind}: nothing to compare: {error}")
    print(f"= {kind}: {', '.join(said)}", flush=True)
    return right


if __name__ == "__main__":
    main()
