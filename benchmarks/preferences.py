"""A step of DPO beside TRL's DPOTrainer: the same pairs, LoRA, batch size and rate, each in a process of its own.

    python benchmarks/preferences.py --peer-python .venv-peers/bin/python

The prompt of a pair is the beginning of a chat of `chitchat-dataset`, the chosen answer its next message, the rejected
one a message of another chat. TRL has its own defaults (bfloat16 autocast, gradient checkpointing, the adapter turned
off for the reference in each step); loratune computes the reference once before step 1, which is counted apart. The
table goes to results/preferences.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import peers
import train
import training

HERE = Path(__file__).parent
ARMS = ("loratune", "trl")
RATE, BATCH, WARM = 2e-5, 8, 2


def write_pairs(file: Path, number: int, length: int) -> None:
    """Write pairs of at most about `length` tokens."""
    import chitchat_dataset

    chats = [
        [" ".join(part["text"] for part in turn) for turn in chat["messages"]]
        for chat in chitchat_dataset.Dataset().values()
    ]
    rows: list[str] = []
    for chat, other in itertools.pairwise(chats):
        turns, left = [], 3 * length
        for text in chat:
            left -= len(text) + 30
            if left < 0:
                break
            turns.append(text)
        turns = turns[: len(turns) // 2 * 2]
        if len(turns) < 2 or len(rows) == number or not other[-1].strip() or other[-1] == turns[-1]:
            continue
        said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns[:-1])]
        answers = {"chosen": turns[-1], "rejected": other[-1][: 3 * length]}
        pair = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        rows.append(json.dumps({"prompt": said, **pair}))
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")


def of_loratune(folder: Path, model: str) -> dict[str, Any]:
    """Train with loratune; return the seconds of each step and of the reference, and the losses."""
    import loratune

    seen: list[Any] = []
    recipe = {
        "model": {"base": model}, "method": {"type": "lora", **training.LORA}, "objective": "dpo",
        "data": {"train": str(folder / "pairs.jsonl"), "max_length": 512, "on_long": "drop", "max_lost": 0.5},
        "optimizer": {"type": "adamw", "lr": RATE}, "train": {"batch_size": BATCH, "epochs": 1},
        "output": str(folder / "run"),
    }  # fmt: skip
    loratune.train(loratune.load_recipe(recipe), on_event=seen.append)
    steps = [event for event in seen if isinstance(event, loratune.StepDone)]
    reference = [event.seconds for event in seen if isinstance(event, loratune.Counted) and "log p" in event.what]
    return {
        "seconds": [step.seconds for step in steps], "losses": [step.loss for step in steps],
        "reference": max(reference), "pairs": [step.rows for step in steps],
    }  # fmt: skip


def of_trl(folder: Path, model: str) -> dict[str, Any]:
    """Train with TRL; return the seconds of each step, and the losses."""
    import datasets
    import torch
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    timer, begins, ends = peers.clock()
    rows = datasets.Dataset.from_list([json.loads(line) for line in (folder / "pairs.jsonl").open(encoding="utf-8")])
    told = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=BATCH, learning_rate=RATE, num_train_epochs=1,
        logging_steps=1, use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to=[], max_length=512,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, args=told, train_dataset=rows, peft_config=LoraConfig(**training.LORA, target_modules="all-linear"),
        callbacks=[timer],
    )  # fmt: skip
    trainer.train()
    seconds = [end - begin for begin, end in zip(begins, ends, strict=True)]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": seconds, "losses": losses, "reference": 0.0, "pairs": [BATCH] * len(seconds)}


def main() -> None:
    """Measure both, print a table and keep it under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--length", type=int, default=160, help="longest pair's row, about, in tokens")
    parser.add_argument("--peer-python", default=sys.executable, help="Python of the environment that holds TRL")
    parser.add_argument("--model", default=None, help="model folder; the demo's by default")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "preferences.md")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        model = (given.folder / "model").read_text(encoding="utf-8")
        found = (of_loratune if given.arm == "loratune" else of_trl)(given.folder, model)
        print(json.dumps({**found, "memory": machine.peak_memory()}))
        return
    lines = [
        "| | seconds per step, median | pairs/s | reference, once | peak memory | first loss | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as made:
        write_pairs(Path(made) / "pairs.jsonl", given.pairs, given.length)
        (Path(made) / "model").write_text(str(given.model or train.demo_model()), encoding="utf-8")
        for name in ARMS:
            found = train.measured(name, Path(made), given.peer_python, program=__file__)
            if "failed" in found:
                sys.exit(f"{name} failed:\n{found['stderr']}")
            seconds, pairs = found["seconds"][WARM:], found["pairs"][WARM:]
            lines.append(
                f"| {name} | {sorted(seconds)[len(seconds) // 2]:.2f} | {sum(pairs) / sum(seconds):.2f} "
                f"| {found['reference']:.0f} s | {found['memory'] / 1e9:.2f} GB "
                f"| {found['losses'][0]:.4f} | {found['losses'][-1]:.4f} |"
            )
            print("\n".join(lines), flush=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
