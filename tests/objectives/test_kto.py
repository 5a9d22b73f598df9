"""KTO: loss and gradient by hand and by TRL, and z0, which is one number for a whole step."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loratune
from loratune.console import Terminal
from loratune.data import batches
from loratune.data.collate import collate
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample
from loratune.errors import DataError, Place, RecipeError, UsageError
from loratune.kernels import packed_attention
from loratune.methods import Lora
from loratune.methods.tuned import Setup, Tuned
from loratune.objectives import Kto
from loratune.training import loop
from tests import rated, tiny
from tests.conftest import Fit
from tests.methods.test_adalora import _Alone
from tests.objectives.test_preference import gradients
from tests.objectives.test_sft import llama
from tests.oracle.test_resume import _exactly, _stop_after
from tests.oracle.test_split import _two_processes

TOKENS = tiny.tokenizer()
CPU = torch.device("cpu")


def moved(size: float = 0.03) -> Tuned:
    """Return a tiny model with an adapter that is no longer at its start."""
    tuned = Lora(r=4).apply(llama(), Setup(1))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.net.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return tuned


def samples(number: int, seed: int = 0) -> list[Sample]:
    """Return random rows with prompts of their own, in turn good and bad, with log p under the base."""
    draw, base = np.random.default_rng(seed), llama()
    made = []
    for index in range(number):
        prompt, answer = (draw.integers(2, len(TOKENS), int(draw.integers(2, 9))).astype(np.int32) for _ in range(2))
        ids = np.concatenate([prompt, answer])
        labels = np.array([float(index % 2 == 0)], dtype=np.float32)
        row = Row(ids, np.arange(len(ids)) >= len(prompt), Place("made", index + 1), labels)
        made.append(Sample((row,), {"reference": logp(base, row).item()}))
    return made


def logp(net: Any, row: Row) -> torch.Tensor:
    """Return log p of a row's trained tokens in float64, from full logits of the row alone."""
    ids = torch.from_numpy(row.ids).long()
    logps = net(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return sum(
        (logps[t - 1, ids[t]] for t in range(1, len(ids)) if row.trained[t]), torch.zeros((), dtype=torch.float64)
    )


def mismatched(one: Row, other: Row) -> Row:
    """Return the prompt of one row with the answer of another."""
    prompt, answer = one.ids[~one.trained], other.ids[other.trained]
    ids = np.concatenate([prompt, answer])
    return Row(ids, np.arange(len(ids)) >= len(prompt), one.place)


def kl(net: Any, base: Any, some: list[Sample]) -> float:
    """Return the mean of log p - log p0 of the prompts with the answers to the ones before, as the paper has it."""
    longest = max(sample.tokens for sample in some)
    found = []
    for index, sample in enumerate(some):
        row = mismatched(sample.rows[0], some[index - 1].rows[0])
        row = Row(row.ids[:longest], row.trained[:longest], row.place)
        with torch.no_grad():
            found.append((logp(net, row) - logp(base, row)).item())
    return sum(found) / len(found)


def by_hand(net: Any, some: list[Sample], objective: Kto, zero: float) -> torch.Tensor:
    """Return the summed loss, eq. 7 of the paper, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    of_good, of_bad = objective.weights
    for sample in some:
        gained = logp(net, sample.rows[0]) - sample.values["reference"]
        if sample.labels[0] == 1:
            total = total + of_good * (1 - torch.sigmoid(objective.beta * (gained - zero)))
        else:
            total = total + of_bad * (1 - torch.sigmoid(objective.beta * (zero - gained)))
    return total


def known(some: list[Sample], value: float) -> list[Sample]:
    """Return samples that know the mean of a step's probes."""
    return [replace(one, values={**one.values, "kl": value}) for one in some]


OBJECTIVES = [Kto(), Kto(beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["default", "weighted"])
@pytest.mark.parametrize("given", [1.75, -0.5])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_loss_and_gradient_are_those_of_the_equation(layout: Layout, given: float, objective: Kto) -> None:
    tuned, some = moved(), samples(6)
    if layout != "padded":
        packed_attention.register()
        tuned.net.set_attn_implementation(packed_attention.NAME)
    batch = collate(known(some, given), layout)
    total, sums = objective.total(tuned.policy(), batch)
    total.backward()
    got = gradients(tuned.net)
    tuned.net.set_attn_implementation("eager")
    wanted = by_hand(tuned.net, some, objective, max(given, 0.0))
    wanted.backward()
    assert objective.count(batch) == 6
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert len(got) > 20
    for name, one in gradients(tuned.net).items():
        torch.testing.assert_close(got[name], one, rtol=1e-4, atol=1e-6, msg=name)
    assert sums["kl"].item() == pytest.approx(6 * max(given, 0.0))


def test_figures_are_of_the_rows_that_they_name() -> None:
    tuned, some, objective = moved(), samples(5), Kto(beta=0.4)
    _, sums = objective.total(tuned.policy(), collate(known(some, 0.3)))
    rewards = [objective.beta * (logp(tuned.net, one.rows[0]).item() - one.values["reference"]) for one in some]
    means = [logp(tuned.net, one.rows[0]).item() / one.rows[0].count() for one in some]
    for name, values in (("reward", rewards), ("logp", means)):
        assert sums[f"{name}_desirable"].item() == pytest.approx(sum(values[0::2]), rel=1e-4)
        assert sums[f"{name}_undesirable"].item() == pytest.approx(sum(values[1::2]), rel=1e-4)
        assert (sums[f"{name}_desirable#"].item(), sums[f"{name}_undesirable#"].item()) == (3, 2)
    right = [(reward > 0.4 * 0.3) == (index % 2 == 0) for index, reward in enumerate(rewards)]
    assert sums["accuracy"].item() == sum(right)


def test_a_row_that_is_there_for_company_teaches_nothing() -> None:
    tuned, (sample,) = moved(), samples(1)
    row = sample.rows[0]
    idle = replace(sample, rows=(replace(row, trained=np.zeros_like(row.trained)),))
    batch = collate(known([idle], 0.5))
    assert Kto().count(batch) == 0
    total, sums = Kto().total(tuned.policy(), batch)
    assert total.item() == 0
    assert all(one.item() == 0 for one in sums.values())
    total.backward()
    assert all(not p.grad.any() for p in tuned.net.parameters() if p.grad is not None)


# ---------------------------------------------------------------- z0


def test_each_prompt_is_asked_with_the_answer_before_it_if_that_is_another() -> None:
    some = samples(4)
    twin = mismatched(some[1].rows[0], some[0].rows[0])  # another prompt, the same answer as the one before
    some[1] = replace(some[1], rows=(replace(some[1].rows[0], ids=twin.ids, trained=twin.trained),))
    longest = max(sample.tokens for sample in some)
    found = [sample.rows[0] for sample in Kto().probes(some)]
    wanted = [mismatched(some[i].rows[0], some[i - 1].rows[0]) for i in (0, 2, 3)]
    for one, other in zip(found, wanted, strict=True):
        assert one.ids.tolist() == other.ids[:longest].tolist()
        assert one.trained.tolist() == other.trained[:longest].tolist()
        assert one.place == other.place
    assert Kto().probes(some[:1]) == Kto().probes([]) == []


def test_what_follows_an_answer_and_stands_within_it_keeps_its_mask() -> None:
    rows = [
        Row(np.arange(begin, begin + 7, dtype=np.int32), np.array(trained, dtype=bool), Place("made", begin))
        for begin, trained in ((10, [0, 0, 1, 1, 0, 0, 0]), (20, [0, 1, 1, 0, 1, 1, 0]))
    ]
    found = [sample.rows[0] for sample in Kto().probes([Sample((row,)) for row in rows])]
    assert [row.ids.tolist() for row in found] == [[10, 11, 21, 22, 23, 24, 25], [20, 12, 13]]
    assert [row.trained.tolist() for row in found] == [
        [False, False, True, True, False, True, True],
        [False, True, True],
    ]


@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_z0_is_the_mean_over_the_step(tokens: int) -> None:
    tuned, some = moved(), samples(7)
    wanted = kl(tuned.net, llama(), some)
    asked: list[int] = []
    found = loop._probed(tuned.policy(), Kto(), some, tokens, _Alone(), lambda: asked.append(1))
    assert found["kl"].item() == pytest.approx(wanted, rel=1e-5)
    assert len(asked) == {1: 7, 30: 3, 10_000: 1}[tokens]


def _one_step(cut: list[int], zero_rate: float = 0.0) -> tuple[loratune.events.Step, dict[str, torch.Tensor]]:
    """Take a step whose samples are cut into micro-batches at these places; return it and the gradient."""
    tuned, some = moved(), samples(8)
    parts = [some[begin:end] for begin, end in zip([0, *cut], [*cut, 8], strict=True)]
    optimizer = torch.optim.SGD([p for p in tuned.net.parameters() if p.requires_grad], lr=zero_rate)
    optimizer.param_groups[0]["initial_lr"] = zero_rate
    kept: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        kept.update({name: p.grad.clone() for name, p in tuned.net.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    batch = batches.Batch(parts, 1.0, 8)
    (step,) = loop.steps(tuned.policy(), Kto(), tuned, [batch], optimizer, lambda n: 1.0, _Alone(), 1e9)
    return step, kept


def test_the_split_does_not_matter() -> None:
    tuned, some = moved(), samples(8)
    zero = kl(tuned.net, llama(), some)
    assert zero > 0.01, "else z0 is 0, and nothing is compared"
    wanted = by_hand(tuned.net, some, Kto(), zero) / 8
    wanted.backward()
    exact = gradients(tuned.net)
    largest = max(float(one.abs().max()) for one in exact.values())
    for cut in ([], [1, 2, 3, 4, 5, 6, 7], [3], [2, 7]):
        step, got = _one_step(cut)
        assert step.loss == pytest.approx(wanted.item(), rel=1e-6)
        assert step.metrics["kl"] == pytest.approx(zero, rel=1e-5)
        assert max(float((got[name] - exact[name]).abs().max()) for name in exact) < 1e-5 * largest


def test_the_adapter_is_on_and_trained_after_the_model_before_step_1_was_asked() -> None:
    tuned, some = moved(), samples(4)
    before = {name: p.requires_grad for name, p in tuned.net.named_parameters()}
    logps = tuned.policy().logps(collate(some)).detach()
    loop._probed(tuned.policy(), Kto(), some, 100, _Alone(), lambda: None)
    assert {name: p.requires_grad for name, p in tuned.net.named_parameters()} == before
    torch.testing.assert_close(tuned.policy().logps(collate(some)).detach(), logps, rtol=0, atol=0)


# ---------------------------------------------------------------- runs

TRAIN = {"batch_size": 8, "epochs": 3, "schedule": "linear", "warmup": 0}


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_at_step_1_the_loss_is_half_the_weight(fit: Fit, tmp_path: Path, weight: float) -> None:
    objective = {"type": "kto", "desirable_weight": weight, "undesirable_weight": weight}
    done = rated.fitted(fit, tmp_path, objective=objective, optimizer={"lr": 1e-12}, train={"epochs": 0.5})()
    assert done.column("loss") == pytest.approx([0.5 * weight] * 2, abs=1e-5)
    assert done.column("kl")[0] == 0
    assert done.column("reward_desirable") == pytest.approx([0, 0], abs=1e-5)
    assert done.events("eval")[-1]["loss"] == pytest.approx(0.5 * weight, abs=1e-5)
    assert done.events("eval")[-1]["trained_tokens"] == 7


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_it_learns_what_is_good_and_resumes_bit_for_bit(fit: Fit, tmp_path: Path, method: str) -> None:
    run = rated.fitted(fit, tmp_path, method=method, optimizer={"lr": 3e-3}, train={"epochs": 5, "save_every": 4})
    straight = run("straight")
    first, *_, last = straight.events("eval")
    assert last["loss"] < first["loss"] < 0.5
    assert last["accuracy"] > 0.7
    assert last["reward_desirable"] > last["reward_undesirable"]
    assert max(straight.column("kl")) > 0.01
    with _stop_after(6):
        run("stopped")
    resumed = run("stopped", resume=True)
    assert _exactly(resumed) == _exactly(straight)
    assert resumed.column("kl") == straight.column("kl")


def _apart(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Return the largest relative difference of loss, gradient norm and z0 of two runs."""
    assert len(one) == len(other) > 0
    return max(
        abs(a[name] - b[name]) / (abs(b[name]) + 1e-3)
        for a, b in zip(one, other, strict=True)
        for name in ("loss", "grad_norm", "kl")
    )


@pytest.mark.parametrize("more", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"packing": "on"}], ids=str)
def test_micro_batches_and_packs_are_one_of_eight(fit: Fit, tmp_path: Path, more: dict[str, Any]) -> None:
    """Also the evaluation, whose z0 is that of all its rows."""
    data = {"packing": more.get("packing", "off")}
    train = {**TRAIN, **{name: value for name, value in more.items() if name != "packing"}}
    run = rated.fitted(fit, tmp_path)
    whole = run("whole", train={**TRAIN, "micro_batch_size": 8}, data={"packing": "off"})
    parts = run("parts", train=train, data=data)
    assert whole.column("loss")[-1] < 0.95 * whole.column("loss")[0], "nothing was learned, so nothing was compared"
    assert max(whole.column("kl")) > 0.1
    assert _apart(parts.events(), whole.events()) < 1e-4
    assert parts.column("tokens") == whole.column("tokens"), "of the rows, not of the probes"
    assert min(whole.column("tokens")) > min(whole.column("trained_tokens"))
    for one, other in zip(parts.events("eval"), whole.events("eval"), strict=True):
        for name in ("loss", "accuracy", "kl", "reward_desirable", "reward_undesirable"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4)


def test_two_processes_are_one(fit: Fit, base: Path, tmp_path: Path) -> None:
    """25 rows leave a last batch of one for two processes: one has nothing to learn from, and nobody anything to ask."""
    run = rated.fitted(fit, tmp_path, number=25, data={"packing": "off"}, train={**TRAIN, "micro_batch_size": 4})
    alone = run("alone")
    (tmp_path / "two").mkdir()
    text = (alone.folder.parent / "recipe.yaml").read_text()
    (tmp_path / "two" / "recipe.yaml").write_text(text)
    folder = _two_processes(tmp_path / "two" / "recipe.yaml")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    assert {line["rows"] for line in lines if line["kind"] == "step"} == {8, 1}
    assert _apart([line for line in lines if line["kind"] == "step"], alone.events()) < 1e-4
    for one, other in zip([line for line in lines if line["kind"] == "eval"], alone.events("eval"), strict=True):
        for name in ("loss", "accuracy", "kl", "reward_desirable", "reward_undesirable"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4)


def test_an_evaluation_of_good_rows_alone_has_no_figures_of_bad_ones(fit: Fit, tmp_path: Path) -> None:
    good = tiny.write_jsonl(tmp_path / "good.jsonl", [row for row in rated.rows(12, seed=9) if row["label"]])
    done = rated.fitted(fit, tmp_path, data={"eval": str(good)})()
    (event,) = done.events("eval")
    assert "reward_desirable" in event
    assert "reward_undesirable" not in event


def test_eval_compares_with_good_answers_only(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = rated.fitted(fit, tmp_path, train={"epochs": 5})()
    found = loratune.evaluate(done.folder, max_new_tokens=4, on_event=Terminal())
    assert (found.rows, found.generated) == (3, 3)
    assert all(example["reference"].startswith("yes") for example in found.examples)
    assert "4 rows labelled false are left out" in capsys.readouterr().err
    assert loratune.evaluate(done.folder, limit=2, generate=False).rows == 2
    bad = tiny.write_jsonl(tmp_path / "bad.jsonl", [row for row in rated.rows(12, seed=9) if not row["label"]])
    with pytest.raises(UsageError, match="all rows are labelled false"):
        loratune.evaluate(done.folder, data=str(bad))


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("objective", "weights", "note"),
    [
        (Kto(), (1.0, 1.0), "16 good rows of weight 1, 8 bad ones of weight 1: 2 to 1 in all"),
        (Kto(undesirable_weight=1.5), (1.0, 1.5), ""),
        (Kto(undesirable_weight=4), (1.0, 4.0), "set `objective.desirable_weight: auto`"),
        (Kto(undesirable_weight="auto"), (1.0, 2.0), "16 good rows of weight 1, 8 bad ones of weight 2"),
        (Kto(desirable_weight="auto"), (0.5, 1.0), "16 good rows of weight 0.5, 8 bad ones of weight 1"),
        (Kto(desirable_weight="auto", undesirable_weight=3), (1.5, 3.0), "16 good rows of weight 1.5"),
        (Kto(desirable_weight="auto", undesirable_weight="auto"), (1.0, 2.0), "8 bad ones of weight 2"),
    ],
    ids=str,
)
def test_weights(tmp_path: Path, objective: Kto, weights: tuple[float, float], note: str) -> None:
    from tests.data.test_kto import load_rated

    rows = load_rated(tmp_path, rated.rows(24, bad=3))
    bound = objective.of_rows(rows, tiny.data())
    assert bound.weights == pytest.approx(weights)
    assert " ".join(bound.notes()).count(note or "x") == bool(note)
    assert bound.model_dump() == objective.model_dump(), "the recipe of the run says auto, too"


def test_rows_count_as_often_as_they_are_shown(tmp_path: Path) -> None:
    good, bad = ([row for row in rated.rows(24) if row["label"] is label] for label in (True, False))
    for name, rows in (("good", good), ("bad", bad)):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    from loratune.data import dataset
    from loratune.data.encode import Encoder

    sources = [{"path": str(tmp_path / "good.jsonl")}, {"path": str(tmp_path / "bad.jsonl"), "weight": 2.5}]
    data = tiny.data(train=sources, format="kto")
    bound = Kto(desirable_weight="auto").of_rows(dataset.load(data.train, data, Encoder(TOKENS)), data)
    assert bound.weights == (2.5, 1.0)


def test_auto_weights_are_used_and_told(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = rated.fitted(fit, tmp_path, bad=4, optimizer={"lr": 1e-12}, data={"packing": "off"}, train={"batch_size": 32})
    done = run(objective={"type": "kto", "undesirable_weight": "auto"})
    assert "24 good rows of weight 1, 8 bad ones of weight 3" in capsys.readouterr().err
    assert done.column("loss") == pytest.approx([0.5 * (24 + 8 * 3) / 32], abs=1e-5)
    assert "undesirable_weight: auto" in (done.folder / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (True, "all 6 rows to train on are labelled true, none false\n  use `objective: sft`"),
        (False, "all 6 rows to train on are labelled false, none true\n  add good answers"),
    ],
)
def test_labels_of_one_kind_only(fit: Fit, tmp_path: Path, label: bool, told: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("loratune.models.base_model.load", lambda *_: pytest.fail("a model is loaded"))
    rows = tiny.write_jsonl(tmp_path / "some.jsonl", [{**row, "label": label} for row in rated.rows(6)])
    with pytest.raises(DataError) as raised:
        fit("a", objective="kto", data={"train": str(rows)})
    assert str(rows) in str(raised.value)
    assert told in str(raised.value)
    with pytest.raises(DataError, match="labelled"):
        loratune.inspect(loratune.load_recipe(tmp_path / "a" / "recipe.yaml"))


# ---------------------------------------------------------------- what can't be


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"method": "full"}, "and with `method: full` that is not the model before step 1"),
        ({"method": "prompt"}, "with `method: prompt` that is not"),
        ({"method": {"init": "pissa"}}, "with `method.init: pissa` that is not"),
        ({"method": {"init": "olora"}}, "`method.init: olora` that is not"),
        ({"method": {"bias": "all"}}, "with `method.bias: all` that is not"),
        ({"method": {"lora_dropout": 0.1}}, "remove `lora_dropout`"),
        ({"train": {"batch_size": 1}}, "`train.batch_size: 1` leaves nothing to compare with"),
        ({"objective": {"type": "kto", "beta": 0}}, "above 0"),
        ({"objective": {"type": "kto", "desirable_weight": 0}}, "must be a number above 0, or `auto`"),
        ({"objective": {"type": "kto", "undesirable_weight": True}}, "must be a number above 0, or `auto`"),
        ({"objective": {"type": "kto", "undesirable_weight": "much"}}, "must be a number above 0, or `auto`"),
        ({"data": {"on_long": "truncate"}}, "would cut answers of `data.format: kto`"),
        ({"data": {"format": "preference"}}, "does not learn from rows of `data.format: preference`"),
    ],
    ids=str,
)
def test_recipes_that_are_refused(tmp_path: Path, base: Path, sections: dict[str, Any], told: str) -> None:
    path = tiny.write_recipe(tmp_path, base, **{"objective": "kto", **sections})
    with pytest.raises(RecipeError, match=re.escape(told)):
        loratune.load_recipe(path)


def test_an_adapter_to_continue_is_merged_first(fit: Fit, tmp_path: Path, base: Path) -> None:
    first = fit("first").folder
    path = tiny.write_recipe(tmp_path, base, objective="kto", method={"type": "lora", "continue_from": str(first)})
    with pytest.raises(RecipeError, match=re.escape("merge that adapter first")):
        loratune.load_recipe(path)


# ---------------------------------------------------------------- TRL


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["default", "weighted"])
def test_loss_and_gradient_are_those_of_trl(tmp_path: Path, objective: Kto) -> None:
    """TRL 1.16, one micro-batch a step: the same rows, rotation and reference, to 1e-5.

    Where TRL differs: z0 is that of a micro-batch, so that its loss depends on the split, a prompt is also asked with
    an answer that equals its own, and rows are not cut to the longest of the step but to `max_length`.
    """
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    some = samples(6)
    cut = [mismatched(one.rows[0], some[i - 1].rows[0]) for i, one in enumerate(some)]
    net, base = llama(), llama()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    config = trl.KTOConfig(
        output_dir=str(tmp_path), beta=objective.beta, desirable_weight=objective.weights[0],
        undesirable_weight=objective.weights[1], report_to=[], use_cpu=True, bf16=False, max_length=None,
        gradient_checkpointing=False, per_device_train_batch_size=6, train_sampling_strategy="sequential",
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": index % 2 == 0} for index in range(6)])
    trainer = trl.KTOTrainer(net, ref_model=base, args=config, train_dataset=rows, processing_class=TOKENS)
    examples = [
        {
            "prompt_ids": one.rows[0].ids[~one.rows[0].trained].tolist(),
            "completion_ids": one.rows[0].ids[one.rows[0].trained].tolist(),
            "KL_completion_ids": some[i - 1].rows[0].ids[some[i - 1].rows[0].trained].tolist(),
            "label": bool(one.labels[0]),
        }
        for i, one in enumerate(some)
    ]
    net.eval()
    loss = trainer._compute_loss(net, DataCollatorForUnpairedPreference(pad_token_id=0)(examples), return_outputs=False)
    loss.backward()
    wanted = gradients(net)
    zero = float(np.mean([(logp(net, row) - logp(base, row)).item() for row in cut]))
    assert zero > 0.01
    assert trainer._metrics["eval"]["kl"] == pytest.approx([zero], rel=1e-4)
    total, _ = objective.total(Tuned(net).policy(), collate(known(some, zero)))
    (total / 6).backward()
    got = gradients(net)
    assert total.item() / 6 == pytest.approx(loss.item(), rel=1e-5)
    largest = max(float(one.abs().max()) for one in wanted.values())
    assert max(float((got[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5 * largest
