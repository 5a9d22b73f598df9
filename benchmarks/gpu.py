"""Training speed on a GPU, with random weights of a real model's shape: nothing is downloaded.

    make gpu-bench
    python benchmarks/gpu.py --cases lora-2x4096 qlora-1x2048 --peer-python ../peers/bin/python

A model of the shape of Llama-3.1-8B is written once with random bfloat16 weights and a tokenizer of as many words. Rows
are random words of exact lengths, so that every arm of `benchmarks/train.py` sees the same tokens. Speed and memory of
dense layers do not depend on what the weights are; a loss that skips small gradients (cut cross entropy) would look
faster on random weights than it is, so there is no such arm.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import machine
import report
import train
import training

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1024, "max_position_embeddings": 16384,
    },
}  # fmt: skip
NF4 = {"model": {"quantization": "nf4"}}
ALL = {"train": {"gradient_checkpointing": "all"}}
LEAST = {"train": {"gradient_checkpointing": "all", "offload": "on"}, "optimizer": {"type": "adamw_8bit"}}
# rows of a step and their length in tokens; (shortest, longest) where it varies; sections of the recipe
CASES: dict[str, tuple[int, int | tuple[int, int], dict[str, Any]]] = {
    "lora-2x4096": (2, 4096, {}),
    "lora-1x2048": (1, 2048, {}),
    "lora-1x8192": (1, 8192, {}),
    "lora-16xvaried": (16, (64, 2048), {}),
    "qlora-2x4096": (2, 4096, NF4),
    "qlora-8x1024": (8, 1024, NF4),
    "qlora-1x2048": (1, 2048, NF4),
    "qlora-1x8192": (1, 8192, NF4),
    "qlora-16xvaried": (16, (64, 2048), NF4),
    "qlora-1x2048-checkpointed": (1, 2048, NF4 | ALL),
    "qlora-1x2048-offloaded": (1, 2048, NF4 | LEAST),
}
ARMS = (
    "loratune", "loratune-plain", "loratune-compiled", "trl", "trl-plain", "trl-liger", "trainer", "trainer-axolotl",
    "unsloth",
)  # fmt: skip


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write a Llama with random weights, and a tokenizer that has a word for each token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, **{f"w{index}": index for index in range(2, shape["vocab_size"])}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        net = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    net.save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    del net
    torch.cuda.empty_cache()


def write_rows(path: Path, number: int, length: int | tuple[int, int], vocabulary: int, seed: int = 0) -> None:
    """Write rows of random words; with the end token each has exactly its length."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as stream:
        for _ in range(number):
            tokens = length if isinstance(length, int) else round(draw.uniform(*length))
            text = " ".join(f"w{draw.randrange(2, vocabulary)}" for _ in range(tokens - 1))
            stream.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    """Measure the cases one after the other; figures and tables go under `--out` after each, in two files."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b", choices=list(SHAPES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(report.TITLES))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm", type=int, default=4, help="first steps whose time is not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shrink", type=int, default=1, help="divide the lengths, to try this on a CPU")
    parser.add_argument("--model", type=Path, help="folder for the weights, which are taken from there the next time")
    parser.add_argument("--limit", type=float, help="seconds for everything: an arm not done by then is given up")
    parser.add_argument("--in-turn", action="store_true", help="an arm over all cases before the next arm")
    parser.add_argument("--profile", type=Path, help="file for a profile of the last step of the first case")
    parser.add_argument("--peer-python", default=sys.executable, help="Python of the environment that holds the peers")
    parser.add_argument("--out", type=Path, default=train.HERE / "results")
    given = parser.parse_args()
    if not torch.cuda.is_available() and given.shape != "tiny":
        sys.exit("no GPU is in reach: on a CPU `--shape tiny --shrink 64` tries whether this runs")
    until = None if given.limit is None else time.monotonic() + given.limit
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine.processor()
    shape = SHAPES[given.shape]
    with tempfile.TemporaryDirectory() as place:
        base = given.model or Path(place) / "model"
        if not (base / "config.json").exists():
            print(f"{device}: writing random weights of {given.shape}", file=sys.stderr, flush=True)
            write_model(base, shape)
        folders = {name: Path(place) / name for name in given.cases}
        for name, folder in folders.items():
            profile = given.profile if name == given.cases[0] else None
            prepare(folder, name, base, shape, given, profile)
        found: dict[str, dict[str, Any]] = {name: {} for name in folders}
        everything: dict[str, dict[str, Any]] = {name: {"rounds": {}, "failed": {}} for name in folders}
        for arms in [[arm] for arm in given.arms] if given.in_turn else [given.arms]:
            for name, folder in folders.items():
                padded = ["loratune-padded"] if isinstance(CASES[name][1], tuple) and "loratune" in arms else []
                median, parts = train.compare(folder, [*arms, *padded], given.rounds, given.peer_python, until=until)
                found[name] |= median
                for key, part in parts.items():
                    everything[name][key] |= part
                everything[name]["median"] = found[name]
                for arm, one in median.items():
                    planned = f", {one['planned'] / 2**30:.1f} planned" if "planned" in one else ""
                    told = f"{one['tokens_per_second']:.0f} tokens/s, {one['peak_memory'] / 2**30:.1f} GiB{planned}"
                    print(f"= {name} {arm}: {told}", flush=True)
                keep(given.out, {"device": device, "shape": given.shape, "cases": everything}, found)
    if not any(found.values()):
        sys.exit("no arm came through")


def keep(out: Path, about: dict[str, Any], found: dict[str, dict[str, Any]]) -> None:
    """Write all figures and a table for each case, named after the device."""
    out.mkdir(parents=True, exist_ok=True)
    name = "gpu-" + re.sub("[^a-z0-9]+", "-", about["device"].lower())
    tables = [f"## {case}\n\n{report.table(arms)}\n" for case, arms in found.items() if arms]
    (out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text("\n".join([f"# {about['device']}, {about['shape']}\n", *tables]), encoding="utf-8")


def prepare(
    folder: Path, name: str, base: Path, shape: dict[str, Any], given: argparse.Namespace, profile: Path | None
) -> None:
    """Write recipe, rows and tokens of a case into its folder."""
    rows, length, sections = CASES[name]
    folder.mkdir()
    length = length // given.shrink if isinstance(length, int) else tuple(n // given.shrink for n in length)
    longest = length if isinstance(length, int) else length[1]
    case = {
        "model": str(base), "dtype": training.precision(), "steps": given.steps, "warm": given.warm,
        "batch_size": rows, "rows_at_once": rows, "profile": str(profile) if profile else "",
        "sections": {**sections, "data": {"format": "text", "max_length": longest}},
    }  # fmt: skip
    write_rows(folder / "rows.jsonl", rows * given.steps, length, shape["vocab_size"])
    training.prepare(folder, case)


if __name__ == "__main__":
    main()
