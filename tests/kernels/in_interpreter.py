"""Our kernels in Triton's interpreter on a CPU; run by `test_triton_kernels.py` in a process that begins with it.

The interpreter cuts numbers off in bfloat16 where a GPU rounds them, so there a number may be one last digit off.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, rms_norm, silu
from transformers.models.llama import modeling_llama

from loratune.kernels import (
    elementwise,
    gpu_kernels,
    gpu_self_test,
    linear_cross_entropy,
    norm_swiglu,
    rotary,
    triton_kernels,
)
from loratune.methods import Lora
from loratune.methods.tuned import Setup
from tests.objectives.test_sft import llama

BOTH = [torch.float32, torch.bfloat16]
SHAPES = [(5, 96), (2, 3, 1000), (7, 1, 128), (65, 40), (1, 5000), (3, 1), (0, 64), (2, 0, 64)]


def near(got: torch.Tensor, wanted: torch.Tensor, roundings: int = 1) -> bool:
    """Return whether numbers are float64's: to 1e-6 in float32, within so many last digits of bfloat16."""
    if got.dtype is torch.float32:
        return bool((got.double() - wanted).norm() <= 1e-6 * wanted.norm())
    return bool(((got.double() - wanted).abs() <= roundings * 2**-7 * wanted.abs() + 1e-30).all())


def laid(x: torch.Tensor, how: str) -> torch.Tensor:
    """Return the same numbers with other strides."""
    if how == "wide rows":
        return torch.cat([x, x + 1], dim=-1)[..., : x.shape[-1]]
    return x.transpose(0, -1).contiguous().transpose(0, -1) if how == "transposed" else x


LAID = pytest.mark.parametrize("how", ["plain", "wide rows", "transposed"])


@LAID
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype, how: str) -> None:
    torch.manual_seed(0)
    weight = (torch.rand(shape[-1]) + 0.5).to(dtype)
    x, g = (laid((torch.randn(shape) * size).to(dtype), how) for size in (3, 1))
    exact = x.double().requires_grad_()
    wanted = rms_norm(exact, shape[-1:], weight.double(), 1e-5)
    (gradient,) = torch.autograd.grad(wanted, exact, g.double())
    out, scale = triton_kernels.norm(x, weight, 1e-5)
    assert (out.dtype, out.shape, scale.dtype, scale.shape) == (dtype, shape, torch.float32, (*shape[:-1], 1))
    assert near(out, wanted.detach(), 2)
    back = triton_kernels.norm_back(g, x, scale, weight)
    assert (back.dtype, back.shape) == (dtype, shape)
    if dtype is torch.float32:
        assert near(back, gradient) or shape[-1] == 1  # there the gradient is what is left of equal numbers
    else:
        assert (back.double() - gradient).norm() <= 2**-7 * gradient.norm() + 1e-3


@LAID
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2050)], ids=str)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, how: str) -> None:
    torch.manual_seed(0)
    gate, up, g = (laid((torch.randn(shape) * size).to(dtype), how) for size in (5, 1, 1))
    exact, other = gate.double().requires_grad_(), up.double().requires_grad_()
    wanted = silu(exact) * other
    of_gate, of_up = torch.autograd.grad(wanted, (exact, other), g.double())
    wanted = wanted.detach()
    assert near(triton_kernels.gate(gate, up), wanted, 3)
    found = triton_kernels.gate_back(g, gate, up)
    assert all(part.shape == shape and part.dtype is dtype for part in found)
    assert (found[0].double() - of_gate).norm() <= (1e-6 if dtype is torch.float32 else 2**-7) * of_gate.norm()
    assert near(found[1], of_up)


def test_a_gate_that_is_far_from_zero_is_a_number() -> None:
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]])
    ones = torch.ones_like(gate)
    found = (triton_kernels.gate(gate, ones), *triton_kernels.gate_back(ones, gate, ones))
    for got, wanted in zip(found, ([0, 0, 0, 90, 1e4], [0, 0, 0.5, 1, 1], [0, 0, 0, 90, 1e4]), strict=True):
        assert torch.allclose(got, torch.tensor([wanted]), atol=1e-30)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("words", [2, 1000, 4096, 5003])
def test_cross_entropy(words: int, smoothing: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(6, words + 8) * 4 + 20).to(dtype)[:, :words]
    targets = torch.tensor([0, words - 1, *torch.randint(words, (4,)).tolist()])
    exact = logits.double().requires_grad_()
    wanted = cross_entropy(exact, targets, reduction="none", label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(wanted.sum(), exact)
    before = logits.clone()
    losses = triton_kernels.cross_entropy(logits, targets, smoothing, gradient=False)
    assert torch.equal(logits, before)
    assert (losses.double() - wanted).norm() <= 1e-6 * wanted.norm()
    assert torch.equal(triton_kernels.cross_entropy(logits, targets, smoothing), losses)
    assert (logits.double() - gradient).norm() <= (2e-6 if dtype is torch.float32 else 2**-7) * gradient.norm()


def test_no_rows_at_all() -> None:
    empty = torch.empty(0, 7)
    assert triton_kernels.cross_entropy(empty, torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_a_logit_that_is_no_number_gives_a_loss_that_is_none() -> None:
    logits = torch.zeros(2, 9)
    logits[1, 4] = torch.nan
    assert triton_kernels.cross_entropy(logits, torch.tensor([0, 0])).isnan().tolist() == [False, True]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("shape", [(64, 512), (3, 768), (1, 1000), (300, 1024)], ids=str)
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(shape: tuple[int, int], size: int, nested: bool) -> None:
    """On a CPU it gives other weights where a row is no whole number of blocks."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from loratune.kernels import lora_linear

    torch.manual_seed(0)
    packed, state = quantize_4bit(torch.randn(shape), blocksize=size, compress_statistics=nested, quant_type="nf4")
    assert lora_linear.is_nf4(packed, state)
    wanted = dequantize_4bit(packed, state)
    assert torch.equal(lora_linear.in_one_launch(packed, state), wanted)
    assert wanted.shape == shape
    fp4 = quantize_4bit(torch.randn(shape), blocksize=size, compress_statistics=nested, quant_type="fp4")
    assert not lora_linear.is_nf4(*fp4)


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("heads", "of_keys", "width"), [(4, 2, 16), (9, 3, 24), (3, 3, 10)])
def test_rotary_is_that_of_transformers(heads: int, of_keys: int, width: int, batch: int, dtype: torch.dtype) -> None:
    """Keys laid head by head, queries token by token; angles for all rows, and for each its own."""
    torch.manual_seed(0)
    q = torch.randn(2, 7, heads, width).to(dtype).transpose(1, 2).requires_grad_()
    k = torch.randn(2, of_keys, 7, width).to(dtype).requires_grad_()
    cos, sin = torch.randn(2, batch, 7, width).to(dtype)
    assert rotary.fits(q, k, cos, sin)
    outs, wanted = (
        rotary.Rotary.apply(q, k, cos, sin),
        modeling_llama.apply_rotary_pos_emb(q.double(), k.double(), cos, sin),
    )
    outer = [torch.randn(part.shape).to(dtype) for part in (q, k)]
    found = torch.autograd.grad(outs, (q, k), outer)
    right = torch.autograd.grad(wanted, (q, k), [part.double() for part in outer])
    for got, exact in zip((*outs, *found), (*wanted, *right), strict=True):
        assert (got.dtype, got.shape) == (dtype, exact.shape)
        assert (got - exact).norm() <= (1e-6 if dtype is torch.float32 else 2**-6) * exact.norm()
    assert outs[0].transpose(1, 2).is_contiguous()


def test_which_rotary_functions_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [home.__name__ for home in rotary.homes(llama())] == ["transformers.models.llama.modeling_llama"]
    glm = __import__("transformers").models.glm.modeling_glm
    assert not rotary._turns_halves(glm.apply_rotary_pos_emb)
    q, k, cos = torch.randn(1, 2, 7, 8), torch.randn(1, 1, 7, 8), torch.randn(1, 7, 8)
    assert rotary.fits(q, k, cos, cos)
    for wrong in ((q, k, cos[:, :6], cos[:, :6]), (q, k, cos.double(), cos.double()), (q[0], k[0], cos, cos)):
        assert not rotary.fits(*wrong)
    assert not rotary.fits(q, k, cos.clone().requires_grad_(), cos)
    assert not rotary.fits(q.transpose(2, 3).contiguous().transpose(2, 3), k, cos, cos)


def step(net: Any) -> list[torch.Tensor]:
    """Return loss and gradients of a step through layers and head."""
    ids = torch.arange(60).view(2, 30) % 50
    states = net.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
    head = net.get_output_embeddings()
    loss = linear_cross_entropy.summed_cross_entropy(states.flatten(0, 1), head.weight, None, ids.flatten())
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])]


def adapted() -> Any:
    torch.manual_seed(0)
    net = Lora(r=4).apply(llama(), Setup(1)).net
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return net.train()


def test_a_step_with_the_kernels_is_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    net, used, theirs = adapted(), [], modeling_llama.apply_rotary_pos_emb
    plain = step(net)
    monkeypatch.setattr(gpu_self_test, "KIND", "cpu")
    assert gpu_self_test.install(net, torch.float32) == (["cross_entropy", "gate", "norm", "rotary"], [])
    assert modeling_llama.apply_rotary_pos_emb is not theirs
    for name in ("norm", "norm_back", "gate", "gate_back", "cross_entropy", "rotary"):
        whole = getattr(triton_kernels, name)

        def spy(*given: Any, name: str = name, whole: Any = whole, **named: Any) -> Any:
            used.append(name)
            return whole(*given, **named)

        monkeypatch.setattr(triton_kernels, name, spy)
    elementwise.in_triton.cache_clear()
    try:
        for mine, other in zip(step(net), plain, strict=True):
            assert (mine - other).norm() <= 3e-6 * other.norm()
    finally:
        gpu_kernels.stop()
        elementwise.in_triton.cache_clear()
    assert set(used) == {"norm", "norm_back", "gate", "gate_back", "cross_entropy", "rotary"}
    assert modeling_llama.apply_rotary_pos_emb is theirs
    used.clear()
    step(adapted())
    assert used == [], "another model, and the kernels are in use no more"


def test_a_training_leaves_none_in_use() -> None:
    with gpu_kernels.for_now():
        gpu_kernels.use("nf4", torch.device("cpu"))
        assert gpu_kernels.uses("nf4", torch.device("cpu"))
    assert not gpu_kernels.uses("nf4", torch.device("cpu"))


def test_what_is_wrong_is_left_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_self_test, "KIND", "cpu")

    def off(*given: Any) -> Any:
        out, scale = triton_kernels.norm(*given)
        return out * 1.1, scale

    def broken(*given: Any) -> Any:
        raise RuntimeError("\nptxas died\nof something")

    wrong = elementwise.Operations(off, triton_kernels.norm_back, triton_kernels.gate, broken)
    monkeypatch.setitem(elementwise.WAYS, "triton", lambda: wrong)
    net = adapted()
    used, notes = gpu_self_test.install(net, torch.float32)
    assert used == ["cross_entropy", "rotary"]
    assert notes == [
        "the GPU kernel `gate` is not used: ptxas died",
        "the GPU kernel `norm` is not used: `norm` gives different values",
    ]
    assert {m.forward.__func__.keywords.get("way", "plain") for m in net.modules() if norm_swiglu._installed(m)} == {
        "plain"
    }
    gpu_kernels.stop()


def test_a_run_goes_on_with_the_kernels_it_was_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_self_test, "KIND", "cpu")
    net, device = adapted(), torch.device("cpu")
    assert gpu_self_test.install(net, torch.float32, ["norm", "gone"]) == (["norm"], [])
    assert not gpu_kernels.uses("cross_entropy", device)
    gpu_self_test.install(net, torch.float32)
    assert gpu_kernels.uses("cross_entropy", device)
    assert gpu_self_test.install(net, torch.float32, []) == ([], [])
    assert not gpu_kernels.uses("cross_entropy", device)
