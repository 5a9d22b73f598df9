"""The reference of an objective: taken once or live, from the cache, or of another adapter or model."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import loratune
from loratune.data import row_cache
from loratune.data.collate import collate
from loratune.errors import BaseMismatchError, ModelError, RecipeError
from loratune.methods import AdaLora, Full, Lora, Prompt
from loratune.methods.tuned import Setup, Tuned
from loratune.models import base_model
from loratune.objectives import Dpo
from loratune.system.run_files import REFERENCE
from loratune.training import reference_store
from tests import pairs, tiny
from tests.conftest import Fit, Trained, adapted
from tests.objectives.test_preference import samples
from tests.objectives.test_sft import llama
from tests.oracle.test_resume import _exactly, _stop_after
from tests.oracle.test_split import _two_processes

SHORT = {"epochs": 0.5}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))


def known(done: Trained) -> dict[str, Any]:
    """Return the values in a run folder, without their key."""
    found = json.loads((done.folder / REFERENCE).read_text())
    return {name: found[name] for name in ("train", "eval")}


def live(**more: Any) -> dict[str, Any]:
    return {"objective": {"type": "dpo", "reference": "live", **more}}


# ---------------------------------------------------------------- adapter off, and a second copy


@pytest.mark.parametrize("method", [Lora(r=4), AdaLora(init_r=4, target_r=2), Lora(init="eva", r=2)], ids=str)
def test_adapter_off_is_a_second_copy_to_the_bit(method: Any) -> None:
    """In float32, whatever the adapter has learned."""
    net, copy, batch = llama(), llama(), collate(samples(5))
    copy.load_state_dict(net.state_dict())
    tuned = method.apply(net, Setup(9, batches=lambda: [dict(batch.inputs, labels=batch.inputs["input_ids"])]))
    with torch.no_grad():
        for parameter in tuned.net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        wanted = Dpo().once(Tuned(copy.requires_grad_(False)).policy(), batch)
        with tuned.policy().reference() as before:
            found = Dpo().once(before, batch)
    for name in Dpo.values:
        assert torch.equal(found[name], wanted[name])
        assert found[name].shape == (5,)


def test_the_base_by_its_name_gives_the_values_of_the_start_to_the_bit(fit: Fit, tmp_path: Path, base: Path) -> None:
    run = pairs.fitted(fit, tmp_path, train=SHORT, data={"packing": "off"})
    start = run("start")
    shutil.rmtree(reference_store.folder())
    named = run("named", objective={"type": "dpo", "reference": str(base)})
    assert known(named) == known(start)
    assert named.column("loss") == start.column("loss"), "no random number was drawn for it"
    prints = named.facts()["fingerprints"]
    assert prints["reference"] == prints["base"]
    assert "reference" not in start.facts()["fingerprints"]


# ---------------------------------------------------------------- live


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_live_is_the_same_training(fit: Fit, tmp_path: Path, method: str) -> None:
    run = pairs.fitted(fit, tmp_path, method=method, train={"epochs": 3, "save_every": 2})
    once, now = run("once"), run("live", **live())
    assert now.column("loss") == pytest.approx(once.column("loss"), abs=1e-6)
    assert now.column("reward_chosen") == pytest.approx(once.column("reward_chosen"), abs=1e-5)
    assert [e["loss"] for e in now.events("eval")] == pytest.approx([e["loss"] for e in once.events("eval")], abs=1e-6)
    assert not (now.folder / REFERENCE).exists()
    with _stop_after(3):
        run("stopped", **live())
    assert _exactly(run("stopped", resume=True, **live())) == _exactly(now)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("full", "`method: full`"),
        ("prompt", "`method: prompt`"),
        ({"type": "lora", "init": "pissa"}, "`method.init: pissa`"),
        ({"type": "lora", "init": "olora"}, "`method.init: olora`"),
        ({"type": "lora", "init": "loftq"}, "`method.init: loftq`"),
        ({"type": "lora", "bias": "all"}, "`method.bias: all`"),
    ],
    ids=str,
)
def test_live_is_refused_where_adapter_off_is_another_model(
    tmp_path: Path, base: Path, method: Any, told: str
) -> None:  # fmt: skip
    model = {"base": str(base), **({"quantization": "nf4"} if "loftq" in told else {})}
    path = tiny.write_recipe(tmp_path, base, method=method, model=model, data={"format": "preference"}, **live())
    with pytest.raises(RecipeError, match=re.escape(f"with {told} that is not the model")):
        loratune.load_recipe(path)


def test_live_is_refused_behind_another_adapter(fit: Fit, tmp_path: Path, base: Path) -> None:
    first = fit("first", train={"epochs": 0.5})
    method = {"type": "lora", "continue_from": str(first.folder)}
    path = tiny.write_recipe(tmp_path, base, method=method, data={"format": "preference"}, **live())
    with pytest.raises(RecipeError, match=r"`method\.continue_from"):
        loratune.load_recipe(path)


def test_every_method_says_whether_off_is_the_start() -> None:
    forgetful = [Full(), Prompt(), Lora(init="pissa"), Lora(init="loftq"), Lora(bias="lora_only")]
    assert all(method.forgets_by for method in forgetful)
    assert not any(method.forgets_by for method in (Lora(), AdaLora(), Lora(dora=True), Lora(init="eva")))


# ---------------------------------------------------------------- the cache


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the samples whose values are computed."""
    seen: list[int] = []
    once = Dpo.once

    def counting(self: Dpo, policy: Any, batch: Any) -> Any:
        seen.append(batch.samples)
        return once(self, policy, batch)

    monkeypatch.setattr(Dpo, "once", counting)
    return seen


def test_another_rate_and_beta_find_the_values(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    seen = _counted(monkeypatch)
    run = pairs.fitted(fit, tmp_path, train=SHORT)
    first = run("first")
    assert sum(seen) == 39
    assert "from the cache" not in capsys.readouterr().err
    more = {"train": {"seed": 3}, "method": {"type": "lora", "r": 2}, "optimizer": {"lr": 1e-5}}
    second = run("second", objective={"type": "dpo", "beta": 0.4, "sft_weight": 0.1}, **more)
    assert sum(seen) == 39
    assert capsys.readouterr().err.count("log p of the model before step 1: from the cache") == 1
    assert known(second) == known(first)
    assert second.column("loss")[0] == pytest.approx(0.6931 - 0.1 * second.column("logp_chosen")[0], abs=1e-4)
    run("full", method="full", objective={"type": "dpo", "loss": "ipo"})
    assert sum(seen) == 39, "the base is the start of a full fine-tuning, too"


@pytest.mark.parametrize("change", ["rows", "adapter", "base", "template"])
def test_values_of_other_rows_adapters_bases_and_templates_are_not_used(
    fit: Fit, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:  # fmt: skip
    first = [fit(name, train={"epochs": 0.5, "seed": seed}) for seed, name in enumerate(("one", "two"))]
    starts = [{"type": "lora", "continue_from": str(one.folder)} for one in first]
    run = pairs.fitted(fit, tmp_path, train=SHORT)
    before = run("before", method=starts[0])
    seen = _counted(monkeypatch)
    assert known(run("again", method=starts[0])) == known(before)
    assert not seen
    more: dict[str, Any] = {"method": starts[0]}
    if change == "rows":
        tiny.write_jsonl(tmp_path / "pairs.jsonl", [*pairs.rows(31), pairs.rows(1, seed=9)[0]])
    elif change == "adapter":
        more["method"] = starts[1]
    elif change == "base":
        more = {"method": "lora"}
        run("of the base", **more)
        assert sum(seen) == 39
        seen.clear()
        more["on"] = tiny.save(tmp_path / "other", seed=5)
    else:
        template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
        template += "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
        (tmp_path / "other.jinja").write_text(template)
        more["data"] = {"chat_template": str(tmp_path / "other.jinja")}
    after = run("after", **more)
    assert sum(seen) == 39
    assert known(after) != known(before)


@pytest.mark.parametrize("damage", ["cut", "number", "empty"])
def test_damaged_values_are_computed_again(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:  # fmt: skip
    run = pairs.fitted(fit, tmp_path, train=SHORT)
    first = run("first")
    (file,) = reference_store.folder().iterdir()
    whole = file.read_text()
    changed = {"cut": whole[:-40], "empty": "", "number": re.sub(r"-(\d)", r"-1\1", whole, count=1)}[damage]
    file.write_text(changed)
    seen = _counted(monkeypatch)
    assert known(run("second")) == known(first)
    assert sum(seen) == 39
    assert file.read_text() == whole


def test_what_was_unused_for_a_month_goes(fit: Fit, tmp_path: Path) -> None:
    folder = reference_store.folder()
    folder.mkdir(parents=True)
    old = time.time() - row_cache.UNUSED - 9
    for name in ("a" * 64 + ".json", "mine.json", f".staging-{'b' * 64}.json-0123abcd"):
        (folder / name).write_text("{}")
        os.utime(folder / name, (old, old))
    (folder / f"{'c' * 64}.json").write_text("{}")
    run = pairs.fitted(fit, tmp_path, train=SHORT)
    run("first")
    names = {file.name for file in folder.iterdir()}
    assert {"mine.json", f"{'c' * 64}.json"} < names
    assert len(names) == 3
    (file,) = (file for file in folder.iterdir() if file.stat().st_size > 9)
    os.utime(file, (old, old))
    run("second")
    assert file.stat().st_mtime > old + 9, "what is used stays"


def test_a_cache_that_cannot_be_written_is_told(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    reference_store.folder().parent.mkdir(parents=True)
    reference_store.folder().write_text("a file")
    assert pairs.fitted(fit, tmp_path, train=SHORT)("first").column("loss")[0] == pytest.approx(0.6931, abs=1e-4)
    assert "is not cached for the next run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "reference", ["start", *(pytest.param(name, marks=pytest.mark.slow) for name in ("live", "named"))]
)
def test_two_processes_are_one(fit: Fit, tmp_path: Path, base: Path, reference: str) -> None:
    """The first process alone writes the values to the cache, and a second run of both finds them there."""
    other = fit("other", optimizer={"lr": 0.01}, train={"epochs": 2}).folder if reference == "named" else reference
    objective = {"type": "dpo", "reference": str(other)}
    data = {"train": str(tmp_path / "pairs.jsonl"), "eval": str(tmp_path / "held.jsonl"), "packing": "off"}
    alone = pairs.fitted(fit, tmp_path)("alone", objective=objective, data=data)
    shutil.rmtree(reference_store.folder(), ignore_errors=True)
    (tmp_path / "two").mkdir()
    recipe = tiny.write_recipe(tmp_path / "two", base, objective=objective, data=data)
    found = [json.loads(line) for line in (_two_processes(recipe) / "metrics.jsonl").read_text().splitlines()]
    events = [alone.events(kind) for kind in ("step", "eval")]
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for some in events for e in some], abs=1e-5)
    files = list(reference_store.folder().glob("*")) if reference != "live" else []
    assert len(files) == (reference != "live")
    if reference == "start":
        before = files[0].read_bytes()
        shutil.rmtree(tmp_path / "two" / "run")
        again = [json.loads(line) for line in (_two_processes(recipe) / "metrics.jsonl").read_text().splitlines()]
        assert [e["loss"] for e in again] == [e["loss"] for e in found]
        assert list(reference_store.folder().glob("*")) == files
        assert files[0].read_bytes() == before


# ---------------------------------------------------------------- another adapter, another model


def _logps(net: Any, folder: Path) -> list[float]:
    """Return log p of the chosen answers of the training pairs by a plain forward pass of each row."""
    from tests.data.test_preference import load_pairs

    rows, found = load_pairs(folder, pairs.rows(32)), []
    for index in range(rows.samples):
        row = rows.sample(index).rows[0]
        ids = torch.from_numpy(row.ids).long()
        with torch.no_grad():
            logp = net(input_ids=ids[None]).logits[0].log_softmax(-1)
        found.append(sum(float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if row.trained[t]))
    return found


@pytest.mark.parametrize("kind", ["adapter", "prompt", "model"])
def test_the_loss_of_another_reference_by_hand(
    fit: Fit, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:  # fmt: skip
    """The loss before step 1 is -log sigmoid(beta d), with d of the base and of the reference by plain forward passes."""
    from transformers import AutoModelForCausalLM

    method = {"adapter": "lora", "prompt": "prompt", "model": "full"}[kind]
    other = fit("other", method=method, optimizer={"lr": 0.01}, train={"epochs": 2})
    gone: list[Any] = []
    load = base_model.load

    def spy(*args: Any, **named: Any) -> Any:
        found = load(*args, **named)
        gone.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr(base_model, "load", spy)
    run = pairs.fitted(fit, tmp_path, train={"epochs": 1, "batch_size": 32}, data={"packing": "off"})
    done = run("named", objective={"type": "dpo", "beta": 0.3, "reference": str(other.folder)})
    gc.collect()
    assert [one() is None for one in gone] == [False, True], "the model of the training stays, the reference goes"
    assert "beside the model until step 1" in capsys.readouterr().err
    if kind != "prompt":  # log p of the reference by another path
        net = (
            adapted(base, other.folder) if kind == "adapter"
            else AutoModelForCausalLM.from_pretrained(other.folder, dtype=torch.float32)
        )  # fmt: skip
        assert known(done)["train"]["reference_chosen"] == pytest.approx(_logps(net, tmp_path), rel=1e-4)
    start = run("start", objective={"type": "dpo", "beta": 0.3})
    p, p0 = (
        [torch.tensor(known(one)["train"][name], dtype=torch.float64) for name in Dpo.values] for one in (start, done)
    )
    wanted = -torch.nn.functional.logsigmoid(0.3 * ((p[0] - p0[0]) - (p[1] - p0[1]))).mean()
    assert abs(wanted.item() - 0.6931) > 0.003
    assert done.column("loss")[0] == pytest.approx(wanted.item(), rel=1e-5)
    assert done.facts()["fingerprints"]["reference"] not in (None, done.facts()["fingerprints"]["base"])
    card = (done.folder / "README.md").read_text()
    assert "reference run" in card
    assert str(tmp_path) not in card


def test_another_reference_resumes_from_its_run_folder(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    other = fit("other", optimizer={"lr": 0.01}, train={"epochs": 2})
    run = pairs.fitted(
        fit, tmp_path, train={"epochs": 2, "save_every": 2}, objective={"type": "dpo", "reference": str(other.folder)}
    )
    straight = run("straight")
    with _stop_after(3):
        run("stopped")
    seen = _counted(monkeypatch)
    assert _exactly(run("stopped", resume=True)) == _exactly(straight)
    assert not seen
    file = other.folder / "adapter_model.safetensors"
    with _stop_after(3):
        run("changed")
    changed = fit("changed other", optimizer={"lr": 0.02}, train={"epochs": 2}).folder / file.name
    shutil.copy(changed, file)
    with pytest.raises(loratune.LoratuneError, match=r"weights of `objective.reference` are not the same"):
        run("changed", resume=True)


def test_an_adapter_of_another_base_is_refused(fit: Fit, tmp_path: Path) -> None:
    other = fit("other", on=tiny.save(tmp_path / "elsewhere", seed=5), train={"epochs": 0.5})
    with pytest.raises(BaseMismatchError, match=r"objective\.reference"):
        pairs.fitted(fit, tmp_path)("a", objective={"type": "dpo", "reference": str(other.folder)})
    assert not (tmp_path / "a" / "run" / "run.json").exists()


def test_a_model_of_another_vocabulary_is_refused(fit: Fit, tmp_path: Path, base: Path) -> None:
    other = shutil.copytree(base, tmp_path / "swapped")
    known = json.loads((other / "tokenizer.json").read_text())
    words = known["model"]["vocab"]
    words["y"], words["a"] = words["a"], words["y"]
    (other / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(ModelError, match=r"2 of .* in use, first .* which is `.*` for the base and `.*` here"):
        pairs.fitted(fit, tmp_path)("a", objective={"type": "dpo", "reference": str(other)})
    assert not (tmp_path / "a" / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("reference", "told", "hint"),
    [
        ("strat", "no adapter or model at `strat`", "did you mean `start`?"),
        ("./none", "no model at `./none`", "looked for"),
        ("empty", "`empty` can't be the reference: no adapter_config.json and no config.json there", "name a run"),
        ("a.txt", "`a.txt` is a file, but not a .gguf", "name the model's folder"),
        ("run", "`objective.reference` {}/run is the run folder {}/run", "name another folder for the run"),
        ("", "objective.reference", ""),
    ],
    ids=str,
)
def test_references_that_are_none(tmp_path: Path, base: Path, reference: str, told: str, hint: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    if reference == "run":
        shutil.copytree(base, tmp_path / "run")
        (tmp_path / "run" / "run.json").write_text("{}")
    objective = {"type": "dpo", "reference": reference}
    path = tiny.write_recipe(tmp_path, base, objective=objective, data={"format": "preference"})
    with pytest.raises(RecipeError) as failed:
        loratune.load_recipe(path)
    assert told.replace("{}", str(tmp_path)) in str(failed.value)
    assert hint in str(failed.value)


def test_a_path_is_relative_to_the_recipe(tmp_path: Path, base: Path) -> None:
    shutil.copytree(base, tmp_path / "other")
    objective = {"type": "dpo", "reference": "other"}
    path = tiny.write_recipe(tmp_path, base, objective=objective, data={"format": "preference"})
    loaded = loratune.load_recipe(path)
    assert isinstance(loaded.objective, Dpo)
    assert loaded.objective.reference == str((tmp_path / "other").resolve())
