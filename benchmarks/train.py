"""Training speed: loratune beside TRL and transformers' Trainer with PEFT, on the same rows.

    make bench
    python benchmarks/train.py --steps 20 --rounds 3 --peer-python ../peers/bin/python

Every arm trains the same model (the demo's SmolLM2-135M, in the precision that loratune takes on this device) with the
same LoRA configuration on the same tokens with the same mask: loratune reads the rows, and the peers are given its
token ids and labels in the order of its batches. Arms run one after the other, each in a process of its own, and the
whole round is repeated, so that a change of the machine's speed meets them all. Counted are tokens without padding over
the seconds of all steps but the first `--warm` ones. The share of the matrix rate is 4 FLOPs per frozen weight of the
layers and token, and 4 per weight of the head and trained token, over what matrix products in that precision would have
done in the time of the steps, at the best rate they reach right after each step (on a GPU: after the training, as they
would count as its memory): of the tokens that were computed, and of all that the rows have, shared or not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
BASE = HERE.parent / "demo" / "data" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RATE = 2e-4
A_LOOK = 0.1  # seconds in which the matrix rate is looked at, after each step
PLAIN = {"bf16": False, "gradient_checkpointing": False, "max_length": None}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # title, and the settings of SFTConfig that differ from its defaults
    "loratune": ("loratune as it comes", {}),
    "loratune-unshared": ("loratune, each row computed whole", {}),
    "loratune-padded": ("loratune, rows padded", {}),
    "loratune-compiled": ("loratune, `train.compile: on`", {}),
    "trl": ("TRL's SFTTrainer as it comes", {}),
    "trl-plain": ("TRL, loratune's precision, no checkpointing", PLAIN),
    "trl-padding-free": ("TRL, the same, padding-free", PLAIN | {"padding_free": True}),
    "trl-liger": ("TRL, the same, with Liger's kernels", PLAIN | {"use_liger_kernel": True}),
    "trainer": ("Trainer + PEFT, loratune's precision", {}),
    "trainer-axolotl": ("Trainer + PEFT, the same, with axolotl's kernels", {}),
    "unsloth": ("unsloth", {}),
}
CPU = ("loratune", "loratune-unshared", "trl", "trl-plain", "trl-padding-free", "trainer")


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


def prepare(folder: Path, case: dict[str, Any]) -> None:
    """Write recipe and case, and the tokens of every step as loratune will see them; the rows are there.

    Args:
        folder: with `rows.jsonl`.
        case: `model` (folder), `dtype`, `steps`, `warm` (steps not counted), `batch_size`, `sections` (of the recipe,
            besides); `attention_apart`, where what attention takes is to be taken off as well.
    """
    import numpy as np
    import yaml

    from loratune import batches, data, load_recipe, tokenizing
    from loratune.encode import Encoder

    recipe: dict[str, Any] = {
        "model": {"base": case["model"], "dtype": case["dtype"]},
        "method": {"type": "lora", "r": 16, "lora_alpha": 32},
        "data": {"train": "rows.jsonl"},
        "optimizer": {"type": "adamw", "lr": RATE},
        "train": {
            "batch_size": case["batch_size"], "max_steps": case["steps"], "schedule": "constant", "warmup": 0,
            "max_grad_norm": 1.0, "log_every": 1, "save_every": 10**6,
        },
        "output": "run",
    }  # fmt: skip
    for name, section in case["sections"].items():
        recipe[name] |= section
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    (folder / "case.json").write_text(json.dumps(case), encoding="utf-8")
    loaded = load_recipe(folder / "recipe.yaml")
    found, _ = data.of(loaded, Encoder(tokenizing.of(loaded)))
    steps = batches.batches(found, case["batch_size"], case["batch_size"], 0, case["steps"])
    rows = [row for batch in steps for micro in batch.micro for row in micro]
    told = [{"input_ids": r.ids.tolist(), "labels": np.where(r.trained, r.ids, -100).tolist()} for r in rows]
    (folder / "tokens.json").write_text(json.dumps(told), encoding="utf-8")


def precision() -> str:
    """Return the precision that loratune takes on this device: bfloat16, or float32 without instructions for it."""
    from loratune import model

    return str(model.dtype_of("auto", model.device())).removeprefix("torch.")


def matrix_rate(case: dict[str, Any], seconds: float) -> float:
    """Return what a product of the model's shapes and precision reaches at best in so many seconds, in FLOP/s."""
    import torch

    config, dtype = model_config(case), getattr(torch, case["dtype"])
    on_gpu = torch.cuda.is_available()
    tokens, width, inner = 8192 if on_gpu else 1024, config["hidden_size"], config["intermediate_size"]
    shapes, where = ((tokens, width), (inner, width)), "cuda" if on_gpu else "cpu"
    x, w = (torch.full(shape, 0.5, dtype=dtype, device=where) for shape in shapes)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * tokens * width * inner / best


def peak_memory() -> int:
    """Return the highest memory of this process in bytes: what torch took of the GPU, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def loratune(name: str, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train with loratune, as a person would: a recipe and `train`."""
    from loratune import load_recipe, train

    ends, rates = watched_steps(case)
    attention = clocked_attention() if case.get("attention_apart") else []
    changes = {
        "loratune-unshared": ["data.prefix_sharing=off"], "loratune-padded": ["data.packing=off"],
        "loratune-compiled": ["train.compile=on"],
    }.get(name, [])  # fmt: skip
    train(load_recipe(folder / "recipe.yaml", changes), overwrite=True)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    counted = ends[case["warm"] - 1] if case["warm"] else 0.0
    return {
        "started": ends[0] - steps[0]["seconds"],
        "attention": sum(seconds for ended, seconds in attention if ended > counted),
        "seconds": [step["seconds"] for step in steps],
        "rates": rates,
        "losses": [step["loss"] for step in steps],
        "computed": [step["computed"] for step in steps],
    }


def watched_steps(case: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return lists that will hold when each of loratune's steps ended, and, but on a GPU, the matrix rate after it."""
    import torch

    from loratune import loop

    ends: list[float] = []
    rates: list[float] = []
    steps = loop.steps

    def watched(*given: Any, **named: Any) -> Any:
        for step in steps(*given, **named):
            ends.append(time.time())
            yield step
            if not torch.cuda.is_available():
                rates.append(matrix_rate(case, A_LOOK))

    loop.steps = watched
    return ends, rates


def model_config(case: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a case's model."""
    found: dict[str, Any] = json.loads((Path(case["model"]) / "config.json").read_text(encoding="utf-8"))
    return found


def clocked_attention() -> list[tuple[float, float]]:
    """Return a list that will hold the end and the seconds of each pass through attention of packed rows on a CPU."""
    from loratune import tiles

    passes: list[tuple[float, float]] = []

    def clocked(way: Any) -> Any:
        def called(*given: Any) -> Any:
            began = time.perf_counter()
            try:
                return way(*given)
            finally:
                passes.append((time.time(), time.perf_counter() - began))

        return staticmethod(called)

    tiles._Rows.forward, tiles._Rows.backward = clocked(tiles._Rows.forward), clocked(tiles._Rows.backward)
    return passes


def peer(name: str, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL, transformers' Trainer or unsloth."""
    if name == "unsloth":
        import unsloth  # before the others, which it patches
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    begins: list[float] = []
    ends: list[float] = []
    rates: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begins.append(time.time())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.time())
            if not torch.cuda.is_available():
                rates.append(matrix_rate(case, A_LOOK))

    rows = Dataset.from_list(json.loads((folder / "tokens.json").read_text(encoding="utf-8")))
    words = AutoTokenizer.from_pretrained(case["model"])
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    each = min(case.get("rows_at_once", 8), case["batch_size"])  # 8: a device's rows at once, by default
    settings: dict[str, Any] = {
        "output_dir": str(folder / name), "max_steps": case["steps"], "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "sequential", "seed": 0, "per_device_train_batch_size": each,
        "gradient_accumulation_steps": case["batch_size"] // each,
    }  # fmt: skip
    dtype = getattr(torch, case["dtype"])
    loading: dict[str, Any] = {}
    if case["sections"].get("model", {}).get("quantization") == "nf4":
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    set_seed(0)
    trainer: Any
    if name.startswith("trainer"):
        net = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype, **loading)
        net = get_peft_model(net, lora)
        if name == "trainer-axolotl":
            axolotl_kernels(net)
        collator = DataCollatorForSeq2Seq(words, label_pad_token_id=-100)
        settings |= {"bf16": False, "gradient_checkpointing": torch.cuda.is_available()}  # large models are there
        trainer = Trainer(net, TrainingArguments(**settings), collator, rows)
    else:
        from trl import SFTConfig, SFTTrainer

        settings |= ARMS[name][1]
        if name == "unsloth":
            longest = max(len(row) for row in rows["input_ids"])
            net, words = unsloth.FastLanguageModel.from_pretrained(
                case["model"], max_seq_length=longest, load_in_4bit=bool(loading), dtype=dtype
            )
            net = unsloth.FastLanguageModel.get_peft_model(
                net, r=16, lora_alpha=32, use_gradient_checkpointing="unsloth",
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            )  # fmt: skip
        else:
            net = case["model"]
            chosen = {} if name == "trl" else {"dtype": case["dtype"]}
            settings["model_init_kwargs"] = {**chosen, **loading} or None
        trainer = SFTTrainer(
            net, args=SFTConfig(**settings), train_dataset=rows, processing_class=words,
            peft_config=None if name == "unsloth" else lora,
        )  # fmt: skip
    trainer.add_callback(Clock())
    trainer.train()
    return {
        "started": begins[0],
        "seconds": [end - begin for begin, end in zip(begins, ends, strict=True)],
        "rates": rates,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def axolotl_kernels(net: Any) -> None:
    """Put axolotl's functions for LoRA into a Llama with PEFT's layers, where its own trainer would put them."""
    from axolotl.kernels.lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

    def attend_by(attention: Any) -> None:
        made: dict[str, Any] = {}

        def query(x: Any) -> Any:
            found, made["key"], made["value"] = apply_lora_qkv(attention, x)
            return found

        attention.q_proj.forward = query
        attention.k_proj.forward = lambda x: made.pop("key")
        attention.v_proj.forward = lambda x: made.pop("value")
        attention.o_proj.forward = partial(apply_lora_o, attention)

    for layer in net.get_base_model().model.layers:
        attend_by(layer.self_attn)
        layer.mlp.forward = partial(apply_lora_mlp_swiglu, layer.mlp)


def arm(name: str, folder: Path) -> dict[str, Any]:
    """Run one arm in this process and return its figures."""
    begun = time.time()
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    found = (loratune if name.startswith("loratune") else peer)(name, folder, case)
    memory = peak_memory()
    config = model_config(case)
    rows = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    size = case["batch_size"]
    parts = [rows[cut : cut + size] for cut in range(0, len(rows), size)][case["warm"] :]
    tokens = sum(len(row["input_ids"]) for part in parts for row in part)
    trained = sum(label != -100 for part in parts for row in part for label in row["labels"][1:])
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    width = config["head_dim"] * (2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"])
    computed = sum(found["computed"][case["warm"] :]) if "computed" in found else tokens
    counted = found["seconds"][case["warm"] :]
    seconds = sum(counted)
    rates = found["rates"][case["warm"] :] or [matrix_rate(case, 1.0)] * len(counted)
    possible = sum(took * rate for took, rate in zip(counted, rates, strict=True))  # FLOPs
    weights, of_head = layers * hidden * (width + 3 * inner), config["vocab_size"] * hidden

    def share(of: int) -> float:
        return float(4 * (weights * of + of_head * trained) / possible)

    apart = {"without_attention": tokens / (seconds - found["attention"])} if case.get("attention_apart") else {}
    return {
        "tokens_per_second": tokens / seconds, "trained_tokens_per_second": trained / seconds,
        "computed_tokens_per_second": computed / seconds, "peak_memory": memory,
        "matrix_rate": possible / seconds, "share_of_matrix_rate": share(computed),
        "share_with_all_tokens": share(tokens),
        "start_seconds": found["started"] - begun, "first_step_done": found["started"] - begun + found["seconds"][0],
        "losses": found["losses"], "seconds": found["seconds"],
        **apart,
    }  # fmt: skip


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure over the rounds of an arm, and the losses of the first."""
    numbers = [name for name, value in rounds[0].items() if isinstance(value, (int, float))]
    return {name: statistics.median(one[name] for one in rounds) for name in numbers} | {"losses": rounds[0]["losses"]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Lay out the results as a Markdown table; a loss is that of the last step."""
    lines = [
        "| | tokens/s | trained/s | peak memory | share of matrix rate (with all tokens) | loss | start "
        "| first step done | speed of loratune |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours = results.get("loratune", next(iter(results.values())))["tokens_per_second"]
    for name, one in results.items():
        lines.append(
            f"| {ARMS[name][0]} | {one['tokens_per_second']:.0f} | {one['trained_tokens_per_second']:.0f} "
            f"| {one['peak_memory'] / 1e9:.2f} GB "
            f"| {one['share_of_matrix_rate']:.0%} ({one['share_with_all_tokens']:.0%}) | {one['losses'][-1]:.4f} "
            f"| {one['start_seconds']:.1f} s | {one['first_step_done']:.1f} s "
            f"| {ours / one['tokens_per_second']:.2f} × |"
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
                out.append(f'<text x="8" y="{y + 15}">{ARMS[name][0]}</text>')
            number = one[key] / unit
            out.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{height - 6}" fill="{colour}"/>')
            out.append(f'<text x="{left + width + 6:.1f}" y="{y + 15}">{number:.{0 if unit == 1 else 2}f}</text>')
    return "\n".join([*out, "</svg>\n"])


def measured(name: str, folder: Path, peer_python: str, threads: int | None = None) -> dict[str, Any]:
    """Run an arm as a process and return what it says on its last line, or under `failed` why there is nothing."""
    python = sys.executable if name.startswith("loratune") else peer_python
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [python, "-W", "ignore", __file__, "--arm", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return {"failed": last[-1][:300], "stderr": done.stderr[-3000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(
    folder: Path, names: Sequence[str], rounds: int, peer_python: str, threads: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run arms round by round on a prepared case; return the median of each and all that was measured.

    An arm that fails is told on stderr and left out from there on.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in [name for name in names if name not in failed]:
            one = measured(name, folder, peer_python, threads)
            if "failed" in one:
                failed[name] = one["failed"]
                print(f"{name} failed:\n{one['stderr']}", file=sys.stderr, flush=True)
                continue
            found[name].append(one)
            print(
                f"round {number + 1}  {name:16} {one['tokens_per_second']:7.0f} tokens/s", file=sys.stderr, flush=True
            )
    median = {name: summary(parts) for name, parts in found.items() if parts}
    return median, {"rounds": found, "failed": failed}


def main() -> None:
    """Measure the arms, print a table, and keep figures, table and picture under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=2, help="first steps whose time is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256, help="longest row in tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None, help="1 where others use the machine too; all by default")
    parser.add_argument("--arms", nargs="+", default=list(CPU), choices=list(ARMS))
    parser.add_argument("--peer-python", default=sys.executable, help="Python of the environment that holds TRL")
    parser.add_argument("--model", type=Path, default=None, help="folder of a Llama; the demo's by default")
    parser.add_argument("--out", type=Path, default=None, help="results/train-cpu-<precision> by default")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(arm(given.arm, given.folder)))
        return
    if given.model is None:
        from loratune import bases

        if not BASE.exists():
            sys.exit(f"{BASE} is not there: run `make demo` first, or name a folder with --model")
        given.model = bases.from_gguf(BASE)
    case = {
        "model": str(given.model), "dtype": precision(), "steps": given.steps, "warm": given.warm,
        "batch_size": given.batch_size,
        "sections": {"data": {"max_length": given.length, "on_long": "truncate", "max_lost": 0.5}},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", given.rows, given.length)
        prepare(Path(folder), case)
        median, everything = compare(Path(folder), given.arms, given.rounds, given.peer_python, given.threads)
    about = {
        "machine": machine.processor(), "threads": given.threads, "rows": given.rows,
        "length": given.length, **case, "model": given.model.name, "median": median, **everything,
    }  # fmt: skip
    others = "" if given.batch_size == parser.get_default("batch_size") else f"-{given.batch_size}-rows"
    keep(given.out or HERE / "results" / f"train-cpu-{case['dtype']}{others}", about, median)


def keep(out: Path, about: dict[str, Any], median: dict[str, Any]) -> None:
    """Print a table of the medians, and keep figures, table and picture beside one another."""
    if not median:
        sys.exit("no arm came through")
    print(table(median))
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        (".json", json.dumps(about, indent=1) + "\n"),
        (".md", table(median) + "\n"),
        (".svg", picture(median)),
    ):
        out.with_suffix(suffix).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
