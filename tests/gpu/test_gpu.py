"""What only a GPU can show: the same training as on the CPU, and QLoRA with paged optimizers. `make gpu-check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import loratune
from loratune import apart, attention
from loratune.encode import Row
from loratune.objectives import Sft
from loratune.sharing import Layout
from tests import test_attention as models
from tests import tiny
from tests.test_sharing import alike

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
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("choice", [1, "all"])
def test_checkpointed_activations_change_nothing(tmp_path: Path, choice: int | str) -> None:
    kept = run(tmp_path / "kept", train={"gradient_checkpointing": "none"})
    again = run(tmp_path / "again", train={"gradient_checkpointing": choice})
    assert kept.train_loss == pytest.approx(again.train_loss, rel=1e-5)


# ---------------------------------------------------------------- packed rows

ROWS = alike(models.rows([40, 3, models.WINDOW, models.WINDOW + 1, 1, 29, 2]), 7)


def loss_and_gradients(net: Any, rows: list[Row], layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
    net.zero_grad()
    batch = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in Sft().collate(rows, layout).items()
    }
    total = Sft().total(net, batch)
    total.backward()
    return total.item(), {name: p.grad.float() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", models.EXACT)
def test_packed_rows_in_one_kernel_are_padded_rows(name: str, dtype: torch.dtype) -> None:
    """In 16 bit both are a rounding away from float32; the packed ones may not be further away than the padded ones."""
    net = models.made(name, models.EXACT[name]).cuda()
    exact, wanted = loss_and_gradients(net, ROWS, "padded")
    net = net.to(dtype)
    padded, near = loss_and_gradients(net, ROWS, "padded")
    attention.register()
    net.set_attn_implementation(attention.NAME)
    for layout in ("packed", "shared"):
        packed, found = loss_and_gradients(net, ROWS, layout)
        assert abs(packed - exact) <= 3 * abs(padded - exact) + 1e-3 * exact
        for key, gradient in wanted.items():
            apart_by = float((found[key] - gradient).norm())
            assert apart_by <= 3 * float((near[key] - gradient).norm()) + 1e-3 * float(gradient.norm()), key


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_packed_run_is_a_padded_run(tmp_path: Path, dtype: str) -> None:
    """In float32 by a block mask, as the kernel for packed rows is for 16 bit."""
    train = {"batch_size": 8, "epochs": 2}
    done = {
        word: run(tmp_path / word, model={"dtype": dtype}, data={"packing": word}, train=train)
        for word in ("on", "off")
    }
    facts = json.loads((done["on"].folder / "run.json").read_text())["batching"]
    assert facts["by"] == ("rows" if dtype == "bfloat16" else "mask")
    assert facts["shared"] == (dtype == "bfloat16")
    assert done["on"].train_loss == pytest.approx(done["off"].train_loss, rel=1e-2 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("name", [*models.EXACT, *models.STATEFUL])
def test_the_self_test_on_the_gpu(name: str) -> None:
    settings = {**models.EXACT.get(name, models.STATEFUL.get(name, {})), **models.NO_DROPOUT}
    net = models.made(name, settings, torch.bfloat16).cuda()
    three = apart._rows(models.Tokens(ROWS), 256, net.config)  # type: ignore[arg-type]
    autocast = Accelerator().autocast
    alone, _ = apart._logits(net, Sft(), [three[-1]], autocast, "padded")
    attention.register()
    net.set_attn_implementation(attention.NAME)
    for layout in ("packed", "shared"):
        told = apart.why_not(net.eval(), Sft(), three, alone, autocast, "half", layout)
        assert ("with the row before it" in told) if name in models.STATEFUL else told == ""


def test_a_full_pack_costs_no_mask() -> None:
    """16,384 tokens of 32 rows: a mask of all pairs takes 256 MiB, the kernel for packed rows needs none."""
    net = models.made("Llama", {"max_position_embeddings": 1024}, torch.bfloat16).cuda()
    rows = models.rows([512] * 32)
    attention.register()
    peaks = {}
    for name in (attention.NAME, "sdpa"):
        net.set_attn_implementation(name)
        loss_and_gradients(net, rows, "packed")  # kernels and gradients have their memory now
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradients(net, rows, "packed")
        peaks[name] = torch.cuda.max_memory_allocated() - before
    assert peaks[attention.NAME] < peaks["sdpa"] - 2**28
