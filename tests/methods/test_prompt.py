"""Prompt tuning: only the virtual tokens move, and PEFT alone reads what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loratune
from loratune.data import collate
from loratune.data.sample import single
from loratune.errors import DataError, ModelError, UsageError
from loratune.methods import Prompt
from loratune.methods.tuned import Setup
from loratune.models import generate
from loratune.models.policy import Policy
from tests import tiny
from tests.conftest import Fit, adapted, logits
from tests.models.test_generate import POSITIONS, gpt2
from tests.objectives.test_sft import ROWS
from tests.oracle.test_resume import _exactly, _stop_after

METHOD = {"type": "prompt", "virtual_tokens": 5}


def put_on(net: Any, **fields: Any) -> Any:
    """Return a tiny model with virtual tokens before its rows."""
    torch.manual_seed(0)
    return Prompt(virtual_tokens=3, **fields).apply(net, Setup(1, tiny.tokenizer()))


def test_only_virtual_tokens_are_trained_and_peft_reads_them(fit: Fit, base: Path, prompts: list[torch.Tensor]) -> None:
    done = fit(method=METHOD, train={"epochs": 3})
    (tensor,) = load_file(done.folder / "adapter_model.safetensors").values()
    assert tensor.shape == (5, 64)
    assert done.column("loss")[-1] < done.column("loss")[0]
    assert sum(p.numel() for p in done.net.parameters() if p.requires_grad) == tensor.numel()
    read = adapted(base, done.folder)
    torch.testing.assert_close(logits(read, prompts), logits(done.net, prompts), rtol=0, atol=0)
    alone = loratune_base(base, prompts)
    assert not torch.allclose(logits(read, prompts)[-len(alone) :], alone, atol=1e-3)


def loratune_base(base: Path, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Return the logits of the last prompt by the base alone."""
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), prompts[-1:])


def test_places_count_the_virtual_tokens() -> None:
    """The loss of a padded batch is that of each row alone, from full logits of prompts and row."""
    net = tiny.model(tiny.tokenizer()).eval()
    tuned = put_on(net)
    batch = collate.collate(single(ROWS), virtual_tokens=3)
    with torch.no_grad():
        found = batch.per_row(-tuned.policy().logps(batch))
        total = tuned.policy().cross_entropy(batch)
        for row, of in zip(ROWS, found.tolist(), strict=True):
            ids = torch.from_numpy(row.ids).long()
            scores = tuned.net(input_ids=ids[None]).logits[0, 3:].log_softmax(-1)
            wanted = -sum(float(scores[t - 1, ids[t]]) for t in range(1, len(ids)) if row.trained[t])
            assert of == pytest.approx(wanted, rel=1e-5)
    assert total.item() == pytest.approx(found.sum().item(), rel=1e-6)


def test_the_head_is_fused_beside_virtual_tokens() -> None:
    net = tiny.model(tiny.tokenizer()).eval()
    seen: list[int] = []
    tuned = put_on(net)
    batch = collate.collate(single(ROWS), virtual_tokens=3)
    tuned.policy().cross_entropy(batch)  # here it is found out whether the head is plain
    net.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[0]))
    tuned.policy().cross_entropy(batch).backward()
    assert seen == [1]


def test_a_text_to_start_from() -> None:
    net = tiny.model(tiny.tokenizer()).eval()
    tuned = put_on(net, init_text="ab")
    ids = tiny.tokenizer()("ab", add_special_tokens=False).input_ids
    wanted = net.get_input_embeddings().weight[torch.tensor([ids[0], ids[1], ids[0]])]
    torch.testing.assert_close(tuned.net.prompt_encoder["default"].embedding.weight, wanted, rtol=0, atol=0)


def test_off_is_the_base_but_not_the_start() -> None:
    net = tiny.model(tiny.tokenizer()).eval()
    batch = collate.collate(single(ROWS))
    with torch.no_grad():
        before = Policy(net).cross_entropy(batch).item()
        tuned = put_on(net)
        with tuned.off():
            assert Policy(tuned.net).cross_entropy(batch).item() == before
    assert not tuned.off_is_start
    with pytest.raises(ValueError, match="can't be restored"), tuned.policy().reference():
        pass


def test_a_resumed_run_is_the_straight_one(fit: Fit) -> None:
    sections = {"method": METHOD, "train": {"epochs": 3, "save_every": 2}, "data": {"eval": "eval.jsonl"}}
    straight = fit("straight", **sections)
    with _stop_after(5):
        fit("stopped", **sections)
    assert _exactly(fit("stopped", resume=True, **sections)) == _exactly(straight)


def test_rows_stand_side_by_side(fit: Fit) -> None:
    facts = fit(method=METHOD).facts()
    assert facts["batching"] == {"packed": False, "why_not": "`method: prompt` puts virtual tokens before each row"}


def test_over_nf4_evaluated_answered_and_not_merged(fit: Fit, tmp_path: Path) -> None:
    done = fit(method=METHOD, model={"quantization": "nf4"}, data={"eval": "eval.jsonl"})
    found = loratune.evaluate(done.folder, max_new_tokens=4)
    assert found.scores["adapter"]["loss"].value < found.scores["base"]["loss"].value
    assert found.generated > 0
    with pytest.raises(UsageError, match="is a soft prompt"):
        loratune.merge(done.folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_eval_loss_is_that_of_the_training(fit: Fit) -> None:
    done = fit(method=METHOD, data={"eval": "eval.jsonl"})
    found = loratune.evaluate(done.folder, generate=False).scores["adapter"]["loss"].value
    assert found == pytest.approx(done.events("eval")[-1]["loss"], rel=1e-4)


def _learned(folder: Path, virtual: int, lengths: tuple[int, ...]) -> Path:
    """Write a base with a table of positions, rows of some lengths, and a recipe of a soft prompt; return it."""
    tokens = tiny.tokenizer()
    gpt2(tokens).save_pretrained(folder / "base")
    tokens.save_pretrained(folder / "base")
    known = tiny.write_recipe(
        folder, folder / "base", method=METHOD | {"virtual_tokens": virtual}, data={"format": "completion"}
    )
    tiny.write_jsonl(folder / "train.jsonl", [{"prompt": "a" * size, "completion": " b"} for size in lengths])
    return known


@pytest.mark.parametrize(("virtual", "remedy"), [(40, f"or data.max_length: {POSITIONS - 40}"), (70, "fewer `method.")])
def test_virtual_tokens_take_positions_of_a_table(tmp_path: Path, virtual: int, remedy: str) -> None:
    recipe = _learned(tmp_path, virtual, (8, 30))
    with pytest.raises(DataError, match=rf"{max(0, POSITIONS - virtual)} positions: {virtual} of the") as caught:
        loratune.train(loratune.load_recipe(recipe))
    assert remedy in str(caught.value)


def test_answers_end_with_the_positions_that_virtual_tokens_leave(tmp_path: Path) -> None:
    run = loratune.train(loratune.load_recipe(_learned(tmp_path, 40, (8, 9))))
    lines: list[str] = []
    loratune.chat(run.folder, "a", on_event=lambda e: lines.append(e.text) if isinstance(e, loratune.Told) else None)
    assert any(line.startswith("answers end after") for line in lines)
    with pytest.raises(UsageError, match="64 positions, and virtual tokens take 40 of them"):
        loratune.chat(run.folder, "a" * 23)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a" * size, "completion": " b"} for size in (4, 15)])
    found = loratune.evaluate(run.folder, data=str(rows), max_new_tokens=50)
    assert found.generated == 2
    long = tiny.write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a" * 25, "completion": " b"}])
    with pytest.raises(DataError, match="longer than 24 positions: 40 of the model's 64 are taken by virtual tokens"):
        loratune.evaluate(run.folder, data=str(long))


def test_a_tokenizer_larger_than_the_embedding(fit: Fit, tmp_path: Path) -> None:
    """Vectors start from tokens the model has; a text of others is an error."""
    tokens = tiny.tokenizer()
    net = tiny.model(tokens)
    tokens.add_tokens(["beyond"] + [f"more{i}" for i in range(2000)])
    torch.manual_seed(0)
    Prompt(virtual_tokens=8).apply(net, Setup(1, tokens))
    with pytest.raises(ModelError, match=r"`method.init_text`: token \d+ has no embedding"):
        Prompt(virtual_tokens=8, init_text="beyond").apply(net, Setup(1, tokens))


def test_prompts_of_one_length_alone_are_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT drops the positions behind virtual tokens: padding would stand between these and the prompt."""
    tokens = tiny.tokenizer()
    tokens.pad_token = tokens.eos_token
    net = put_on(tiny.model(tokens).eval()).net
    seen: list[tuple[int, int]] = []
    whole = generate._generate

    def spy(net: Any, tokenizer: Any, input_ids: torch.Tensor, mask: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert bool(mask.all())
        seen.append(tuple(input_ids.shape))
        return whole(net, tokenizer, input_ids, mask, *rest)

    monkeypatch.setattr(generate, "_generate", spy)
    prompts = [[7] * 9, [8] * 4, [9] * 9, [5] * 4, [6] * 9]
    together = generate.answers(net, tokens, prompts, 6, 2)
    assert seen == [(2, 9), (1, 9), (2, 4)]
    assert together == [generate.answers(net, tokens, [one], 6, 1)[0] for one in prompts]
