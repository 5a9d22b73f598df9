"""Full fine-tuning of models whose tensors have other names on disk than in memory: the experts of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loratune.methods import Lora
from loratune.methods.tuned import Setup
from loratune.runs import checkpoint
from tests import tiny
from tests.conftest import Fit, logits
from tests.methods.test_targets import bases  # noqa: F401  a fixture
from tests.oracle.test_resume import _stop_after

MIXTURES = ["mixtral", "qwen3_moe"]
SECTIONS = {
    "method": {"type": "full"},
    "data": {"eval": "eval.jsonl"},
    "train": {"eval_every": 1, "save_every": 1, "keep": 9},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_best_step_of_a_mixture_is_saved(
    fit: Fit,
    bases: Callable[[str], Path],  # noqa: F811
    prompts: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr("loratune.training.loop.measure", lambda *_: (next(losses), 10, {}))
    done = fit(model={"base": str(bases(kind))}, **SECTIONS)
    assert done.facts()["saved_step"] == 2
    final, best, last = (
        load_file(folder / "model.safetensors")
        for folder in (done.folder, checkpoint.path_of(done.folder, 2), checkpoint.path_of(done.folder, 3))
    )
    assert final.keys() == best.keys() == load_file(bases(kind) / "model.safetensors").keys()
    assert all(torch.equal(final[name], best[name]) for name in final)
    assert any(not torch.equal(final[name], last[name]) for name in final if "experts" in name)
    read = transformers.AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    torch.testing.assert_close(logits(read, prompts), logits(done.net, prompts), rtol=0, atol=0)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_is_resumed(fit: Fit, bases: Callable[[str], Path], kind: str) -> None:  # noqa: F811
    sections = {**SECTIONS, "model": {"base": str(bases(kind))}}
    straight = fit("straight", **sections)
    with _stop_after(2):
        fit("stopped", **sections)
    resumed = fit("stopped", resume=True, **sections)
    assert resumed.column("loss") == straight.column("loss")
    one, other = (load_file(run.folder / "model.safetensors") for run in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("changes", [{"modules_to_save": ("lm_head",)}, {"modules_to_save": ("norm",)}, {"dora": True}])
def test_what_is_trained_of_a_float16_base_is_float32(changes: dict[str, object]) -> None:
    net = Lora(r=4, **changes).apply(tiny.model(tiny.tokenizer()).half(), Setup(1)).net
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in net.parameters() if not p.requires_grad} == {torch.float16}
    with torch.autocast("cpu", dtype=torch.float16):
        net(input_ids=torch.tensor([[1, 2, 3]])).logits.float().sum().backward()
