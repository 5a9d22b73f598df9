"""Packed rows are kept apart exactly, whatever the model; where they can't be, that is found out before training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.data import bin_packing, prefix_sharing
from loratune.data.collate import collate
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import single
from loratune.errors import Place
from loratune.kernels import cpu_attention, packed_attention
from loratune.models.batch import Batch
from loratune.objectives import Sft
from loratune.training import layout_test
from tests import tiny
from tests.data.test_prefix_sharing import alike

WINDOW = 16
COMMON: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"sliding_window": WINDOW}
HALF_SLIDING = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16}
EXACT = {
    "Llama": {},
    "Qwen2": {**HALF_SLIDING, "use_sliding_window": True},
    "Qwen3": {},
    "Mistral": SLIDING,
    "Gemma3": HALF_SLIDING,
    "Mixtral": {"num_local_experts": 4},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # of GPT2
STATEFUL = {
    "Lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "Bamba": {**MAMBA, "attn_layer_indices": [1]},
    "FalconH1": {**MAMBA, "mamba_d_ssm": 128},
}


def made(name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Return a tiny random model whose attention matters."""
    config = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    model = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    torch.manual_seed(0)
    net = getattr(transformers, model)(getattr(transformers, config)(**{**COMMON, **settings}))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return net.to(dtype).eval()


def rows(lengths: list[int], seed: int = 0) -> list[Row]:
    random = np.random.default_rng(seed)
    return [
        Row(random.integers(3, 260, n).astype(np.int32), random.random(n) < 0.5, Place("made", i + 1))
        for i, n in enumerate(lengths)
    ]


ROWS = rows([40, 3, WINDOW, WINDOW + 1, 1, 29, 2])  # shorter, as long and longer than the window


def measured(net: Any, micro: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the summed loss of micro-batches and the gradient of every parameter."""
    net.zero_grad()
    totals = []
    for batch in micro:
        total = tiny.total(Sft(), net, batch)
        total.backward()
        totals.append(total.item())
    return sum(totals), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def use(net: Any, by: str) -> None:
    packed_attention.register()
    net.set_attn_implementation(packed_attention.NAME if by == "rows" else "sdpa")


@pytest.mark.parametrize("by", ["rows", "mask"])
@pytest.mark.parametrize("name", EXACT)
def test_loss_and_gradients_are_those_of_padded_rows(name: str, by: str) -> None:
    net, objective = made(name, EXACT[name]), Sft()
    loss, gradients = measured(net, [tiny.batch([row]) for row in ROWS])
    use(net, by)
    packs = bin_packing.pack(np.array([len(row.ids) for row in ROWS]), 50)
    assert len(packs) < len(ROWS)
    whole, parts = (
        [tiny.batch(ROWS, layout="packed")],
        [tiny.batch([ROWS[i] for i in members], layout="packed") for members in packs],
    )
    for micro in (whole, parts):  # at once, and accumulated
        got, found = measured(net, micro)
        assert got == pytest.approx(loss, rel=1e-5)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
        assert sum(objective.count(batch) for batch in micro) == sum(int(row.trained[1:].sum()) for row in ROWS)


@pytest.mark.parametrize("name", EXACT)
def test_without_packs_it_is_sdpa_to_the_bit(name: str) -> None:
    net, batch = made(name, EXACT[name]), tiny.batch(ROWS)
    inputs = batch.inputs
    with torch.no_grad():
        padded = net(**inputs).logits
        plain = net(input_ids=inputs["input_ids"]).logits
        asked = inputs["input_ids"][:1, :5]
        written = net.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=30, do_sample=False)
        use(net, "rows")
        assert torch.equal(net(**inputs).logits, padded)
        assert torch.equal(net(input_ids=inputs["input_ids"]).logits, plain)
        again = net.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=30, do_sample=False)
        assert torch.equal(again, written)


def test_checkpointed_activations_and_packs() -> None:
    net = made("Mistral", EXACT["Mistral"]).train()
    loss, gradients = measured(net, [tiny.batch(ROWS)])
    use(net, "rows")
    net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got, found = measured(net, [tiny.batch(ROWS, layout="packed")])
    assert got == pytest.approx(loss, rel=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


BEGINNING = alike(rows([40, 3, 2 * WINDOW, WINDOW + 1, 1, 29, 2]), 7)  # the last needs one token, and shares it


@pytest.mark.parametrize("name", EXACT)
def test_loss_and_gradients_of_rows_that_share_are_those_of_padded_rows(name: str) -> None:
    net, objective = made(name, EXACT[name]), Sft()
    loss, gradients = measured(net, [tiny.batch([row]) for row in BEGINNING])
    use(net, "rows")
    whole, parts = single(BEGINNING), prefix_sharing.cut(single(BEGINNING), 50)
    assert len(parts) > 1
    for chosen in ([whole], parts):  # at once, and accumulated
        micro = [collate(part, "shared") for part in chosen]
        assert micro[0].inputs["input_ids"].shape[1] < sum(sample.tokens for sample in chosen[0]) - 5
        got, found = measured(net, micro)
        assert got == pytest.approx(loss, rel=1e-5)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))
        assert sum(objective.count(batch) for batch in micro) == sum(row.count() for row in BEGINNING)
        assert sum(batch.tokens for batch in micro) == sum(len(row.ids) for row in BEGINNING)


# ---------------------------------------------------------------- the self-test


class Tokens(list[Row]):
    """As much of `data.Rows` as the self-test needs."""


def verdict(net: Any, by: str, max_length: int = 256, layout: Layout = "packed") -> str:
    three = layout_test._rows(Tokens(ROWS), max_length, net.config)  # type: ignore[arg-type]
    alone, _ = layout_test._logits(net, [three[-1]], contextlib.nullcontext, "padded")
    use(net, by)
    rounding = "float32" if net.dtype is torch.float32 else "half"
    return layout_test.why_not(net, three, alone, contextlib.nullcontext, rounding, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("by", ["rows", "mask"])
@pytest.mark.parametrize("name", EXACT)
def test_the_self_test_lets_pass_what_is_right(name: str, by: str, dtype: torch.dtype) -> None:
    net = made(name, {**EXACT[name], **NO_DROPOUT}, dtype)
    assert verdict(net, by) == ""
    if by == "rows":
        assert verdict(net, by, layout="shared") == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("by", ["rows", "mask"])
@pytest.mark.parametrize("name", STATEFUL)
def test_the_self_test_finds_state_that_runs_from_row_to_row(name: str, by: str, dtype: torch.dtype) -> None:
    """Short convolutions and state-space layers know nothing of where a row begins."""
    net = made(name, STATEFUL[name], dtype)
    assert "with the row before it" in verdict(net, by)
    assert by == "mask" or "with the row before it" in verdict(net, by, layout="shared")


def test_a_kernel_that_rounds_otherwise_is_no_packing_that_mixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many layers in bfloat16 two right kernels may lie further apart than the packed and the lone row may."""
    net = made("Llama", {}, torch.bfloat16)
    monkeypatch.setitem(layout_test.TOLERANCES, "half", (1e-2, 1e-6))
    assert verdict(net, "rows") == ""
    monkeypatch.setattr(layout_test, "KERNELS", 1e-6)
    assert "off when it is packed" in verdict(net, "rows"), "and a kernel that is further off is not taken"


def test_other_products_round_a_row_in_a_pack_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack has more tokens than a row, so that other products are taken: as far off as the other kernel is right."""
    net = made("Llama", {}, torch.bfloat16)
    three = layout_test._rows(Tokens(ROWS), 256, net.config)  # type: ignore[arg-type]
    monkeypatch.setitem(layout_test.TOLERANCES, "half", (1e-2, 1e-6))
    real = layout_test._logits

    def rounded(net: Any, rows: list[Row], *others: Any) -> tuple[torch.Tensor, bool]:
        logits, drew = real(net, rows, *others)
        draw = torch.Generator().manual_seed(len(rows) if others[-1] == "packed" else 0)
        return logits + far * logits.std() * torch.randn(logits.shape, generator=draw), drew

    alone, _ = real(net, [three[-1]], contextlib.nullcontext, "padded")
    use(net, "rows")
    monkeypatch.setattr(layout_test, "_logits", rounded)
    found = {}
    for far in (0.05, 0.4):
        found[far] = layout_test.why_not(net, three, alone, contextlib.nullcontext, "half", "packed")
    assert found[0.05] == ""
    assert "off when it is packed" in found[0.4], "and what is further off than any kernel is refused"


def test_a_pack_that_is_off_by_more_than_its_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that forgets the first token of a row that is not the first: no row changes another, and all is wrong."""
    net = made("Llama", {}, torch.bfloat16)
    monkeypatch.setitem(layout_test.TOLERANCES, "half", (1e-2, 1e-6))

    def shifted(query: Any, key: Any, value: Any, own: list[int], *others: Any) -> torch.Tensor:
        if len(own) > 1:
            value = value.clone()
            value[:, :, own[0]] = 0
        return attend(query, key, value, own, *others)

    attend = cpu_attention.attend
    monkeypatch.setattr(cpu_attention, "attend", shifted)
    assert "off when it is packed" in verdict(net, "rows")


def _one_row(*arguments: Any, cu_seq_lens_q: Any = None, **others: Any) -> Any:
    """Attend over the whole pack as if it were one row: contamination as other tools have shipped it."""
    return AttentionInterface()["sdpa"](*arguments[:4], None, **others)


def _no_window(*arguments: Any, sliding_window: Any = None, **others: Any) -> Any:
    return packed_attention.attend(*arguments, **others)


def _wrong_scale(*arguments: Any, scaling: float = 1.0, **others: Any) -> Any:
    return packed_attention.attend(*arguments, scaling=0.5 * scaling, **others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("broken", "told"),
    [(_one_row, "with the row before it"), (_no_window, "off when it is packed"), (_wrong_scale, "off when")],
)
def test_the_self_test_finds_a_broken_attention(
    broken: Callable[..., Any], told: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_attention.register()
    monkeypatch.setattr(packed_attention, "register", lambda: None)
    monkeypatch.setitem(AttentionInterface._global_mapping, packed_attention.NAME, broken)
    assert told in verdict(made("Mistral", SLIDING, dtype), "rows")


def _nothing_shared(*arguments: Any, key_places: Any = None, cu_seq_lens_k: Any = None, **others: Any) -> Any:
    """Attend to a row's own tokens only, as where a model does not hand on what is shared."""
    return packed_attention.attend(*arguments, **others)


def _another_rows_beginning(*arguments: Any, key_places: torch.Tensor, **others: Any) -> Any:
    return packed_attention.attend(*arguments, key_places=key_places.roll(1), **others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("broken", [_nothing_shared, _another_rows_beginning])
def test_the_self_test_finds_what_is_not_shared_rightly(
    broken: Callable[..., Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed_attention.register()
    monkeypatch.setattr(packed_attention, "register", lambda: None)
    monkeypatch.setitem(AttentionInterface._global_mapping, packed_attention.NAME, broken)
    assert "a row's logits" in verdict(made("Llama", {}, dtype), "rows", layout="shared")


DROPOUTS = {
    "of attention": ("Llama", {"attention_dropout": 0.1}),
    "a module": ("GPT2", {**EXACT["GPT2"], **dict.fromkeys(NO_DROPOUT, 0.0), "resid_pdrop": 0.1}),
    "a function": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 64, "dropout": 0.1}),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_what_is_drawn_for_each_row_is_not_shared(name: str) -> None:
    net = made(*DROPOUTS[name])
    assert verdict(net, "rows") == ""
    assert "draws random numbers" in verdict(net, "rows", layout="shared")


def test_what_would_change_the_scores_is_not_ignored() -> None:
    gemma2 = made("Gemma2", SLIDING)
    assert verdict(gemma2, "rows") == "its attention takes `softcap`, which is not supported for packed rows"
    gpt_oss = made("GptOss", {**SLIDING, "num_local_experts": 4})
    assert verdict(gpt_oss, "rows") == "its attention takes `s_aux`, which is not supported for packed rows"


def test_chunked_attention_is_no_window() -> None:
    llama4 = {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 64}
    config = transformers.Llama4TextConfig(**{**COMMON, **llama4})
    torch.manual_seed(0)
    net = transformers.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1) if parameter.ndim > 1 else None
    assert "off when it is packed" in verdict(net, "rows")
    assert verdict(net, "rows", max_length=WINDOW) == ""  # no row is longer than a chunk


def test_registered_beside_transformers_own() -> None:
    packed_attention.register()
    assert {packed_attention.NAME, "sdpa"} <= set(AttentionInterface().valid_keys())
    assert {packed_attention.NAME, "sdpa"} <= set(AttentionMaskInterface().valid_keys())
