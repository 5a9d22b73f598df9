"""Whether training keeps its speed as rows grow longer and as there are more of them: loratune alone.

    python benchmarks/growth.py

A model of SmolLM2-135M's shape with random weights trains on rows of exact lengths, the same number of tokens in each
step. Attention grows with the length of a row by its nature, so what its passes take in the same training is also taken
off. All cases are trained one after the other, and that again: the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import gpu
import machine
import report
import train
import training

SHAPE = dict(gpu.SHAPES["smollm2-135m"])
AT_ONCE = 50  # rows of a step where their number grows: a hundred make steps of the same size, too


def prepare(base: Path, folder: Path, number: int, length: int, at_once: int, steps: int) -> None:
    """Write so many rows of so many tokens, and the recipe that trains on `at_once` of them a step."""
    folder.mkdir()
    gpu.write_rows(folder / "rows.jsonl", number, length, SHAPE["vocab_size"])
    data = {"format": "text", "max_length": length, "max_lost": 0.5}
    case = {
        "model": str(base), "dtype": training.precision(), "steps": steps, "warm": 1, "batch_size": at_once,
        "sections": {"data": data}, "attention_apart": True,
    }  # fmt: skip
    training.prepare(folder, case)


def main() -> None:
    """Measure, print a table, keep figures and table under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--numbers", type=int, nargs="+", default=[100, 100_000])
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--short", type=int, default=64, help="tokens of a row where their number grows")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--out", type=Path, default=None, help="results/growth-cpu-<precision> by default")
    given = parser.parse_args()
    SHAPE["num_hidden_layers"] = given.layers
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "model"
        gpu.write_model(base, SHAPE)
        cases = [(given.tokens // length * given.steps, length, given.tokens // length) for length in given.lengths]
        cases += [(number, given.short, min(AT_ONCE, number)) for number in given.numbers]
        folders = [Path(place) / f"{number}x{length}" for number, length, _ in cases]
        for case, folder in zip(cases, folders, strict=True):
            prepare(base, folder, *case, given.steps)
        rounds: list[list[dict[str, Any]]] = [[] for _ in cases]
        for _ in range(given.rounds):  # in turn, so that a change of the machine's speed meets all
            for (number, length, _), folder, seen in zip(cases, folders, rounds, strict=True):
                one = train.measured("loratune", folder, sys.executable)
                if "failed" in one:
                    sys.exit(one["stderr"])
                seen.append(one)
                print(f"{number:,} x {length:,}: {one['without_attention']:.0f}", file=sys.stderr, flush=True)
    lines = ["| rows | tokens a row | tokens/s | without attention | peak memory |", "|---|---|---|---|---|"]
    found = []
    for (number, length, _), seen in zip(cases, rounds, strict=True):
        one = report.summary(seen)
        found.append({"rows": number, "length": length, **one, "rounds": seen})
        lines.append(
            f"| {number:,} | {length:,} | {one['tokens_per_second']:.0f} | {one['without_attention']:.0f} "
            f"| {one['peak_memory'] / 1e9:.2f} GB |"
        )
    print("\n".join(lines))
    out = given.out or train.HERE / "results" / f"growth-cpu-{training.precision()}"
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {"machine": machine.processor(), "cases": found}
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
