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
from loratune.errors import UsageError
from loratune.methods import Prompt
from loratune.methods.tuned import Setup
from loratune.models.policy import Policy
from tests import tiny
from tests.conftest import Fit, adapted, logits
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
    with pytest.raises(ValueError, match="can't be had again"), tuned.policy().reference():
        pass


def test_a_resumed_run_is_the_straight_one(fit: Fit) -> None:
    sections = {"method": METHOD, "train": {"epochs": 3, "save_every": 2}, "data": {"eval": "eval.jsonl"}}
    straight = fit("straight", **sections)
    with _stop_after(5):
        fit("stopped", **sections)
    assert _exactly(fit("stopped", resume=True, **sections)) == _exactly(straight)


def test_rows_stand_side_by_side(fit: Fit) -> None:
    facts = fit(method=METHOD).facts()
    assert facts["batching"] == {"packed": False, "why_not": "`method: prompt` puts something before each row"}


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
