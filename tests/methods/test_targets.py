"""Where LoRA's matrices go: mixtures of experts, towers beside the language model, GPT-2's layers, tied weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loratune import recipe
from loratune.errors import ModelError, RecipeError
from loratune.methods import Lora
from loratune.methods.lora import Lora as Method
from tests import tiny
from tests.conftest import Fit, adapted

WIDTHS = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def _save(folder: Path, kind: str) -> Path:
    """Write a tiny random model of a kind, with its tokenizer."""
    tokens = tiny.tokenizer()
    common = {
        "vocab_size": len(tokens),
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": None,
        "bos_token_id": None,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    configs: dict[str, Callable[[], Any]] = {
        "mixtral": lambda: transformers.MixtralConfig(**common, **WIDTHS, num_local_experts=4),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
            **common, **WIDTHS, **experts, shared_expert_intermediate_size=64, decoder_sparse_step=1
        ),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**common, **WIDTHS, **experts, head_dim=16),
        "gpt2": lambda: transformers.GPT2Config(**common, n_embd=64, n_layer=3, n_head=4, n_positions=512),
        "gemma3": lambda: transformers.Gemma3Config(
            text_config={**common, **WIDTHS, "head_dim": 16}, vision_config=VISION, mm_tokens_per_image=4
        ),
    }
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(configs[kind]()).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = _save(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return of


def _modules(folder: Path) -> set[str]:
    """Return the names of the modules an adapter has tensors of, without layers' numbers."""
    names = load_file(folder / "adapter_model.safetensors")
    return {
        ".".join(word for word in name.removeprefix("base_model.model.").split(".") if not word.isdigit())
        for name in names
    }


def test_a_router_is_frozen_and_that_is_said(fit: Fit, bases: Any, capsys: pytest.CaptureFixture[str]) -> None:
    trained = fit("a", rows=8, model={"base": str(bases("qwen2_moe"))}, method={"type": "lora", "r": 2})
    told = capsys.readouterr().err
    assert (
        "the routers (`mlp.gate`, `mlp.shared_expert_gate`) are frozen (`method.router: trained` trains them)" in told
    )
    assert "no matrices in `mlp.experts`: frozen, PEFT's `all-linear` does not cover it" in told
    assert _modules(trained.folder) == {
        f"model.layers.{name}.lora_{part}.weight"
        for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj",
        )
        for part in "AB"
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_reached_and_their_router_is_not(
    fit: Fit, bases: Any, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    trained = fit("a", rows=8, model={"base": str(bases(kind))}, method={"type": "lora", "r": 2})
    told = capsys.readouterr().err
    assert "the routers (`mlp.gate`) are frozen (`method.router: trained` trains them)" in told
    assert "no matrices" not in told
    names = load_file(trained.folder / "adapter_model.safetensors")
    assert any(".mlp.experts." in name for name in names)
    assert not any(".mlp.gate." in name for name in names)
    net = adapted(bases(kind), trained.folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(net(ids).logits, trained.net.eval()(ids).logits, rtol=0, atol=1e-6)


def test_a_frozen_router_has_no_remedy_that_the_method_lacks(
    fit: Fit, bases: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fit("a", rows=8, model={"base": str(bases("qwen3_moe"))}, method={"type": "adalora", "init_r": 4, "target_r": 2})
    told = capsys.readouterr().err
    assert "the routers (`mlp.gate`) are frozen" in told
    assert "method.router" not in told


@pytest.mark.parametrize(
    ("kind", "routers"), [("mixtral", ["mlp.gate"]), ("qwen2_moe", ["mlp.gate", "mlp.shared_expert_gate"])]
)
def test_a_router_can_be_trained(
    fit: Fit, bases: Any, capsys: pytest.CaptureFixture[str], kind: str, routers: list[str]
) -> None:
    base = bases(kind)
    trained = fit("a", rows=8, model={"base": str(base)}, method={"type": "lora", "r": 2, "router": "trained"})
    names = " , ".join(f"`{name}`" for name in routers).replace(" ,", ",")
    assert f"the routers ({names}) are trained in full and saved with the adapter" in capsys.readouterr().err
    saved = load_file(trained.folder / "adapter_model.safetensors")
    before = load_file(base / "model.safetensors")
    for layer in range(2):
        for router in routers:
            name = f"model.layers.{layer}.{router}.weight"
            old = before.get(name, before.get(name.replace("mlp", "block_sparse_moe")))
            assert not torch.equal(saved[f"base_model.model.{name}"], old)
    net = adapted(base, trained.folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(net(ids).logits, trained.net.eval()(ids).logits, rtol=0, atol=1e-6)


def test_a_router_where_there_is_none(fit: Fit) -> None:
    with pytest.raises(ModelError, match="this model has no router"):
        fit("a", method={"type": "lora", "router": "trained"})


def test_a_router_that_is_named_gets_matrices(fit: Fit, bases: Any, capsys: pytest.CaptureFixture[str]) -> None:
    method = {"type": "lora", "r": 2, "target_modules": ["q_proj", "gate"]}
    trained = fit("a", rows=8, model={"base": str(bases("mixtral"))}, method=method)
    assert any(".mlp.gate." in name for name in load_file(trained.folder / "adapter_model.safetensors"))
    assert "routers" not in capsys.readouterr().err


def test_a_tower_that_text_does_not_reach_gets_no_matrices(
    fit: Fit, bases: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = [{"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}]
    for number, wanted in enumerate(targets):
        trained = fit(
            f"run{number}", rows=8, model={"base": str(bases("gemma3"))}, method={"type": "lora", "r": 2, **wanted}
        )
        told = capsys.readouterr().err
        assert "no matrices in `model.vision_tower`: not used for text" in told
        names = _modules(trained.folder)
        assert names
        assert all(name.startswith("model.language_model.layers.") for name in names)


def test_layers_of_gpt2_can_be_chosen(fit: Fit, bases: Any) -> None:
    method = {"type": "lora", "r": 2, "layers_to_transform": [1]}
    trained = fit("a", rows=8, model={"base": str(bases("gpt2"))}, method=method)
    names = set(load_file(trained.folder / "adapter_model.safetensors"))
    assert names == {
        f"base_model.model.transformer.h.1.{module}.lora_{part}.weight"
        for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        for part in "AB"
    }


def test_an_unknown_name_lists_the_layers_of_gpt2(fit: Fit, bases: Any) -> None:
    with pytest.raises(ModelError) as raised:
        fit("a", model={"base": str(bases("gpt2"))}, method={"type": "lora", "target_modules": ["q_proj"]})
    assert "matches no module of this model; known: `c_attn`, `c_fc`, `c_proj`, `lm_head`" in str(raised.value)


@pytest.mark.parametrize(
    ("targets", "told"), [(["embed_tokens"], "embedding"), (["lm_head"], "head"), (["embed_tokens", "lm_head"], "both")]
)
def test_matrices_beside_tied_weights_are_told(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str], targets: list[str], told: str
) -> None:
    base = tiny.save(tmp_path / "tied", tie_word_embeddings=True)
    fit("a", rows=8, model={"base": str(base)}, method={"type": "lora", "r": 2, "target_modules": [*targets, "q_proj"]})
    where = "embedding and the head" if told == "both" else told
    assert f"embedding and head share their weights: matrices in the {where} can't be merged" in capsys.readouterr().err


def test_matrices_beside_weights_that_are_not_tied(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("a", rows=8, method={"type": "lora", "r": 2, "target_modules": ["embed_tokens", "q_proj"]})
    assert "share their weights" not in capsys.readouterr().err


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("word", ["*q_proj", "q_proj(", "[a"])
def test_a_pattern_that_is_none_is_a_mistake_with_its_place(tmp_path: Path, base: Path, key: str, word: str) -> None:
    path = tiny.write_recipe(tmp_path, base, method={"type": "lora", key: {word: 8}})
    with pytest.raises(RecipeError) as raised:
        recipe.load(path)
    (problem,) = raised.value.problems
    assert f"`{word}` is not a regular expression" in problem.message
    assert problem.place is not None
    assert problem.place.line is not None


def test_a_warmup_that_does_not_end_is_told(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("a", rows=16, train={"warmup": 2})
    assert "the warmup of 2 steps does not end before the run: see train.warmup" in capsys.readouterr().err
    fit("b", rows=16, train={"warmup": 1})
    assert "does not end" not in capsys.readouterr().err


def test_all_linear_without_anything_to_leave_out_is_pefts() -> None:
    net = tiny.model(tiny.tokenizer())
    assert Lora is Method
    assert Lora()._config(net).exclude_modules is None
    assert Lora()._config(net).target_modules == "all-linear"
