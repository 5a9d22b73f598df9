"""What a launcher leaves in the environment: refused, told, or without effect on the training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.errors import SetupError
from loratune.training import launcher
from tests import tiny
from tests.conftest import Fit

WORLD = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}, WORLD, {"PMI_SIZE": "1"}])
def test_a_launch_that_works(environment: dict[str, str]) -> None:
    launcher.check(environment)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is set: this launch asks for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "True"}, "this launch asks for DeepSpeed, which is not supported"),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, "ACCELERATE_TORCH_DEVICE=cuda:1"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but no RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1, WORLD_SIZE=2, but no LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({**WORLD, "MASTER_ADDR": ""}, "RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, but no MASTER_ADDR"),
        ({**WORLD, "RANK": "2"}, "RANK=2 of WORLD_SIZE=2: ranks go from 0"),
        ({**WORLD, "RANK": "one"}, "RANK=one is not an integer"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4, but no RANK, LOCAL_RANK, WORLD_SIZE"),
    ],
)
def test_a_launch_that_does_not(environment: dict[str, str], told: str) -> None:
    with pytest.raises(SetupError) as raised:
        launcher.check(environment)
    assert told in str(raised.value)
    assert "torchrun" in str(raised.value) or "CUDA_VISIBLE_DEVICES" in str(raised.value)
    assert raised.value.exit_code == 3


def test_a_launch_without_an_address_is_a_message(tmp_path: Path, base: Path) -> None:
    path = tiny.write_recipe(tmp_path, base)
    done = subprocess.run(
        [sys.executable, "-m", "loratune", "train", str(path)], capture_output=True, text=True, check=False,
        env={**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
    )  # fmt: skip
    assert done.returncode == 3
    assert "but no MASTER_ADDR, MASTER_PORT: the processes would not find one another" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_environment_does_not_change_the_training(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = fit("plain", train={"micro_batch_size": 2})
    capsys.readouterr()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    other = fit("other", train={"micro_batch_size": 2})
    assert other.column("loss") == plain.column("loss")
    assert other.column("grad_norm") == plain.column("grad_norm")
    told = capsys.readouterr().err
    for name in ("GRADIENT_ACCUMULATION_STEPS=4", "MIXED_PRECISION=bf16", "DYNAMO_BACKEND=inductor"):
        assert f"ACCELERATE_{name} is not used: " in told


def test_what_accelerate_sets_by_itself_is_not_told() -> None:
    by_itself = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    assert launcher.not_read({**by_itself, "ACCELERATE_DYNAMO_BACKEND": "NO"}) == []


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_in_every_spelling(name: str, value: str) -> None:
    program = "from loratune.models import base_files; print(base_files.unusable('a/b', OSError('no'), 'model'))"
    rest = {key: text for key, text in os.environ.items() if not key.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**rest, name: value}
    )
    assert "only models in the local cache can be used" in done.stdout
