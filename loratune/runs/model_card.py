"""The model card, README.md of a run or merge: what was trained on what, and how to use it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from loratune.data.formats import Patterns
from loratune.objectives import Pattern
from loratune.recipe import Recipe
from loratune.runs.facts import Facts


def write(recipe: Recipe, facts: Facts) -> str:
    """Return README.md for a run.

    Args:
        recipe: what was run.
        facts: of the run, as run.json holds them.
    """
    adapter = recipe.method.output == "adapter"
    named = recipe.model.base
    front = _front(named, "adapter" if adapter else "finetune")
    front += [f"library_name: {'peft' if adapter else 'transformers'}"]
    kind = "text-classification" if recipe.objective.outputs else "text-generation"
    front += [f"pipeline_tag: {kind}", "tags:", "- loratune", *([f"- {recipe.method.type}"] if adapter else [])]
    setup, end = facts.prepared, facts.end
    assert end is not None
    data = setup.data["train"]
    held = f", {data['held_out']:,} held out" if data["held_out"] else ""
    rows = f"{recipe.objective.sample}s"
    lines = [
        "---", *front, "---", "",
        f"# {recipe.output.rstrip('/').rpartition('/')[2]}", "",
        f"{'An adapter for' if adapter else 'A fine-tuned copy of'} `{name_of(named)}`, "
        f"trained with loratune {facts.start.versions['loratune']}.", "",
        "| | |", "|---|---|",
        f"| {rows} | {data['kept']:,} to train on{held}, of {data['read']:,} read |",
        *([] if recipe.objective.pooled else [f"| label tokens | {data['trained_tokens']:,} per epoch |"]),
        f"| steps | {end.step} of {recipe.train.batch_size} {rows} |",
        f"| objective | {_objective(recipe)} |",
        f"| method | {_method(recipe, setup.quantization)} |",
        f"| optimizer | {recipe.optimizer.type}, lr {recipe.optimizer.lr:g} |",
        f"| last train loss | {_number(end.train_loss)} |",
        f"| best eval loss | {_number(end.best_eval_loss)} |",
        f"| device | {facts.start.device} |",
        f"| time in steps | {end.seconds:.0f} s |", "",
        *_figures(end.best_evaluation),
        "![loss](loss.svg)", "",
        *(
            use_scores(recipe.output if adapter else None, setup.base, recipe.objective.head(), recipe.model.revision)
            if recipe.objective.outputs
            else use(
                recipe.output if adapter else None, setup.base, setup.chat, list(setup.turn_ends),
                recipe.model.revision, _labelling(recipe),
            )
        ),
        "",
        "`recipe.yaml` is the full recipe of the run, `run.json` has versions and counts, `metrics.jsonl` every step.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def merged(title: str, adapter: str, base: str, about: dict[str, Any], chat: bool, ends: Sequence[str]) -> str:
    """Return README.md for a merged model.

    Args:
        title: name of its folder.
        adapter: name of the adapter's folder.
        base: the base model, as it was named: a hub id or a path.
        about: version, dtype, difference, relative and agreement of the merge.
        chat: as in `use`.
        ends: as in `use`.
    """
    front = [*_front(base, "finetune"), "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines = [
        "---", *front, "- loratune", "- merge", "---", "",
        f"# {title}", "",
        f"The adapter `{adapter}` merged into `{name_of(base)}` with loratune {about['version']}: "
        f"its update added to W in float32, rounded once to {about['dtype']}.", "",
        "| compared with base + adapter | |", "|---|---|",
        f"| largest logit difference | {about['difference']:.2e} ({about['relative']:.1e} of the largest logit) |",
        f"| same next token | {100 * about['agreement']:.1f} % of the positions |", "",
        *use(None, base, chat, ends),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def name_of(base: str) -> str:
    """Return a base's public name: its hub id, or the last part of its path, never the path."""
    return hub_id(base) or os.path.basename(base.rstrip("/"))


def hub_id(base: str) -> str | None:
    """Return the hub id of a base, from its name or its folder in the hub's cache; else None."""
    for part in base.split("/") if os.path.isabs(base) else ():
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None if os.path.isabs(base) else base


def _front(base: str, relation: str) -> list[str]:
    """Return the card's metadata lines on the base: none for a base that is on this machine only."""
    known = hub_id(base)
    return [f"base_model: {json.dumps(known, ensure_ascii=False)}", f"base_model_relation: {relation}"] if known else []


def use_scores(
    adapter: str | None, base: str, head: Mapping[str, Any], revision: str | None = None
) -> list[str]:  # fmt: skip
    """Return the section on how to use a classifier or a reward model, with code that runs unchanged in its folder.

    Args:
        adapter: folder of the adapter, or None for a full model.
        base: its base model, as in `use`.
        head: transformers' settings of the classifier, as `ObjectiveSection.head` returns them.
        revision: of the base model, as in `use`.
    """
    names = "AutoModelForSequenceClassification, AutoTokenizer"
    lines = [*(["from peft import PeftModel"] if adapter else []), f"from transformers import {names}", ""]
    lines += ['folder = "."  # this folder; from elsewhere, its path or hub id']
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if adapter:
        at = f"base, revision={revision!r}" if revision else "base"
        lines += [
            f"base = {_base(base, adapter)!r}  # the base model: its path or hub id",
            f"labels = {dict(head['id2label'])!r}",
            "model = AutoModelForSequenceClassification.from_pretrained(",
            f'    {at}, num_labels=len(labels), id2label=labels, pad_token_id=tokenizer.pad_token_id, dtype="auto"',
            ")",
            "model = PeftModel.from_pretrained(model, folder)",
        ]
    else:
        lines += ['model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")']
    if list(head["id2label"].values()) == ["score"]:
        lines += [
            'messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello to you."}]',
            'inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")',
        ]
    else:
        lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    lines += ["print(model(**inputs.to(model.device)).logits)"]
    return ["## Use", "", "```python", *lines, "```"]


def use(
    adapter: str | None, base: str, chat: bool, ends: Sequence[str], revision: str | None = None,
    labelling: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Return the section on how to use a model, with code that runs unchanged in its folder.

    Args:
        adapter: folder of the adapter, or None for a full model.
        base: its base model: a hub id, or an absolute path, which is written relative to the adapter.
        chat: whether it was trained on turns, so that a question goes through the chat template.
        ends: tokens that end an answer, as text.
        revision: of the base model on a hub, or None for its newest.
        labelling: lines of code that label a text, instead of those that generate.
    """
    names = ["AutoModelForCausalLM", "AutoTokenizer", *(["GenerationConfig"] if adapter and not labelling else [])]
    lines = ["import torch"] if labelling else []
    lines += ["from peft import PeftModel"] if adapter else []
    lines += [f"from transformers import {', '.join(names)}", ""]
    lines += ['folder = "."  # this folder; from elsewhere, its path or hub id']
    lines += [f"base = {_base(base, adapter)!r}  # the base model: its path or hub id"] if adapter else []
    at = f"base, revision={revision!r}" if revision else "base"
    lines += [
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'model = AutoModelForCausalLM.from_pretrained({at if adapter else "folder"}, dtype="auto")',
    ]
    if adapter:
        lines += ["model = PeftModel.from_pretrained(model, folder)"]
    if labelling:
        return ["## Use", "", "```python", *lines, *labelling, "```"]
    if adapter:
        lines += [
            "model.generation_config = GenerationConfig.from_pretrained(folder)  # has the end tokens",
        ]
    if chat:
        lines += [
            'messages = [{"role": "user", "content": "Hello! What can you do?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    lines += [
        "output = model.generate(**inputs.to(model.device), max_new_tokens=256)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    told = []
    if ends:
        shown = ", ".join(f"`{end}`" for end in ends)
        told = ["", f"An answer ends with {shown}, as `generation_config.json` says."]
        if adapter:
            told[1] += f" A server may read the base's file instead: give it {shown} as a stop token."
    return ["## Use", "", "```python", *lines, "```", *told]


def _labelling(recipe: Recipe) -> list[str]:
    """Return code that labels a text as `objective: pattern` learned it: the mean of the patterns' probabilities."""
    form, objective = recipe.data.format, recipe.objective
    if not isinstance(form, Patterns) or not isinstance(objective, Pattern):
        return []
    return [
        f"patterns = {list(form.patterns)!r}",
        f"verbalizers = {dict(form.verbalizers)!r}",
        f"row = {dict.fromkeys(form.columns, 'Once upon a time')!r}",
        "chances = 0",
        "for text in [pattern.format(**row) for pattern in patterns]:",
        "    scores = []",
        "    for words in verbalizers.values():",
        '        inputs = tokenizer(text + words, return_offsets_mapping=True, return_tensors="pt")',
        '        of_words = inputs.pop("offset_mapping")[0, 1:, 0] >= len(text)',
        "        logps = model(**inputs.to(model.device)).logits[0, :-1].float().log_softmax(-1).cpu()",
        '        found = logps.gather(1, inputs["input_ids"][0, 1:, None].cpu())[of_words]',
        f"        scores.append(found.{objective.normalise}())",
        "    chances = chances + torch.stack(scores).softmax(0) / len(patterns)",
        "print(dict(zip(verbalizers, chances.tolist())))",
    ]


def _base(base: str, adapter: str) -> str:
    """Return how code in the folder of an adapter names its base: never by an absolute path."""
    if not os.path.isabs(base):
        return base
    base, adapter = os.path.realpath(base), os.path.realpath(adapter)
    if os.path.commonpath([base, adapter]) == os.path.sep:
        return os.path.basename(base)
    return os.path.relpath(base, adapter)


def _method(recipe: Recipe, quantization: str) -> str:
    return recipe.method.describe() + ("" if quantization == "none" else f" on a {quantization} base")


def _objective(recipe: Recipe) -> str:
    """Return the objective with its settings, without those that are off, and the unit of its loss."""
    known = recipe.objective.model_dump(mode="json")
    reference = known.pop("reference", "start")
    given = [(name, value) for name, value in known.items() if name != "type" and value]
    given += [("reference", name_of(reference))] if reference != "start" else []  # never a path
    settings = [f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in given]
    return ", ".join([known["type"], *settings]) + f"; loss in {recipe.objective.unit}".replace("in per", "per")


def _figures(best: dict[str, Any] | None) -> list[str]:
    """Return a table of the figures of the best evaluation, where there are others than the loss."""
    if best is None or len(best["figures"]) == 1:
        return []
    rows = (
        f"| {name} | {_number(one['value'])} | {one['unit']} | {one['better']} |"
        for name, one in best["figures"].items()
    )
    head = f"| held out, after step {best['step']} (the best by its {best['metric']}) | | unit | better |"
    return [head, "|---|---|---|---|", *rows, ""]


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
