"""The side of loratune: trains on bases that transformers 4 wrote, and writes down the logits that must be found again.

`newer.py FOLDER OLDER_PYTHON` does all of it: bases, runs, merges, full fine-tuning, a .gguf, and the comparison.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratune
from loratune.commands import opened_model
from loratune.models import base_files
from loratune.system import startup
from tests import tiny
from tests.other_readers import gguf_file

TEXTS = ("a blue cat runs over the red house", "<|im_start|>user\nHi there<|im_end|>\n", "1, 2, 3 and then some more")
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "there"}]


def expect(place: Path, model: Path, net: Any, base: Path | None = None) -> None:
    """Put a folder where the other side looks for it, with what it must find there."""
    place.mkdir(parents=True)
    shutil.copytree(model, place / "model", ignore=shutil.ignore_patterns("checkpoints"))
    tokens = AutoTokenizer.from_pretrained(model)
    net.float().eval()
    with torch.no_grad():
        asked = [tokens(text * 3, return_tensors="pt").input_ids for text in TEXTS]
        found = torch.cat([net(input_ids=ids, use_cache=False).logits[0].float() for ids in asked])
    save_file({"logits": found}, place / "expected.safetensors")
    told = {
        "base": str(base) if base else None, "ids": [tokens(text).input_ids for text in TEXTS], "chat": CHAT,
        "shown": tokens.apply_chat_template(CHAT, tokenize=False),
    }  # fmt: skip
    (place / "expected.json").write_text(json.dumps(told))


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(place: Path, base: Path, **sections: Any) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    path = tiny.write_recipe(place, base, rows=16, **sections)
    return loratune.train(loratune.load_recipe(path)).folder


def write(folder: Path, name: str) -> None:
    """Train on one base in each way."""
    place, work = folder / name, folder / name / "work"
    base = place / "base"
    run = train(work / "lora", base)
    if name != "mixtral":  # matrices on fused experts are for transformers 5 alone, which is told when they are trained
        expect(place / "run", run, opened_model.load(opened_model.open_subject(str(run)), exact=True).model, base)
    loratune.merge(run, work / "merged")
    expect(place / "merged", work / "merged", load(work / "merged"))
    full = train(work / "full", base, method={"type": "full"}, optimizer={"type": "adamw", "lr": 1e-3})
    expect(place / "full", full, load(full))


def main(folder: Path, older: str) -> int:
    os.environ.update(HF_HUB_OFFLINE="1", LORATUNE_CACHE=str(folder / "cache"), CI="1")
    with startup.quiet():
        return compare(folder, older)


def compare(folder: Path, older: str) -> int:
    script = str(Path(__file__).parent / "older.py")
    subprocess.run([older, script, "make", str(folder)], check=True)
    for base in sorted(folder.glob("*/base")):
        write(folder, base.parent.name)
    file = gguf_file.write(folder / "llama" / "base", folder / "llama.gguf")
    made = base_files.from_gguf(file)
    expect(folder / "gguf" / "base", made, load(folder / "llama" / "base"))  # what the file was made of
    (folder / "gguf" / "work").mkdir()
    run = train(folder / "gguf" / "work" / "lora", file)
    expect(folder / "gguf" / "run", run, opened_model.load(opened_model.open_subject(str(run)), exact=True).model, made)
    loratune.merge(run, folder / "gguf" / "work" / "merged")
    expect(folder / "gguf" / "merged", folder / "gguf" / "work" / "merged", load(folder / "gguf" / "work" / "merged"))
    return subprocess.run([older, script, "compare", str(folder)]).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2]))
