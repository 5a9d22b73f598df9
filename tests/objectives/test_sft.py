from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM

from loratune.data import collate
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.errors import Place
from loratune.kernels import linear_cross_entropy, packed_attention
from loratune.models.batch import Batch
from loratune.models.policy import Policy
from loratune.objectives import Sft
from tests import tiny

TOKENS = tiny.tokenizer()


def rows(lengths: list[int], seed: int = 0) -> list[Row]:
    """Return random rows; about half of their tokens are trained, the first ones too."""
    random = np.random.default_rng(seed)
    return [
        Row(random.integers(0, len(TOKENS), n).astype(np.int32), random.random(n) < 0.5, Place("made", i + 1))
        for i, n in enumerate(lengths)
    ]


ROWS = rows([9, 3, 17, 12, 2])


def llama(**changes: Any) -> Any:
    return tiny.model(TOKENS, **changes).eval()


def gemma2(words: int = len(TOKENS)) -> Any:
    """Return a model that caps its logits behind the head, and shares the head with the embedding."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=0.5,
        attn_implementation="eager",
        pad_token_id=0,
    )
    return Gemma2ForCausalLM(config).eval()


def adapted() -> Any:
    net = get_peft_model(
        llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return net.eval()


MODELS = {"llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "peft": adapted, "gemma2": gemma2}


def by_hand(net: Any, row: Row) -> list[tuple[float, bool]]:
    """Return (-log p, whether most probable) of each trained token, row by row from full logits in plain arithmetic."""
    ids = torch.from_numpy(row.ids).long()
    with torch.no_grad():
        logits = net(input_ids=ids[None]).logits[0].double()
    out = []
    for position in range(1, len(ids)):
        if row.trained[position]:
            scores = logits[position - 1]
            out.append((float(scores.logsumexp(0) - scores[ids[position]]), int(scores.argmax()) == int(ids[position])))
    return out


def scores(net: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return nats, right tokens and trained tokens of each row, as an evaluation sums them."""
    nats, right = Policy(net).losses_and_hits(batch)
    assert nats.shape == right.shape == batch.targets.shape
    assert nats.dtype == right.dtype == torch.float32
    return batch.per_row(nats), batch.per_row(right), batch.per_row(torch.ones_like(nats))


def listed(batch: Batch) -> dict[str, Any]:
    """Return a micro-batch with lists in place of its tensors."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return {name: plain(value) for name, value in asdict(batch).items()}


@pytest.mark.parametrize("name", MODELS)
def test_total_is_the_sum_of_cross_entropies(name: str) -> None:
    net = MODELS[name]()
    objective = Sft()
    batch = tiny.batch(ROWS)
    wanted = [by_hand(net, row) for row in ROWS]
    assert objective.count(batch) == sum(map(len, wanted)) == sum(row.count() for row in ROWS)
    total = tiny.total(objective, net, batch)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(sum(nats for row in wanted for nats, _ in row), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_each_row(name: str) -> None:
    net = MODELS[name]()
    objective = Sft()
    batch = tiny.batch(ROWS)
    with torch.no_grad():
        nats, right, count = scores(net, batch)
        total = tiny.total(objective, net, batch)
    wanted = [by_hand(net, row) for row in ROWS]
    assert nats.tolist() == pytest.approx([sum(n for n, _ in row) for row in wanted], rel=1e-5)
    assert right.tolist() == [sum(r for _, r in row) for row in wanted]
    assert count.tolist() == [len(row) for row in wanted]
    assert nats.sum().item() == pytest.approx(total.item(), rel=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor of floats that an operator gave, views left out, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in torch.utils._pytree.tree_leaves(made):
            if isinstance(one, torch.Tensor) and one.is_floating_point() and one._base is None:
                self.numbers[one.dtype] = max(self.numbers.get(one.dtype, 0), one.numel())
        return made


def plain_scores(net: Any, batch: Batch) -> list[torch.Tensor]:
    """Return the scores of a padded micro-batch from all its logits at once."""
    logits = net(**batch.inputs).logits[:, :-1].float()
    labels = collate.labels(batch)[:, 1:]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return [nats.sum(1), (logits.argmax(-1) == labels).float().sum(1), (labels != -100).float().sum(1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capped", [False, True])
def test_scores_never_hold_all_logits_in_float32(capped: bool, dtype: torch.dtype) -> None:
    words = 4000
    net = (gemma2(words) if capped else llama(vocab_size=words)).to(dtype)
    objective, batch = Sft(), tiny.batch(rows([60, 59, 3, 50] * 8, seed=3))
    with torch.no_grad():
        scores(net, tiny.batch(ROWS))  # here it is found out whether the head is plain
        wanted = plain_scores(net, batch)
        with Largest() as seen:
            got = scores(net, batch)
    close = 1e-6 if dtype is torch.float32 else 1e-3
    for mine, plain in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=close, atol=close)
    logits = objective.count(batch) * words
    assert logits > 4 * linear_cross_entropy.ROWS["cpu"] * words
    if not capped:
        assert max(seen.numbers.values()) < logits / 3
    if dtype is not torch.float32:
        assert seen.numbers[torch.float32] < logits / 3


def test_an_eval_loss_in_float16_holds_few_logits() -> None:
    """Nothing is scaled where there is no gradient; a training keeps the logits, as its gradient must be."""
    words = 4000
    net = llama(vocab_size=words).requires_grad_(False).half()
    objective, batch = Sft(), tiny.batch(rows([60, 59, 3, 50] * 8, seed=3))
    with torch.no_grad():
        tiny.total(objective, net, tiny.batch(ROWS))
        with Largest() as seen:
            found = tiny.total(objective, net, batch)
        assert max(seen.numbers.values()) < objective.count(batch) * words / 3
        assert found.item() == pytest.approx(plain_scores(net, batch)[0].sum().item(), rel=1e-4)
    assert not linear_cross_entropy.is_fusible(net, batch.inputs["input_ids"])


@pytest.mark.parametrize("case", ["float32", "autocast", "bfloat16", "beside an adapter", "capped", "capped bfloat16"])
def test_training_a_head_never_holds_all_logits_in_float32(case: str) -> None:
    """Forward and backward, whatever is trained; of a head that is nothing but one, no logits in any precision."""
    words = 4000
    net: Any = gemma2(words) if case.startswith("capped") else llama(vocab_size=words)
    if case == "beside an adapter":
        net = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=["lm_head"]))
    net = net.bfloat16() if case.endswith("bfloat16") else net
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast")
    objective, batch = Sft(), tiny.batch(rows([60, 59, 3, 50] * 60, seed=3))
    with cast:
        tiny.total(objective, net, tiny.batch(ROWS))  # here it is found out whether the head is plain
        with Largest() as seen:
            tiny.total(objective, net.train(), batch).backward()
    logits = objective.count(batch) * words
    assert logits > 8 * linear_cross_entropy.TRAINED["cpu"] * words
    if not case.startswith("capped"):
        assert max(seen.numbers.values()) < logits / 3
    elif case == "capped bfloat16":  # but the cap of transformers' own is float32 nowhere else than in its tanh
        assert seen.numbers[torch.float32] < logits / 3


def test_the_cap_of_gemma2_matters_here() -> None:
    """Else the tests above would pass with the head alone."""
    net = gemma2()
    hidden = net.model(input_ids=torch.tensor([[1, 2, 3]])).last_hidden_state
    assert not torch.allclose(net.lm_head(hidden), net(input_ids=torch.tensor([[1, 2, 3]])).logits, rtol=1e-2)


def test_padding_and_order_dont_matter() -> None:
    net, objective = llama(), Sft()
    with torch.no_grad():
        apart = sum(tiny.total(objective, net, tiny.batch([row])).item() for row in ROWS)
        for chosen in (ROWS, ROWS[::-1]):
            assert tiny.total(objective, net, tiny.batch(chosen)).item() == pytest.approx(apart, rel=1e-5)
        batch = tiny.batch(ROWS)
        padded = replace(
            batch,
            inputs={name: torch.nn.functional.pad(value, (0, 9)) for name, value in batch.inputs.items()},
            places=batch.places + 9 * (batch.places // batch.inputs["input_ids"].shape[1]),
        )
        assert tiny.total(objective, net, padded).item() == pytest.approx(apart, rel=1e-5)


def test_gradients_are_those_of_the_plain_loss() -> None:
    net = llama()
    objective = Sft()
    tiny.total(objective, net, tiny.batch(ROWS)).backward()
    got = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    for row in ROWS:
        ids = torch.from_numpy(row.ids).long()
        labels = torch.where(torch.from_numpy(row.trained), ids, -100)[1:]
        logits = net(input_ids=ids[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_sees_trained_positions_only(name: str) -> None:
    net, objective = MODELS[name](), Sft()
    seen: list[tuple[int, ...]] = []
    net.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    batch = tiny.batch(ROWS)
    tiny.total(objective, net, batch)  # here it is found out whether the head is plain
    seen.clear()
    tiny.total(objective, net, batch)
    scores(net, batch)
    assert seen == 2 * [(objective.count(batch) if name == "gemma2" else 1, len(TOKENS))]
    net(input_ids=torch.tensor([[1, 2, 3]]))  # and nothing of it stays behind
    assert seen[-1] == (1, 3, len(TOKENS))


def test_collate() -> None:
    made = Row(np.array([5, 6, 7], np.int32), np.array([True, False, True]), Place("made", 1))
    short = Row(np.array([8, 9], np.int32), np.array([False, True]), Place("made", 2))
    batch = tiny.batch([made, short])
    assert listed(batch) == {
        "inputs": {"input_ids": [[5, 6, 7], [8, 9, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]},
        "places": [1, 3],
        "targets": [7, 9],
        "row": [0, 1],
        "sample": [0, 1],
        "samples": 2,
        "tokens": 5,
        "labels": [[], []],
        "values": {},
        "states": None,
    }
    assert collate.labels(batch).tolist() == [[-100, -100, 7], [-100, 9, -100]]
    assert batch.computed == 6


def test_a_batch_that_teaches_nothing() -> None:
    net, objective = llama(), Sft()
    idle = Row(np.array([1, 2, 3], np.int32), np.zeros(3, bool), Place("made", 1))
    batch = tiny.batch([idle])
    assert objective.count(batch) == 0
    total = tiny.total(objective, net, batch)
    assert total.item() == 0
    total.backward()  # several processes wait for each other's gradients
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_torchs(smoothing: float) -> None:
    """Loss = (1 - s) nll + s mean over the vocabulary of -log p; in training only."""
    net, objective = llama(), Sft(label_smoothing=smoothing)
    batch = tiny.batch(ROWS)
    wanted = 0.0
    for row in ROWS:
        logp = net(input_ids=torch.from_numpy(row.ids).long()[None]).logits[0].double().log_softmax(-1)
        for position in range(1, len(row.ids)):
            if row.trained[position]:
                scores = -logp[position - 1]
                wanted += ((1 - smoothing) * scores[int(row.ids[position])] + smoothing * scores.mean()).item()
    assert tiny.total(objective, net, batch).item() == pytest.approx(tiny.total(Sft(), net, batch).item())
    net.train()
    assert tiny.total(objective, net, batch).item() == pytest.approx(wanted, rel=1e-5)


def embedded(net: Any, objective: Sft, batch: Batch) -> torch.Tensor:
    """Return what the first layer gets, shape (rows, tokens, width)."""
    seen = []
    layer = net.get_submodule("model.layers.0")
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    tiny.total(objective, net, batch)
    hook.remove()
    return seen[0]


def test_neftune_is_noise_within_its_bound_while_training() -> None:
    net = llama()
    batch = tiny.batch(ROWS)
    tiny.total(Sft(), net, batch)  # here it is found out whether the head is plain
    clean = net.get_input_embeddings()(batch.inputs["input_ids"]).detach()
    noisy = Sft(neftune=5.0)
    assert torch.equal(embedded(net, noisy, batch), clean)  # evaluation mode
    net.train()
    assert torch.equal(embedded(net, Sft(), batch), clean)
    torch.manual_seed(1)
    noise = embedded(net, noisy, batch) - clean
    for row, of in zip(ROWS, noise, strict=True):
        bound = 5.0 / math.sqrt(len(row.ids) * 64)  # alpha / sqrt(L d), equation in algorithm 1
        assert of.abs().max() <= bound * (1 + 1e-5)
        assert of.abs().max() > 0.95 * bound
        assert of[: len(row.ids)].std() == pytest.approx(bound / math.sqrt(3), rel=0.2)  # uniform
    assert not torch.equal(embedded(net, noisy, batch) - clean, noise)
    net.eval()
    assert torch.equal(net.get_input_embeddings()(batch.inputs["input_ids"]), clean)  # no hook stays


# ---------------------------------------------------------------- packed rows


def test_collate_packed() -> None:
    made = Row(np.array([5, 6, 7], np.int32), np.array([True, False, True]), Place("made", 1))
    short = Row(np.array([8, 9], np.int32), np.array([True, True]), Place("made", 2))
    batch = tiny.batch([made, short], "packed")
    assert listed(batch) == {
        "inputs": {
            "input_ids": [[5, 6, 7, 8, 9]],
            "position_ids": [[0, 1, 2, 0, 1]],
            "cu_seq_lens_q": [0, 3, 5],
            "cu_seq_lens_k": [0, 3, 5],
            "max_length_q": 3,
            "max_length_k": 3,
        },
        "places": [1, 3],
        "targets": [7, 9],  # the 8 is trained, and nothing of its own row stands before it
        "row": [0, 1],
        "sample": [0, 1],
        "samples": 2,
        "tokens": 5,
        "labels": [[], []],
        "values": {},
        "states": None,
    }
    assert batch.inputs["cu_seq_lens_q"].dtype == torch.int32
    assert batch.computed == 5


def test_collate_shared() -> None:
    """Two of three tokens in common, the third of one only to be foretold: from the place where others go on."""
    made = Row(np.array([5, 6, 7], np.int32), np.array([True, False, True]), Place("made", 1))
    longer = Row(np.array([5, 6, 8, 9, 4], np.int32), np.array([False, False, True, True, False]), Place("made", 2))
    batch = tiny.batch([longer, made], "shared")
    assert listed(batch) == {
        "inputs": {
            "input_ids": [[5, 6, 8]],
            "position_ids": [[0, 1, 2]],
            "cu_seq_lens_q": [0, 2, 3],
            "cu_seq_lens_k": [0, 2, 5],
            "max_length_q": 2,
            "max_length_k": 3,
            "key_places": [0, 1, 0, 1, 2],
        },
        "places": [1, 2, 1],
        "targets": [8, 9, 7],
        "row": [0, 0, 1],
        "sample": [0, 1],
        "samples": 2,
        "tokens": 8,
        "labels": [[], []],
        "values": {},
        "states": None,
    }
    assert batch.inputs["cu_seq_lens_q"].dtype == batch.inputs["cu_seq_lens_k"].dtype == torch.int32
    assert batch.computed == 3


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_packed_rows_count_the_same_tokens(layout: Layout) -> None:
    objective = Sft()
    assert objective.count(tiny.batch(ROWS, layout)) == objective.count(tiny.batch(ROWS))


def test_neftune_is_as_wide_for_a_packed_row_as_for_a_padded_one() -> None:
    net = llama().train()
    batch = tiny.batch(ROWS, "packed")
    tiny.total(Sft(), net, batch)  # here it is found out whether the head is plain
    clean = net.get_input_embeddings()(batch.inputs["input_ids"]).detach()
    torch.manual_seed(1)
    noise = (embedded(net, Sft(neftune=5.0), batch) - clean)[0]
    for row, of in zip(ROWS, noise.split([len(row.ids) for row in ROWS]), strict=True):
        bound = 5.0 / math.sqrt(len(row.ids) * 64)
        assert 0.95 * bound < of.abs().max() <= bound * (1 + 1e-5)


class Waits(TorchDispatchMode):
    """Collects what a GPU would have to be waited for: values and sizes that depend on a tensor's content."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        name = op.overloadpacket.__name__
        by_mask = any(
            isinstance(one, torch.Tensor) and one.dtype is torch.bool
            for part in given[1:2]
            for one in (part if isinstance(part, (list, tuple)) else ())
        )
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim") or by_mask:
            self.seen.append(name)
        return op(*given, **(named or {}))


@pytest.mark.parametrize(("noise", "layout"), [(0.0, "packed"), (5.0, "packed"), (0.0, "shared")])
def test_a_micro_batch_is_waited_for_once_at_most(noise: float, layout: Layout) -> None:
    packed_attention.register()
    net, objective = llama().train(), Sft(neftune=noise)
    net.set_attn_implementation(packed_attention.NAME)
    net.lm_head.weight.requires_grad_(False)
    tiny.total(objective, net, tiny.batch(ROWS, layout))  # the head is looked at once
    batch = tiny.batch(ROWS, layout)
    with Waits() as waits:
        tiny.total(objective, net, batch).backward()
    assert waits.seen in ([], ["_local_scalar_dense"]), "transformers looks whether rows are packed, before any layer"
