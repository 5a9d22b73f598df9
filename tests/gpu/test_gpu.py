"""What only a GPU can show: the same training as on the CPU, and QLoRA with paged optimizers. `make gpu-check`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers.models.llama import modeling_llama

import loratune
from loratune.commands import evaluate
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.kernels import elementwise, gpu_kernels, gpu_self_test, offload, packed_attention
from loratune.methods import Lora
from loratune.methods.tuned import Setup
from loratune.objectives import Sft
from loratune.optim import PagedAdamW8bit, PagedAdamW32bit
from loratune.training import layout_test
from tests import tiny
from tests.conftest import Fit
from tests.data.test_prefix_sharing import alike
from tests.kernels import test_packed_attention as models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(folder: Path, **sections: object) -> loratune.training.run.Run:
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


def test_float16_learns(tmp_path: Path) -> None:
    """Its scaler may skip the first steps, until the gradient is finite."""
    result = run(tmp_path, model={"dtype": "float16"}, optimizer={"lr": 1e-2}, train={"epochs": 10})
    facts = json.loads((result.folder / "run.json").read_text())
    lines = (result.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert (facts["dtype"], len(losses)) == ("float16", 30)
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("kind", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_what_is_large_is_paged_after_a_resume_too(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """bitsandbytes pages the state of 100,000 numbers and more: A and B of r 256 over 512 have 131,072."""
    made: list[Any] = []
    section = PagedAdamW8bit if kind == "paged_adamw_8bit" else PagedAdamW32bit
    build = section.build

    def spy(*given: Any) -> Any:
        made.append(build(*given))
        return made[-1]

    monkeypatch.setattr(section, "build", spy)
    wide = tiny.save(tmp_path / "wide", hidden_size=512, intermediate_size=512)
    sections = {"method": {"type": "lora", "r": 256, "lora_alpha": 256}, "optimizer": {"type": kind, "lr": 1e-3}}
    train = {"schedule": "constant", "warmup": 0}
    straight = fit("straight", on=wide, **sections, train={**train, "epochs": 2})
    fit("cut", on=wide, **sections, train={**train, "epochs": 1})
    resumed = fit("cut", on=wide, resume=True, **sections, train={**train, "epochs": 2})
    for optimizer in made:
        states = {p: [state["state1"], state["state2"]] for p, state in optimizer.state.items()}
        paged = [getattr(one, "is_paged", False) for both in states.values() for one in both]
        assert paged == [p.numel() >= 100_000 for p in states for _ in range(2)]
        assert any(paged)
    assert resumed.column("loss") == pytest.approx(straight.column("loss"), rel=1e-2)


@pytest.mark.parametrize("choice", [1, "all"])
def test_checkpointed_activations_change_nothing(tmp_path: Path, choice: int | str) -> None:
    kept = run(tmp_path / "kept", train={"gradient_checkpointing": "none"})
    again = run(tmp_path / "again", train={"gradient_checkpointing": choice})
    assert kept.train_loss == pytest.approx(again.train_loss, rel=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("layers", ["none", "all"])
def test_an_offloaded_run_is_one_on_the_gpu(tmp_path: Path, layers: str, quantization: str) -> None:
    """The head by slices rounds otherwise; the rest is the same."""
    losses = {}
    for choice in ("off", "on"):
        train = {"gradient_checkpointing": layers, "offload": choice, "epochs": 2}
        done = run(tmp_path / choice, model={"dtype": "bfloat16", "quantization": quantization}, train=train)
        assert json.loads((done.folder / "run.json").read_text())["activations"]["offload"] is (choice == "on")
        losses[choice] = done.train_loss
    assert losses["on"] == pytest.approx(losses["off"], rel=2e-2)


def test_what_is_offloaded_takes_no_gpu_memory() -> None:
    """Embedding and head of 100,000 words, 13 MB each; and the loss is the same."""
    rows = models.rows([256] * 4)
    losses = []
    for away in (False, True):
        net = tiny.model(tiny.tokenizer(), vocab_size=WORDS).bfloat16().requires_grad_(False).cuda()
        net.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())
        loss_and_gradients(net, rows[:1], "padded")  # here it is found out whether the head is plain
        before = torch.cuda.memory_allocated()
        if away:
            offload.weights_to_host(net)
            assert before - torch.cuda.memory_allocated() == 2 * WORDS * net.config.hidden_size * 2
        losses.append(loss_and_gradients(net, rows, "padded")[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# ---------------------------------------------------------------- packed rows

ROWS = alike(models.rows([40, 3, models.WINDOW, models.WINDOW + 1, 1, 29, 2]), 7)


def loss_and_gradients(net: Any, rows: list[Row], layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
    net.zero_grad()
    total = tiny.total(Sft(), net, tiny.batch(rows, layout).to(torch.device("cuda")))
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
    packed_attention.register()
    net.set_attn_implementation(packed_attention.NAME)
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


def test_packs_in_bfloat16_go_through_the_kernel_and_not_by_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    whole = packed_attention.varlen

    def spy(query: torch.Tensor, *given: Any) -> torch.Tensor:
        calls.append(query.shape[2])
        return whole(query, *given)

    monkeypatch.setattr(packed_attention, "varlen", spy)
    done = run(tmp_path, model={"dtype": "bfloat16"}, train={"batch_size": 8, "epochs": 2})
    facts = json.loads((done.folder / "run.json").read_text())["batching"]
    assert (facts["packed"], facts["by"]) == (True, "rows")
    assert "mask" not in capsys.readouterr().err
    assert len(calls) >= 2 * done.steps, "two layers, and what was tried before"


@pytest.mark.parametrize("name", [*models.EXACT, *models.STATEFUL])
def test_the_self_test_on_the_gpu(name: str) -> None:
    settings = {**models.EXACT.get(name, models.STATEFUL.get(name, {})), **models.NO_DROPOUT}
    net = models.made(name, settings, torch.bfloat16).cuda()
    three = layout_test._rows(models.Tokens(ROWS), 256, net.config)  # type: ignore[arg-type]
    autocast = Accelerator().autocast
    alone, _ = layout_test._logits(net, [three[-1]], autocast, "padded")
    packed_attention.register()
    net.set_attn_implementation(packed_attention.NAME)
    for layout in ("packed", "shared"):
        told = layout_test.why_not(net.eval(), three, alone, autocast, "half", layout)
        assert ("with the row before it" in told) if name in models.STATEFUL else told == ""


def test_a_full_pack_costs_no_mask() -> None:
    """16,384 tokens of 32 rows: a mask of all pairs takes 256 MiB, the kernel for packed rows needs none."""
    net = models.made("Llama", {"max_position_embeddings": 1024}, torch.bfloat16).cuda()
    rows = models.rows([512] * 32)
    packed_attention.register()
    peaks = {}
    for name in (packed_attention.NAME, "sdpa"):
        net.set_attn_implementation(name)
        loss_and_gradients(net, rows, "packed")  # kernels and gradients have their memory now
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_and_gradients(net, rows, "packed")
        peaks[name] = torch.cuda.max_memory_allocated() - before
    assert peaks[packed_attention.NAME] < peaks["sdpa"] - 2**28


# ---------------------------------------------------------------- a large vocabulary

WORDS = 100_000


def peak_of(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return what some work returns, and the most bytes it had in GPU memory beside what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = work()
    torch.cuda.synchronize()
    return out, torch.cuda.max_memory_allocated() - before


def test_an_evaluation_over_a_large_vocabulary_holds_few_logits(tmp_path: Path) -> None:
    """All logits of a micro-batch would take 3 GB in 16 bit, and twice that in float32."""
    base = tiny.save(tmp_path / "base", vocab_size=WORDS)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"text": f"{n:03} a red cat " * 17} for n in range(64)])
    result, peak = peak_of(lambda: evaluate.evaluate(base, data=str(rows), format="text", generate=False))
    assert result.rows == 64
    assert peak < 64 * 200 * WORDS * 2 / 3


def test_a_trained_head_over_a_large_vocabulary_holds_few_logits() -> None:
    net = tiny.model(tiny.tokenizer(), vocab_size=WORDS).bfloat16().cuda()
    rows = models.rows([256] * 64)
    for row in rows:
        row.trained[:] = True
    loss_and_gradients(net, rows[:1], "padded")  # here it is found out whether the head is plain
    (loss, _), peak = peak_of(lambda: loss_and_gradients(net, rows, "padded"))
    assert loss / (64 * 255) == pytest.approx(math.log(WORDS), rel=0.05)
    assert peak < 64 * 255 * WORDS * 2 / 2


# ---------------------------------------------------------------- kernels of our own

DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [96, 128, 1000, 4096, 14336])
def test_norms_and_swiglus_are_the_plain_ones(width: int, dtype: torch.dtype) -> None:
    for kind in ("norm", "gate"):
        assert elementwise.differs(kind, width, dtype, DEVICE, "triton") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norms_and_swiglus_are_no_further_from_the_truth(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, up, g = (torch.randn(300, 1000, device=DEVICE).to(dtype) for _ in range(3))
    weight = (torch.rand(1000, device=DEVICE) + 0.5).to(dtype)
    exact, other = x.double().requires_grad_(), up.double().requires_grad_()
    gated = torch.nn.functional.silu(exact) * other
    normed = torch.nn.functional.rms_norm(exact, (1000,), weight.double(), 1e-5)
    truth = [
        normed, torch.autograd.grad(normed, exact, g.double())[0],
        gated, *torch.autograd.grad(gated, (exact, other), g.double()),
    ]  # fmt: skip
    off = []
    for way in (elementwise.PLAIN, elementwise.in_triton()):
        out, scale = way.norm(x, weight, 1e-5)
        found = [out, way.norm_back(g, x, scale, weight), way.gate(x, up), *way.gate_back(g, x, up)]
        off.append([float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)])
    for plain, ours in zip(*off, strict=True):
        assert ours <= 1.2 * plain + 1e-6


def test_cross_entropy_in_one_kernel() -> None:
    for words in (1000, 50257, 128256):
        assert gpu_self_test._cross_entropy(words, torch.float32, DEVICE) is None


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < gpu_self_test.HOPPER,
    reason="flash attention there",
)
@pytest.mark.parametrize(("rows", "length"), [(1, 256), (2, 255), (3, 512), (2, 1023)])
def test_rows_of_one_length_attend_as_rows_of_any(rows: int, length: int) -> None:
    """Forward and gradient; both are a rounding away from float32."""
    torch.manual_seed(0)
    shapes = [(1, rows * length, heads, 64) for heads in (8, 2, 2)]
    q, k, v = (torch.randn(shape, device=DEVICE).transpose(1, 2) for shape in shapes)
    outer = torch.randn(1, rows * length, 8, 64, device=DEVICE)
    starts = torch.arange(rows + 1, device=DEVICE, dtype=torch.int32) * length

    def learnt(way: str, dtype: torch.dtype) -> list[torch.Tensor]:
        parts = [part.to(torch.bfloat16).to(dtype).requires_grad_() for part in (q, k, v)]
        if way == "even":
            out = packed_attention.even(*parts, None, length)
        elif way == "varlen":
            out = packed_attention.varlen(*parts, None, None, (starts, starts), (length, length), None)
        else:
            alone = zip(*(part.split(length, dim=2) for part in parts), strict=True)
            sdpa = torch.nn.functional.scaled_dot_product_attention
            out = torch.cat([sdpa(*row, is_causal=True, enable_gqa=True) for row in alone], dim=2).transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out, parts, outer.to(out.dtype))]

    exact = learnt("one by one", torch.float32)
    for truth, even, varlen in zip(exact, *(learnt(way, torch.bfloat16) for way in ("even", "varlen")), strict=True):
        assert even.shape == truth.shape
        assert (even - truth).norm() <= 1.5 * (varlen - truth).norm() + 1e-3 * truth.norm()


def test_the_kernels_of_a_model_are_right_here() -> None:
    net = models.made("Llama", {}, torch.bfloat16).cuda()
    used, notes = gpu_self_test.install(Lora(r=4).apply(net, Setup(1)).net, torch.bfloat16)
    gpu_kernels.stop()
    assert notes == []
    assert {"cross_entropy", "gate", "norm", "rotary"} <= set(used)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rotary_is_that_of_transformers(dtype: torch.dtype) -> None:
    home = modeling_llama
    for heads in ({}, {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 24}):
        assert gpu_self_test._rotary(home, models.made("Llama", heads), dtype, DEVICE) is None


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(dtype: torch.dtype, nested: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from loratune.kernels import lora_linear

    for shape in ((256, 512), (300, 1000), (1, 70), (4096, 1024)):
        weight = torch.randn(shape, device=DEVICE).to(dtype)
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        assert lora_linear.is_nf4(packed, state)
        got, wanted = lora_linear.in_one_launch(packed, state), dequantize_4bit(packed, state)
        assert got.dtype is dtype
        assert torch.equal(got, wanted), shape


@pytest.mark.parametrize("checkpointing", ["none", "all"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_with_the_kernels_is_one_without(tmp_path: Path, quantization: str, checkpointing: str) -> None:
    done, used = {}, {}
    for word in ("auto", "off"):
        done[word] = run(
            tmp_path / word, model={"dtype": "bfloat16", "quantization": quantization},
            train={"kernels": word, "epochs": 2, "gradient_checkpointing": checkpointing},
        )  # fmt: skip
        used[word] = json.loads((done[word].folder / "run.json").read_text())["kernels"]
    assert used["off"] == []
    assert {"cross_entropy", "gate", "norm", "rotary", *(["nf4"] if quantization == "nf4" else [])} <= set(used["auto"])
    assert done["auto"].train_loss == pytest.approx(done["off"].train_loss, rel=1e-2)
