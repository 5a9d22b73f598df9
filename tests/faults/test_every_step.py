"""Stopped at any step and resumed, also ten times: every loss and norm is that of the straight run, to the last bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loratune.kernels import cpu_attention, linear_cross_entropy
from loratune.training.progress import RunReport
from tests.conftest import Fit
from tests.faults import scene

# 24 steps: 3 epochs of 8 batches; each of 3 micro-batches, the last of them and the last batch smaller
SECTIONS: dict[str, Any] = {
    "method": {"type": "lora", "r": 64, "lora_alpha": 8, "lora_dropout": 0.1},  # so large that 8-bit states are 8-bit
    "data": {"eval": "eval.jsonl"},
    "train": {"batch_size": 5, "micro_batch_size": 2, "epochs": 3, "save_every": 1, "eval_every": 5, "keep": 2},
}
ROWS = 38


class Stop(Exception):
    """The power fails."""


@contextmanager
def _power_fails_after(step: int) -> Iterator[None]:
    record = RunReport.step

    def fail(self: RunReport, done: Any) -> None:
        if done.number == step + 1:
            raise Stop
        record(self, done)

    with pytest.MonkeyPatch.context() as power:
        power.setattr(RunReport, "step", fail)
        with pytest.raises(Stop):
            yield


def _every(
    fit: Fit, tmp_path: Path, optimizer: str, packing: str, stops: list[int], dtype: str = "float32"
) -> None:  # fmt: skip
    data = {"eval": "eval.jsonl", "packing": packing, "max_length": 128}
    sections = {**SECTIONS, "data": data, "optimizer": {"type": optimizer, "lr": 1e-2}, "model": {"dtype": dtype}}
    if dtype == "bfloat16":  # without dropout the layers are our own
        sections["method"] = {**SECTIONS["method"], "lora_dropout": 0.0}
    straight = scene.result(fit("straight", rows=ROWS, **sections).folder)
    assert len(straight["steps"]) == 24
    for stop in stops:
        with _power_fails_after(stop):
            fit(f"stop{stop}", rows=ROWS, **sections)
        assert scene.newest_step(tmp_path / f"stop{stop}" / "run") == stop
        assert scene.result(fit(f"stop{stop}", rows=ROWS, resume=True, **sections).folder) == straight, stop
    print(
        f"{optimizer}, {dtype}, packing {packing}: stopped after each of {len(stops)} steps, the same 24 losses and norms, the same adapter"
    )


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_stopped_after_one_step(fit: Fit, tmp_path: Path, optimizer: str, packing: str):
    _every(fit, tmp_path, optimizer, packing, [13])


@pytest.mark.parametrize("packing", ["on", "off"])
def test_stopped_after_one_step_in_bfloat16(fit: Fit, tmp_path: Path, packing: str, monkeypatch: pytest.MonkeyPatch):
    """Head without logits, LoRA in few passes, attention by tiles: all that float32 above leaves out."""
    ways: list[str] = []
    for module, name in ((cpu_attention, "attend"), (linear_cross_entropy, "summed_cross_entropy")):
        monkeypatch.setattr(module, name, _noted(module.__dict__[name], name, ways))
    _every(fit, tmp_path, "adamw", packing, [13], "bfloat16")
    assert set(ways) == {"summed_cross_entropy", *(["attend"] if packing == "on" else [])}


def _noted(function: Callable[..., Any], name: str, names: list[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        names.append(name)
        return function(*args)

    return call


@pytest.mark.faults
@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize(
    ("optimizer", "dtype"), [("adamw", "float32"), ("adamw_8bit", "float32"), ("adamw", "bfloat16")]
)
def test_stopped_after_every_step(fit: Fit, tmp_path: Path, optimizer: str, dtype: str, packing: str):
    _every(fit, tmp_path, optimizer, packing, list(range(1, 24)), dtype)


def test_stopped_ten_times(fit: Fit, tmp_path: Path):
    straight = scene.result(fit("straight", rows=ROWS, **SECTIONS).folder)
    for resume, stop in zip(itertools.chain([False], itertools.repeat(True)), range(2, 22, 2), strict=False):
        with _power_fails_after(stop):
            fit("stopped", rows=ROWS, resume=resume, **SECTIONS)
    done = fit("stopped", rows=ROWS, resume=True, **SECTIONS)
    assert scene.result(done.folder) == straight
    assert scene.leftovers(done.folder) == []
