"""Rows longer than a model's positions, and tokens it has no embedding for: told before the first step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loratune import recipe
from loratune.commands.evaluate import evaluate
from loratune.errors import DataError
from loratune.events import Event, Told
from loratune.training import run
from tests import tiny
from tests.models.test_generate import POSITIONS, made

LENGTHS = (10, POSITIONS + 9, POSITIONS + 5)


def laid(folder: Path, kind: str, lengths: tuple[int, ...] = LENGTHS) -> Path:
    """Write a base and a recipe with rows of some lengths; return the recipe."""
    tokens = tiny.tokenizer()
    made(kind, tokens).save_pretrained(folder / "base")
    tokens.save_pretrained(folder / "base")
    written = tiny.write_recipe(folder, folder / "base", data={"format": "completion"}, train={"batch_size": 3})
    rows = [{"prompt": "a" * size, "completion": " b"} for size in lengths]
    tiny.write_jsonl(folder / "train.jsonl", rows)
    return written


def test_rows_past_learned_positions_stop_before_training(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run.train(recipe.load(laid(tmp_path, "gpt2")))
    assert f"train.jsonl:2: 2 of 3 rows are longer than the model's {POSITIONS} positions" in str(caught.value)
    assert f"data.max_length: {POSITIONS}" in str(caught.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_rows_past_rotary_positions_are_noted_and_trained(tmp_path: Path) -> None:
    heard: list[Event] = []
    done = run.train(recipe.load(laid(tmp_path, "llama")), on_event=heard.append)
    assert done.steps == 1
    told = f"2 of 3 rows are longer than the model's {POSITIONS} positions"
    assert sum(told in event.text for event in heard if isinstance(event, Told)) == 1


@pytest.mark.parametrize("what", ["train", "eval"])
def test_a_token_beyond_the_embedding_is_named_with_its_row(tmp_path: Path, what: str) -> None:
    written = laid(tmp_path, "llama", (10, 11))
    tokens = tiny.tokenizer()
    beyond = len(tokens)
    tokens.add_tokens(["beyond"])
    tokens.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": "beyond"}]
    path = tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    options: dict[str, Any] = {"data": str(path), "format": "completion", "generate": False}
    measure = partial(evaluate, tmp_path / "base", **options)
    work: Any = partial(run.train, recipe.load(written)) if what == "train" else measure
    told = rf"train.jsonl:2: token {beyond} has no embedding: the model has {beyond}"
    with pytest.raises(DataError, match=told) as caught:
        work()
    assert "is it of another model" in str(caught.value)
