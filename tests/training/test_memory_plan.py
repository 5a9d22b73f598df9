"""Activations: what is measured is what autograd keeps, and what is computed a second time changes no bit."""

from __future__ import annotations

import gc
import itertools
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from loratune import recipe
from loratune.data import batches
from loratune.data.collate import collate
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.errors import ModelError, Place, SetupError
from loratune.kernels import cpu_attention
from loratune.models import quantization
from loratune.models.batch import Batch
from loratune.models.policy import Policy
from loratune.objectives import Sft
from loratune.training import activation_memory, memory_plan, session
from loratune.training import memory_use as fits
from loratune.training.activation_memory import Cost
from loratune.training.layout_test import Packing
from loratune.training.memory_plan import BUDGETS, Plan
from tests import tiny
from tests.conftest import Fit
from tests.data.test_prefix_sharing import alike
from tests.kernels import test_packed_attention as models

GB = 10**9
LAYERS = 30
PACKED, PADDED = Packing("packed", "rows"), Packing("padded")
COST = Cost((100_000.0,) * LAYERS, (1_000.0,) * LAYERS, 10_000.0)  # 3 MB a token with everything kept


# ---------------------------------------------------------------- measured


def kept_bytes(run: Any) -> tuple[Any, int]:
    """Return what `run` returns, and the bytes that were allocated and not freed meanwhile, as torch's profiler says."""
    gc.collect()  # what other tests left, and Python would free meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        out = run()
    events = seen.profiler.kineto_results.events()
    return out, sum(event.nbytes() for event in events if event.name() == "[memory]")


KINDS = [
    "packed", "shared", "padded", "eager", "dropout", "nf4", "int8", "full", "trained head",
    "packed bfloat16", "shared bfloat16", "long bfloat16",
]  # fmt: skip


@pytest.mark.parametrize("again", ["none", 3, "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_measured_is_what_is_kept(fit: Fit, tmp_path: Path, kind: str, again: int | str) -> None:
    """The profiler's bytes of a batch ten times as large as the measured one: never 5 % more, nor 10 % less.

    Less, as a few tensors that don't grow with the tokens (a mask, the angles of positions) are taken to do so.
    """
    lora = {"type": "lora", "r": 4, "lora_dropout": 0.1 if kind == "dropout" else 0.0}
    if kind == "trained head":
        lora["modules_to_save"] = ["lm_head"]
    half, kind = kind.endswith(" bfloat16"), kind.removesuffix(" bfloat16")  # attention keeps probabilities then
    layout: Layout = "packed" if kind in ("packed", "nf4", "long") else "shared" if kind == "shared" else "padded"
    data: dict[str, Any] = {}
    if kind == "long":  # all rows: nothing is kept of the probabilities
        turns = [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two " * (cpu_attention.KEPT // 3)},
        ]
        rows = [{"messages": [{"role": "system", "content": word}, *turns]} for word in ("red", "blue") * 4]
        data = {"train": str(tiny.write_jsonl(tmp_path / "long.jsonl", rows)), "max_length": 2 * cpu_attention.KEPT}
    done = fit(
        on=tiny.save(tmp_path / "deep", layers=6, hidden_size=128, intermediate_size=256),
        rows=8,
        model={
            "attention": "eager" if kind == "eager" else "auto",
            "quantization": kind if kind in ("nf4", "int8") else "none",
            "dtype": "bfloat16" if half else "float32",
        },
        method={"type": "full"} if kind == "full" else lora,
        data={
            "packing": "off" if layout == "padded" else "on", "prefix_sharing": "on" if layout == "shared" else "off",
            **data,
        },
        train={"gradient_checkpointing": again},
    )  # fmt: skip
    known = done.facts()
    longest, trained = known["memory"]["longest"], known["data"]["train"]
    share = trained["trained_tokens"] / trained["tokens"]
    made = models.rows([longest, longest - 1] * 4)
    for row in made:
        row.ids[:] %= 200
        row.trained[:] = np.arange(len(row.ids)) % round(1 / share) == 0
    if layout == "shared":
        saved = known["batching"]["saved"]
        assert 0.1 < saved < 0.4
        made = alike(made, round(saved * 8 / 7 * longest / 1.5))  # of every other row twice as many
    objective, batch = done.recipe.objective, tiny.batch(made, layout)
    done.net.train()
    tiny.total(objective, done.net, batch)  # the head is looked at once
    loss, kept = kept_bytes(lambda: tiny.total(objective, done.net, batch))
    assert loss.requires_grad
    assert 0.9 < kept / batch.computed / known["memory"]["per_token_now"] < 1.05


def test_measuring_leaves_the_model_as_it_was(fit: Fit) -> None:
    done = fit("a", rows=8)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in done.net.modules())
    assert not any(module.gradient_checkpointing for module in activation_memory._layers(done.net))


# ---------------------------------------------------------------- computed a second time


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize(
    "method", [{"type": "lora", "r": 4, "lora_dropout": 0.1}, {"type": "lora", "r": 4}, {"type": "full"}],
    ids=["dropout", "lora", "full"],
)  # fmt: skip
def test_no_bit_depends_on_how_many_layers_are_computed_again(fit: Fit, method: dict[str, Any], packing: str) -> None:
    runs = {
        choice: fit(
            str(choice), method=method, optimizer={"lr": 1e-3}, data={"packing": packing},
            train={"epochs": 2, "gradient_checkpointing": choice},
        )
        for choice in ("none", 1, "all")
    }  # fmt: skip
    for choice, again in (("none", 0), (1, 1), ("all", 2)):
        flags = [layer.gradient_checkpointing for layer in activation_memory._layers(runs[choice].net)]
        assert flags == [True] * again + [False] * (2 - again)
        assert runs[choice].facts()["activations"]["again"] == again
        for name in ("loss", "grad_norm"):
            assert runs[choice].column(name) == runs["none"].column(name)
        for file in runs["none"].folder.glob("*.safetensors"):
            wanted = load_file(file)
            assert wanted
            assert all(torch.equal(t, wanted[n]) for n, t in load_file(runs[choice].folder / file.name).items())


@pytest.mark.parametrize(
    ("drawing", "keeps"),
    [({}, False), ({"method": {"type": "lora", "r": 4, "lora_dropout": 0.1}}, True), ({"objective": {"type": "sft", "neftune": 5}}, True)],
    ids=["nothing drawn", "dropout", "noise"],
)  # fmt: skip
def test_random_states_are_kept_for_layers_only_where_something_is_drawn(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, drawing: dict[str, Any], keeps: bool
) -> None:
    taken: list[bool] = []
    whole = torch.utils.checkpoint._checkpoint_without_reentrant_generator

    def spy(fn: Any, preserve_rng_state: bool = True, *args: Any, **kwargs: Any) -> Any:
        taken.append(preserve_rng_state)
        return whole(fn, preserve_rng_state, *args, **kwargs)

    monkeypatch.setattr(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", spy)
    fit("a", **drawing, train={"gradient_checkpointing": "all"})
    assert set(taken) == {keeps}


def test_more_layers_than_there_are(fit: Fit) -> None:
    with pytest.raises(ModelError) as caught:
        fit("a", train={"gradient_checkpointing": 3})
    assert str(caught.value) == (
        "`train.gradient_checkpointing: 3`: this model has 2 layers\n  use 2 or fewer, or `all`"
    )


class Legacy:
    """A model of which only the whole can be switched, or nothing."""

    def __init__(self, able: bool) -> None:
        self.able, self.on = able, False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, bool]) -> None:
        if not self.able:
            raise ValueError("Legacy does not support gradient checkpointing.")
        self.on = not gradient_checkpointing_kwargs["use_reentrant"]


def plan_of(again: int = 0, layers: int = 0, short: bool = False) -> Plan:
    return Plan(layers, again, 4096, 4096, GB, GB, short)


@pytest.mark.parametrize(
    ("wish", "short", "on"),
    [("auto", False, False), ("auto", True, True), ("none", True, False), ("all", False, True), (7, False, True)],
)
def test_a_model_that_is_switched_as_a_whole(wish: str | int, short: bool, on: bool) -> None:
    net = Legacy(able=True)
    plan = memory_plan.switch(net, [], plan_of(short=short), wish)
    assert net.on is on
    assert ("for all layers or none" in plan.note) is on


def test_a_model_that_can_compute_nothing_again() -> None:
    net = Legacy(able=False)
    assert "stay in memory" in memory_plan.switch(net, [], plan_of(short=True), "auto").note
    assert memory_plan.switch(net, [], plan_of(), "none").note == ""
    with pytest.raises(ModelError, match=r"`train\.gradient_checkpointing: all`: this model has no"):
        memory_plan.switch(net, [], plan_of(), "all")


# ---------------------------------------------------------------- chosen


def rows_of(*lengths: int, weights: float = 1.0) -> Any:
    place = Place("made", 1)
    rows = [Row(np.zeros(n, np.int32), np.ones(n, bool), place) for n in lengths]
    return tiny.stored(rows, [weights] * len(rows))


ROWS = rows_of(*[2048] * 64)


def chosen(
    tmp_path: Path, base: Path, free: int | None, begun: dict[str, int] | None = None, device: str = "cuda",
    packing: Packing = PACKED, rows: Any = ROWS, movable: int = 0, world: int = 1, **train: Any,
) -> Plan:  # fmt: skip
    path = tiny.write_recipe(tmp_path, base, train={"batch_size": 16, **train}, data={"max_length": 2048})
    return memory_plan.choose(recipe.load(path), COST, rows, packing, device, free, 0, world, begun, movable)


def test_auto_keeps_what_fits_then_takes_fewer_tokens_then_computes_again(tmp_path: Path, base: Path) -> None:
    """From much memory to little: first only the budget falls, then only the layers that are kept."""
    plans = [chosen(tmp_path, base, int(free * GB)) for free in (200, 100, 60, 30, 15, 12, 8, 5, 3, 0.1)]
    assert [plan.tokens for plan in plans] == sorted((plan.tokens for plan in plans), reverse=True)
    assert [plan.again for plan in plans] == sorted(plan.again for plan in plans)
    assert plans[0].largest == BUDGETS["cuda"][0] == 16384, "no more, whatever is free: nothing gets faster"
    assert BUDGETS["cuda"][-1] == 2048
    assert plans[0].again == 0
    assert plans[-1].again == LAYERS
    assert plans[-1].short
    assert not any(plan.short for plan in plans[:-1])
    for plan in plans:
        assert plan.again == 0 or plan.tokens == BUDGETS["cuda"][-1]
        if not plan.short:
            assert plan.free is not None
            assert plan.needed <= plan.free * memory_plan.USABLE
        if plan.again > 0 and not plan.short:  # and one fewer would have been too much
            assert COST.at_once(plan.largest, plan.again - 1) > plan.free * memory_plan.USABLE
    assert len({plan.again for plan in plans}) >= 4
    assert len({plan.tokens for plan in plans}) >= 4


def test_a_gpu_offloads_last_and_only_where_that_helps(tmp_path: Path, base: Path) -> None:
    """2,048 tokens need 307 MB with all layers recomputed; offloaded 250 MB, and 100 MB of weights are free."""
    few = partial(chosen, tmp_path, base)
    assert not few(350_000_000, movable=10**8).offload, "it fits with all layers recomputed"
    plan = few(250_000_000, movable=10**8)
    assert (plan.offload, plan.again, plan.short, plan.moved) == (True, LAYERS, False, 10**8)
    assert plan.needed == COST.at_once(2048, LAYERS, offload=True) < COST.at_once(2048, LAYERS)
    assert plan.told().startswith("embedding, head and layer inputs in main memory, gradient checkpointing on all 30")
    assert few(100_000_000, movable=10**8).short
    for other in ({"offload": "off"}, {"world": 2}, {"device": "cpu"}, {"movable": 0}):
        plan = few(250_000_000, **{"movable": 10**8, **other})
        assert (plan.offload, plan.short) == (False, True)


def test_offloading_that_is_asked_for(tmp_path: Path, base: Path) -> None:
    plan = chosen(tmp_path, base, 200 * GB, movable=10**8, offload="on")
    assert (plan.offload, plan.again, plan.tokens) == (True, 0, 16384)
    plan = chosen(tmp_path, base, 200 * GB, movable=10**8, offload="on", gradient_checkpointing="all")
    assert (plan.offload, plan.again) == (True, LAYERS)
    for other, told in (
        ({"device": "cpu"}, "no GPU"),
        ({"world": 2}, "several processes"),
        ({"movable": 0}, "trained"),
    ):
        assert told in chosen(tmp_path, base, GB, **{"movable": 10**8, "offload": "on", **other}).note
    begun = {"tokens": 2048, "again": 30, "offload": True}
    assert chosen(tmp_path, base, 200 * GB, begun=begun, movable=10**8).offload, "a resumed run goes on as it began"
    assert not chosen(tmp_path, base, 200 * GB, begun={"tokens": 2048, "again": 30}, movable=10**8).offload


def test_what_is_not_there_yet_is_left_room_for(tmp_path: Path, base: Path) -> None:
    path = tiny.write_recipe(tmp_path, base, train={"batch_size": 16}, data={"max_length": 2048})
    given = (recipe.load(path), COST, ROWS, PACKED, "cuda", 15 * GB)
    assert memory_plan.choose(*given, fixed=0).again == 0
    assert memory_plan.choose(*given, fixed=8 * GB).again > 0


def test_what_is_given_stays(tmp_path: Path, base: Path) -> None:
    for wish, again in (("none", 0), (7, 7), ("all", LAYERS)):
        plan = chosen(tmp_path, base, 3 * GB, micro_batch_size=2, gradient_checkpointing=wish)
        assert (plan.again, plan.largest, plan.tokens) == (again, 4096, BUDGETS["cuda"][0])
    assert chosen(tmp_path, base, 3 * GB, micro_batch_size=2).again > 0
    assert chosen(tmp_path, base, None).again == 0, "where free memory can't be known everything is kept"


def test_a_resumed_run_keeps_its_budget_whatever_is_free(tmp_path: Path, base: Path) -> None:
    """The budget decides the order of sums; how much is computed again decides nothing, and may only grow."""
    begun = {"tokens": 8192, "again": 5}
    for free in (1000, 100, 30, 5):
        plan = chosen(tmp_path, base, free * GB, begun=begun)
        assert plan.tokens == 8192
        assert plan.again >= 5
    assert chosen(tmp_path, base, 1000 * GB, begun=begun).again == 5
    assert chosen(tmp_path, base, 5 * GB, begun=begun).again > 5


def test_a_resume_takes_the_budget_from_the_checkpoint(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"train": {"epochs": 2, "save_every": 2}, "data": {"packing": "off"}}
    monkeypatch.setitem(memory_plan.BUDGETS, "cpu", (300,))
    whole = fit("whole", **sections)
    began = fit("cut", **{**sections, "train": {**sections["train"], "schedule": "constant", "epochs": 1}})
    assert began.facts()["activations"]["tokens"] == 300
    straight = fit("straight", **{**sections, "train": {**sections["train"], "schedule": "constant"}})
    monkeypatch.setitem(memory_plan.BUDGETS, "cpu", (4096,))
    other = fit("cut", resume=True, **{**sections, "train": {**sections["train"], "schedule": "constant"}})
    assert other.facts()["activations"]["tokens"] == 300
    assert other.column("loss") == straight.column("loss")
    assert len(other.column("loss")) == len(whole.column("loss"))


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("micro", [1, 3, "auto"])
@pytest.mark.parametrize("world", [1, 2])
def test_no_micro_batch_is_larger_than_the_largest(layout: Layout, micro: int | str, world: int) -> None:
    """All micro-batches of ten epochs against the figure that is planned with, which some of them nearly reach."""
    random = np.random.default_rng(3)
    lengths = random.integers(2, 200, 90)
    made = alike(models.rows(lengths.tolist()), 20)
    data = tiny.stored(made, random.choice([0.5, 1.0, 2.5], 90).tolist())
    capacity = None if layout == "padded" else 256
    most = batches.largest(data.sizes, data.sample_weights, 12, micro, 300, capacity, world)
    steps = 10 * -(-batches.samples_per_epoch(data.sample_weights) // 12)
    seen = [
        batch.layout == layout and collate(part, layout).computed
        for rank in range(world)
        for batch in batches.batches(data, 12, micro, 0, steps, 0, 300, rank, world, 256, layout)
        for part in batch.micro
    ]
    assert most * (0.8 if layout == "shared" else 0.9) <= max(seen) <= most


def test_what_is_told() -> None:
    assert plan_of(8, 30).told() == (
        "gradient checkpointing on 8 of 30 layers, activations: about 1.0 GB for a micro-batch of 4,096 tokens, "
        "1.0 GB free"
    )
    assert plan_of(0, 30).told().startswith("activations: about")
    assert plan_of(30, 30).told().startswith("gradient checkpointing on all 30 layers, activations: about")
    assert plan_of(0, 0).told().startswith("activations: about")
    assert plan_of(30, 30, short=True).told().endswith("1.0 GB free: it may not fit")


# ---------------------------------------------------------------- free memory


def test_free_memory_of_this_machine() -> None:
    free = fits.free_memory(torch.device("cpu"))
    shared = fits.free_memory(torch.device("cpu"), 4)
    if free is None:
        pytest.skip("no /proc/meminfo here")
    assert shared is not None
    assert 2**20 < free < 2**50
    assert shared == pytest.approx(free / 4, rel=0.2)


def test_the_seal_holds_what_was_chosen(fit: Fit) -> None:
    done = fit("a")
    facts = done.facts()
    found = session.checkpoint.newest(done.folder)
    assert found is not None
    assert found.seal["activations"] == facts["activations"]
    assert facts["activations"]["tokens"] in BUDGETS["cpu"]
    assert facts["activations"]["layers"] == 2


# ---------------------------------------------------------------- memory that runs out in the first step


class Full:
    """An objective's `total` that runs out of memory at its calls of some numbers, after random numbers were drawn."""

    def __init__(self, *calls: int) -> None:
        self.calls, self.seen = calls, 0
        self.held: list[weakref.ref[torch.Tensor]] = []

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = Sft.total

        def total(objective: Sft, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            found, others = whole(objective, policy, batch)
            if policy.training and torch.is_grad_enabled():
                self.seen += 1
                assert not any(ref() is not None for ref in self.held), "what did not fit is still in memory"
                if self.seen in self.calls:
                    self.held.append(weakref.ref(found))
                    raise torch.OutOfMemoryError("CUDA out of memory")
            return found, others

        monkeypatch.setattr(Sft, "total", total)


# the first call measures, then come two micro-batches of a step
DRAWING = {
    "method": {"type": "lora", "r": 4, "lora_dropout": 0.1}, "objective": {"type": "sft", "neftune": 5},
    "data": {"packing": "off"}, "optimizer": {"lr": 1e-2},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["tokens", "layers"])
@pytest.mark.parametrize("call", [2, 3])
def test_a_first_step_that_does_not_fit_is_tried_once_with_a_lighter_plan(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, call: int
) -> None:
    """All is as in a run that had the second plan from the start: losses, norms, weights, the seal of a checkpoint."""
    train = {"epochs": 2} if kind == "tokens" else {"epochs": 2, "micro_batch_size": 4}
    budgets = (500, 200) if kind == "tokens" else (500,)
    with monkeypatch.context() as patch:
        patch.setitem(memory_plan.BUDGETS, "cpu", budgets)
        Full(call).put_in(patch)
        tried = fit("tried", **DRAWING, train=train)
    again = tried.facts()["activations"]["again"]
    assert again == (0 if kind == "tokens" else 1)
    told = capsys.readouterr().err
    lighter = "activations: about" if kind == "tokens" else "gradient checkpointing on 1 of 2 layers, activations"
    assert f"out of memory: retrying with {lighter}" in told
    monkeypatch.setitem(memory_plan.BUDGETS, "cpu", budgets[-1:])
    straight = fit("straight", **DRAWING, train=train if kind == "tokens" else {**train, "gradient_checkpointing": 1})
    for name in ("loss", "grad_norm"):
        assert tried.column(name) == straight.column(name)
    one, other = (load_file(done.folder / "adapter_model.safetensors") for done in (tried, straight))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    same = ("activations", "memory")
    known = {name: {k: v for k, v in tried.facts()[name].items() if k != "free"} for name in same}
    assert known == {name: {k: v for k, v in straight.facts()[name].items() if k != "free"} for name in same}
    found = session.checkpoint.newest(tried.folder)
    assert found is not None
    assert found.seal["activations"] == tried.facts()["activations"]


def test_what_does_not_fit_twice_or_later_is_an_error_with_advice(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"micro_batch_size": 4}
    for name, calls in (("twice", (2, 3)), ("later", (4,))):
        with monkeypatch.context() as patch:
            Full(*calls).put_in(patch)
            with pytest.raises(SetupError, match=r"out of memory on CPU.*\n  cheapest first, estimated: train"):
                fit(name, **DRAWING, train=train)
    with monkeypatch.context() as patch:  # nothing is left to choose
        Full(2).put_in(patch)
        with pytest.raises(SetupError, match="out of memory on CPU"):
            fit("all", **DRAWING, train={**train, "gradient_checkpointing": "all"})


def test_an_optimizer_that_runs_out_of_memory_is_not_asked_again(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def step(self: Any, closure: Any = None) -> None:
        asked.append(True)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(SetupError, match="out of memory"):
        fit("a", **DRAWING)
    assert len(asked) == 1


def test_a_lighter_plan_takes_clearly_less(tmp_path: Path, base: Path) -> None:
    path = tiny.write_recipe(tmp_path, base, train={"batch_size": 16}, data={"max_length": 2048})
    given = (recipe.load(path), COST, ROWS, PACKED, "cuda")
    plan: Plan | None = memory_plan.choose(*given, 300 * GB, 0)
    seen = []
    while plan is not None:
        seen.append(plan)
        plan = memory_plan.lighter(*given, plan)
    assert [plan.tokens for plan in seen[:4]] == list(BUDGETS["cuda"])
    assert [plan.again for plan in seen[:5]][-2:] == [0, 8]
    assert seen[-1].again == LAYERS
    assert all(after.needed <= 0.75 * before.needed for before, after in itertools.pairwise(seen[:-1]))
    resumed = memory_plan.lighter(*given, seen[0], 1, {"tokens": 16384, "again": 0})
    assert resumed is not None
    assert (resumed.tokens, resumed.again) == (16384, 8)
    last = memory_plan.lighter(*given, seen[-1], movable=10**8)
    assert last is not None
    assert last.offload
    assert memory_plan.lighter(*given, last, movable=10**8) is None


def test_what_leaves_its_few_bits_is_planned_for(fit: Fit) -> None:
    """One weight of 64 x 128 in float32, the largest of the tiny model, as it is dequantized for its product."""
    done = fit("a", model={"quantization": "nf4"})
    loaded: Any = SimpleNamespace(model=done.net, device=torch.device("cpu"), dtype=torch.float32)
    assert quantization.largest_dequantized(done.net, torch.float32) == 64 * 128 * 4
    plain = fit("b").net
    assert quantization.largest_dequantized(plain, torch.float32) == 0
    with_it = fits.fixed_bytes(done.recipe, loaded, done.net)
    assert with_it - fits.fixed_bytes(done.recipe, loaded, plain) == 64 * 128 * 4
    on_gpu: Any = SimpleNamespace(model=done.net, device=torch.device("cuda"), dtype=torch.float32)
    chunk = (1024 - 128) * 258 * 4  # so many tokens more, of a tiny vocabulary
    assert fits.fixed_bytes(done.recipe, on_gpu, plain) == with_it - 64 * 128 * 4 + chunk + 2**27, "working space"
