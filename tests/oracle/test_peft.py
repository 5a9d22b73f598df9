"""The adapter folder belongs to PEFT: it loads it, on the base as it is on disk, and gives our logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loratune.commands import opened_model
from loratune.errors import ModelError
from loratune.methods import Lora, tensor_files
from loratune.methods.lora import _best_of_rank
from loratune.methods.tuned import Setup
from loratune.models import base_model, tokenizing
from loratune.models.policy import Policy
from loratune.models.section import Model, Nf4
from tests import tiny
from tests.conftest import Fit, Trained, logits

# all rows in each step, so that the losses of two steps can be compared
FULL = {"batch_size": 24, "epochs": 3, "schedule": "constant", "warmup": 0}


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("biased"), attention_bias=True, mlp_bias=True)


def _peft(done: Trained, on: Path) -> Any:
    """Load the adapter with PEFT on the base, both plainly."""
    plain = AutoModelForCausalLM.from_pretrained(on, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, done.folder)


def _effect(net: Any, prompts: list[torch.Tensor]) -> float:
    """Return how far an adapter moves the logits."""
    with_adapter = logits(net, prompts)
    with net.disable_adapter():
        return float((with_adapter - logits(net, prompts)).abs().max())


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "dora and rslora": {"dora": True, "rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"q_proj": 24, "v_proj": 2.5},
    },
    "a fraction for alpha": {"lora_alpha": 6.5},
    "some layers": {"layers_to_transform": [1]},
    "some targets": {"target_modules": ["q_proj", "v_proj"]},
    "a pattern of targets": {"target_modules": r".*layers\.0\..*(k|o)_proj"},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embedding and head in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "new tokens": {"trainable_token_indices": [256, 257]},
    "biases": {"bias": "all"},
    "biases of the targets": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "embedding as target": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_gives_exactly_our_logits(fit: Fit, base: Path, biased: Path, prompts: list[torch.Tensor], variant: str):
    on = biased if variant.startswith("biases") else base
    done = fit(on=on, method={"type": "lora", "r": 4, "lora_alpha": 8, **VARIANTS[variant]}, train=FULL)
    assert done.column("loss")[-1] < done.column("loss")[0]
    ours = logits(done.net, prompts)
    assert torch.equal(logits(_peft(done, on), prompts), ours)
    again = opened_model.load(opened_model.open_subject(str(done.folder)))
    assert torch.equal(logits(again.model, prompts), ours)
    assert _effect(done.net, prompts) > 1e-2, "an adapter that does nothing would pass"
    facts = done.facts()
    on_disk = (done.folder / "adapter_model.safetensors").stat().st_size
    assert facts["adapter_bytes"] == on_disk
    assert facts["adapter_bytes_predicted"] == pytest.approx(on_disk, rel=0.01)


def test_a_tied_base_stays_tied(fit: Fit, tmp_path: Path, prompts: list[torch.Tensor]):
    on = tiny.save(tmp_path / "tied", tie_word_embeddings=True)
    done = fit(on=on, train=FULL)
    assert torch.equal(logits(_peft(done, on), prompts), logits(done.net, prompts))


def test_layers_to_transform_leaves_the_other_layers_alone(fit: Fit):
    done = fit(method={"type": "lora", "r": 4, "layers_to_transform": [1]}, train=FULL)
    names = load_file(done.folder / "adapter_model.safetensors").keys()
    assert names
    assert all(".layers.1." in name for name in names)
    assert len(names) == 14, "A and B at seven places"


def test_patterns_reach_their_modules(fit: Fit):
    done = fit(method={"type": "lora", "r": 4, "lora_alpha": 8, **VARIANTS["patterns"]}, train=FULL)
    ranks = {name: min(t.shape) for name, t in load_file(done.folder / "adapter_model.safetensors").items()}
    assert {r for name, r in ranks.items() if "q_proj" in name} == {8}
    assert {r for name, r in ranks.items() if "layers.1.mlp.up_proj" in name} == {2}
    assert {r for name, r in ranks.items() if "layers.0.mlp.up_proj" in name} == {4}
    scales = {
        name: m.scaling["default"]
        for name, m in done.net.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj"))
    }
    assert {scale for name, scale in scales.items() if "q_proj" in name} == {24 / 8}
    assert {scale for name, scale in scales.items() if "v_proj" in name} == {2.5 / 4}
    assert {scale for name, scale in scales.items() if "k_proj" in name} == {8 / 4}


def test_an_adapter_for_llama_3_8b_has_84_mb():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        tuned = Lora(r=16).apply(LlamaForCausalLM(config), Setup(1))
    trained, everything = base_model.count_parameters(tuned.net)
    # r x (in + out) of q, k, v, o, gate, up and down
    by_hand = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert trained == by_hand == 41_943_040
    assert everything == 8_030_261_248 + by_hand
    size = tensor_files.bytes_on_disk(tuned.state(), torch.bfloat16)
    assert 2 * by_hand < size < 2 * by_hand * 1.001
    assert round(size / 1e6) == 84


# ---------------------------------------------------------------- starts


def _start_loss(done: Trained, net: Any) -> float:
    """Return the loss of a model on the rows of a run's first step."""
    from loratune.data import batches, dataset
    from loratune.data.encode import Encoder
    from loratune.training import loop

    rows, _ = dataset.of(done.recipe.data, done.recipe.train.seed, Encoder(tokenizing.load(done.recipe.model)))

    class Alone:
        device, process_index, num_processes = torch.device("cpu"), 0, 1

    return loop.measure(Policy(net), done.recipe.objective, batches.in_length_order(rows, 8, 4096), Alone())[0]


STARTS: dict[str, dict[str, Any]] = {
    "default": {"init": "default"},
    "gaussian": {"init": "gaussian"},
    "eva": {"init": "eva"},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
    "pissa with rslora": {"init": "pissa", "rslora": True},
    "olora with rslora": {"init": "olora", "rslora": True},
    "pissa with patterns": {
        "init": "pissa",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"q_proj": 3, "k_proj": 5.5},
    },
    "pissa and the head in full": {"init": "pissa", "modules_to_save": ["lm_head"]},
    "eva with dora": {"init": "eva", "dora": True},
}


@pytest.mark.parametrize("start", STARTS)
def test_every_start_trains_and_its_adapter_fits_the_original_base(
    fit: Fit, base: Path, prompts: list[torch.Tensor], start: str
):
    done = fit(method={"type": "lora", "r": 4, "lora_alpha": 8, **STARTS[start]}, train=FULL, optimizer={"lr": 5e-3})
    losses = done.column("loss")
    assert losses[0] > losses[1] > losses[2]
    untrained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert losses[0] == pytest.approx(_start_loss(done, untrained), rel=1e-5), "the start must not move the model"
    ours, theirs = logits(done.net, prompts), logits(_peft(done, base), prompts)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    moved = float((theirs - logits(untrained, prompts)).abs().max())
    assert moved > 1e-2
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["r"] == (8 if STARTS[start]["init"] in ("pissa", "olora") else 4)
    assert config["init_lora_weights"] is True, "else PEFT would change the base on loading"
    facts = done.facts()
    assert facts["adapter_bytes_predicted"] == pytest.approx(facts["adapter_bytes"], rel=0.01)


def test_the_starts_are_different_starts(fit: Fit):
    seen = {}
    for init in ("default", "gaussian", "eva", "pissa", "olora"):
        done = fit(init, method={"type": "lora", "r": 4, "init": init}, train={**FULL, "epochs": 2})
        seen[init] = done.column("loss")[1]
    assert len(set(seen.values())) == 5, seen


@pytest.mark.parametrize("r", [4, 16])
def test_what_rounding_took_is_fitted_nearly_as_by_a_whole_decomposition(r: int):
    """Of the error of nf4, which is nearly noise: less than 1 % more is left, at least 95 % of the best is fitted."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    weight = torch.randn(640, 1536) * 0.02
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    lost = weight - bnb.functional.dequantize_4bit(packed, state).float()
    up, down = _best_of_rank(lost, r)
    assert (up.shape, down.shape) == ((640, r), (r, 1536))
    assert up.norm() == pytest.approx(down.norm().item(), rel=1e-4)
    sigma = torch.linalg.svdvals(lost).square()
    left, least, whole = float((lost - up @ down).square().sum()), float(sigma[r:].sum()), float(sigma.sum())
    assert least < left < 1.01**2 * least
    assert whole - left > 0.95 * (whole - least)
    small = lost[:64, :128]
    up, down = _best_of_rank(small, r)
    assert float((small - up @ down).square().sum()) == pytest.approx(
        float(torch.linalg.svdvals(small)[r:].square().sum()), rel=1e-4
    )


def test_loftq_starts_nearer_to_the_full_base_than_plain_nf4(fit: Fit, base: Path, prompts: list[torch.Tensor]):
    quantized = {"model": {"quantization": "nf4"}, "train": FULL}
    loftq = fit("loftq", method={"type": "lora", "r": 16, "init": "loftq"}, **quantized)
    losses = loftq.column("loss")
    assert losses[0] > losses[1] > losses[2]
    again = PeftModel.from_pretrained(
        base_model.load(Model(base=str(base), dtype="float32", quantization=Nf4()), where=torch.device("cpu")).model,
        loftq.folder,
    )
    assert torch.equal(logits(again, prompts), logits(loftq.net, prompts))

    torch.manual_seed(0)
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = base_model.load(Model(base=str(base), dtype="float32", quantization=Nf4()), where=torch.device("cpu")).model
    away = float((logits(plain, prompts) - logits(full, prompts)).norm())
    start = Lora(r=16, init="loftq").apply(plain, Setup(1)).net
    nearer = float((logits(start, prompts) - logits(full, prompts)).norm())
    assert nearer < 0.8 * away


@pytest.mark.parametrize(
    "more", [{"init": "eva"}, {"dora": True}, {"rslora": True}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_variants_over_an_nf4_base(fit: Fit, base: Path, prompts: list[torch.Tensor], more: dict[str, Any]):
    done = fit(
        model={"quantization": "nf4"}, method={"type": "lora", "r": 4, **more}, train=FULL, optimizer={"lr": 5e-3}
    )
    losses = done.column("loss")
    assert losses[0] > losses[1] > losses[2]
    quantized = base_model.load(
        Model(base=str(base), dtype="float32", quantization=Nf4()), where=torch.device("cpu")
    ).model
    assert torch.equal(logits(PeftModel.from_pretrained(quantized, done.folder), prompts), logits(done.net, prompts))


# ---------------------------------------------------------------- names that lead nowhere


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            {"target_modules": ["q_proj", "query"]},
            "`method.target_modules`: `query` matches no module of this model; known: `down_proj`, `gate_proj`, `k_proj`, "
            "`lm_head`, `o_proj`, `q_proj`, `up_proj`, `v_proj`",
        ),
        (
            {"target_modules": r".*\.attn\..*"},
            r"`.*\.attn\..*` matches no module of this model; known: `down_proj`",
        ),
        (
            {"modules_to_save": ["head"]},
            "`method.modules_to_save`: `head` matches no module of this model; known: `0`",
        ),
        ({"rank_pattern": {"query": 8}}, "`method.rank_pattern`: `query` matches no module"),
        ({"alpha_pattern": {"query": 8}}, "`method.alpha_pattern`: `query` matches no module"),
        ({"layers_to_transform": [0, 2]}, "`method.layers_to_transform`: no layer 2; they go from 0 to 1"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "does not combine with a regular expression"),
        ({"trainable_token_indices": [999]}, "`method.trainable_token_indices`: no token 999; they go from 0 to 257"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_name_that_leads_nowhere_is_an_error_that_lists_what_there_is(
    fit: Fit, tmp_path: Path, method: dict[str, Any], said: str
):
    with pytest.raises(ModelError) as caught:
        fit(method={"type": "lora", "r": 4, **method})
    assert said in str(caught.value)
    assert not (tmp_path / "a" / "run").exists()


def test_all_wrong_names_are_told_at_once(fit: Fit):
    with pytest.raises(ModelError) as caught:
        fit(
            method={
                "type": "lora",
                "target_modules": ["query", "key"],
                "modules_to_save": ["head"],
                "layers_to_transform": [7],
            }
        )
    assert len(caught.value.problems) == 4
