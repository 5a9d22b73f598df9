"""How a batch is split must not matter: over micro-batches, packs, processes, or all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.conftest import Fit

LOSS, NORM = 1e-6, 1e-5  # float32 rounding, relative
ADAPTER = 1e-5  # absolute: its weights are of the order of 0.1
PADDED: dict[str, Any] = {"data": {"packing": "off"}}
TRAIN = {"batch_size": 8, "epochs": 2, "schedule": "linear", "warmup": 0, "max_grad_norm": 0.5}


def _apart(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """Return the largest relative differences of two runs; what must be equal is checked here."""
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for name in ("number", "epoch", "lr", "rows", "tokens", "trained_tokens"):
            assert a[name] == b[name], name
    return {
        name: max(abs(a[name] - b[name]) / b[name] for a, b in zip(one, other, strict=True))
        for name in ("loss", "grad_norm")
    }


def _check(what: str, apart: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{what}: loss {apart['loss']:.1e}, gradient norm {apart['grad_norm']:.1e} apart (relative)")
    assert apart["loss"] < LOSS
    assert apart["grad_norm"] < NORM


@pytest.mark.parametrize("micro", [1, 3, "auto"])
def test_micro_batches_of_one_three_and_auto_are_one_of_eight(
    fit: Fit, micro: int | str, capsys: pytest.CaptureFixture[str]
):
    whole = fit("whole", train={**TRAIN, "micro_batch_size": 8}, **PADDED)
    parts = fit("parts", train={**TRAIN, "micro_batch_size": micro}, **PADDED)
    assert whole.column("loss")[-1] < 0.95 * whole.column("loss")[0], "nothing was learned, so nothing was compared"
    _check(f"micro-batches of {micro}", _apart(parts.events(), whole.events()), capsys)


def test_auto_really_splits_long_rows(fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from loratune.data import batches
    from loratune.training import memory_plan

    whole = fit("whole", train={**TRAIN, "micro_batch_size": 8}, **PADDED)
    sizes = []
    split = batches.split

    def spy(chosen: Any, micro_batch_size: Any, tokens: int) -> Any:
        sizes.append([len(part) for part in split(chosen, micro_batch_size, tokens)])
        return split(chosen, micro_batch_size, tokens)

    monkeypatch.setitem(memory_plan.BUDGETS, "cpu", (300,))
    monkeypatch.setattr(batches, "split", spy)
    parts = fit("parts", train={**TRAIN, "micro_batch_size": "auto"}, **PADDED)
    assert all(len(of) > 1 for of in sizes)
    assert len({size for of in sizes for size in of}) > 1, "uneven micro-batches are the point"
    _check("micro-batches of 300 tokens", _apart(parts.events(), whole.events()), capsys)


def _two_processes(recipe: Path) -> Path:
    """Train a recipe with two gloo processes on the CPU; return the run folder."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",  # it finds a free port itself, and holds it
        "-m",
        "loratune",
        "train",
        str(recipe),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=recipe.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    result = str(recipe.parent / "run")
    said = done.stdout.split()
    if "[Gloo]" in done.stdout:  # that of torch 2.11 and before says who is connected, from both processes at once
        said = [word for word in said if word == result]
    assert said == [result], "only the first process prints the result"
    return recipe.parent / "run"


@pytest.mark.parametrize(("rows", "last"), [(24, 8), (17, 1)], ids=["even", "one row left"])
def test_two_processes_of_four_are_one_of_eight(
    fit: Fit, base: Path, tmp_path: Path, rows: int, last: int, capsys: pytest.CaptureFixture[str]
):
    """17 rows leave a last batch of one row for two processes: one of them has nothing to learn from."""
    sections = {
        "train": {**TRAIN, "micro_batch_size": 4, "eval_every": 1.0},
        "data": {"eval": "eval.jsonl", "packing": "off"},
    }
    alone = fit("alone", rows=rows, **sections)
    assert last in {event["rows"] for event in alone.events()}
    (tmp_path / "two").mkdir()
    folder = _two_processes(tiny.write_recipe(tmp_path / "two", base, rows=rows, **sections))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    _check("two processes", _apart([e for e in lines if e["kind"] == "step"], alone.events()), capsys)
    evaluations = [e for e in lines if e["kind"] == "eval"]
    assert len(evaluations) == len(alone.events("eval")) == 2
    for mine, other in zip(evaluations, alone.events("eval"), strict=True):
        assert mine["trained_tokens"] == other["trained_tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    two, one = (load_file(path / "adapter_model.safetensors") for path in (folder, alone.folder))
    assert two.keys() == one.keys()
    assert max(float((two[name] - one[name]).abs().max()) for name in one) < 1e-4


@pytest.mark.parametrize(
    "method", [{"type": "full"}, {"type": "lora", "r": 4, "modules_to_save": ["lm_head"]}], ids=["full", "head"]
)
def test_two_processes_with_a_trained_head_are_one(
    fit: Fit, base: Path, tmp_path: Path, method: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    """Its gradient comes with the loss, behind the back of what adds gradients up over processes."""
    sections = {**PADDED, "method": method, "optimizer": {"lr": 1e-3}, "train": {**TRAIN, "micro_batch_size": 2}}
    alone = fit("alone", rows=17, **sections)
    (tmp_path / "two").mkdir()
    folder = _two_processes(tiny.write_recipe(tmp_path / "two", base, rows=17, **sections))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    _check("two processes, a trained head", _apart([e for e in lines if e["kind"] == "step"], alone.events()), capsys)


def _same_adapter(one: Path, other: Path) -> float:
    """Return how far the adapters of two runs are apart; their names must be the same."""
    a, b = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("sharing", ["on", "off"])
@pytest.mark.parametrize("micro", [1, 2, "auto"])
def test_packed_is_padded(fit: Fit, micro: int | str, sharing: str, capsys: pytest.CaptureFixture[str]):
    """Packs of one, two and all at once, so with and without accumulation; sharing what rows have in common, or not."""
    padded = fit("padded", train={**TRAIN, "micro_batch_size": 8}, data={"packing": "off"})
    data = {"packing": "on", "prefix_sharing": sharing}
    packed = fit("packed", train={**TRAIN, "micro_batch_size": micro}, data=data)
    assert padded.facts()["batching"]["packed"] is False
    batching = packed.facts()["batching"]
    assert (batching["packed"], batching["by"], batching["shared"]) == (True, "rows", sharing == "on")
    if sharing == "on":
        assert sum(packed.column("computed")) < 0.95 * sum(packed.column("tokens"))
    else:
        assert 1 < batching["rows_per_pack"] < 8, "several packs make a step"
    _check(f"packed, sharing {sharing}, micro-batches of {micro}", _apart(packed.events(), padded.events()), capsys)
    assert _same_adapter(packed.folder, padded.folder) < ADAPTER


def test_packed_by_a_mask_is_padded(fit: Fit, capsys: pytest.CaptureFixture[str]):
    eager = {"model": {"attention": "eager"}, "train": {**TRAIN, "micro_batch_size": 2}}
    padded = fit("padded", data={"packing": "off"}, **eager)
    packed = fit("packed", data={"packing": "on"}, **eager)
    assert packed.facts()["batching"]["by"] == "mask"
    _check("packed by a mask", _apart(packed.events(), padded.events()), capsys)


def test_packed_quantized_is_padded(fit: Fit, capsys: pytest.CaptureFixture[str]):
    nf4 = {"model": {"quantization": "nf4"}, "method": {"dora": True}, "train": TRAIN}
    padded, packed = (fit(word, data={"packing": word}, **nf4) for word in ("off", "on"))
    _check("packed, nf4 and DoRA", _apart(packed.events(), padded.events()), capsys)


def test_packed_and_padded_train_the_same_tokens_where_rows_are_dropped(fit: Fit, tmp_path: Path):
    """1,000 rows, 300 of them too long: 700 rows and their trained tokens, packed or padded."""
    random = torch.Generator().manual_seed(0)
    rows = []
    for number in range(1000):
        words = 60 if number % 10 < 3 else int(torch.randint(1, 8, (), generator=random))
        user, answer = "cat " * words, "dog " * int(torch.randint(1, 6, (), generator=random))
        rows.append({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]})
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"train": str(tmp_path / "rows.jsonl"), "max_length": 160, "on_long": "drop", "max_lost": 0.3}
    runs = [fit(word, data={**data, "packing": word}, train={"batch_size": 50}) for word in ("off", "on")]
    counts = [run.facts()["data"]["train"] for run in runs]
    assert counts[0] == counts[1]
    assert (counts[0]["dropped"], counts[0]["rows"]) == (300, 700)
    for run in runs:
        assert sum(run.column("rows")) == 700
        assert sum(run.column("tokens")) == counts[0]["tokens"]
        assert sum(run.column("trained_tokens")) == counts[0]["trained_tokens"]
    assert runs[0].column("trained_tokens") == runs[1].column("trained_tokens")


@pytest.mark.parametrize("micro", [1, "auto"], ids=["accumulated", "at once"])
def test_two_processes_packed_are_one_padded(
    fit: Fit, base: Path, tmp_path: Path, micro: int | str, capsys: pytest.CaptureFixture[str]
):
    """17 rows: one process has nothing to learn from in the last step, and its packs are fewer than the other's."""
    train = {**TRAIN, "micro_batch_size": micro}
    alone = fit("alone", rows=17, train={**TRAIN, "micro_batch_size": 8}, data={"packing": "off"})
    (tmp_path / "two").mkdir()
    recipe = tiny.write_recipe(tmp_path / "two", base, rows=17, train=train, data={"packing": "on"})
    folder = _two_processes(recipe)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    _check("two processes, packed", _apart([e for e in lines if e["kind"] == "step"], alone.events()), capsys)
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["processes"], facts["batching"]["packed"]) == (2, True)
    assert _same_adapter(folder, alone.folder) < ADAPTER
