"""What is trained in a benchmark: rows, a recipe, and the tokens of every step for those who don't read rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RATE = 2e-4
LORA = {"r": 16, "lora_alpha": 32}


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

    from loratune import load_recipe
    from loratune.data import batches, chat_template, dataset
    from loratune.data.encode import Encoder

    recipe: dict[str, Any] = {
        "model": {"base": case["model"], "dtype": case["dtype"]},
        "method": {"type": "lora", **LORA},
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
    found, _ = dataset.of(
        loaded.data, loaded.train.seed, Encoder(chat_template.tokenizer_of(loaded.model, loaded.data))
    )
    steps = batches.batches(found, case["batch_size"], case["batch_size"], 0, case["steps"])
    rows = [row for batch in steps for micro in batch.micro for sample in micro for row in sample.rows]
    told = [{"input_ids": r.ids.tolist(), "labels": np.where(r.trained, r.ids, -100).tolist()} for r in rows]
    (folder / "tokens.json").write_text(json.dumps(told), encoding="utf-8")


def precision() -> str:
    """Return the precision that loratune takes on this device: bfloat16, or float32 without instructions for it."""
    from loratune.models import base_model

    return str(base_model.dtype_of("auto", base_model.device())).removeprefix("torch.")


def model_config(case: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a case's model."""
    found: dict[str, Any] = json.loads((Path(case["model"]) / "config.json").read_text(encoding="utf-8"))
    return found
