"""What holds for every objective: neither layout nor split of a step matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from loratune.data import batches
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample
from loratune.kernels import packed_attention
from loratune.methods import Lora
from loratune.methods.tuned import Setup, Tuned
from loratune.models import score_head
from loratune.objectives import Classify, Cpo, Dpo, Kto, Orpo, Pattern, Reward, Simpo
from loratune.training import loop
from tests.methods.test_adalora import _Alone
from tests.objectives import test_heads, test_kto, test_pattern, test_preference
from tests.objectives.test_sft import llama

ROWS = 8
LABELS = {"one": [[n % 3] for n in range(ROWS)], "several": [[0, 2], [], [1], [0, 1, 2]] * 2}
LABELS["number"] = [[0.5 * n - 1] for n in range(ROWS)]


def classified(kind: Any) -> tuple[Classify, list[Sample]]:
    """Return a classifier and rows with a common beginning and their labels."""
    made = test_heads.bound(kind, 0 if kind == "number" else 3)
    return made, [Sample((row,)) for row in test_heads.rows_of(ROWS, LABELS[kind])]


def rewarded() -> tuple[Reward, list[Sample]]:
    rows = test_heads.rows_of(2 * ROWS, [[0.5 * (n % 3)] if n % 2 == 0 else [] for n in range(2 * ROWS)])
    return Reward(centre=0.1), [Sample((rows[n], rows[n + 1])) for n in range(0, 2 * ROWS, 2)]


CASES: dict[str, Any] = {
    **{one.type: lambda one=one: (one, test_preference.samples(ROWS)) for one in (Dpo(), Orpo(), Simpo(), Cpo())},
    "kto": lambda: (Kto(), test_kto.samples(ROWS)),
    "pattern": lambda: (Pattern(), test_pattern.samples(ROWS)),
    "reward": rewarded,
    **{f"classify {kind}": lambda kind=kind: classified(kind) for kind in LABELS},
}  # fmt: skip


def adapted(outputs: int, layout: Layout) -> Tuned:
    """Return a tiny model whose adapter and head, if it has one, are not at their start."""
    net = llama()
    if layout != "padded":
        packed_attention.register()
        net.set_attn_implementation(packed_attention.NAME)
    if outputs:
        names = {"id2label": dict(enumerate(map(str, range(outputs)))), "problem_type": "regression"}
        score_head.add(net, outputs, names)
    tuned = Lora(r=4).apply(net, Setup(1))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03 * torch.randn_like(parameter))
    return tuned


def stepped(case: str, layout: Layout, cut: Sequence[int] = ()) -> tuple[float, dict[str, torch.Tensor]]:
    """Take a step of `ROWS` samples, cut into micro-batches at some places; return loss and gradient."""
    objective, some = CASES[case]()
    tuned, kept = adapted(objective.outputs, layout), {}
    optimizer = torch.optim.SGD([p for p in tuned.net.parameters() if p.requires_grad], lr=0.0)
    optimizer.param_groups[0]["initial_lr"] = 0.0

    def keep(*_: Any) -> None:
        kept.update({name: p.grad.clone() for name, p in tuned.net.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    parts = [some[begin:end] for begin, end in zip([0, *cut], [*cut, ROWS], strict=True)]
    batch = batches.Batch(parts, 1.0, ROWS, layout)
    (step,) = loop.steps(tuned.policy(), objective, tuned, [batch], optimizer, lambda n: 1.0, _Alone(), 1e9)
    return step.loss, kept


WAYS: list[tuple[Layout, Sequence[int]]] = [
    ("padded", range(1, ROWS)), ("packed", ()), ("packed", (3,)), ("shared", ()), ("shared", (2, 7)),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "cut"), WAYS, ids=lambda one: str(one).replace("range(1, 8)", "one by one"))
@pytest.mark.parametrize("case", CASES)
def test_layout_and_split_do_not_matter(case: str, layout: Layout, cut: Sequence[int]) -> None:
    wanted, exact = stepped(case, "padded")
    loss, gradient = stepped(case, layout, cut)
    assert loss == pytest.approx(wanted, rel=1e-6)
    largest = max(float(one.abs().max()) for one in exact.values())
    assert gradient.keys() == exact.keys()
    assert largest > 1e-4, "there is nothing to compare"
    assert max(float((gradient[name] - exact[name]).abs().max()) for name in exact) < 1e-5 * largest
