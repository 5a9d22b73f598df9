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
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import peers
import report
import training

HERE = Path(__file__).parent
BASE = HERE.parent / "demo" / "data" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CPU = ("loratune", "loratune-unshared", "trl", "trl-plain", "trl-padding-free", "trainer")


def loratune(name: str, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train with loratune, as a person would: a recipe and `train`."""
    from loratune import load_recipe, train

    ends, rates = watched_steps(training.model_config(case), case["dtype"])
    attention = clocked_attention() if case.get("attention_apart") else []
    changes = {
        "loratune-unshared": ["data.prefix_sharing=off"], "loratune-padded": ["data.packing=off"],
        "loratune-compiled": ["train.compile=on"], "loratune-plain": ["train.kernels=off", "train.compile=off"],
    }.get(name, [])  # fmt: skip
    if case.get("profile") and name == "loratune":
        profile_last_step(case["steps"], Path(case["profile"]))
    train(load_recipe(folder / "recipe.yaml", changes), overwrite=True)
    facts = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
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
        "planned": facts["memory"]["weights"] + (facts["activations"] or {}).get("needed", 0),
    }


def profile_last_step(number: int, path: Path) -> None:
    """Let the last of so many steps be profiled, and write what took how long."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from loratune.training import loop

    steps, cuda = loop.steps, torch.cuda.is_available()

    def profiled(*given: Any, **named: Any) -> Any:
        made = steps(*given, **named)
        for _ in range(number - 1):
            yield next(made)
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            last = next(made)
        order = "self_device_time_total" if cuda else "self_cpu_time_total"
        path.write_text(found.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90))
        yield last
        yield from made

    loop.steps = profiled


def watched_steps(config: dict[str, Any], precision: str) -> tuple[list[float], list[float]]:
    """Return lists that will hold when each of loratune's steps ended, and, but on a GPU, the matrix rate after it."""
    import torch

    from loratune.training import loop

    ends: list[float] = []
    rates: list[float] = []
    steps = loop.steps

    def watched(*given: Any, **named: Any) -> Any:
        for step in steps(*given, **named):
            ends.append(time.time())
            yield step
            if not torch.cuda.is_available():
                rates.append(machine.matrix_rate(config, precision))

    loop.steps = watched
    return ends, rates


def clocked_attention() -> list[tuple[float, float]]:
    """Return a list that will hold the end and the seconds of each pass through attention of packed rows on a CPU."""
    from loratune.kernels import cpu_attention

    passes: list[tuple[float, float]] = []

    def clocked(way: Any) -> Any:
        def called(*given: Any) -> Any:
            began = time.perf_counter()
            try:
                return way(*given)
            finally:
                passes.append((time.time(), time.perf_counter() - began))

        return staticmethod(called)

    cpu_attention._Rows.forward, cpu_attention._Rows.backward = (
        clocked(cpu_attention._Rows.forward),
        clocked(cpu_attention._Rows.backward),
    )
    return passes


def arm(name: str, folder: Path) -> dict[str, Any]:
    """Run one arm in this process and return its figures."""
    begun = time.time()
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    found = (loratune if name.startswith("loratune") else peers.run)(name, folder, case)
    memory = machine.peak_memory()
    config = training.model_config(case)
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
    rates = found["rates"][case["warm"] :] or [machine.matrix_rate(config, case["dtype"], 1.0)] * len(counted)
    possible = sum(took * rate for took, rate in zip(counted, rates, strict=True))  # FLOPs
    weights, of_head = layers * hidden * (width + 3 * inner), config["vocab_size"] * hidden

    def share(of: int) -> float:
        return float(4 * (weights * of + of_head * trained) / possible)

    planned = {"planned": found["planned"]} if "planned" in found else {}
    apart = {"without_attention": tokens / (seconds - found["attention"])} if case.get("attention_apart") else {}
    return {
        "tokens_per_second": tokens / seconds, "trained_tokens_per_second": trained / seconds,
        "computed_tokens_per_second": computed / seconds, "peak_memory": memory,
        "matrix_rate": possible / seconds, "share_of_matrix_rate": share(computed),
        "share_with_all_tokens": share(tokens),
        "start_seconds": found["started"] - begun, "first_step_done": found["started"] - begun + found["seconds"][0],
        "losses": found["losses"], "seconds": found["seconds"],
        **apart, **planned,
    }  # fmt: skip


def demo_model() -> Path:
    """Return the folder of the demo's model, or leave with what to do about it."""
    from loratune.models import base_files

    if not BASE.exists():
        sys.exit(f"{BASE} is not there: run `make demo` first, or name a folder with --model")
    return base_files.from_gguf(BASE)


def measured(
    name: str, folder: Path, peer_python: str, threads: int | None = None, until: float | None = None,
    program: str = __file__,
) -> dict[str, Any]:  # fmt: skip
    """Run an arm as a process and return what it says on its last line, or under `failed` why there is nothing.

    It is given up at `until` (of the monotonic clock, in seconds).
    """
    python = sys.executable if name.startswith("loratune") else peer_python
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [python, "-W", "ignore", program, "--arm", name, "--folder", str(folder)]
    left = None if until is None else until - time.monotonic()
    if left is not None and left <= 0:
        return {"failed": "no time is left", "stderr": "no time is left"}
    try:
        done = subprocess.run(command, capture_output=True, env=environment, text=True, check=False, timeout=left)
    except subprocess.TimeoutExpired:
        return {"failed": "no time is left", "stderr": "out of time"}
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return {"failed": last[-1][:300], "stderr": done.stderr[-3000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(
    folder: Path,
    names: Sequence[str],
    rounds: int,
    peer_python: str,
    threads: int | None = None,
    until: float | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run arms round by round on a prepared case; return the median of each and all that was measured.

    An arm that fails is told on stderr and left out from there on.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for number in range(rounds):
        for name in [name for name in names if name not in failed]:
            one = measured(name, folder, peer_python, threads, until)
            if "failed" in one:
                failed[name] = one["failed"]
                print(f"{name} failed:\n{one['stderr']}", file=sys.stderr, flush=True)
                continue
            found[name].append(one)
            print(
                f"round {number + 1}  {name:16} {one['tokens_per_second']:7.0f} tokens/s", file=sys.stderr, flush=True
            )
    median = {name: report.summary(parts) for name, parts in found.items() if parts}
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
    parser.add_argument("--arms", nargs="+", default=list(CPU), choices=list(report.TITLES))
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
        given.model = demo_model()
    case = {
        "model": str(given.model), "dtype": training.precision(), "steps": given.steps, "warm": given.warm,
        "batch_size": given.batch_size,
        "sections": {"data": {"max_length": given.length, "on_long": "truncate", "max_lost": 0.5}},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        training.write_rows(Path(folder) / "rows.jsonl", given.rows, given.length)
        training.prepare(Path(folder), case)
        median, everything = compare(Path(folder), given.arms, given.rounds, given.peer_python, given.threads)
    about = {
        "machine": machine.processor(), "threads": given.threads, "rows": given.rows,
        "length": given.length, **case, "model": given.model.name, "median": median, **everything,
    }  # fmt: skip
    others = "" if given.batch_size == parser.get_default("batch_size") else f"-{given.batch_size}-rows"
    report.keep(given.out or HERE / "results" / f"train-cpu-{case['dtype']}{others}", about, median)
    if everything["failed"]:
        sys.exit(f"failed: {', '.join(everything['failed'])}")


if __name__ == "__main__":
    main()
