"""Training speed: loratune beside TRL and transformers' Trainer with PEFT, on the same rows.

    make bench
    python benchmarks/train.py --steps 20 --rounds 3 --peer-python ../peers/bin/python

Every arm trains the same model (the demo's SmolLM2-135M, in bfloat16) with the same LoRA configuration on the same
tokens with the same mask: loratune reads the rows, and the peers are given its token ids and labels in the order of
its batches. Arms run one after the other, each in a process of its own, and the whole round is repeated, so that a
change of the machine's speed meets them all. Counted are tokens without padding over the seconds of all steps but the
first `--warm` ones. The share of the matrix rate is 4 FLOPs per frozen weight of the layers and token, and 4 per weight
of the head and trained token, over what a bfloat16 matrix product reaches in the same process right after the training.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BASE = HERE.parent / "demo" / "data" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RATE = 2e-4
ARMS = {
    "loratune": "loratune as it comes",
    "trl": "TRL's SFTTrainer as it comes",
    "trl-bf16": "TRL, bfloat16 weights, no checkpointing",
    "trl-padding-free": "TRL, the same, padding-free",
    "trainer": "Trainer + PEFT, bfloat16 weights",
}


def write_rows(path: Path, number: int, length: int, seed: int = 0) -> None:
    """Write half chats cut to about so many tokens by whole turns, half short questions with an answer."""
    import random

    import chitchat_dataset
    import reasoning_gym

    rows = []
    for chat in chitchat_dataset.Dataset().values():
        said, left = [], length * 3  # about three letters a token, with the template's own
        for turn in chat["messages"]:
            text = " ".join(part["text"] for part in turn)
            left -= len(text) + 30
            if left < 0:
                break
            said.append({"role": ("user", "assistant")[len(said) % 2], "content": text})
        if len(said) > 1 and len(rows) < number // 2:
            rows.append({"messages": said})
    for item in reasoning_gym.create_dataset("chain_sum", size=number - len(rows), seed=seed):
        turns = (("user", item["question"]), ("assistant", item["answer"]))
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    random.Random(seed).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(folder: Path, given: argparse.Namespace) -> None:
    """Write rows, recipe, and the tokens of every step as loratune will see them."""
    import numpy as np
    import yaml

    from loratune import batches, data, load_recipe, model
    from loratune.encode import Encoder

    write_rows(folder / "rows.jsonl", given.rows, given.length)
    recipe = {
        "model": {"base": str(given.model)},
        "method": {"type": "lora", "r": 16, "lora_alpha": 32},
        "data": {"train": "rows.jsonl", "max_length": given.length, "on_long": "truncate", "max_lost": 0.5},
        "optimizer": {"type": "adamw", "lr": RATE},
        "train": {
            "batch_size": given.batch_size, "max_steps": given.steps, "schedule": "constant", "warmup": 0,
            "max_grad_norm": 1.0, "log_every": 1, "save_every": 10**6,
        },
        "output": "run",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    loaded = load_recipe(folder / "recipe.yaml")
    found, _ = data.of(loaded, Encoder(model.load_tokenizer(loaded.model)))
    steps = batches.batches(found, given.batch_size, given.batch_size, 0, given.steps)
    rows = [row for batch in steps for micro in batch.micro for row in micro]
    told = [{"input_ids": r.ids.tolist(), "labels": np.where(r.trained, r.ids, -100).tolist()} for r in rows]
    (folder / "tokens.json").write_text(json.dumps(told), encoding="utf-8")


def matrix_rate() -> float:
    """Return what a bfloat16 matrix product of the model's shapes reaches here, in FLOP/s."""
    import torch

    x, w = torch.randn(1024, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    best, until = float("inf"), time.perf_counter() + 1
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - began)
    return 2 * 1024 * 576 * 1536 / best


def loratune(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Train with loratune, as a person would: a recipe and `train`."""
    from loratune import load_recipe, train

    metrics, first = folder / "run" / "metrics.jsonl", []

    def watch() -> None:
        while not metrics.exists() or not metrics.stat().st_size:
            time.sleep(0.02)
        first.append(time.time())

    threading.Thread(target=watch, daemon=True).start()
    train(load_recipe(folder / "recipe.yaml"), overwrite=True)
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {
        "started": first[0] - steps[0]["seconds"],
        "seconds": [step["seconds"] for step in steps],
        "losses": [step["loss"] for step in steps],
    }


def peer(name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL or transformers' Trainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    begins: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begins.append(time.time())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.time())

    rows = Dataset.from_list(json.loads((folder / "tokens.json").read_text(encoding="utf-8")))
    words = AutoTokenizer.from_pretrained(given.model)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    each = min(8, given.batch_size)  # a device's rows at once, by default
    settings: dict[str, Any] = {
        "output_dir": str(folder / name), "max_steps": given.steps, "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "train_sampling_strategy": "sequential", "seed": 0, "per_device_train_batch_size": each,
        "gradient_accumulation_steps": given.batch_size // each,
    }  # fmt: skip
    set_seed(0)
    if name == "trainer":
        net = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16)
        net = get_peft_model(net, lora)
        collator = DataCollatorForSeq2Seq(words, label_pad_token_id=-100)
        trainer = Trainer(net, TrainingArguments(**settings, bf16=False), collator, rows)
    else:
        from trl import SFTConfig, SFTTrainer

        net = str(given.model)
        if name != "trl":
            settings |= {"bf16": False, "gradient_checkpointing": False, "padding_free": name == "trl-padding-free"}
            settings |= {"model_init_kwargs": {"dtype": "bfloat16"}, "max_length": None}
        trainer = SFTTrainer(
            net, args=SFTConfig(**settings), train_dataset=rows, processing_class=words, peft_config=lora
        )
    trainer.add_callback(Clock())
    trainer.train()
    return {
        "started": begins[0],
        "seconds": [end - begin for begin, end in zip(begins, ends, strict=True)],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def arm(name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run one arm in this process and return its figures."""
    begun = time.time()
    found = loratune(folder, given) if name == "loratune" else peer(name, folder, given)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = matrix_rate()
    rows = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    parts = [rows[cut : cut + given.batch_size] for cut in range(0, len(rows), given.batch_size)][given.warm :]
    tokens = sum(len(row["input_ids"]) for part in parts for row in part)
    trained = sum(label != -100 for part in parts for row in part for label in row["labels"][1:])
    config = json.loads((given.model / "config.json").read_text(encoding="utf-8"))
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    width = config["head_dim"] * (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    flops = 4 * (layers * hidden * (width + 3 * inner) * tokens + config["vocab_size"] * hidden * trained)
    seconds = sum(found["seconds"][given.warm :])
    return {
        "tokens_per_second": tokens / seconds, "trained_tokens_per_second": trained / seconds,
        "peak_memory": memory,
        "matrix_rate": rate, "share_of_matrix_rate": flops / seconds / rate,
        "start_seconds": found["started"] - begun, "losses": found["losses"], "seconds": found["seconds"],
    }  # fmt: skip


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure over the rounds of an arm, and the losses of the first."""
    numbers = [name for name, value in rounds[0].items() if isinstance(value, (int, float))]
    return {name: statistics.median(one[name] for one in rounds) for name in numbers} | {"losses": rounds[0]["losses"]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Lay out the results as a Markdown table; a loss is that of the last step."""
    lines = [
        "| | tokens/s | trained/s | peak memory | share of matrix rate | loss | start | speed of loratune |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = results.get("loratune", next(iter(results.values())))["tokens_per_second"]
    for name, one in results.items():
        lines.append(
            f"| {ARMS[name]} | {one['tokens_per_second']:.0f} | {one['trained_tokens_per_second']:.0f} "
            f"| {one['peak_memory'] / 1e9:.2f} GB | {one['share_of_matrix_rate']:.0%} | {one['losses'][-1]:.4f} "
            f"| {one['start_seconds']:.1f} s | {ours / one['tokens_per_second']:.2f} × |"
        )
    return "\n".join(lines)


def picture(results: dict[str, dict[str, Any]]) -> str:
    """Draw tokens/s and peak memory as bars, in SVG."""
    height, top = 26, 40
    kinds = (
        ("tokens/s", "tokens_per_second", 1, "#2563eb", 270),
        ("peak memory, GB", "peak_memory", 1e9, "#9ca3af", 560),
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {top + height * len(results) + 10}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for title, key, unit, colour, left in kinds:
        most = max(one[key] for one in results.values())
        out.append(f'<text x="{left}" y="24" font-weight="bold">{title}</text>')
        for index, (name, one) in enumerate(results.items()):
            y, width = top + index * height, 200 * one[key] / most
            if left == 270:
                out.append(f'<text x="8" y="{y + 15}">{ARMS[name]}</text>')
            number = one[key] / unit
            out.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{height - 6}" fill="{colour}"/>')
            out.append(f'<text x="{left + width + 6:.1f}" y="{y + 15}">{number:.{0 if unit == 1 else 2}f}</text>')
    return "\n".join([*out, "</svg>\n"])


def measured(name: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run an arm as a process and return what it says on its last line."""
    python = sys.executable if name == "loratune" else given.peer_python
    words = ["--arm", name, "--folder", str(folder), "--model", str(given.model)]
    for key in ("steps", "batch_size", "warm"):
        words += [f"--{key.replace('_', '-')}", str(getattr(given, key))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if given.threads:
        environment["OMP_NUM_THREADS"] = str(given.threads)
    command = [python, "-W", "ignore", __file__, *words]
    done = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure the arms, print a table, and keep figures, table and picture under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=2, help="first steps whose time is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256, help="longest row in tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None, help="1 where others use the machine too; all by default")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--peer-python", default=sys.executable, help="Python of the environment that holds TRL")
    parser.add_argument("--model", type=Path, default=None, help="folder of a Llama; the demo's by default")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "train-cpu")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(arm(given.arm, given.folder, given)))
        return
    if given.model is None:
        from loratune import model

        given.model = model.from_gguf(BASE)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in given.arms}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), given)
        for number in range(given.rounds):
            for name in given.arms:
                rounds[name].append(measured(name, Path(folder), given))
                speed = rounds[name][-1]["tokens_per_second"]
                print(f"round {number + 1}  {name:16} {speed:7.0f} tokens/s", file=sys.stderr, flush=True)
    results = {name: summary(found) for name, found in rounds.items()}
    about = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "steps": given.steps, "warm": given.warm,
        "batch_size": given.batch_size, "length": given.length, "threads": given.threads, "rows": given.rows,
        "median": results, "rounds": rounds,
    }  # fmt: skip
    print(table(results))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        (".json", json.dumps(about, indent=1) + "\n"),
        (".md", table(results) + "\n"),
        (".svg", picture(results)),
    ):
        given.out.with_suffix(suffix).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
