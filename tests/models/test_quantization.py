"""A base that is stored in few bits: what it is, and not what the recipe says, decides what a run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from loratune.commands import merge
from loratune.errors import ModelError
from loratune.kernels.lora_linear import is_of_bitsandbytes
from loratune.models import base_model, quantization
from loratune.models.section import Int8, Model, Nf4, NoQuantization
from tests import tiny
from tests.conftest import Fit, adapted, logits
from tests.methods.test_targets import _save

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # it says on a CPU that it computes in float16


def _config(kind: str) -> Any:
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    # float16 is what most of such models on the hub say, whatever they are trained in
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
    )


@pytest.fixture(scope="module")
def stored(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of the tiny base, quantized before it was saved."""
    folders = {}
    for kind in ("nf4", "fp4", "int8"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        net = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=_config(kind), device_map=CPU)
        net.save_pretrained(folders[kind])
        tiny.tokenizer().save_pretrained(folders[kind])
    return folders


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_is_loaded_is_told(stored: dict[str, Path], kind: str) -> None:
    loaded = base_model.load(Model(base=str(stored[kind]), dtype="float32"), where=CPU)
    assert loaded.quantization == kind
    assert loaded.notes == [f"the base's files hold {kind} weights: it is used unchanged"]


@pytest.mark.parametrize("wanted", [NoQuantization(), Nf4()])
def test_a_stored_base_trains_as_one_quantized_here(
    stored: dict[str, Path], base: Path, fit: Fit, wanted: NoQuantization | Nf4
) -> None:
    quantized = wanted.model_dump()
    here = fit("a", model={"quantization": {"type": "nf4"}})
    there = fit("b", model={"base": str(stored["nf4"]), "quantization": quantized})
    assert there.column("loss") == here.column("loss")
    assert there.column("grad_norm") == here.column("grad_norm")
    assert there.facts()["quantization"] == "nf4"
    assert "on a nf4 base" in (there.folder / "README.md").read_text()


def test_an_evaluation_does_not_change_gradients(stored: dict[str, Path]) -> None:
    net = base_model.load(Model(base=str(stored["nf4"]), dtype="float32"), where=CPU).model
    ids = torch.tensor([list(range(40, 60))])

    def gradient() -> torch.Tensor:
        embedded = net.get_input_embeddings()(ids).detach().requires_grad_(True)
        net.train()
        net(inputs_embeds=embedded, use_cache=False).logits.square().sum().backward()
        assert embedded.grad is not None
        return embedded.grad

    before = gradient()
    net.eval()
    with torch.no_grad():
        net(input_ids=ids)
    assert torch.equal(gradient(), before)
    layers = [module for module in net.modules() if is_of_bitsandbytes(module, "Linear4bit")]
    assert layers
    # what makes the evaluation harmless on processors that have the kernel without a backward pass
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert {layer.compute_dtype for layer in layers} == {torch.float32}


def test_int8_rows_are_not_packed_wherever_they_were_quantized(stored: dict[str, Path], fit: Fit) -> None:
    trained = fit("a", model={"base": str(stored["int8"])})
    assert trained.facts()["batching"]["why_not"] == "int8 rounds all rows of a micro-batch together"


@pytest.mark.parametrize(
    ("kind", "method", "told"),
    [
        ("nf4", {"type": "full"}, "`method: full` trains every weight, and nf4 weights can't be trained"),
        ("int8", {"type": "full"}, "`method: full` trains every weight, and int8 weights can't be trained"),
        (
            "fp4",
            {"type": "lora", "init": "pissa"},
            "`method.init: pissa` changes the base, which fp4 weights don't allow",
        ),
        ("int8", {"type": "lora", "init": "eva"}, "`method.init: eva` is not known to work on an int8 base"),
    ],
)
def test_a_method_that_its_weights_do_not_allow(
    stored: dict[str, Path], fit: Fit, kind: str, method: dict[str, Any], told: str
) -> None:
    with pytest.raises(ModelError) as raised:
        fit("a", model={"base": str(stored[kind])}, method=method)
    assert told in str(raised.value)


def test_another_quantization_than_the_stored_one(stored: dict[str, Path]) -> None:
    with pytest.raises(ModelError) as raised:
        base_model.load(Model(base=str(stored["nf4"]), quantization=Int8()), where=CPU)
    assert "`model.quantization: int8`, but its files are already quantized as `nf4`" in str(raised.value)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_an_adapter_is_merged_into_what_the_stored_weights_stand_for(
    stored: dict[str, Path], fit: Fit, tmp_path: Path, prompts: list[torch.Tensor], kind: str
) -> None:
    trained = fit("a", model={"base": str(stored[kind])})
    merged = merge.merge(trained.folder, tmp_path / "merged", dtype="float32")
    assert merged.relative < 1e-5
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert quantization.kind_of(plain) == "none"
    assert quantization.stored_as(plain.config) is None
    exact = adapted(stored[kind], trained.folder)
    quantization.compute_in(exact, torch.float32)  # its files say float16
    quantization.mend_on_cpu(exact, has_bf16=False)  # the kernel for AVX512-BF16 rounds by 0.4 %
    error = (logits(plain, prompts) - logits(exact, prompts)).abs().max() / logits(exact, prompts).abs().max()
    assert float(error) < (1e-5 if kind == "nf4" else 0.05)  # LLM.int8() rounds what goes in, too


def test_experts_that_stay_in_16_bits_are_told_with_their_bytes(fit: Fit, tmp_path: Path) -> None:
    base = _save(tmp_path / "moe", "mixtral")
    loaded = base_model.load(Model(base=str(base), dtype="bfloat16", quantization=Nf4()), where=CPU)
    (told,) = loaded.notes
    experts = 2 * 4 * (256 * 64 + 64 * 128) * 2  # layers x experts x (gate, up and down) x bytes
    routers = 2 * 4 * 64 * 2
    whole = sum(p.numel() * p.itemsize for p in loaded.model.parameters())
    part = 100 * (experts + routers) / whole
    assert f"({part:.0f} %) stay in bfloat16" in told
    assert "`mlp.experts.down_proj`, `mlp.experts.gate_up_proj`" in told


def test_a_plain_model_says_nothing(base: Path) -> None:
    loaded = base_model.load(Model(base=str(base), dtype="float32"), where=CPU)
    assert (loaded.quantization, loaded.notes) == ("none", [])
    four_bits = base_model.load(Model(base=str(base), dtype="float32", quantization=Nf4()), where=CPU)
    assert (four_bits.quantization, four_bits.notes) == ("nf4", [])
