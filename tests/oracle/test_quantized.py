"""Quantized bases on the CPU: a layer against its own dequantized weight, and training that an evaluation does not disturb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from loratune.errors import ModelError
from loratune.models import base_model
from loratune.models.section import Fp4, Int8, Model, Nf4
from tests import tiny
from tests.conftest import Fit, logits

CPU = torch.device("cpu")
FOUR_BIT = [(kind, double) for kind in ("nf4", "fp4") for double in (True, False)]


def _load(base: Path, quantization: Any) -> Any:
    return base_model.load(Model(base=str(base), dtype="float32", quantization=quantization), where=CPU).model


def _four_bit(kind: str, double: bool) -> Any:
    return Nf4(double_quant=double) if kind == "nf4" else Fp4(double_quant=double)


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_four_bit_layer_is_a_linear_layer_with_the_dequantized_weight(base: Path, kind: str, double: bool, rows: int):
    net = _load(base, _four_bit(kind, double))
    layers = {name: module for name, module in net.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(layers) == 14, "7 per layer; the head stays as it is"
    for name, layer in layers.items():
        assert layer.quant_state.quant_type == kind
        assert (layer.weight.quant_state.nested) is double
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)
        original = dict(tiny.model(tiny.tokenizer()).named_modules())[name].weight.detach()
        error = float((weight - original).norm() / original.norm())
        assert 0.01 < error < 0.2, "quantized, and still this layer's weight"
        torch.manual_seed(rows)
        x = torch.randn(rows, layer.in_features, requires_grad=True)
        same = x.detach().clone().requires_grad_(True)
        up = torch.randn(rows, layer.out_features)
        for _ in range(2):  # the second time with a forward pass without gradients before it
            x.grad = same.grad = None
            y, expected = layer(x), torch.nn.functional.linear(same, weight)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
            y.backward(up)
            expected.backward(up)
            torch.testing.assert_close(x.grad, same.grad, rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                layer.eval()
                torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
                layer.train()


@pytest.mark.parametrize(("kind", "double"), FOUR_BIT)
def test_the_whole_four_bit_model_is_the_model_of_its_dequantized_weights(
    base: Path, kind: str, double: bool, prompts: list[torch.Tensor]
):
    net = _load(base, _four_bit(kind, double))
    plain = tiny.model(tiny.tokenizer())
    targets = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                targets[name].weight.copy_(
                    bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                )
    torch.testing.assert_close(logits(net, prompts), logits(plain, prompts), rtol=1e-4, atol=1e-5)
    original = logits(tiny.model(tiny.tokenizer()), prompts)
    assert float((logits(net, prompts) - original).abs().max()) > 1e-3, "rounding to 4 bit must show"


def test_an_int8_layer_is_close_to_its_dequantized_weight(base: Path):
    """The inputs are rounded to 8 bit, too: 1 part in 127 of the largest of a row, and so many in the sum."""
    net = _load(base, Int8())
    layers = {name: module for name, module in net.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
    assert len(layers) == 14
    originals = dict(tiny.model(tiny.tokenizer()).named_modules())
    for name, layer in layers.items():
        torch.manual_seed(0)
        x = torch.randn(9, layer.in_features, requires_grad=True)
        weight = layer.weight.CB.float() * layer.weight.SCB.float()[:, None] / 127
        rounded = layer.weight.SCB[:, None] * (0.5 / 127 + 2**-11)  # to 8 bit, after float16
        assert bool(((weight - originals[name].weight).abs() <= rounded).all())
        y, expected = layer(x), torch.nn.functional.linear(x, weight)
        assert float((y - expected).detach().norm() / expected.detach().norm()) < 0.02
        up = torch.randn(9, layer.out_features)
        (gradient,) = torch.autograd.grad(y, x, up)
        torch.testing.assert_close(gradient, up @ weight, rtol=1e-2, atol=1e-4)


TRAIN = {"batch_size": 8, "epochs": 3, "schedule": "constant", "warmup": 0}


@pytest.mark.parametrize(
    ("quantization", "dropout"),
    [("nf4", 0), ({"type": "nf4", "double_quant": False}, 0), ("fp4", 0), ("int8", 0), ("none", 0.2)], ids=str,
)  # fmt: skip
def test_training_after_an_evaluation_is_training_without_one(fit: Fit, quantization: Any, dropout: float):
    method = {"method": {"lora_dropout": dropout}} if dropout else {}
    sections: dict[str, Any] = {"model": {"quantization": quantization}, "train": TRAIN, **method}
    plain = fit("plain", **sections)
    measured = fit("measured", **{**sections, "train": {**TRAIN, "eval_every": 1}, "data": {"eval": "eval.jsonl"}})
    assert len(measured.events("eval")) == 9
    assert [value.hex() for value in measured.column("loss")] == [value.hex() for value in plain.column("loss")]
    assert plain.column("loss")[-1] < plain.column("loss")[0] - 0.2, "it must learn"


def test_only_the_adapter_is_trained_on_a_quantized_base(fit: Fit, base: Path):
    done = fit(model={"quantization": "nf4"})
    fresh = dict(_load(base, Nf4()).named_modules())
    for name, module in done.net.get_base_model().named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            assert torch.equal(module.weight.data, fresh[name.removesuffix(".base_layer")].weight.data), name
    trained = [name for name, parameter in done.net.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_4_bit_base_keeps_no_more_of_a_token_than_a_plain_one(fit: Fit, dtype: str):
    kept = {}
    for kind in ("none", "nf4", "int8"):
        done = fit(kind, model={"quantization": kind, "dtype": dtype}, train={"epochs": 1})
        kept[kind] = json.loads((done.folder / "run.json").read_text())["memory"]["per_token"]
        layers = {type(module).__name__ for module in done.net.modules() if hasattr(module, "lora_A")}
        assert layers == {{"none": "FewPasses", "nf4": "FewPasses4bit", "int8": "Linear8bitLt"}[kind]}
    assert kept["nf4"] == kept["none"]
    assert kept["int8"] > 1.3 * kept["nf4"]


@pytest.mark.parametrize(
    "quantization",
    [Nf4(), Nf4(double_quant=False), Fp4(), Int8()],
    ids=lambda q: f"{q.type} {q.model_dump().get('double_quant', '')}",
)
def test_parameters_of_a_quantized_base_count_as_the_matrices_they_stand_for(base: Path, quantization: Any):
    net = _load(base, quantization)
    number = sum(parameter.numel() for parameter in tiny.model(tiny.tokenizer()).parameters())
    assert base_model.count_parameters(net)[1] == number


def test_trained_parameters_are_the_adapters(fit: Fit, base: Path, capsys: pytest.CaptureFixture[str]):
    done = fit(model={"quantization": "nf4"}, method={"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]})
    adapter = 2 * 4 * ((64 + 64) + (64 + 32))  # layers x r x (in + out) of q and v
    number = sum(parameter.numel() for parameter in tiny.model(tiny.tokenizer()).parameters())
    assert base_model.count_parameters(done.net) == (adapter, number + adapter)
    assert f"{adapter:,} of {number + adapter:,} parameters trained" in capsys.readouterr().err


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base with layers of 96 inputs, which is no multiple of a block."""
    return tiny.save(tmp_path_factory.mktemp("narrow"), intermediate_size=96)


@pytest.mark.parametrize("kind", [Nf4(), Fp4()], ids=lambda q: q.type)
def test_layers_that_a_cpu_would_get_wrong_are_refused(narrow: Path, kind: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loratune.models.base_model.computes_in_bf16", lambda where: True)
    with pytest.raises(ModelError) as caught:
        _load(narrow, kind)
    text = str(caught.value)
    assert "model.layers.0.mlp.down_proj (96)" in text
    assert "not a multiple of 64" in text
    assert "q_proj" not in text, "only what is wrong is named"
    assert "leave `model.quantization` out" in text


def test_other_cpus_take_them(narrow: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loratune.models.base_model.computes_in_bf16", lambda where: False)
    _load(narrow, Nf4())


def test_paged_optimizers_say_that_nothing_is_paged_on_a_cpu(fit: Fit, capsys: pytest.CaptureFixture[str]):
    for name in ("paged_adamw_8bit", "paged_adamw_32bit"):
        fit(name, optimizer={"type": name, "lr": 1e-2})
        assert f"note     {name} runs unpaged: there is no GPU memory to page" in capsys.readouterr().err
    fit("adamw_8bit", optimizer={"type": "adamw_8bit", "lr": 1e-2})
    assert "unpaged" not in capsys.readouterr().err


def test_paged_on_a_cpu_is_the_same_optimizer_unpaged(fit: Fit):
    method = {"type": "lora", "r": 64}  # smaller matrices keep 32-bit states anyhow
    paged, plain = (
        fit(name, optimizer={"type": name, "lr": 1e-2}, method=method) for name in ("paged_adamw_8bit", "adamw_8bit")
    )
    assert paged.column("loss") == plain.column("loss")
