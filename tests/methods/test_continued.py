"""Training that continues an existing adapter: from a run, or one of other programs."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratune
from loratune.errors import BaseMismatchError, LoratuneError, ModelError, RecipeError
from loratune.methods.adapter_files import CONFIG, TENSORS
from loratune.models import fingerprint
from tests import pairs, tiny
from tests.conftest import Fit, Trained
from tests.oracle.test_resume import _exactly, _stop_after

FIRST: dict[str, Any] = {"method": {"type": "lora", "r": 6, "lora_alpha": 9}, "train": {"epochs": 3}}


@pytest.fixture
def first(fit: Fit) -> Trained:
    return fit("first", **FIRST)


def start(folder: Path | str, **more: Any) -> dict[str, Any]:
    return {"type": "lora", "continue_from": str(folder), **more}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / TENSORS)


def test_a_run_begins_where_the_other_ended(fit: Fit, first: Trained) -> None:
    still = fit("still", method=start(first.folder), optimizer={"lr": 1e-30})
    for name, tensor in tensors(first.folder).items():
        assert torch.equal(tensor, tensors(still.folder)[name])
    on = fit("on", method=start(first.folder), train={"epochs": 3})
    assert on.column("loss")[0] == still.column("loss")[0]
    assert on.column("loss")[0] < first.column("loss")[0] - 0.1
    assert on.column("loss")[-1] < first.column("loss")[-1]
    config = json.loads((on.folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 9)
    assert "LoRA r 6, lora_alpha 9, from run" in (on.folder / "README.md").read_text()
    again = loratune.load_recipe(on.folder / "recipe.yaml")
    assert again.method == on.recipe.method


@pytest.mark.parametrize(
    "method",
    [
        {"dora": True, "r": 4},
        {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}, "target_modules": ["q_proj", "k_proj"]},
        {"modules_to_save": ["lm_head"], "bias": "lora_only"},
        {"layers_to_transform": [1], "trainable_token_indices": [5, 9]},
        {"init": "pissa"},
    ],
    ids=str,
)  # fmt: skip
def test_every_kind_of_adapter(fit: Fit, method: dict[str, Any]) -> None:
    before = fit("first", method={"type": "lora", **method}, train={"epochs": 2})
    after = fit("second", method=start(before.folder), optimizer={"lr": 1e-30})
    was, now = tensors(before.folder), tensors(after.folder)
    assert was.keys() == now.keys()
    for name, tensor in was.items():
        torch.testing.assert_close(now[name], tensor, rtol=0, atol=0, msg=name)


def test_a_continued_run_resumes(fit: Fit, first: Trained) -> None:
    given = {"method": start(first.folder, lora_dropout=0.1), "train": {"epochs": 3, "save_every": 2}}
    straight = fit("straight", **given)
    with _stop_after(5):
        fit("stopped", **given)
    assert _exactly(fit("stopped", resume=True, **given)) == _exactly(straight)


def test_the_reference_is_the_adapter(fit: Fit, tmp_path: Path, first: Trained) -> None:
    run = pairs.fitted(fit, tmp_path, method=start(first.folder), train={"epochs": 4})
    done = run("dpo")
    assert done.column("loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    base = pairs.fitted(fit, tmp_path)("base")
    of = [json.loads((one.folder / "reference_logps.json").read_text())["train"] for one in (done, base)]
    assert of[0]["reference_chosen"] != pytest.approx(of[1]["reference_chosen"], rel=1e-3)


def test_an_adapter_of_peft(fit: Fit, base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    net = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=3, target_modules=["v_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    net.save_pretrained(tmp_path / "theirs")
    done = fit("a", method=start(tmp_path / "theirs"), optimizer={"lr": 1e-30})
    for name, tensor in tensors(tmp_path / "theirs").items():
        assert torch.equal(tensors(done.folder)[name], tensor)


def change(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    known = json.loads((target / CONFIG).read_text())
    (target / CONFIG).write_text(json.dumps({**known, **config}))
    return target


def test_what_can_not_be_continued(fit: Fit, tmp_path: Path, first: Trained) -> None:
    (tmp_path / "empty").mkdir()
    soft = fit("soft", method="prompt")
    cases: list[tuple[dict[str, Any], str]] = [
        (start(tmp_path / "empty"), "no adapter at"),
        (start("nowhere"), "no adapter at `nowhere`"),
        (start(first.folder, r=8), "`method.r`: the adapter has 6"),
        (start(first.folder, target_modules=["q_proj"]), "`method.target_modules`: the adapter has"),
        (start(first.folder, init="pissa"), "`method.init: pissa` is for a new adapter"),
        (start(soft.folder), "only LoRA can be continued"),
        (start(change(first.folder, tmp_path / "a", r="six")), "`r` is not valid"),
        (start(change(first.folder, tmp_path / "b", use_qalora=True)), "`use_qalora` is not supported"),
    ]
    for method, told in cases:
        with pytest.raises(LoratuneError, match=re.escape(told)) as error:
            fit("never", method=method)
        assert error.value.exit_code == 2, told


def test_an_adapter_that_does_not_fit(fit: Fit, tmp_path: Path, first: Trained) -> None:
    short = change(first.folder, tmp_path / "short")
    save_file(dict(list(tensors(short).items())[2:]), short / TENSORS)
    with pytest.raises(ModelError, match="lacks tensors"):
        fit("never", method=start(short))
    with pytest.raises(BaseMismatchError, match="not the base it was trained on") as error:
        fit("other", method=start(first.folder), model={"base": str(tiny.save(tmp_path / "another base", seed=3))})
    assert "set `model.base`" in str(error.value)
    with pytest.raises(RecipeError, match=r"`method\.continue_from` .* is the run folder"):
        fit("first", method=start(first.folder), overwrite=True)


def scored(fit: Fit, folder: Path, name: str, objective: str, words: tuple[str, str] = ("red", "blue"), **more: Any) -> Trained:  # fmt: skip
    texts = [{"text": f"a {word} {number}", "label": word} for number in range(8) for word in words]
    format, rows = ("labelled", texts) if objective == "classify" else ("preference", pairs.rows(16))
    data = {"train": str(tiny.write_jsonl(folder / f"{name}.jsonl", rows)), "format": format}
    return fit(name, data=data, objective=objective, **more)


HEAD = "base_model.model.score.weight"


@pytest.mark.parametrize("objective", ["classify", "reward"])
def test_what_learned_to_write_learns_to_score(
    fit: Fit, tmp_path: Path, first: Trained, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = scored(fit, tmp_path, "a", objective, method=start(first.folder), optimizer={"lr": 1e-30})
    assert done.column("loss")[0] == pytest.approx(math.log(2), abs=1e-6), "the head starts at zero"
    found = tensors(done.folder)
    assert not found[HEAD].abs().max() > 1e-20
    for name, tensor in tensors(first.folder).items():
        assert torch.equal(tensor, found[name])
    assert "the head that scores rows starts at zero" in capsys.readouterr().err
    trained = scored(fit, tmp_path, "b", objective, method=start(first.folder))
    assert tensors(trained.folder)[HEAD].abs().max() > 1e-4, "and is trained"


def test_a_head_goes_on_only_for_the_same_outputs(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    before = scored(fit, tmp_path, "a", "classify", train={"epochs": 4})
    head = tensors(before.folder)[HEAD]
    assert head.any()
    same = scored(fit, tmp_path, "same", "classify", method=start(before.folder), optimizer={"lr": 1e-30})
    assert torch.equal(tensors(same.folder)[HEAD], head)
    assert "starts at zero" not in capsys.readouterr().err
    for name, objective, words in (("others", "classify", ("up", "down")), ("reward", "reward", ("red", "blue"))):
        with pytest.raises(ModelError, match="the head of the adapter to continue is for `blue`, `red`; now: "):
            scored(fit, tmp_path, name, objective, words, method=start(before.folder))
    with pytest.raises(ModelError, match="now: `objective: sft` has none"):
        fit("never", method=start(before.folder))
    (before.folder / fingerprint.NAME).unlink()  # as an adapter of PEFT alone
    with pytest.raises(ModelError, match="has a head that scores rows, and this objective learns to write"):
        fit("never", method=start(before.folder))
