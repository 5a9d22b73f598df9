"""Numbers that are not finite, a loss of nothing, tensors that are passed by: stopped, named, and never saved."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loratune.data import batches
from loratune.data.encode import Row
from loratune.data.sample import single
from loratune.errors import Place, TrainingError
from loratune.methods.tuned import Tuned
from loratune.models.batch import Batch
from loratune.models.policy import Policy
from loratune.objectives import Sft
from loratune.objectives.section import ObjectiveSection
from loratune.optim import AdamW
from loratune.runs import checkpoint, training_state
from loratune.training import loop
from tests.conftest import Fit
from tests.faults import scene

SECTIONS = {**scene.SECTIONS, "train": {**scene.SECTIONS["train"], "save_every": 1, "keep": 99}}


def _not_finite_on_disk(run: Path) -> list[str]:
    return [
        f"{file.relative_to(run)}: {name}"
        for file in run.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]


class _Poison(torch.autograd.Function):
    """The number itself forwards, something else backwards."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        return slope * ctx.value, None


def _poison(monkeypatch: pytest.MonkeyPatch, step: int, where: str, value: float) -> None:
    total, calls = Sft.total, iter(range(-1, 10_000))  # before the first step activations are measured, once

    def poisoned(self: Any, policy: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, others = total(self, policy, batch)
        if not torch.is_grad_enabled() or next(calls) // 2 + 1 != step:  # two micro-batches a step
            return loss, others
        return loss + value if where == "loss" else _Poison.apply(loss, value), others

    monkeypatch.setattr(Sft, "total", poisoned)


def _stops(fit: Fit, tmp_path: Path, step: int, where: str, value: float) -> None:
    name = f"{where}{value}{step}"
    with pytest.MonkeyPatch.context() as patch:
        _poison(patch, step, where, value)
        with pytest.raises(TrainingError) as caught:
            fit(name, **SECTIONS)
    run = tmp_path / name / "run"
    assert caught.value.exit_code == 4
    said = rf"step {step}: the (loss is -?(nan|inf)|gradient is not finite); stopped before the optimizer stepped"
    assert re.search(said, str(caught.value)), str(caught.value)
    assert len(re.findall(r"train\.jsonl:\d+", str(caught.value))) == 4, "the rows of the step"
    assert scene.newest_step(run) == step - 1
    assert _not_finite_on_disk(run) == []
    assert checkpoint.status(run) == "failed"


@pytest.mark.parametrize(("where", "value"), [("loss", float("nan")), ("gradient", float("inf"))], ids=["loss", "gradient"])  # fmt: skip
def test_a_number_that_is_not_finite_stops_at_its_step(fit: Fit, tmp_path: Path, where: str, value: float):
    _stops(fit, tmp_path, 5, where, value)


@pytest.mark.faults
def test_it_stops_at_every_step(fit: Fit, tmp_path: Path):
    for step in range(1, 13):
        for where in ("loss", "gradient"):
            for value in (float("nan"), float("inf"), -float("inf")):
                _stops(fit, tmp_path, step, where, value)
    print("72 poisoned runs stopped at their step; no tensor on disk that is not finite")


@pytest.mark.faults
def test_ten_normal_runs_are_not_stopped(fit: Fit):
    for seed in range(10):
        optimizer = ("adamw", "adamw_8bit", "adafactor")[seed % 3]
        sections = {**SECTIONS, "train": {**SECTIONS["train"], "seed": seed}, "optimizer": {"type": optimizer, "lr": 1e-2}}  # fmt: skip
        method = {"type": "full"} if seed == 9 else SECTIONS["method"]
        assert len(fit(f"run{seed}", **{**sections, "method": method}).events()) == 12


def test_weights_that_are_not_finite_are_not_saved(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Loss and gradient may be finite, and the step too long all the same."""
    record = training_state.randomness

    def spoil() -> Any:
        if scene.newest_step(tmp_path / "a" / "run") == 2:
            net.lora["default"].weight.data[0, 0] = float("inf")
        return record()

    class Net:
        lora: Any = None

    net = Net()
    build = AdamW.build

    def built(self: Any, named: Any, device: str) -> Any:
        pairs = list(named)
        net.lora = {"default": torch.nn.Linear(1, 1)}
        net.lora["default"].weight = pairs[0][1]
        return build(self, pairs, device)

    monkeypatch.setattr(AdamW, "build", built)
    monkeypatch.setattr(training_state, "randomness", spoil)
    with pytest.raises(
        TrainingError, match=r"step 3: a trained tensor is not finite \(`.*lora_A.*`\): nothing was saved"
    ):
        fit("a", **{**SECTIONS, "data": {"max_length": 256}})  # without held-out rows, whose loss would tell first
    assert scene.newest_step(tmp_path / "a" / "run") == 2
    assert _not_finite_on_disk(tmp_path / "a" / "run") == []


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW(lr=0.1).build([("w", weight)], "cpu")
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[weight]["exp_avg_sq"][1] = float("inf")
    with pytest.raises(TrainingError, match="the optimizer's state is not finite"):
        checkpoint.save(tmp_path, checkpoint.Progress(1), lambda folder: None, optimizer, None, [], {})
    assert scene.saved(tmp_path) == []


# ---------------------------------------------------------------- the first step

ROW = Row(np.array([1, 2], np.int32), np.array([False, True]), Place("rows.jsonl", 1))


class Given(ObjectiveSection):
    """An objective that is the sum of what a function makes of the model."""

    def count(self, batch: Batch) -> int:
        return 1

    def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return policy.net(), {}


class Model(torch.nn.Module):
    def __init__(self, forward: Callable[[Any], torch.Tensor], **parameters: torch.nn.Module):
        super().__init__()
        for name, module in parameters.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self) -> torch.Tensor:
        return self._forward(self)


def _one_step(net: Any, start: int = 0) -> list[Any]:
    from accelerate import Accelerator

    batch = batches.Batch([single([ROW])], 1.0, 1)
    optimizer = AdamW(lr=0.1).build(net.named_parameters(), "cpu")
    return list(
        loop.steps(
            Policy(net), Given(), Tuned(net), [batch], optimizer, lambda n: 1.0, Accelerator(cpu=True), 1.0, start
        )
    )


def _linear() -> torch.nn.Linear:
    return torch.nn.Linear(2, 1, bias=False)


def test_a_loss_of_exactly_nothing_is_an_error():
    net = Model(lambda m: (m.a.weight * 0).sum(), a=_linear())
    with pytest.raises(TrainingError, match="step 1: the loss is exactly 0: nothing would be learned"):
        _one_step(net)


def test_a_gradient_of_exactly_nothing_is_an_error():
    net = Model(lambda m: (m.a.weight * 0).sum() + 1, a=_linear())
    with pytest.raises(TrainingError, match="step 1: the gradient is exactly 0: nothing would be learned"):
        _one_step(net)


@pytest.mark.parametrize("start", [0, 7])
def test_a_tensor_that_is_passed_by_is_named(start: int):
    net = Model(lambda m: m.a.weight.square().sum(), a=_linear(), passed=_linear())
    with pytest.raises(TrainingError) as caught:
        _one_step(net, start)
    assert f"step {start + 1}: 1 of 2 trained tensors have no gradient: `passed.weight`" in str(caught.value)
    assert caught.value.exit_code == 4


def test_an_expert_without_a_token_is_no_error():
    experts = torch.nn.ModuleList([_linear(), _linear()])
    net = Model(lambda m: m.experts[0].weight.square().sum(), experts=experts)
    assert len(_one_step(net)) == 1


def test_a_gradient_of_zeros_is_one():
    """Of LoRA's A on the first step, as B is zero."""
    net = Model(lambda m: (m.a.weight * m.b.weight).sum() + 1, a=_linear(), b=_linear())
    torch.nn.init.zeros_(net.b.weight)
    assert len(_one_step(net)) == 1


def test_the_state_of_a_float16_scaler_is_kept(tmp_path: Path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = AdamW(lr=0.1).build([("w", torch.nn.Parameter(torch.ones(2)))], "cpu")
    random = [training_state.randomness().as_json()]
    checkpoint.save(tmp_path, checkpoint.Progress(1), lambda folder: None, optimizer, scaler, random, {})
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    checkpoint.restore(checkpoint.path_of(tmp_path, 1), optimizer, other, 0)
    assert other.get_scale() == 8.0
    assert json.loads((checkpoint.path_of(tmp_path, 1) / "state.json").read_text())["scaler"]["scale"] == 8.0


def test_an_eval_loss_that_is_not_finite_stops(fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    total, calls = Sft.total, iter(range(10_000))

    def poisoned(self: Any, policy: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, others = total(self, policy, batch)
        return loss if torch.is_grad_enabled() or next(calls) < 2 else loss * float("nan"), others

    monkeypatch.setattr(Sft, "total", poisoned)
    sections = {"train": {"eval_every": 1, "micro_batch_size": 4}, "data": {"eval": "eval.jsonl"}}
    with pytest.raises(TrainingError) as raised:  # 6 rows in 2 micro-batches; the first evaluation is whole
        fit(**sections)
    assert "step 2: the eval loss is nan. Rows: " in str(raised.value)
    assert "eval.jsonl:" in str(raised.value)
    assert raised.value.exit_code == 4
    run = tmp_path / "a" / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert [folder.name for folder in sorted((run / "checkpoints").iterdir())] == ["step-000001"]


class _Overflowing:
    """What the loop needs of accelerate in float16, where no scale makes a gradient finite."""

    device, num_processes, process_index, is_main_process, scaler = torch.device("cpu"), 1, 0, True, object()

    def no_sync(self, model: Any) -> Any:
        return contextlib.nullcontext()

    def unscale_gradients(self, optimizer: Any) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        (loss * self.slope).backward()

    def __init__(self, finite_at: int = 0):
        self.calls, self.finite_at = 0, finite_at

    @property
    def slope(self) -> float:
        self.calls += 1
        return 1.0 if self.calls == self.finite_at else float("inf")


@pytest.mark.parametrize(("finite_at", "stops_at"), [(0, loop.SKIPPED), (10, 10 + loop.SKIPPED)])
def test_float16_that_never_becomes_finite_stops(finite_at: int, stops_at: int):
    net = torch.nn.Linear(2, 2)

    class Skipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            """Do nothing, as under a scaler that found a gradient that is not finite."""

    optimizer = Skipping(net.parameters(), lr=0.0)
    optimizer.param_groups[0]["initial_lr"] = 0.0

    class Square(ObjectiveSection):
        def count(self, batch: Batch) -> int:
            return 1

        def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return policy.net(torch.ones(1, 2)).square().sum(), {}

    many = (batches.Batch([single([ROW])], 1.0, 1) for _ in range(100))
    steps = loop.steps(Policy(net), Square(), Tuned(net), many, optimizer, lambda n: 1.0, _Overflowing(finite_at), 1.0)
    with pytest.raises(TrainingError, match=f"step {stops_at}: the gradient has not been finite in 24 steps in a row"):
        list(steps)
