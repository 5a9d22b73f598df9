"""AdaLoRA: PEFT's own loop gives the same weights and ranks; penalty and order of calls; its state in a checkpoint."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loratune
from loratune.data import batches, collate, dataset
from loratune.data.encode import Encoder
from loratune.data.sample import single
from loratune.errors import RecipeError
from loratune.methods import AdaLora
from loratune.methods.adalora import STATE
from loratune.methods.tuned import Setup
from loratune.objectives import Sft
from loratune.runs import checkpoint
from loratune.training import loop
from tests import tiny
from tests.conftest import Fit, adapted, logits
from tests.objectives.test_sft import ROWS
from tests.oracle.test_resume import _exactly, _stop_after

METHOD = {"type": "adalora", "init_r": 6, "target_r": 2, "tinit": 0.2, "tfinal": 0.3}
SECTIONS: dict[str, Any] = {"method": METHOD, "train": {"epochs": 5, "save_every": 3, "keep": 9}}


def test_ranks_fall_to_the_budget_and_peft_reads_what_is_left(
    fit: Fit, base: Path, prompts: list[torch.Tensor]
) -> None:
    done = fit(**SECTIONS)
    assert done.column("loss")[-1] < done.column("loss")[0]
    config = json.loads((done.folder / "adapter_config.json").read_text())
    left = [sum(kept) for kept in config["rank_pattern"].values()]
    assert sum(left) == 2 * len(left)
    assert len(set(left)) > 1, "the ranks of the layers differ"
    state = load_file(done.folder / "adapter_model.safetensors")
    assert sorted(t.shape[0] for name, t in state.items() if name.endswith("lora_E")) == sorted(left)
    torch.testing.assert_close(logits(adapted(base, done.folder), prompts), logits(done.net, prompts))


def test_a_training_is_that_of_pefts_own_loop(fit: Fit, base: Path) -> None:
    """The same batches through `AdaLoraModel.forward` with labels, and `update_and_allocate` where PEFT documents it."""
    done = fit(rows=48, **{**SECTIONS, "data": {"packing": "off"}, "train": {"epochs": 3, "schedule": "constant"}})
    settings = done.recipe.train
    set_seed(settings.seed)
    net: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    net.requires_grad_(False)
    steps = len(done.events())
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=6, target_r=2, lora_alpha=32, target_modules="all-linear",
        tinit=int(0.2 * steps), tfinal=int(0.3 * steps), deltaT=1, total_step=steps,
    )  # fmt: skip
    net = get_peft_model(net, config).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], weight_decay=0)
    rows = dataset.of(done.recipe.data, settings.seed, Encoder(tiny.tokenizer()))[0]
    losses = []
    order = batches.batches(rows, settings.batch_size, 10**6, settings.seed, steps)
    for number, (batch, event) in enumerate(zip(order, done.events(), strict=True), 1):
        (part,) = batch.micro
        made = collate.collate(part)
        out = net(**made.inputs, labels=collate.labels(made))
        out.loss.backward()
        losses.append(out.loss.item())
        torch.nn.utils.clip_grad_norm_(net.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = event["lr"]
        optimizer.step()
        net.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    for (name, one), other in zip(net.named_parameters(), done.net.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)
    # PEFT's loss has the penalty in it, the printed one has not
    assert all(with_penalty > alone for with_penalty, alone in zip(losses, done.column("loss"), strict=True))


class _Alone:
    """What the loop asks of accelerate, with one process."""

    device, num_processes, process_index, scaler = torch.device("cpu"), 1, 0, None

    def no_sync(self, model: Any) -> Any:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def test_the_penalty_counts_once_a_step_and_is_not_in_the_printed_loss() -> None:
    """However the step is cut into micro-batches: the same gradient, and the loss of an objective alone."""
    found = {}
    for weight in (0.0, 0.5):
        for cut in (1, 5):
            torch.manual_seed(0)
            net = tiny.model(tiny.tokenizer()).train()
            tuned = AdaLora(orth_reg_weight=weight, init_r=4, target_r=2).apply(net, Setup(100))
            samples = single(ROWS)
            size = -(-len(samples) // cut)
            parts = [samples[begin : begin + size] for begin in range(0, len(samples), size)]
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
            optimizer.param_groups[0]["initial_lr"] = 0.0
            (step,) = loop.steps(
                tuned.policy(), Sft(), tuned, [batches.Batch(parts, 1.0, len(samples))], optimizer, lambda n: 1.0,
                _Alone(), 1e9,
            )  # fmt: skip
            found[weight, cut] = (step.loss, step.grad_norm)
    assert found[0.5, 1] == pytest.approx(found[0.5, 5], rel=1e-5)
    assert found[0.5, 1][0] == pytest.approx(found[0.0, 1][0], rel=1e-6)
    assert found[0.5, 1][1] > found[0.0, 1][1] * 1.01


def test_it_is_told_after_the_optimizer_and_before_gradients_are_dropped() -> None:
    net = tiny.model(tiny.tokenizer()).train()
    tuned = AdaLora(init_r=4, target_r=2).apply(net, Setup(100))
    told: list[tuple[int, bool, bool]] = []
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    watched = next(p for p in net.parameters() if p.requires_grad)
    before = watched.detach().clone()
    tuned.after_step = lambda step: told.append((step, watched.grad is not None, torch.equal(watched, before)))
    order = [batches.Batch([single(ROWS)], 1.0, len(ROWS))] * 2
    list(loop.steps(tuned.policy(), Sft(), tuned, order, optimizer, lambda n: 1.0, _Alone(), 1e9, 7))
    assert told == [(8, True, False), (9, True, False)]


@pytest.mark.parametrize("stop", [4, 9, 13])
def test_a_resumed_run_is_the_straight_one(fit: Fit, stop: int) -> None:
    """Stopped before ranks fall, while they do, and after: what decides them lies in the checkpoint."""
    straight = fit("straight", **SECTIONS)
    with _stop_after(stop):
        fit("stopped", **SECTIONS)
    assert (checkpoint.path_of(straight.folder, 3) / STATE).is_file()
    assert not (straight.folder / STATE).exists()
    assert _exactly(fit("stopped", resume=True, **SECTIONS)) == _exactly(straight)


def _left(folder: Path) -> list[int]:
    """Return the ranks that an adapter's layers have."""
    state = load_file(folder / "adapter_model.safetensors")
    return [t.shape[0] for name, t in state.items() if name.endswith("lora_E")]


@pytest.mark.parametrize(("steps", "tfinal"), [(1, 0.3), (2, 0.5), (3, 0.9), (10, 0.9)])
def test_ranks_are_settled_in_a_run_of_few_steps(fit: Fit, steps: int, tfinal: float) -> None:
    """Also where the first step is the one that settles them, before which PEFT has seen no gradient."""
    method = METHOD | {"tinit": 0.0, "tfinal": tfinal}
    done = fit(method=method, train={"epochs": steps / 3 - 0.1})
    assert len(done.events()) == steps
    assert sum(_left(done.folder)) == 2 * len(_left(done.folder))


@pytest.mark.parametrize("epochs", [4, 5, 6])
def test_a_finished_run_goes_on(fit: Fit, epochs: int) -> None:
    """Its ranks were settled, and gradients forgotten; wherever the longer run settles, they are at the target."""
    fit("a", method=METHOD, train={"epochs": 3})
    done = fit("a", method=METHOD, train={"epochs": epochs}, resume=True)
    assert sum(_left(done.folder)) == 2 * len(_left(done.folder))


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_made_shorter_than_where_ranks_settle(fit: Fit, stop: int) -> None:
    """It never meets the step at which they would have been settled."""
    with _stop_after(stop):
        fit("a", method=METHOD, train={"epochs": 5, "save_every": 1})
    done = fit("a", method=METHOD, train={"epochs": 2, "save_every": 1}, resume=True, allow_drift=True)
    assert sum(_left(done.folder)) == 2 * len(_left(done.folder))


def test_over_nf4_evaluated_and_merged(fit: Fit, tmp_path: Path) -> None:
    done = fit(**SECTIONS, model={"quantization": "nf4"}, data={"eval": "eval.jsonl"})
    found = loratune.evaluate(done.folder, generate=False)
    assert found.scores["adapter"]["loss"].value < found.scores["base"]["loss"].value
    assert found.scores["adapter"]["loss"].value == pytest.approx(done.events("eval")[-1]["loss"], rel=1e-3)
    assert loratune.merge(done.folder, tmp_path / "merged").relative < 1e-4


def test_a_checkpoint_is_an_adapter(fit: Fit, base: Path) -> None:
    done = fit(**SECTIONS, data={"eval": "eval.jsonl"})
    step = checkpoint.path_of(done.folder, 6)
    found = loratune.evaluate(step, data=str(done.folder.parent / "eval.jsonl"), generate=False)
    known = {event["number"]: event["loss"] for event in done.events("eval")}
    if 6 in known:
        assert found.scores["adapter"]["loss"].value == pytest.approx(known[6], rel=1e-4)
    assert found.scores["adapter"]["loss"].value != found.scores["base"]["loss"].value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target_r": 9}, "`method.target_r` 9 is larger than `method.init_r` 6"),
        ({"target_r": 6}, "`method.target_r` is `method.init_r`, 6: no rank would fall"),
        ({"tinit": 0.7, "tfinal": 0.3}, "leave no steps in which ranks could fall"),
    ],
)
def test_fields_that_do_not_go_together(fit: Fit, change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        fit(method=METHOD | change)
