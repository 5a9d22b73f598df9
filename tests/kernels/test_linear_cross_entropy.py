"""The fused loss of a frozen head against linear and cross entropy, and when it must not be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, linear

from loratune.data.prefix_sharing import Layout
from loratune.kernels import linear_cross_entropy
from loratune.models.batch import Batch
from loratune.objectives import Sft
from tests import tiny
from tests.objectives.test_sft import ROWS, gemma2, llama

CHUNK = linear_cross_entropy.ROWS["cpu"]  # tokens


def frozen(net: Any) -> Any:
    net.requires_grad_(False)
    return net


def adapted(net: Any, **changes: Any) -> Any:
    torch.manual_seed(1)
    made = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **changes))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return made


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_float32_loss_and_gradient(tokens: int, bias: bool, smoothing: float) -> None:
    torch.manual_seed(tokens)
    hidden, weight = torch.randn(tokens, 64, requires_grad=True), torch.randn(301, 64)
    targets, shift = torch.randint(0, 301, (tokens,)), torch.randn(301) if bias else None
    plain = cross_entropy(linear(hidden, weight, shift), targets, reduction="sum", label_smoothing=smoothing) * 0.37
    (wanted,) = torch.autograd.grad(plain, hidden)
    fused = linear_cross_entropy.summed_cross_entropy(hidden, weight, shift, targets, smoothing) * 0.37
    (got,) = torch.autograd.grad(fused, hidden)
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
    assert (got - wanted).norm() < 1e-6 * wanted.norm()
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy.summed_cross_entropy(hidden, weight, shift, targets, smoothing) * 0.37,
            plain,
            rtol=1e-6,
            atol=0,
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2 * linear_cross_entropy.TRAINED["cpu"] + 3])
def test_float32_gradients_of_a_trained_head(tokens: int, bias: bool, smoothing: float) -> None:
    torch.manual_seed(tokens)
    given = [torch.randn(tokens, 64), torch.randn(301, 64), *([torch.randn(301)] if bias else [])]
    parts = [one.requires_grad_() for one in given]
    hidden, weight, shift = (*parts, None)[:3]
    targets = torch.randint(0, 301, (tokens,))
    plain = cross_entropy(linear(hidden, weight, shift), targets, reduction="sum", label_smoothing=smoothing) * 0.37
    wanted = torch.autograd.grad(plain, parts)
    fused = linear_cross_entropy.summed_cross_entropy(hidden, weight, shift, targets, smoothing) * 0.37
    got = torch.autograd.grad(fused, parts)
    torch.testing.assert_close(fused, plain, rtol=1e-6, atol=0)
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() < 2e-6 * other.norm()
    with torch.no_grad():
        assert not linear_cross_entropy.summed_cross_entropy(hidden, weight, shift, targets, smoothing).requires_grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cross_entropy_of_logits_by_chunks(dtype: torch.dtype, smoothing: float) -> None:
    """With a gradient that is scaled before it is rounded: of a scale so large that float16 needs it."""
    torch.manual_seed(0)
    logits = (4 * torch.randn(2 * CHUNK + 3, 301)).to(dtype).requires_grad_()
    targets = torch.randint(0, 301, (len(logits),))
    plain = cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
    (wanted,) = torch.autograd.grad(plain * 4096, logits)
    chunked = linear_cross_entropy.cross_entropy_of_logits(logits, targets, smoothing)
    (got,) = torch.autograd.grad(chunked * 4096, logits)
    assert (chunked.dtype, got.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(got, wanted, rtol=1e-5 if dtype is torch.float32 else 8e-3, atol=1e-4)
    (small,) = torch.autograd.grad(linear_cross_entropy.cross_entropy_of_logits(logits, targets) * 2.0**-20, logits)
    (as_small,) = torch.autograd.grad(cross_entropy(logits.float(), targets, reduction="sum") * 2.0**-20, logits)
    torch.testing.assert_close(small, as_small, rtol=1e-2, atol=2.0**-24)


TRAINED = {
    "all": lambda tied: llama(tie_word_embeddings=tied),
    "beside an adapter": lambda tied: adapted(llama(tie_word_embeddings=tied), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("half", ["no", "autocast", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_trained_head_and_what_is_before_it(
    name: str, tied: bool, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient are those of plain cross entropy, in 16 bit as near to the truth as those."""
    objective, batch = Sft(), tiny.batch(ROWS)

    def gradients(net: Any, fused: bool) -> tuple[float, dict[str, torch.Tensor]]:
        cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half == "autocast" and net.dtype is torch.float32)
        net.train().zero_grad()
        with cast:
            assert not fused or linear_cross_entropy.is_fusible(net, batch.inputs["input_ids"])
            total = tiny.total(objective, net, batch) if fused else plain(monkeypatch, net, objective, batch)
        (total / 7).backward()
        return total.item(), {n: p.grad.double().clone() for n, p in net.named_parameters() if p.grad is not None}

    net = TRAINED[name](tied)
    net = net.bfloat16() if half == "bfloat16" else net
    (fused, got), (before, wanted) = gradients(net, True), gradients(net, False)
    assert got.keys() == wanted.keys()
    assert any("embed_tokens" in key if tied and name == "all" else "lm_head" in key for key in got)
    assert fused == pytest.approx(before, rel=1e-6 if half == "no" else 1e-4)
    if half == "no":
        for key, gradient in wanted.items():
            assert (got[key] - gradient).norm() < 1e-5 * gradient.norm(), key
        return
    _, truth = gradients(net.double(), False)
    # each matrix in its own size; one alone is nearer now by this way and now by that
    off = [sum(((one[k] - t).norm() / t.norm()) ** 2 for k, t in truth.items()) for one in (got, wanted)]
    assert off[0] < 1.2**2 * off[1]
    key = next(key for key in truth if ("embed_tokens" in key if tied and name == "all" else "lm_head" in key))
    assert (got[key] - truth[key]).norm() < 1.1 * (wanted[key] - truth[key]).norm(), "what is new here"


def test_bfloat16_is_as_near_to_the_truth_as_the_plain_path() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64).bfloat16().requires_grad_(), torch.randn(2000, 64).bfloat16() / 4
    targets = torch.randint(0, 2000, (300,))
    exact = hidden.detach().double().requires_grad_()
    true = cross_entropy(linear(exact, weight.double()), targets, reduction="sum")
    (truth,) = torch.autograd.grad(true / 300, exact)
    plain = cross_entropy(linear(hidden, weight).float(), targets, reduction="sum")
    (before,) = torch.autograd.grad(plain / 300, hidden)
    fused = linear_cross_entropy.summed_cross_entropy(hidden, weight, None, targets)
    (after,) = torch.autograd.grad(fused / 300, hidden)
    assert fused.item() == pytest.approx(plain.item(), rel=1e-5)
    assert (after - truth).norm() < 1.1 * (before - truth).norm()


def plain(monkeypatch: pytest.MonkeyPatch, net: Any, objective: Sft, batch: Batch) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(linear_cross_entropy, "is_fusible", lambda *_: False)
        return tiny.total(objective, net, batch)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_model_and_its_gradients(
    layout: Layout, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, objective = adapted(llama()).train(), Sft(label_smoothing=smoothing)
    batch = tiny.batch(ROWS, layout)
    assert linear_cross_entropy.is_fusible(net, batch.inputs["input_ids"])
    fused = tiny.total(objective, net, batch)
    fused.backward()
    got = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    other = plain(monkeypatch, net, objective, batch)
    other.backward()
    assert fused.item() == pytest.approx(other.item(), rel=1e-6)
    assert got
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert (got[name] - parameter.grad).norm() < 1e-5 * parameter.grad.norm(), name


def test_logits_are_never_there_in_full() -> None:
    net, objective = adapted(llama()), Sft()
    shapes: list[int] = []
    tiny.total(objective, net, tiny.batch(ROWS[:1]))  # here it is found out whether the head is plain
    hook = net.get_output_embeddings().register_forward_hook(lambda m, i, output: shapes.append(output.numel()))
    tiny.total(objective, net, tiny.batch(ROWS))
    hook.remove()
    assert shapes == [net.get_output_embeddings().out_features]  # of one token


CASES = {
    "capped": lambda: frozen(gemma2()),
    "adapted": lambda: get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"])),
    "float16": lambda: frozen(llama()).half(),
}


@pytest.mark.parametrize("name", CASES)
def test_other_heads_keep_the_plain_path(name: str) -> None:
    net = CASES[name]()
    assert not linear_cross_entropy.is_fusible(net, torch.tensor([[1, 2, 3]]))


def test_a_scale_behind_the_head_is_seen() -> None:
    from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM

    shape = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "pad_token_id": 0,
    }  # fmt: skip
    ids = torch.tensor([[1, 2, 3, 4]])
    for scale in (0.25, 4.0):
        assert not linear_cross_entropy.is_fusible(
            frozen(CohereForCausalLM(CohereConfig(**shape, logit_scale=scale))), ids
        )
        assert not linear_cross_entropy.is_fusible(
            frozen(GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=scale))), ids
        )
    assert linear_cross_entropy.is_fusible(frozen(CohereForCausalLM(CohereConfig(**shape, logit_scale=1.0))), ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cap_is_seen_where_logits_are_so_small_that_it_changes_none(dtype: torch.dtype) -> None:
    net = frozen(gemma2()).to(dtype)
    net.config.final_logit_softcapping = 64.0  # a power of two: to divide by it and multiply again changes nothing
    with torch.no_grad():
        net.lm_head.weight.mul_(1e-4)
    ids = torch.tensor([[1, 2, 3, 4]])
    made: list[torch.Tensor] = []
    hook = net.lm_head.register_forward_hook(lambda m, i, output: made.append(output))
    with torch.no_grad():
        logits = net(input_ids=ids).logits
    hook.remove()
    assert torch.equal(made[0], logits), "not to be told by the model's own logits"
    assert not linear_cross_entropy.is_fusible(net, ids)
    net.config.final_logit_softcapping = None
    linear_cross_entropy._plain.clear()
    assert linear_cross_entropy.is_fusible(net, ids)


class Added(torch.nn.Module):
    """A model that does something to its logits."""

    def __init__(self, change: Any):
        super().__init__()
        self.net, self.change = frozen(llama()), change

    def get_output_embeddings(self) -> Any:
        return self.net.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        out = self.net(**inputs)
        out.logits = self.change(out.logits)
        return out


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        (lambda logits: logits, True),
        (lambda logits: logits.float(), True),
        (lambda logits: logits * 1.0001, False),
        (lambda logits: logits + 1e-5, False),
        (lambda logits: logits.clamp(max=2000), False),
        (lambda logits: logits.log_softmax(-1), False),
        (lambda logits: logits[:, 1:], False),
        (lambda logits: logits.index_fill(-1, torch.tensor([7]), float("-inf")), False),
    ],
)
def test_whatever_is_done_to_the_logits_is_seen(change: Any, plain: bool) -> None:
    assert linear_cross_entropy.is_fusible(Added(change), torch.tensor([[1, 2, 3]])) is plain


def test_a_head_that_gets_the_last_token_only_is_seen() -> None:
    class Last(Added):
        def forward(self, **inputs: Any) -> Any:
            return self.net(**inputs, logits_to_keep=1)

    assert not linear_cross_entropy.is_fusible(Last(None), torch.tensor([[1, 2, 3]]))
    assert not linear_cross_entropy.is_fusible(Last(None), torch.tensor([[1, 2, 3], [4, 5, 6]]))


def test_a_mixture_of_experts_with_a_loss_of_its_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """That loss is the model's own: neither way adds it, and neither is put off by it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True,
    }  # fmt: skip
    net, objective = adapted(frozen(MixtralForCausalLM(MixtralConfig(**shape)))).train(), Sft()
    batch = tiny.batch(ROWS)
    assert linear_cross_entropy.is_fusible(net, batch.inputs["input_ids"])
    fused = tiny.total(objective, net, batch)
    assert fused.item() == pytest.approx(plain(monkeypatch, net, objective, batch).item(), rel=1e-6)


def test_what_may_change_is_looked_at_each_time() -> None:
    net, ids = frozen(llama(tie_word_embeddings=True)), torch.tensor([[1, 2, 3]])
    assert linear_cross_entropy.is_fusible(net, ids)
    assert linear_cross_entropy.is_fusible(net.train(), ids)
    assert linear_cross_entropy.is_fusible(net.eval().bfloat16(), ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_cross_entropy.is_fusible(net, ids)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not linear_cross_entropy.is_fusible(net, ids)
    assert not linear_cross_entropy.is_fusible(net.half(), ids)
    net.float().get_input_embeddings().weight.requires_grad_(True)
    assert linear_cross_entropy.is_fusible(net, ids), "trained, too"


def test_a_head_that_computes_in_float16_within_the_model_only() -> None:
    """As accelerate prepares a model: what is outside of its forward pass knows no autocast."""
    net, ids = frozen(llama()), torch.tensor([[1, 2, 3]])
    net.forward = torch.autocast("cpu", dtype=torch.float16)(net.forward)
    assert not linear_cross_entropy.is_fusible(net, ids)
    assert linear_cross_entropy.is_plain(net, ids)


def test_finding_out_draws_no_random_numbers() -> None:
    net = adapted(llama(), lora_dropout=0.5).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert linear_cross_entropy.is_fusible(net, torch.tensor([[1, 2, 3]]))
    assert torch.equal(before, torch.get_rng_state())
