"""Our LoRA layer against PEFT's: output and gradients, and what is left to PEFT."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from loratune.commands import opened_model
from loratune.data.encode import Row
from loratune.data.sample import single
from loratune.errors import Place
from loratune.kernels import lora_linear
from loratune.methods import Lora
from loratune.methods.tuned import Setup
from loratune.models.policy import Policy
from loratune.training import loop
from tests import tiny
from tests.conftest import Fit, logits
from tests.objectives.test_sft import llama


def in_4_bits(layer: torch.nn.Linear, kind: str) -> Any:
    """Return a linear layer quantized, which computes in the precision it had."""
    import bitsandbytes as bnb

    dtype, bias = layer.weight.dtype, layer.bias is not None
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=bias, compute_dtype=dtype, quant_type=kind)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu").requires_grad_(False)


def both(dtype: torch.dtype, bias: bool, kind: str | None = None, **changes: Any) -> tuple[Any, Any]:
    """Return a LoRA layer of ours and one of PEFT's with the same random weights."""
    made = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=bias)).to(dtype).requires_grad_(False)
        if kind:
            net[0] = in_4_bits(net[0], kind)
            net.is_loaded_in_4bit = True  # or PEFT takes it for a plain one
        config = LoraConfig(r=8, lora_alpha=24, target_modules=["0"], **changes)
        if ours:
            lora_linear.replace_layers(config)
        net = get_peft_model(net, config)
        layer = net.base_model.model[0]
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(std=0.3)
        made.append(layer)
    assert type(made[0]).__name__ == ("FewPasses4bit" if kind else "FewPasses")
    assert type(made[1]).__name__ == ("Linear4bit" if kind else "Linear")
    return made[0], made[1]


def gradients(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    loss = (out.float() * torch.linspace(-1, 1, out.shape[-1])).square().mean()
    found = torch.autograd.grad(loss, (x, a, b))
    assert [g.dtype for g in found] == [x.dtype, torch.float32, torch.float32]
    return [out.detach(), *found]


@pytest.fixture(params=["large first", "small first"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the products of a layer: on a CPU the large one comes first, on a GPU the small one."""
    monkeypatch.setattr(lora_linear, "_adds_for_free", lambda x: request.param == "small first")


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kind", [None, "nf4", "fp4"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 37, 64), (3, 5, 64), (7, 64)])
def test_float32_is_pefts(shape: tuple[int, ...], bias: bool, kind: str | None) -> None:
    ours, theirs = both(torch.float32, bias, kind)
    x = torch.randn(shape)
    for mine, other in zip(gradients(ours, x), gradients(theirs, x), strict=True):
        assert mine.shape == other.shape
        assert (mine - other).norm() < 1e-6 * other.norm()


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_bfloat16_is_as_near_to_the_truth_as_the_rounding_of_its_output(kind: str | None) -> None:
    ours, theirs = both(torch.bfloat16, True, kind)
    exact, _ = both(torch.float32, True)
    for part, of in ((exact.lora_A, ours.lora_A), (exact.lora_B, ours.lora_B)):
        part.load_state_dict(of.state_dict())
    with torch.no_grad():
        exact.base_layer.weight.copy_(ours._weight())
        exact.base_layer.bias.copy_(ours.base_layer.bias)
    x = torch.randn(4, 50, 64).bfloat16()
    for mine, other, truth in zip(gradients(ours, x), gradients(theirs, x), gradients(exact, x.float()), strict=True):
        assert (mine - truth).norm() < max(2**-7 * truth.norm(), 1.5 * (other - truth).norm())


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}]
)
def test_variants_are_pefts_to_the_bit(changes: dict[str, Any]) -> None:
    """And rsLoRA, which is only another scale, is computed here."""
    ours, theirs = both(torch.float32, True, **changes)
    x, found = torch.randn(2, 9, 64), []
    for layer in (ours, theirs):
        torch.manual_seed(5)
        found.append(gradients(layer.train(), x))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(
            mine, other, rtol=1e-5 if "use_rslora" in changes else 0, atol=1e-6 if "use_rslora" in changes else 0
        )


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_switched_off_and_merged(kind: str | None) -> None:
    ours, theirs = both(torch.float32, True, kind)
    x = torch.randn(3, 64)
    plain = ours.train()(x)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    for layer in (ours.train(), theirs.train()):
        layer.enable_adapters(False)
    assert torch.equal(ours(x), theirs(x))
    assert not torch.allclose(ours(x), plain)
    ours.enable_adapters(True)
    if kind:
        return  # merged it is rounded to 4 bits again
    ours.merge()
    torch.testing.assert_close(ours(x), plain)


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_an_evaluation_in_bfloat16_has_the_numbers_of_a_training(kind: str | None) -> None:
    ours, theirs = both(torch.bfloat16, True, kind)
    x = torch.randn(40, 64).bfloat16()
    trained = ours.train()(x)
    with torch.no_grad():
        found, other = ours.eval()(x), theirs.eval()(x)
    assert torch.equal(found, trained)
    assert not torch.equal(found, other), "PEFT's layer rounds otherwise, or nothing is tested here"
    assert (found - other).float().norm() < 2**-7 * other.float().norm()


@pytest.mark.parametrize(
    ("changes", "word"),
    [({}, None), ({"dora": True}, "dora"), ({"lora_dropout": 0.1}, "lora_dropout"), ({"bias": "all"}, "bias: all")],
)
def test_what_is_left_to_peft_is_told(changes: dict[str, Any], word: str | None) -> None:
    method = Lora(r=4, **changes)
    net = method.apply(llama(), Setup(1)).net
    kinds = {type(m).__name__ for m in net.modules() if hasattr(m, "lora_A")}
    notes = method.notes(net.get_base_model())
    if word is None:
        assert notes == []
        assert kinds == {"FewPasses"}
    else:
        (note,) = notes
        assert word in note
        assert kinds == {"Linear"}


def test_float16_is_left_to_peft() -> None:
    method = Lora(r=4)
    (note,) = method.notes(method.apply(llama().half(), Setup(1)).net.get_base_model())
    assert "float16" in note


class Heads(torch.nn.Module):
    """Three layers that are usually given the same state."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (torch.nn.Linear(64, out, bias=out == 32) for out in (96, 32, 32))


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("given", ["xxx", "xyx", "x--", "-xy", "xx-"])
def test_layers_together_are_each_alone(given: str) -> None:
    """Given the same state or another one, or never asked at all."""
    found = []
    for ours in (True, False):
        torch.manual_seed(0)
        config = LoraConfig(r=8, lora_alpha=24, target_modules="all-linear", rank_pattern={"k_proj": 4})
        if ours:
            lora_linear.replace_layers(config)
        net = get_peft_model(Heads().requires_grad_(False), config).train()
        torch.manual_seed(1)
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        if ours:
            lora_linear.join(net)
        states = {name: torch.randn(2, 5, 64).requires_grad_() for name in "xy"}
        layers = [getattr(net.base_model.model, name) for name in ("q_proj", "k_proj", "v_proj")]
        outs = [layer(states[name]) for layer, name in zip(layers, given, strict=True) if name != "-"]
        loss = sum((out * torch.linspace(-1, 1, out.shape[-1])).square().sum() for out in outs)
        inputs = [*states.values(), *(p for p in net.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        found.append([*outs, *(torch.zeros(()) if g is None else g for g in gradients)])
    for mine, other in zip(*found, strict=True):
        assert (mine - other).norm() <= 1e-6 * other.norm()


def test_layers_of_a_model_are_computed_together() -> None:
    net = Lora(r=4).apply(llama(), Setup(1)).net.train()
    kinds: dict[str, int] = {}
    out = net.base_model.model.model(input_ids=torch.arange(9)[None], use_cache=False).last_hidden_state
    seen, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kinds[type(node).__name__] = kinds.get(type(node).__name__, 0) + 1
        waiting += [before for before, _ in node.next_functions]
    assert kinds["LowRankBackward"] == 4 * net.config.num_hidden_layers  # qkv, o, gate and up, down


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_that_is_loaded_goes_the_same_way(fit: Fit, prompts: list[torch.Tensor], dtype: str) -> None:
    """For `eval` and `chat`: the logits of the model in memory to the bit, by few passes where those are in bfloat16."""
    done = fit(model={"dtype": dtype}, method={"type": "lora", "r": 4}, optimizer={"lr": 1e-2})
    with torch.no_grad():  # as the file holds them
        for parameter in done.net.parameters():
            parameter.copy_(parameter.bfloat16() if parameter.requires_grad and dtype == "bfloat16" else parameter)
    wanted = logits(done.net, prompts)
    again = opened_model.load(opened_model.open_subject(str(done.folder)))
    assert again.dtype is getattr(torch, dtype)
    assert {type(m).__name__ for m in again.model.modules() if hasattr(m, "lora_A")} == {"FewPasses"}
    assert torch.equal(logits(again.model, prompts), wanted)
    with again.model.disable_adapter():
        assert not torch.equal(logits(again.model, prompts), wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_linear, "fits", lambda layer: False)  # PEFT's way
        assert torch.equal(logits(again.model, prompts), wanted) == (dtype == "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_eval_loss_is_that_of_the_training_step(fit: Fit, dtype: str) -> None:
    """The same rows, measured and trained on: to the bit in bfloat16, to rounding in float32."""
    done = fit(model={"dtype": dtype}, data={"packing": "off"}, optimizer={"lr": 1e-2})
    rows = [Row(np.arange(n, dtype=np.int32), np.arange(n) % 3 == 0, Place("made", 1)) for n in (40, 37, 12)]
    measured, count, _ = loop.measure(Policy(done.net), done.recipe.objective, [single(rows)], Accelerator(cpu=True))
    total = tiny.total(done.recipe.objective, done.net.train(), tiny.batch(rows))
    assert measured == pytest.approx(total.item() / count, rel=0 if dtype == "bfloat16" else 1e-6, abs=0)
