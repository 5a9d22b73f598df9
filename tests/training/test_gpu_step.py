"""A whole training step on a GPU without numbers: no tensor on the wrong device, one wait of the host, and its kernels."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from loratune.data.batches import Batch as Samples
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import single
from loratune.kernels import gpu_kernels, gpu_self_test, linear_cross_entropy, offload, packed_attention
from loratune.methods import Lora
from loratune.methods.tuned import Setup
from loratune.models import base_model
from loratune.models.section import Model
from loratune.objectives import Sft
from loratune.training import loop
from tests import tiny
from tests.objectives.test_sft import ROWS
from tests.training import fake_gpu

pytest.importorskip("triton", reason="triton is not installed")
ALL = ["cross_entropy", "even_rows", "gate", "nf4", "norm", "rotary"]
LAYERS, MICRO, STEPS = 2, 2, 3


def train(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, layout: Layout = "packed", kernels: bool = True,
    checkpointed: bool = False, quantization: str = "none", away: bool = False,
) -> fake_gpu.Gpu:  # fmt: skip
    """Train a tiny Llama in bfloat16 for some steps of two micro-batches; return what was asked of the GPU."""
    packed_attention.register()
    section = Model(base=str(tiny.save(folder / "base", layers=LAYERS)), dtype="bfloat16", quantization=quantization)
    net = base_model.load(section, where=torch.device("cpu")).model
    net.set_attn_implementation("sdpa" if layout == "padded" else packed_attention.NAME)
    tuned = Lora(r=4).apply(net, Setup(steps=STEPS))
    if checkpointed:
        given = {"use_reentrant": False, "preserve_rng_state": False}
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)
    stays = offload.movable(net) if away else []
    if away:
        offload.weights_to_host(net)
        offload.inputs_to_host(list(net.model.layers))
    assert linear_cross_entropy.is_plain(tuned.net, torch.arange(4)[None]), "looked at while there are numbers"
    with fake_gpu.gpu(monkeypatch) as gpu, gpu_kernels.for_now():
        fake_gpu.move(tuned.net, stays)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(gpu_self_test, "_why_not", lambda trial: None)
        if kernels:
            used, _ = gpu_self_test.install(tuned.net, torch.bfloat16)
            without = [*(["nf4"] if quantization == "none" else []), *(["cross_entropy"] if away else [])]
            assert used == [name for name in ALL if name not in without]
        trained = [p for p in tuned.net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        optimizer.param_groups[0]["initial_lr"] = 1e-3
        samples = single(ROWS)
        batches = [Samples([samples[:2], samples[2:]], n / STEPS, len(ROWS), layout) for n in range(STEPS)]
        accelerator = SimpleNamespace(
            device=fake_gpu.DEVICE, scaler=None, num_processes=1, backward=lambda loss: loss.backward(),
            no_sync=lambda net: contextlib.nullcontext(),
        )  # fmt: skip
        done = list(loop.steps(tuned.policy(), Sft(), tuned, batches, optimizer, lambda n: 1.0, accelerator, 1.0))
    assert [step.tokens for step in done] == [sum(len(row.ids) for row in ROWS)] * STEPS
    return gpu


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("layout", ["packed", "shared", "padded"])
def test_a_step_has_one_synchronisation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: Layout, checkpointed: bool, quantization: str
) -> None:
    launches = {}
    for kernels in (False, True):
        with monkeypatch.context() as patch:
            gpu = train(
                patch, tmp_path, layout=layout, kernels=kernels, checkpointed=checkpointed, quantization=quantization
            )
        launches[kernels] = sum(gpu.launches.values()) / STEPS
        # where rows are padded transformers looks at each micro-batch's mask
        looks = ["_local_scalar_dense"] * (MICRO if layout == "padded" else 0)
        assert gpu.syncs == [*looks, "_to_copy to the host"] * STEPS, "loss and gradient norm, and nothing else"
    print(f"\nlaunches a step: {launches[False]:.0f} plain, {launches[True]:.0f} with kernels")
    assert launches[True] < 0.75 * launches[False]


def test_a_step_with_offloading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The ids of each micro-batch are waited for, as their rows are looked up in main memory."""
    monkeypatch.setattr(offload, "SLICE", 50)
    monkeypatch.setattr(offload, "SMALL", 64)
    gpu = train(monkeypatch, tmp_path, checkpointed=True, quantization="nf4", away=True)
    assert gpu.syncs == ["_to_copy to the host"] * (MICRO + 1) * STEPS
    assert gpu.copies_out == LAYERS * MICRO * STEPS, "the input of each layer"
