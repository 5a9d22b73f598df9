"""Embedding, head and layer inputs in main memory: the numbers of those on the device, and on a GPU without numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loratune.kernels import linear_cross_entropy, offload, packed_attention
from loratune.models.policy import Policy
from tests import tiny
from tests.objectives.test_sft import ROWS, llama


@pytest.fixture
def in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slices of a small vocabulary, and the way of a weight that is elsewhere."""
    monkeypatch.setattr(offload, "SLICE", 50)


def _head(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 24) * 2, torch.randn(333, 24)
    offset = torch.randn(333) if bias else None
    targets = torch.randint(0, 333, (37,))
    targets[:4] = torch.tensor([0, 49, 50, 332])
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), None if offset is None else offset.to(dtype), targets


@pytest.mark.usefixtures("in_slices")
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_by_slices(dtype: torch.dtype, bias: bool, smoothing: float) -> None:
    hidden, weight, offset, targets = _head(dtype, bias)
    exact = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(exact, weight.double(), None if offset is None else offset.double())
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    (right,) = torch.autograd.grad(wanted * 0.5, exact)
    apart = []
    for head in (offload.Head, linear_cross_entropy.Head):
        total = head.apply(hidden, weight, offset, targets, smoothing)  # type: ignore[no-untyped-call]
        (gradient,) = torch.autograd.grad(total * 0.5, hidden)
        assert (total.dtype, gradient.dtype) == (torch.float32, dtype)
        apart.append((abs(total.item() / wanted.item() - 1), float((gradient.double() - right).norm() / right.norm())))
    (loss, of_hidden), whole = apart
    assert loss <= max(1.2 * whole[0], 1e-6)
    assert of_hidden <= max(1.2 * whole[1], 1e-6)


@pytest.mark.usefixtures("in_slices")
def test_large_logits_and_no_tokens() -> None:
    hidden, weight, _, targets = _head(torch.float32, bias=False)
    total = offload.Head.apply(hidden * 1e3, weight, None, targets, 0.0)  # type: ignore[no-untyped-call]
    wanted = torch.nn.functional.cross_entropy(hidden.detach() * 1e3 @ weight.t(), targets, reduction="sum")
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    none = offload.Head.apply(hidden[:0], weight, None, targets[:0], 0.0)  # type: ignore[no-untyped-call]
    assert none.item() == 0


@pytest.mark.usefixtures("in_slices")
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_by_slices(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(24, 333, bias=bias).requires_grad_(False), torch.randn(2, 5, 24).requires_grad_()
    outer = torch.randn(2, 5, 333)
    wanted = layer(x)
    (right,) = torch.autograd.grad(wanted, x, outer)
    layer.__class__ = offload.Linear
    out = layer(x)
    (gradient,) = torch.autograd.grad(out, x, outer)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(gradient, right)
    assert layer(x[:0]).shape == (0, 5, 333)


def test_which_weights_can_be_moved() -> None:
    net = llama().requires_grad_(False)
    assert offload.movable(net) == [net.get_input_embeddings(), net.lm_head]
    assert offload.movable_bytes(net) == net.lm_head.weight.nbytes + net.get_input_embeddings().weight.nbytes
    net.lm_head.weight.requires_grad_(True)
    assert offload.movable(net) == [net.get_input_embeddings()], "a trained head is needed where its gradient is"
    tied = llama(tie_word_embeddings=True).requires_grad_(False)
    assert offload.movable_bytes(tied) == tied.lm_head.weight.nbytes, "one weight"


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_model_with_its_weights_away_is_the_same(layout: Any) -> None:
    """On a CPU all memory is main memory: the classes and the two ways of the loss, without copies."""
    net = llama().requires_grad_(False)
    batch = tiny.batch(ROWS, layout)
    packed_attention.register()
    net.set_attn_implementation(packed_attention.NAME)
    policy = Policy(net)
    with torch.no_grad():
        assert linear_cross_entropy.is_plain(net, batch.inputs["input_ids"])
        before = policy.cross_entropy(batch), policy.logps(batch), policy.logits_at(batch.inputs, batch.places)
        offload.weights_to_host(net)
        assert {type(net.lm_head), type(net.get_input_embeddings())} == {offload.Linear, offload.Embedding}
        assert linear_cross_entropy.is_plain(net, batch.inputs["input_ids"])
        after = policy.cross_entropy(batch), policy.logps(batch), policy.logits_at(batch.inputs, batch.places)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_inputs_of_checkpointed_layers_go_out_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One input a layer, and nothing of what is within the layer."""
    out: list[tuple[int, ...]] = []
    back: list[tuple[int, ...]] = []
    monkeypatch.setattr(offload, "_out", lambda tensor: out.append(tuple(tensor.shape)) or (tensor.clone(),))
    monkeypatch.setattr(offload, "_back", lambda kept: back.append(tuple(kept[0].shape)) or kept[0])
    found = []
    for away in (False, True):
        net = llama(layers=3).train()
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if away:
            offload.inputs_to_host(list(net.model.layers))
        net(input_ids=torch.arange(9)[None], use_cache=False).logits.square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    width = net.config.hidden_size
    assert [shape for shape in out if shape[-1] == width] == [(1, 9, width)] * 3
    assert [shape for shape in back if shape[-1] == width] == [(1, 9, width)] * 3
