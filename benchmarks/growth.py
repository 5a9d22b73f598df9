"""Whether training keeps its speed as rows grow longer and as there are more of them: loratune alone.

    python benchmarks/growth.py

A model of SmolLM2-135M's shape with random weights trains on rows of exact lengths, the same number of tokens in each
step. Attention grows with the length of a row by its nature, so what its passes take in the same training is also taken
off.
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
import train

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip


AT_ONCE = 50  # rows of a step where their number grows: a hundred make steps of the same size, too


def measure(base: Path, folder: Path, number: int, length: int, at_once: int, steps: int) -> dict[str, Any]:
    """Train on so many rows of so many tokens, `at_once` of them a step."""
    folder.mkdir()
    gpu.write_rows(folder / "rows.jsonl", number, length, SHAPE["vocab_size"])
    data = {"format": "text", "max_length": length, "max_lost": 0.5}
    case = {
        "model": str(base), "steps": steps, "warm": 1, "batch_size": at_once, "sections": {"data": data},
        "attention_apart": True,
    }  # fmt: skip
    train.prepare(folder, case)
    return train.measured("loratune", folder, sys.executable)


def main() -> None:
    """Measure, print a table, keep figures and table under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--numbers", type=int, nargs="+", default=[100, 100_000])
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--short", type=int, default=64, help="tokens of a row where their number grows")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--out", type=Path, default=train.HERE / "results" / "growth")
    given = parser.parse_args()
    SHAPE["num_hidden_layers"] = given.layers
    lines = ["| rows | tokens a row | tokens/s | without attention | peak memory |", "|---|---|---|---|---|"]
    found = []
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "model"
        gpu.write_model(base, SHAPE)
        cases = [(given.tokens // length * given.steps, length, given.tokens // length) for length in given.lengths]
        cases += [(number, given.short, min(AT_ONCE, number)) for number in given.numbers]
        for number, length, at_once in cases:
            one = measure(base, Path(place) / f"{number}x{length}", number, length, at_once, given.steps)
            if "failed" in one:
                sys.exit(one["stderr"])
            found.append({"rows": number, "length": length, **one})
            lines.append(
                f"| {number:,} | {length:,} | {one['tokens_per_second']:.0f} | {one['without_attention']:.0f} "
                f"| {one['peak_memory'] / 1e9:.2f} GB |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    given.out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
