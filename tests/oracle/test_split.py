"""How a batch is split must not matter: over micro-batches, over processes, or both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.conftest import Fit

LOSS, NORM = 1e-6, 1e-5  # float32 rounding, relative
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
    whole = fit("whole", train={**TRAIN, "micro_batch_size": 8})
    parts = fit("parts", train={**TRAIN, "micro_batch_size": micro})
    assert whole.column("loss")[-1] < 0.95 * whole.column("loss")[0], "nothing was learned, so nothing was compared"
    _check(f"micro-batches of {micro}", _apart(parts.events(), whole.events()), capsys)


def test_auto_really_splits_long_rows(fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from loratune import batches

    whole = fit("whole", train={**TRAIN, "micro_batch_size": 8})
    sizes = []
    split = batches.split

    def spy(chosen: Any, micro_batch_size: Any, tokens: int) -> Any:
        sizes.append([len(part) for part in split(chosen, micro_batch_size, tokens)])
        return split(chosen, micro_batch_size, tokens)

    monkeypatch.setitem(batches.AUTO_TOKENS, "cpu", 300)
    monkeypatch.setattr(batches, "split", spy)
    parts = fit("parts", train={**TRAIN, "micro_batch_size": "auto"})
    assert all(len(of) > 1 for of in sizes)
    assert len({size for of in sizes for size in of}) > 1, "uneven micro-batches are the point"
    _check("micro-batches of 300 tokens", _apart(parts.events(), whole.events()), capsys)


def _two_processes(recipe: Path) -> Path:
    """Train a recipe with two gloo processes on the CPU; return the run folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={port}",
        "-m",
        "loratune",
        "train",
        str(recipe),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=recipe.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(recipe.parent / "run")], "only the first process prints the result"
    return recipe.parent / "run"


@pytest.mark.parametrize(("rows", "last"), [(24, 8), (17, 1)], ids=["even", "one row left"])
def test_two_processes_of_four_are_one_of_eight(
    fit: Fit, base: Path, tmp_path: Path, rows: int, last: int, capsys: pytest.CaptureFixture[str]
):
    """17 rows leave a last batch of one row for two processes: one of them has nothing to learn from."""
    sections = {"train": {**TRAIN, "micro_batch_size": 4, "eval_every": 1.0}, "data": {"eval": "eval.jsonl"}}
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
