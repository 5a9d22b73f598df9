"""Every recipe in recipes/ loads as it stands and trains two steps of a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loratune import recipe
from loratune.training import run
from tests import labelled, pairs, rated, tiny

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "demo")  # the demo trains on rows of its own

# ChatML that also writes tools and calls, as the templates of models for tool calling do.
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = [
    {"role": "user", "content": "rain?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture(scope="module")
def template_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokens = tiny.tokenizer(TEMPLATE)
    tiny.model(tokens, max_position_embeddings=4096).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def copied(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Copy a recipe into a folder with small rows under every local path it names."""
    copy = tmp_path / request.param.name
    copy.write_text(request.param.read_text())
    tree = yaml.safe_load(copy.read_text())
    kind = _kind(tree)
    for source in _sources(tree):
        if not _on_hub(source):
            _write_rows(tmp_path / source["path"], kind, tools="tool" in request.param.stem)
    return copy


def _kind(tree: dict[str, Any]) -> str:
    kind = tree["data"].get("format", "chat")
    return str(kind["type"] if isinstance(kind, dict) else kind)


def _sources(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in ("train", "eval"):
        found = tree["data"].get(key, [])
        for source in found if isinstance(found, list) else [found]:
            yield source if isinstance(source, dict) else {"path": source}


def _on_hub(source: dict[str, Any]) -> bool:
    return not source["path"].startswith("data/")


def _write_rows(path: Path, kind: str, tools: bool = False) -> None:
    if kind == "text":  # a folder; one text long enough to be split
        path.mkdir(parents=True)
        (path / "long.txt").write_text("the red cat runs. " * 150)
        (path / "short.txt").write_text("a blue dog sees a tree.")
        tiny.write_jsonl(path / "more.jsonl", [{"text": f"one two {i}"} for i in range(20)])
        return
    which = path.name  # no row may stand in two files
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": which}, *row["messages"][1:]]} for row in tiny.chats(20)
    ]
    if kind == "instruction":
        rows = [{"instruction": "say", "input": "red" * (i % 2), "output": f"{which} {i}"} for i in range(20)]
    elif kind == "labelled":
        rows = [{"text": f"{which} {i}", "label": "red" if i % 2 else "blue"} for i in range(20)]
    elif kind == "preference":
        rows = pairs.rows(20)
    elif kind == "kto":
        rows = rated.rows(20)
    elif kind == "pattern":
        rows = labelled.rows(20)
    elif tools:
        rows = [{"tools": [TOOL], "messages": [{"role": "user", "content": which}, *CALL[1:]]}] * 20
    tiny.write_jsonl(path, rows)


def test_there_are_a_dozen() -> None:
    assert len(list(FOLDER.glob("*.yaml"))) >= 12


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    top = text[: text.index("\nmodel:")]
    assert len(text.splitlines()) < 40
    assert "# Run:" in top
    assert "# Expect:" in top
    assert path.stem == "demo" or f"loratune train {path.name}" in top


def test_loads_as_it_stands(copied: Path) -> None:
    loaded = recipe.load(copied)
    assert loaded.output.startswith(str(copied.parent / "runs"))


def test_trains_two_steps(copied: Path, template_base: Path) -> None:
    tree = yaml.safe_load(copied.read_text())
    tree["model"]["base"] = str(template_base)
    for source in _sources(tree):
        if _on_hub(source):
            _write_rows(copied.parent / "data/hub.jsonl", _kind(tree))
            source["path"] = "data/hub.jsonl"  # the sources of such a recipe are mappings
    tree["train"].pop("epochs", None)
    tree["train"] |= {"max_steps": 2, "batch_size": 2, "micro_batch_size": 1, "warmup": 0}
    tree["data"]["max_length"] = 512
    copied.write_text(yaml.safe_dump(tree, sort_keys=False))

    done = run.train(recipe.load(copied))

    facts = json.loads((done.folder / "run.json").read_text())
    assert (done.steps, facts["status"]) == (2, "complete")
    assert torch.isfinite(torch.tensor(done.train_loss))
    assert facts["data"]["train"]["trained_tokens"] > 0 or tree["objective"]["type"] == "classify"
    lora = tree["method"] != "full"
    assert (done.folder / ("adapter_model.safetensors" if lora else "model.safetensors")).stat().st_size > 0
    assert (done.folder / ("adapter_config.json" if lora else "config.json")).is_file()
    if tree["data"].get("on_long") == "split":
        assert facts["data"]["train"]["split"] == 1
