"""The model card: what was trained on what, and how to use it, written beside the adapter."""

from __future__ import annotations

import json
from typing import Any

from loratune.recipe import Recipe


def write(recipe: Recipe, facts: dict[str, Any]) -> str:
    """Return README.md for a run.

    Args:
        recipe: what was run.
        facts: run.json: counts, losses, versions, device.
    """
    adapter = recipe.method.type == "lora"
    base = facts["base"]
    front = [f"base_model: {json.dumps(base, ensure_ascii=False)}"]
    front += [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation", "tags:"]
    front += ["- loratune", *(["- lora"] if adapter else [])]
    data = facts["data"]["train"]
    held = f", {data['held_out']:,} held out" if data["held_out"] else ""
    lines = [
        "---", *front, "---", "",
        f"# {recipe.output.rstrip('/').rpartition('/')[2]}", "",
        f"{'A LoRA adapter for' if adapter else 'A fine-tuned copy of'} `{base}`, "
        f"trained with loratune {facts['versions']['loratune']}.", "",
        "| | |", "|---|---|",
        f"| rows | {data['kept']:,} to train on{held}, of {data['read']:,} read |",
        f"| trained tokens | {data['trained_tokens']:,} per epoch |",
        f"| steps | {facts['step']} of {recipe.train.batch_size} rows |",
        f"| method | {_method(recipe, facts['quantization'])} |",
        f"| optimizer | {recipe.optimizer.type}, lr {recipe.optimizer.lr:g} |",
        f"| last train loss | {_number(facts.get('train_loss'))} |",
        f"| best eval loss | {_number(facts.get('best_eval_loss'))} |",
        f"| device | {facts['device']} |",
        f"| time in steps | {facts['seconds']:.0f} s |", "",
        "![loss](loss.svg)", "",
        "## Use", "",
        "```python",
    ]  # fmt: skip
    if adapter:
        lines += [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")',
        ]
    else:
        lines += [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")',
        ]
    lines += [
        'tokenizer = AutoTokenizer.from_pretrained("PATH OF THIS FOLDER")',
        "```",
        "",
        "`recipe.yaml` is the whole recipe as it was run, `run.json` versions and counts, `metrics.jsonl` every step.",
        "",
    ]
    return "\n".join(lines)


def _method(recipe: Recipe, quantization: str) -> str:
    method = recipe.method
    base = "" if quantization == "none" else f" over a {quantization} base"
    if method.type == "full":
        return "full fine-tuning"
    kind = "DoRA" if method.dora else "LoRA"
    scale = f"lora_alpha {method.lora_alpha:g}{', rsLoRA' if method.rslora else ''}"
    return f"{kind} r {method.r}, {scale}, start {method.init}{base}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
