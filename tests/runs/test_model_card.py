"""Cards and adapter_config.json are for everybody: no path of this machine in them, the same from equal runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loratune.commands.merge import merge
from loratune.runs import model_card
from tests import pairs, tiny
from tests.conftest import Fit

ROOT = Path(__file__).parents[2]


def front(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---")[1]))


def test_no_path_of_this_machine(fit: Fit, base: Path, tmp_path: Path) -> None:
    run = fit("lora").folder
    full = fit("full", method={"type": "full"}, optimizer={"lr": 1e-3}).folder
    merge(run, tmp_path / "merged")
    for folder in (run, full, tmp_path / "merged"):
        card_text = (folder / "README.md").read_text()
        for place in (base, tmp_path, Path.home()):
            assert f"`{place}" not in card_text
            assert f'"{place}' not in card_text
            assert f"'{place}" not in card_text
        assert f"`{base.name}`" in card_text
        assert "base_model" not in front(folder)
    for folder in (run, *(run / "checkpoints").glob("step-*")):
        config = (folder / "adapter_config.json").read_text()
        assert json.loads(config)["base_model_name_or_path"] is None
        assert "/" not in config.replace("\\/", "")


@pytest.mark.parametrize(
    ("base", "hub", "name"),
    [
        ("owner/name", "owner/name", "owner/name"),
        ("gpt2", "gpt2", "gpt2"),
        ("/home/me/models/llama-3/", None, "llama-3"),
        ("/data/some.gguf", None, "some.gguf"),
        ("/home/me/.cache/huggingface/hub/models--owner--a-name/snapshots/0123", "owner/a-name", "owner/a-name"),
    ],
)
def test_what_a_base_is_called(base: str, hub: str | None, name: str) -> None:
    assert model_card.hub_id(base) == hub
    assert model_card.name_of(base) == name
    assert model_card._front(base, "adapter") == (
        [f'base_model: "{hub}"', "base_model_relation: adapter"] if hub else []
    )


def test_the_card_of_a_merge(fit: Fit, base: Path, tmp_path: Path) -> None:
    run = fit("lora").folder
    done = merge(run, tmp_path / "merged", dtype="bfloat16")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert front(tmp_path / "merged") == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["loratune", "merge"],
    }  # fmt: skip
    assert text.splitlines()[8:12] == ["# merged", "", text.splitlines()[10], ""]
    assert "rounded once to bfloat16" in text
    assert f"| largest logit difference | {done.difference:.2e} ({done.relative:.1e} of the largest logit) |" in text
    assert "apply_chat_template" in text
    assert "PeftModel" not in text
    assert "An answer ends with `<|im_end|>`" in text
    manifest = json.loads((tmp_path / "merged" / "MANIFEST.json").read_text())
    assert manifest["files"]["README.md"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.slow
def test_two_equal_runs_write_the_same_adapter_config(base: Path, tmp_path: Path) -> None:
    """In two processes: the order of a set is another one in each."""
    found = set()
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        path = tiny.write_recipe(tmp_path / seed, base, rows=8)
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", "loratune", "train", str(path)], check=True, env=environment)
        found.add((tmp_path / seed / "run" / "adapter_config.json").read_bytes())
    assert len(found) == 1


def test_target_modules_are_sorted(fit: Fit) -> None:
    config = json.loads((fit().folder / "adapter_config.json").read_text())
    assert len(config["target_modules"]) >= 7
    assert config["target_modules"] == sorted(config["target_modules"])


def test_a_run_that_starts_over_leaves_nothing_of_the_one_before(fit: Fit) -> None:
    run = fit().folder
    for name in ("predictions.jsonl", "predictions-step-000001.jsonl"):
        (run / name).write_text('{"place": "x:1", "prompt": "a", "reference": "b"}\n')
    (run / "note-of-mine.txt").write_text("mine")
    shutil.copy(run / "tokenizer.json", run / "merges.txt")
    manifest = json.loads((run / "MANIFEST.json").read_text())
    manifest["files"] |= {"merges.txt": {}, "../outside.txt": {}}  # of another tokenizer
    (run / "MANIFEST.json").write_text(json.dumps(manifest))
    (run.parent / "outside.txt").write_text("mine")
    fit(overwrite=True)
    assert not list(run.glob("predictions*.jsonl"))
    assert not (run / "merges.txt").exists()
    assert (run / "note-of-mine.txt").exists()
    assert (run.parent / "outside.txt").exists()
    assert (run / "adapter_config.json").exists()


def test_a_card_says_what_was_minimised_and_counts_pairs(fit: Fit, tmp_path: Path) -> None:
    card = (pairs.fitted(fit, tmp_path, number=16)("pairs").folder / "README.md").read_text()
    assert "| pairs | 16 to train on, of 16 read |" in card
    assert "| steps | 2 of 8 pairs |" in card
    assert "| objective | dpo, loss sigmoid, beta 0.1; loss per pair |" in card
    rows = (fit("rows", objective={"label_smoothing": 0.1}).folder / "README.md").read_text()
    assert "| objective | sft, label_smoothing 0.1; loss in nats per label token |" in rows
    assert "| steps | 3 of 8 rows |" in rows
