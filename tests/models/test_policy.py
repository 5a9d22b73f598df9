"""What an objective asks of a model, against full logits row by row in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.kernels import linear_cross_entropy, packed_attention
from loratune.models.policy import Policy
from tests import tiny
from tests.data.test_prefix_sharing import alike
from tests.objectives.test_sft import Largest, gemma2, llama, rows

ROWS = alike(rows([70, 9, 140, 33, 2, 66]), 5)
CHUNK = linear_cross_entropy.ROWS["cpu"]  # targets whose logits are in memory at once
LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")


def trained_head() -> Any:
    """Return a model with an adapter that is not zero, and a copy of the head that is trained beside it."""
    made = get_peft_model(
        llama(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def frozen() -> Any:
    """Return a model whose head is not trained: the gradient below it is made in the forward pass."""
    net = llama()
    net.lm_head.weight.requires_grad_(False)
    return net


NETS = {"plain": llama, "frozen": frozen, "capped": gemma2, "trained": trained_head}
WAYS = [(name, layout) for name in NETS for layout in LAYOUTS if name != "capped" or layout == "padded"]


def made(name: str, layout: Layout) -> Any:
    """Return a model that keeps the rows of a layout apart."""
    torch.manual_seed(4)
    net = NETS[name]()
    with torch.no_grad():
        net.get_output_embeddings().weight.mul_(8)  # so that logits differ
    if layout != "padded":
        packed_attention.register()
        inner = net.get_base_model() if name == "trained" else net
        inner.set_attn_implementation(packed_attention.NAME)
    return net


def exact(name: str, chosen: Sequence[Row]) -> tuple[Any, torch.Tensor]:
    """Return a model in float64, and its log p over the vocabulary at each target, (targets, vocabulary)."""
    net = copy.deepcopy(made(name, "padded")).double()
    found = []
    for row in chosen:
        logits = net(input_ids=torch.from_numpy(row.ids).long()[None], use_cache=False).logits[0]
        found.append(logits.log_softmax(-1)[:-1][torch.from_numpy(row.trained[1:])])
    return net, torch.cat(found)


def wanted(chosen: Sequence[Row]) -> torch.Tensor:
    """Return the targets of rows one after another, (targets,)."""
    return torch.cat([torch.from_numpy(row.ids[1:][row.trained[1:]]).long() for row in chosen])


def weights(count: int) -> torch.Tensor:
    """Return what each target counts in a loss, of both signs, (targets,)."""
    return torch.linspace(-1.0, 1.3, count)[torch.randperm(count, generator=torch.Generator().manual_seed(2))]


def gradients(net: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in net.named_parameters() if p.grad is not None}


def assert_near(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    assert found.keys() == truth.keys()
    for name, gradient in truth.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-9, name


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("name", "layout"), WAYS)
def test_log_probabilities_and_their_gradient(name: str, layout: Layout, training: bool) -> None:
    net, batch = made(name, layout).train(training), tiny.batch(ROWS, layout)
    assert len(batch.targets) > CHUNK + 1
    policy = Policy(net)
    assert policy.training == training
    true, logps = exact(name, ROWS)
    of_targets = logps.gather(1, wanted(ROWS)[:, None])[:, 0]
    assert torch.equal(batch.targets, wanted(ROWS))
    each = weights(len(of_targets))
    (of_targets * each.double()).sum().backward()
    with torch.no_grad():
        alone = policy.logps(batch)
    assert not alone.requires_grad
    got = policy.logps(batch)
    assert (got.dtype, got.shape) == (torch.float32, batch.targets.shape)
    for one in (alone, got.detach()):
        torch.testing.assert_close(one.double(), of_targets.detach(), rtol=1e-5, atol=1e-5)
    (got * each).sum().backward()
    assert_near(gradients(net), gradients(true))
    per_row = torch.stack([part.sum() for part in of_targets.detach().split([int(r.trained[1:].sum()) for r in ROWS])])
    torch.testing.assert_close(batch.per_row(got.detach()).double(), per_row, rtol=1e-5, atol=1e-4)


def entropy_and_score(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the entropy and the logit of the target less the mean of all, (targets, 2)."""
    logp = logits.log_softmax(-1)
    of_target = logits.gather(1, targets[:, None])[:, 0] - logits.mean(-1)
    return torch.stack([-(logp.exp() * logp).sum(-1), of_target], dim=1)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("name", "layout"), WAYS)
def test_another_function_of_logits_and_its_gradient(name: str, layout: Layout, training: bool) -> None:
    net, batch = made(name, layout).train(training), tiny.batch(ROWS, layout)
    true, logps = exact(name, ROWS)
    truth = entropy_and_score(logps, wanted(ROWS))  # neither changes with what is added to all logits
    each = torch.stack([weights(len(truth)), weights(len(truth)).flip(0)], dim=1)
    (truth * each.double()).sum().backward()
    seen: list[tuple[torch.dtype, int]] = []

    def watched(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append((logits.dtype, len(logits)))
        return entropy_and_score(logits, targets)

    got = Policy(net).per_target(batch, watched)
    assert got.shape == (len(batch.targets), 2)
    assert seen == [(torch.float32, min(CHUNK, len(truth) - at)) for at in range(0, len(truth), CHUNK)]
    torch.testing.assert_close(got.detach().double(), truth.detach(), rtol=1e-5, atol=1e-4)
    (got * each).sum().backward()
    assert_near(gradients(net), gradients(true))


@pytest.mark.parametrize("gradient", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("case", ["float32", "bfloat16", "beside an adapter", "capped bfloat16"])
def test_few_logits_are_held_in_float32(case: str, gradient: bool) -> None:
    """Forward and backward; of a head that is nothing but one, few in any precision."""
    words = 4000
    net: Any = gemma2(words) if case.startswith("capped") else llama(vocab_size=words)
    if case == "beside an adapter":
        net = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", r=4, modules_to_save=["lm_head"]))
    net = (net.bfloat16() if case.endswith("bfloat16") else net).train(gradient)
    batch = tiny.batch(rows([60, 59, 3, 50] * 40, seed=3))
    policy = Policy(net)
    with torch.set_grad_enabled(gradient):
        policy.logps(tiny.batch(ROWS))  # here it is found out whether the head is plain
        with Largest() as seen:
            found = policy.logps(batch).sum()
            if gradient:
                found.backward()
    logits = len(batch.targets) * words
    assert logits > 8 * CHUNK * words
    assert seen.numbers[torch.float32] < logits / 3
    if not case.startswith("capped"):
        assert max(seen.numbers.values()) < logits / 3


def test_sums_of_each_sample() -> None:
    """Row and sample of each target lead to the sums of rows and of samples."""
    from loratune.data.collate import collate
    from loratune.data.sample import Sample

    pairs = [Sample((ROWS[0], ROWS[1])), Sample((ROWS[3], ROWS[5]))]
    batch = collate(pairs)
    values = torch.arange(len(batch.targets)).float()
    counts = [int(row.trained[1:].sum()) for pair in pairs for row in pair.rows]
    per_row = [float(part.sum()) for part in values.split(counts)]
    assert batch.per_row(values).tolist() == per_row
    assert batch.per_sample(values).tolist() == [per_row[0] + per_row[1], per_row[2] + per_row[3]]
    two = torch.stack([values, -values], dim=1)
    assert batch.per_row(two).tolist() == [[one, -one] for one in per_row]
