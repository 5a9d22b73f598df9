"""A tiny random Llama with a byte-level tokenizer, made in code: the base model of nearly every test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loratune.data.collate import collate
from loratune.data.dataset import Counts, Rows
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import single
from loratune.data.section import Data
from loratune.errors import Place
from loratune.models.batch import Batch
from loratune.models.policy import Policy
from loratune.objectives import Objective

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def data(**fields: Any) -> Data:
    """Return the section `data` of a recipe."""
    return Data.model_validate({"train": "rows.jsonl", **fields})


def tokenizer(
    template: str | None = CHATML,
    special: Sequence[str] = ("<|im_start|>", "<|im_end|>"),
    bos: str | None = None,
    eos: str = "<|im_end|>",
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: one token per byte, plus special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = list(dict.fromkeys([*special, eos, *([bos] if bos else [])]))
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        bos_token=bos,
        additional_special_tokens=names,
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = template
    return made


def model(tokens: Any, seed: int = 0, layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """Return a random Llama whose widths are multiples of 64, so that it can be quantized to 4 bit."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokens),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id,
            "pad_token_id": None,
            **changes,
        }
    )
    return LlamaForCausalLM(config)


def save(folder: Path, **changes: Any) -> Path:
    """Write model and tokenizer to a folder and return it."""
    tokens = tokenizer()
    model(tokens, **changes).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def chats(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return short conversations of uneven length."""
    import random

    rng = random.Random(seed)
    words = ["the", "a", "red", "blue", "cat", "dog", "runs", "sees", "house", "tree", "one", "two", "three"]

    def say(most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, most)))

    rows = []
    for _ in range(number):
        turns = []
        for _ in range(rng.randint(1, 2)):
            turns += [{"role": "user", "content": say(8)}, {"role": "assistant", "content": say(4)}]
        rows.append({"messages": turns})
    return rows


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows to a JSONL file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of some parts of a recipe; keys of a section are joined, the later part wins."""
    known: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(known.get(key), dict)
            known[key] = {**known[key], **value} if both else value
    return known


def write_recipe(folder: Path, base: Path, rows: int = 24, **sections: Any) -> Path:
    """Write a recipe that trains the tiny model on `rows` chats in float32; `sections` are merged into it."""
    write_jsonl(folder / "train.jsonl", chats(rows))
    write_jsonl(folder / "eval.jsonl", chats(6, seed=1))
    recipe: dict[str, Any] = {
        "model": {"base": str(base), "dtype": "float32"},
        "method": {"type": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": "train.jsonl", "max_length": 256},
        "optimizer": {"type": "adamw", "lr": 1e-2},
        "train": {"batch_size": 8, "epochs": 1},
        "output": "run",
    }
    for name, value in sections.items():
        if (
            isinstance(value, dict)
            and isinstance(recipe.get(name), dict)
            and value.get("type") in (None, recipe[name].get("type"))
            and "continue_from" not in value  # r and lora_alpha are the adapter's
        ):
            recipe[name] = {**recipe[name], **value}
        else:
            recipe[name] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


class Store:
    """As much of a store of rows as batches are made from, in memory."""

    def __init__(self, rows: Sequence[Row], weights: Sequence[float] | None, per_sample: int):
        self.rows = list(rows)
        self.lengths = np.array([len(row.ids) for row in rows])
        self.weights = np.ones(len(rows)) if weights is None else np.array(weights)
        self.about = {"per_sample": per_sample, "sample": "row"}

    def row(self, number: int) -> Row:
        return self.rows[number]

    def place(self, number: int) -> Place:
        return self.rows[number].place


def stored(rows: Sequence[Row], weights: Sequence[float] | None = None, per_sample: int = 1) -> Rows:
    """Return rows as a run has them; `weights` are those of the rows."""
    store: Any = Store(rows, weights, per_sample)
    return Rows(store, np.arange(len(rows)), Counts())


def batch(rows: Sequence[Row], layout: Layout = "padded") -> Batch:
    """Make one micro-batch of rows, each a sample of its own."""
    return collate(single(rows), layout)


def total(objective: Objective, net: Any, part: Batch) -> torch.Tensor:
    """Return the summed loss of a micro-batch, without the other sums."""
    return objective.total(Policy(net), part)[0]
