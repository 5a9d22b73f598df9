"""What a reward model learns of real replies: SmolLM2-135M-Instruct is to tell which reply followed.

    python benchmarks/rewards.py            # some minutes on two cores

Pairs are those of benchmarks/preferences.py: turns of conversations (chitchat-dataset), the chosen answer being what
was said next and the rejected one what was said in another conversation. Beside the accuracy on held-out pairs stands
what a score of the answer's length alone would reach. The table, with 95 % bootstrap intervals, is results/rewards.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import preferences
import train

import loratune

HERE = Path(__file__).parent


def main() -> None:
    """Train, print a table, and keep it under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--length", type=int, default=100, help="longest pair's row, about, in tokens")
    parser.add_argument("--model", type=Path, default=None, help="model folder; the demo's by default")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "rewards.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        preferences.write_pairs(folder / "pairs.jsonl", given.pairs + given.held_out, given.length)
        recipe = {
            "model": {"base": str(given.model or train.demo_model())}, "method": {"type": "lora", "r": 16},
            "objective": {"type": "reward", "centre": 0.01},
            "data": {
                "train": str(folder / "pairs.jsonl"), "eval_fraction": given.held_out / (given.pairs + given.held_out),
                "max_length": 512, "on_long": "drop", "max_lost": 0.5,
            },
            "optimizer": {"type": "adamw", "lr": 2e-4}, "train": {"epochs": 1, "batch_size": 8, "warmup": 0.1},
            "output": str(folder / "run"),
        }  # fmt: skip
        run = loratune.train(loratune.load_recipe(recipe))
        found = loratune.evaluate(run.folder)
    scores = found.scores["adapter"]
    lines = ["| | held-out pairs | accuracy | margin | seconds |", "|---|---|---|---|---|"]
    length = scores["chosen is longer"]
    lines.append(f"| the longer answer | {found.rows} | {told(length)} | | |")
    lines.append(
        f"| reward | {found.rows} | {told(scores['accuracy'])} | {told(scores['margin'])} | {run.seconds:.0f} |"
    )
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def told(score: object) -> str:
    """Return a score with its interval."""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
