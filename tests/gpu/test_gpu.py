"""What only a GPU can show: the same training as on the CPU, and QLoRA with paged optimizers. `make gpu-check`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import loratune
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(folder: Path, **sections: object) -> loratune.run.Run:
    base = tiny.save(folder / "base")
    return loratune.train(loratune.load_recipe(tiny.write_recipe(folder, base, **sections)))


def test_loss_on_the_gpu_is_that_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = run(tmp_path / "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = run(tmp_path / "cpu")
    assert on_gpu.train_loss == pytest.approx(on_cpu.train_loss, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_every_optimizer_learns_on_every_base(tmp_path: Path, optimizer: str, quantization: str) -> None:
    sections = {
        "model": {"dtype": "bfloat16", "quantization": quantization},
        "optimizer": {"type": optimizer, "lr": 1e-2},
        "train": {"epochs": 4},
    }
    result = run(tmp_path, **sections)
    losses = [
        float(line.partition('"loss": ')[2].partition(",")[0]) for line in (result.folder / "metrics.jsonl").open()
    ]
    assert losses[-1] < losses[0] - 0.05


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    kept = run(tmp_path / "kept", train={"gradient_checkpointing": "none"})
    again = run(tmp_path / "again", train={"gradient_checkpointing": "all"})
    assert kept.train_loss == pytest.approx(again.train_loss, rel=1e-5)
