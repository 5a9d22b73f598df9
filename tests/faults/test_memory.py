"""Memory that runs out: exit code 3, what would take less, and the last checkpoint intact."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.errors import SetupError
from loratune.models import base_model
from loratune.objectives import Sft
from loratune.runs.facts import Setup
from loratune.system import storage
from loratune.training import memory_use as fits
from loratune.training import run, session
from tests.conftest import Fit
from tests.faults import scene
from tests.faults.child import Plan
from tests.faults.child import run as run_child


def test_memory_that_runs_out_is_told_and_the_run_goes_on_later(tmp_path: Path, base: Path):
    recipe = scene.write(tmp_path / "a", base)
    folder = recipe.parent / "run"
    done = run_child(recipe, plan=Plan(str(folder), hook="no_memory"))
    assert done.code == 3, done.told
    assert "out of memory on CPU" in done.told
    assert "cheapest first, estimated: train.micro_batch_size: 1 (about" in done.told
    assert "Traceback" not in done.told
    scene.check_saved(folder)
    assert scene.newest_step(folder) == 2
    straight = scene.write(tmp_path / "straight", base)
    assert run_child(recipe, "--resume").code == run_child(straight).code == 0
    assert scene.result(folder) == scene.result(straight.parent / "run")


def test_memory_of_a_gpu_that_runs_out(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(Sft, "total", full)
        with pytest.raises(SetupError, match="out of memory") as caught:
            fit("a", **scene.SECTIONS)
    assert caught.value.exit_code == 3


def test_memory_that_runs_out_at_a_resume(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    fit("a", **scene.SECTIONS)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(session.checkpoint, "restore", full)
    with pytest.raises(SetupError, match="out of memory"):
        fit("a", resume=True, **scene.SECTIONS)


def test_a_base_that_does_not_fit(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(run.base_model, "load", full)
    with pytest.raises(SetupError, match=r"the base model itself does not fit: model\.quantization: nf4"):
        fit("a", **scene.SECTIONS)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_which_errors_are_about_memory(error: Exception, memory: bool):
    assert base_model.is_out_of_memory(error) == memory


GB = 10**9
MEMORY = {
    "weights": 16 * GB, "linear": 14 * GB, "states": GB, "per_token": 4_000_000, "per_token_checkpointed": 400_000,
    "per_token_now": 4_000_000,    "longest": 2048, "tokens": 16384,
}  # fmt: skip


def test_advice_is_cheapest_first_with_what_it_gives(fit: Fit):
    known = fit("a", **scene.SECTIONS)
    blank = dict.fromkeys(field.name for field in fields(Setup))
    setup = Setup(**{**blank, "memory": MEMORY, "dtype": "bfloat16", "quantization": "none"})
    assert fits.advice(known.recipe, setup) == (
        "cheapest first, estimated: train.micro_batch_size: 1 (about 57.3 GB less), "
        "train.gradient_checkpointing: all (about 7.4 GB less), model.quantization: nf4 (about 10.4 GB less), "
        "optimizer.type: adamw_8bit (about 750.0 MB less), data.max_length: 1024 (about 409.6 MB less)"
    )
    on = fits.advice(known.recipe, replace(setup, memory={**MEMORY, "per_token_now": 400_000}))
    assert "gradient_checkpointing" not in on
    assert "train.micro_batch_size: 1 (about 5.7 GB less)" in on


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "adafactor"])
@pytest.mark.parametrize("method", [{"type": "lora", "r": 64}, {"type": "full"}], ids=lambda m: m["type"])
def test_the_bytes_of_a_checkpoint_are_known_beforehand(
    fit: Fit, kind: str, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    sizes: list[int] = []
    check = session.check_space

    def spy(job: Any, resume: bool) -> None:
        sizes.append(job.checkpoint_bytes)
        check(job, resume)

    monkeypatch.setattr(session, "check_space", spy)
    done = fit("a", method=method, optimizer={"type": kind, "lr": 1e-3})
    real = storage.size(scene.saved(done.folder)[-1])
    assert real <= sizes[0] <= real + 140_000 + real // 10


def test_measured_is_what_the_model_weighs(fit: Fit):
    done = fit("a")
    known = done.facts()["memory"]
    assert known["weights"] == sum(p.numel() * p.itemsize for p in done.net.parameters())
    assert known["states"] == 8 * 8192
    assert known["longest"] <= known["tokens"]
    assert known["per_token_checkpointed"] < known["per_token"]
