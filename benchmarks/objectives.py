"""What each objective learns from the same preference pairs: SmolLM2-135M-Instruct is to reverse a list of words.

    python benchmarks/objectives.py                     # all; a minute or two each on two cores
    python benchmarks/objectives.py --arms dpo orpo

Of a pair the chosen answer is the list reversed, the rejected one the list in alphabetical order. Each objective trains
on the same 480 pairs once; 48 are held out, of lists that occur in no training pair. `sft` trains on the chosen answers
alone, `kto` on both answers of a pair as rows of their own, 16 a step, `sft, dpo at 1e-5` continues the adapter of
`sft`. The table, with 95 % bootstrap intervals, is results/objectives.md.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import train

import loratune

HERE = Path(__file__).parent
WORDS = [
    "river", "cloud", "table", "stone", "horse", "lamp", "garden", "window", "bread", "silver", "paper",
    "forest", "candle", "bridge", "apple", "winter", "mirror", "ladder", "button", "copper", "island", "pencil",
    "rocket", "velvet", "anchor", "basket", "dragon", "feather", "hammer", "jacket", "kettle", "lemon",
    "marble", "needle", "orange", "pepper", "ribbon", "saddle", "ticket", "valley", "wagon", "yellow", "zebra",
    "barrel", "castle", "desert", "engine", "falcon", "guitar", "honey",
]  # fmt: skip
RATE = 1e-4
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "dpo": {"objective": "dpo"},
    "dpo, ipo": {"objective": {"type": "dpo", "loss": "ipo"}},
    "dpo, sft_weight 1": {"objective": {"type": "dpo", "sft_weight": 1.0}},
    "orpo": {"objective": "orpo"},
    "simpo": {"objective": "simpo"},
    "cpo": {"objective": "cpo"},
    "kto": {"objective": "kto", "rows": "rated", "batch_size": 16},
    "sft, dpo at 1e-5": {"objective": "dpo", "method": {"type": "lora", "continue_from": "sft"}, "rate": 1e-5},
}


def write_pairs(folder: Path, train: int, held_out: int, seed: int = 0) -> None:
    """Write pairs to train on and held-out ones; also the chosen answers alone as conversations, and both as rated."""
    draw = random.Random(seed)
    lists: dict[tuple[str, ...], None] = {}
    while len(lists) < train + held_out:
        words = tuple(draw.sample(WORDS, draw.randint(3, 5)))
        if words[::-1] != tuple(sorted(words)):
            lists[words] = None
    rows = []
    for words in lists:
        answers = {"chosen": words[::-1], "rejected": tuple(sorted(words))}
        asked = {"role": "user", "content": f"Reverse this list: {', '.join(words)}"}
        said = {name: [{"role": "assistant", "content": ", ".join(one)}] for name, one in answers.items()}
        rows.append({"prompt": [asked], **said})
    chats = [{"messages": [*row["prompt"], *row["chosen"]]} for row in rows]
    rated = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]
    for name, each, some in (("pairs", 1, rows), ("chats", 1, chats), ("rated", 2, rated)):
        for held, part in (("", some[: train * each]), ("held-", some[train * each :])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{held}{name}.jsonl").write_text(text, encoding="utf-8")


def recipe(folder: Path, base: str, name: str) -> dict[str, Any]:
    """Return the recipe of an arm."""
    arm = ARMS[name]
    rows = "chats" if arm["objective"] == "sft" else arm.get("rows", "pairs")
    method = dict(arm.get("method", {"type": "lora", "r": 16}))
    if "continue_from" in method:
        method["continue_from"] = str(folder / method["continue_from"])
    return {
        "model": {"base": base}, "method": method, "objective": arm["objective"],
        "data": {"train": str(folder / f"{rows}.jsonl"), "eval": str(folder / f"held-{rows}.jsonl")},
        "optimizer": {"type": "adamw", "lr": arm.get("rate", RATE)},
        "train": {"epochs": 1, "batch_size": arm.get("batch_size", 8), "seed": 0},
        "output": str(folder / name),
    }  # fmt: skip


def told(score: Any) -> str:
    """Return a score with its interval."""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def main() -> None:
    """Train the arms, print a table, and keep it under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rows", type=int, default=480)
    parser.add_argument("--model", type=Path, default=None, help="model folder; the demo's by default")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "objectives.md")
    given = parser.parse_args()
    base = str(given.model or train.demo_model())
    lines = [
        "| | exact match | token F1 | chosen answer likelier per token | its log p per token | seconds |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_pairs(folder, given.rows, 48)
        for name in given.arms:
            run = loratune.train(loratune.load_recipe(recipe(folder, base, name)))
            found = loratune.evaluate(
                run.folder, data=str(folder / "held-pairs.jsonl"), format="preference", max_new_tokens=48
            )
            if len(lines) == 2:
                lines.append(_line("base", found.scores["base"], 0))
            lines.append(_line(name, found.scores["adapter"], run.seconds))
            print("\n".join(lines), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(name: str, scores: dict[str, Any], seconds: float) -> str:
    shown = " | ".join(told(scores[key]) for key in ("exact match", "token F1", "chosen preferred"))
    return f"| {name} | {shown} | {-scores['loss'].value:.3f} | {seconds:.0f} |"


if __name__ == "__main__":
    main()
