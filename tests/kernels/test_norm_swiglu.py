"""Norms and SwiGLU that keep little, against transformers' own: the same numbers, gradients as near to the truth."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from loratune.kernels import lora_linear, norm_swiglu
from loratune.methods import Lora
from loratune.methods.tuned import Setup
from tests.objectives.test_sft import llama

BOTH = [torch.float32, torch.bfloat16]


def swiglu(act: str = "silu") -> torch.nn.Module:
    config = llama().config
    config.hidden_act = act
    return LlamaMLP(config)


def norm(kind: Any = LlamaRMSNorm) -> torch.nn.Module:
    module: torch.nn.Module = kind(64, eps=1e-5)
    torch.nn.init.normal_(module.weight, 0.1 if kind is GemmaRMSNorm else 1.0, 0.5)
    return module


def installed(module: torch.nn.Module) -> bool:
    """Install, and return whether anything came of it."""
    norm_swiglu.install(module, again=True)
    return "forward" in vars(module)


def gradients(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = module(x)
    outer = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, x, outer)]


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("make", [norm, swiglu, lambda: norm(Qwen3RMSNorm)], ids=["norm", "swiglu", "qwen3"])
def test_the_same_numbers_and_a_gradient_as_near_to_the_truth(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = make().to(dtype).requires_grad_(False)
    ours, exact = make().to(dtype).requires_grad_(False), make().double().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    exact.load_state_dict(theirs.state_dict())
    assert installed(ours)
    x = (torch.randn(2, 5, 64) * torch.tensor([0.01, 1.0, 30.0, 3.0, 0.3])[:, None]).to(dtype)
    (out, mine), (same, other), (_, truth) = (
        gradients(module.train(), x.to(next(module.parameters()).dtype)) for module in (ours, theirs, exact)
    )
    assert torch.equal(out, same)
    assert (mine - truth).norm() <= max(1.2 * (other - truth).norm(), 1e-6 * truth.norm())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    "module",
    [
        norm(GemmaRMSNorm).requires_grad_(False),  # 1 + w
        norm(),  # trained
        norm().half().requires_grad_(False),
        swiglu("gelu"),
        torch.nn.LayerNorm(64).requires_grad_(False),
    ],
    ids=["gemma", "trained", "float16", "gelu", "layernorm"],
)
def test_what_is_something_else_is_left_alone(module: torch.nn.Module) -> None:
    assert not installed(module)


def test_another_precision_and_autocast_go_their_own_way() -> None:
    ours, theirs = norm().requires_grad_(False), norm().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict())
    assert installed(ours)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(ours.train()(x), theirs(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x.float()), theirs(x.float()))


def adapted(dtype: torch.dtype, ours: bool, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    torch.manual_seed(0)
    base = llama().to(dtype)
    with monkeypatch.context() as patch:
        if not ours:
            patch.setattr(norm_swiglu, "install", lambda model, again: None)
        net = Lora(r=4, **changes).apply(base, Setup(1)).net
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return net.train()


def losses(net: Any, kept: dict[int, int] | None = None) -> list[torch.Tensor]:
    """Return the loss and the gradient of every trained tensor; `kept` gets the bytes of every storage autograd keeps."""
    ids = torch.arange(60).view(2, 30) % 50
    there = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if kept is not None and address not in there:
            alive.append(tensor)  # so that no address is used twice
            kept[address] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = net.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = (states.float() * torch.linspace(0, 99, states.numel()).sin().view_as(states)).sum()
    found = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])
    return [loss.detach(), *found]


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"target_modules": ("q_proj", "down_proj")}], ids=str)
def test_a_whole_model_learns_the_same(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = losses(adapted(torch.float32, True, monkeypatch, **changes))
    for mine, other in zip(ours, losses(adapted(torch.float32, False, monkeypatch, **changes)), strict=True):
        assert (mine - other).norm() <= 2e-6 * other.norm()


def test_in_bfloat16_it_is_as_near_to_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (adapted(torch.bfloat16, kind, monkeypatch) for kind in (True, False))
    exact = adapted(torch.float32, False, monkeypatch)
    exact.load_state_dict(ours.state_dict())
    off = [0.0, 0.0]
    for mine, other, truth in zip(losses(ours), losses(theirs), losses(exact), strict=True):
        off[0] += float((mine - truth).norm() / truth.norm())
        off[1] += float((other - truth).norm() / truth.norm())
    assert off[0] < 1.1 * off[1], off


def test_an_adapter_that_is_not_zero_and_drops_hides_no_swiglu() -> None:
    for changes in ({"init": "olora"}, {"lora_dropout": 0.5}):
        net = Lora(r=4, **changes).apply(llama().bfloat16(), Setup(1)).net
        gated = [module for module in net.modules() if type(module).__name__ == "LlamaMLP"]
        assert gated
        assert all("forward" in vars(module) for module in gated)


def test_a_copy_stands_on_its_own_weights() -> None:
    ours = norm().requires_grad_(False)
    assert installed(ours)
    other = copy.deepcopy(ours).double().train()
    ours.weight.zero_()
    assert other(torch.ones(1, 64).double()).abs().sum() > 1


def test_a_third_less_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Llama's layer: two states the norms were given, q, k, v, what attention gave, gate and up, and r-wide ones."""
    found = []
    for kind in (True, False):
        kept: dict[int, int] = {}
        losses(adapted(torch.bfloat16, kind, monkeypatch), kept)
        found.append(sum(kept.values()))
    assert found[0] < 0.65 * found[1]


class _Edited(torch.nn.Module):
    """A norm (or a SwiGLU's gate) before a LoRA layer, and something that edits a state in place between them."""

    def __init__(self, what: str):
        super().__init__()
        self.norm, self.what = norm(), what
        self.q_proj, self.k_proj = torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x * 1.0
        state = self.norm(given)
        if self.what == "what the norm gave":
            state.mul_(2.0)
        first = self.q_proj(state)
        if self.what == "between two layers":
            state.mul_(3.0)
        return first + self.k_proj(state)


@pytest.mark.parametrize("what", ["nothing", "what the norm gave", "between two layers"])
def test_a_state_that_is_edited_in_place_is_another_state(what: str) -> None:
    """What is remembered of a state is right for that state alone: then the plain way is taken."""
    torch.manual_seed(1)
    plain = _Edited(what).requires_grad_(False)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    theirs = inject_adapter_in_model(config, copy.deepcopy(plain))
    lora_linear.replace_layers(config)
    ours = inject_adapter_in_model(config, copy.deepcopy(plain))
    ours.load_state_dict(theirs.state_dict())
    lora_linear.join(ours)
    norm_swiglu.install(ours, again=True)
    assert "forward" in vars(ours.norm)
    x = torch.randn(2, 5, 64)
    if what == "between two layers":  # a backward pass would refuse it, with or without us
        with torch.no_grad():
            torch.testing.assert_close(ours.train()(x), theirs.train()(x), rtol=1e-5, atol=1e-5)
        return
    found = []
    for module in (ours.train(), theirs.train()):
        out = module(x.clone())
        out.square().sum().backward()
        found.append((out.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}))
    (mine, my_gradients), (other, gradients_of_peft) = found
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert len(my_gradients) == 4
    for name, gradient in gradients_of_peft.items():
        torch.testing.assert_close(my_gradients[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_a_norm_with_another_gradient_is_left_alone() -> None:
    class PassingRMSNorm(LlamaRMSNorm):
        """The same numbers, and no gradient for what it was given."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach() + 0.0 * x

    class SameRMSNorm(LlamaRMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.0 * x

    for kind, wanted in ((PassingRMSNorm, False), (SameRMSNorm, True)):
        assert installed(kind(64, eps=1e-5).requires_grad_(False)) is wanted
