from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from loratune.commands.chat import chat
from loratune.commands.evaluate import evaluate
from loratune.console import Terminal
from loratune.errors import DataError, UsageError
from loratune.models import generate
from tests import tiny

POSITIONS = 64


def gpt2(tokens: Any) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokens), n_positions=POSITIONS, n_embd=64, n_layer=2, n_head=4,
                        bos_token_id=None, eos_token_id=None)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def made(kind: str, tokens: Any) -> Any:
    return gpt2(tokens) if kind == "gpt2" else tiny.model(tokens, max_position_embeddings=POSITIONS).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_answers_end_with_the_positions(kind: str) -> None:
    tokens = tiny.tokenizer()
    net = made(kind, tokens)
    assert generate.positions(net) == POSITIONS
    assert generate.has_learned_positions(net) == (kind == "gpt2")
    prompts = [[7] * 10, [8] * (POSITIONS - 3), [9] * 20]
    seen: list[tuple[int, int]] = []
    told: list[int] = []
    whole = net.generate

    def spy(**arguments: Any) -> Any:
        seen.append((arguments["input_ids"].shape[1], arguments["generation_config"].max_new_tokens))
        return whole(**arguments)

    net.generate = spy
    answers = generate.answers(net, tokens, prompts, 12, 4, progress=told.append)
    assert seen == [(POSITIONS - 3, 3), (20, 12)]
    assert told == [1, 3]
    assert answers[0] == generate.answers(net, tokens, prompts[:1], 12, 1)[0]


def test_sampling_is_from_the_models_own_distribution() -> None:
    """Not from the 50 likeliest tokens, nor as the model's generation_config.json has it."""
    tokens = tiny.tokenizer()
    net = made("llama", tokens)
    net.generation_config.top_k = 3
    net.generation_config.repetition_penalty = 50.0
    ids = torch.tensor([[7]]).repeat(600, 1)
    torch.manual_seed(0)
    drawn = generate._generate(net, tokens, ids, torch.ones_like(ids), 1, 1.0, ())[:, -1]
    assert len(drawn.unique()) > 150, "nearly uniform over 258 tokens"
    with torch.no_grad():
        likeliest = net(input_ids=ids[:1]).logits[0, -1].softmax(0)
    assert drawn.bincount(minlength=len(tokens)).double().div(600).sub(likeliest).abs().max() < 0.03
    long = torch.tensor([[7, 8, 9, 10, 11]])
    first = generate._generate(net, tokens, long, torch.ones_like(long), 6, 0.0, ())
    net.generation_config.repetition_penalty = None
    assert torch.equal(first, generate._generate(net, tokens, long, torch.ones_like(long), 6, 0.0, ()))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_past_the_positions_are_told(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tiny.tokenizer()
    made(kind, tokens).save_pretrained(tmp_path / "base")
    tokens.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "a" * size, "completion": " b"} for size in (10, POSITIONS - 8, POSITIONS + 9)]
    long = tiny.write_jsonl(tmp_path / "long.jsonl", rows)
    fits = tiny.write_jsonl(tmp_path / "fits.jsonl", rows[:2])
    options = {"format": "completion", "max_new_tokens": 12, "out": tmp_path / "out.jsonl", "on_event": Terminal()}
    assert evaluate(tmp_path / "base", data=str(fits), **options).generated == 2
    assert f"1 of 2 answers may be truncated at {POSITIONS} positions" in capsys.readouterr().err
    if kind == "gpt2":
        with pytest.raises(DataError, match=r"long.jsonl:3: 1 of 3 rows are longer than the model's 64 positions"):
            evaluate(tmp_path / "base", data=str(long), **options)
        return
    assert evaluate(tmp_path / "base", data=str(long), **options).generated == 2
    told = capsys.readouterr().err
    assert "1 of 3 rows are longer than the model's 64 positions" in told
    assert "1 of 3 prompts leave no room: not answered" in told


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_chat_ends_with_the_positions(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = tiny.tokenizer(template=None)
    made(kind, tokens).save_pretrained(tmp_path / "base")
    tokens.save_pretrained(tmp_path / "base")
    chat(tmp_path / "base", "a" * (POSITIONS - 5), max_new_tokens=12, on_event=Terminal())
    assert "answers end after 5 tokens here: the model has no more positions" in capsys.readouterr().err
    chat(tmp_path / "base", "a", max_new_tokens=12, on_event=Terminal())
    assert "positions" not in capsys.readouterr().err
    with pytest.raises(UsageError, match=f"^{POSITIONS} tokens leave no room: the model has {POSITIONS}"):
        chat(tmp_path / "base", "a" * POSITIONS, max_new_tokens=12)
