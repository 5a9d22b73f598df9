"""DPO: loss and gradient by hand and by TRL, and the reference that is taken once."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import loratune
from loratune.data import batches
from loratune.data.collate import collate
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample
from loratune.errors import Place, RecipeError, RunFolderError
from loratune.kernels import packed_attention
from loratune.methods import Full, Lora
from loratune.methods.tuned import Setup, Tuned
from loratune.models import base_model
from loratune.objectives import Cpo, Dpo, Orpo, Simpo
from loratune.objectives.preference import _log_odds
from loratune.system.run_files import REFERENCE
from loratune.training import loop, reference, reference_store
from tests import pairs, tiny
from tests.conftest import Fit
from tests.methods.test_adalora import _Alone
from tests.objectives.test_sft import gemma2, llama
from tests.oracle.test_resume import _exactly, _stop_after

TOKENS = tiny.tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No values of the reference from another test."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))


def _forget() -> None:
    """Empty the cache of the reference's values."""
    for file in reference_store.folder().glob("*.json"):
        file.unlink()


def samples(number: int, seed: int = 0, values: bool = True) -> list[Sample]:
    """Return pairs of random rows with a common prompt, and log p of some other model."""
    draw = np.random.default_rng(seed)

    def ids(count: int) -> np.ndarray:
        return draw.integers(2, len(TOKENS), count).astype(np.int32)

    made = []
    for index in range(number):
        prompt = ids(int(draw.integers(1, 9)))
        answers = [ids(int(draw.integers(1, 7))) for _ in range(2)]
        rows = tuple(
            Row(np.concatenate([prompt, a]), np.arange(len(prompt) + len(a)) >= len(prompt), Place("made", index + 1))
            for a in answers
        )
        known = {name: float(-5 * len(a) + draw.normal()) for name, a in zip(Dpo.values, answers, strict=True)}
        made.append(Sample(rows, known if values else {}))
    return made


def _loss(objective: Any, p: list[Any], p0: list[float], n: list[int]) -> Any:
    """Return the loss of a pair as its paper has it, in float64: log p and lengths of chosen and rejected."""
    kind = objective.type if objective.type != "dpo" else objective.loss
    w, l = (p[0] - p0[0], p[1] - p0[1]) if objective.type == "dpo" else p  # noqa: E741
    mw, ml = p[0] / n[0], p[1] / n[1]
    if kind == "orpo":
        odds = [m.exp() / (1 - m.exp()) for m in (mw, ml)]
        return -mw - objective.weight * (odds[0] / odds[1]).log().sigmoid().log()
    if kind == "simpo":
        return -(objective.beta * (mw - ml) - objective.gamma).sigmoid().log() - objective.sft_weight * mw
    if kind == "cpo":
        return -(objective.beta * (w - l)).sigmoid().log() - objective.sft_weight * mw
    d, e = objective.beta * (w - l), objective.label_smoothing
    found = {
        "sigmoid": -(1 - e) * d.sigmoid().log() - e * (-d).sigmoid().log(),
        "robust": (-(1 - e) * d.sigmoid().log() + e * (-d).sigmoid().log()) / (1 - 2 * e),
        "hinge": (1 - d).clamp(min=0),
        "ipo": (w / n[0] - l / n[1] - 1 / (2 * objective.beta)) ** 2,
        "apo_zero": 1 - (objective.beta * w).sigmoid() + (objective.beta * l).sigmoid(),
    }
    return found[kind] - objective.sft_weight * mw


def by_hand(net: Any, some: list[Sample], objective: Any) -> torch.Tensor:
    """Return the summed loss from full logits of each row alone."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in some:
        said, tokens = [], []
        for row in sample.rows:
            ids = torch.from_numpy(row.ids).long()
            logp = net(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            said.append(sum(logp[t - 1, ids[t]] for t in range(1, len(ids)) if row.trained[t]))
            tokens.append(int(row.trained[1:].sum()))
        total = total + _loss(objective, said, [sample.values[name] for name in Dpo.values], tokens)
    return total


def gradients(net: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


OBJECTIVES = [
    Dpo(beta=0.3), Dpo(label_smoothing=0.2), Dpo(loss="robust", label_smoothing=0.1), Dpo(loss="hinge"),
    Dpo(loss="ipo"), Dpo(loss="apo_zero"), Dpo(sft_weight=0.7), Orpo(), Orpo(weight=1.5), Simpo(), Simpo(sft_weight=0.2),
    Cpo(), Cpo(beta=0.4, sft_weight=0),
]  # fmt: skip


def _id(objective: Any) -> str:
    changed = objective.model_dump(exclude_defaults=True)
    return "-".join([objective.type, *(f"{name}={value}" for name, value in changed.items() if name != "type")])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=_id)
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_loss_and_gradient_are_those_of_the_equation(layout: Layout, objective: Any) -> None:
    net, some = llama(), samples(6)
    if layout != "padded":
        packed_attention.register()
        net.set_attn_implementation(packed_attention.NAME)
    batch = collate(some, layout)
    if layout == "shared":  # the prompt of a pair stands there once
        assert batch.computed < collate(some, "packed").computed - 6
    total, sums = objective.total(Tuned(net).policy(), batch)
    total.backward()
    got = gradients(net)
    net.set_attn_implementation("eager")
    wanted = by_hand(net, some, objective)
    wanted.backward()
    assert objective.count(batch) == 6
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, one in gradients(net).items():
        torch.testing.assert_close(got[name], one, rtol=1e-4, atol=1e-5, msg=name)
    if objective.type == "dpo":
        rewards = sums["reward_chosen"] - sums["reward_rejected"]
        assert sums["margin"].item() == pytest.approx(rewards.item(), rel=1e-5)
    assert sums["logp_chosen"] < 0
    assert 0 <= sums["accuracy"].item() <= 6


def test_a_head_that_caps_its_logits() -> None:
    net, some = gemma2(), samples(3)
    total, _ = Dpo().total(Tuned(net).policy(), collate(some))
    assert total.item() == pytest.approx(by_hand(net, some, Dpo()).item(), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=_id)
def test_a_pair_that_is_there_for_company_teaches_nothing(objective: Any) -> None:
    """A process without a pair of its own runs one without trained tokens, as the others wait for it."""
    net = llama()
    (sample,) = samples(1)
    idle = Sample(tuple(Row(r.ids, np.zeros_like(r.trained), r.place) for r in sample.rows), sample.values)
    alone = collate([idle])
    assert objective.count(alone) == 0
    total, sums = objective.total(Tuned(net).policy(), alone)
    assert total.item() == 0
    assert all(one.item() == 0 for one in sums.values())
    total.backward()
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


def test_log_odds_near_0_and_far_from_it() -> None:
    means = torch.tensor([-1e-9, -1e-6, -1e-3, -0.5, -0.7, -1.0, -30.0, -200.0], requires_grad=True)
    found = _log_odds(means)
    exact = means.detach().double().clamp(max=-1e-7).requires_grad_()
    wanted = exact - torch.log(-torch.expm1(exact))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)
    (got,), (right,) = torch.autograd.grad(found.sum(), means), torch.autograd.grad(wanted.sum(), exact)
    assert got.isfinite().all()
    torch.testing.assert_close(got[1:].double(), right[1:], rtol=1e-5, atol=0)


def test_before_step_1_the_loss_is_log_2(fit: Fit, tmp_path: Path) -> None:
    """Evaluation asks the objective as training does, with the reference: at the start neither answer is preferred."""
    done = pairs.fitted(fit, tmp_path)(optimizer={"lr": 1e-12}, train={"epochs": 0.5})
    assert done.column("loss") == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert done.events("eval")[-1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert done.events("eval")[-1]["trained_tokens"] == 7
    assert done.events("eval")[-1]["margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=_id)
def test_the_split_does_not_matter(objective: Any) -> None:
    net, some = llama(), samples(7)
    policy = Tuned(net).policy()
    whole, _ = objective.total(policy, collate(some))
    whole.backward()
    wanted = gradients(net)
    parts = [objective.total(policy, collate(part))[0] for part in (some[:1], some[1:4], some[4:])]
    sum(parts).backward()
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-6)
    largest = max(float(one.abs().max()) for one in wanted.values())
    got = gradients(net)
    assert max(float((got[name] - wanted[name]).abs().max()) for name in wanted) < 1e-6 * largest


RECIPES: list[Any] = [
    {"type": "dpo", "loss": "ipo"}, {"type": "dpo", "loss": "hinge"}, {"type": "dpo", "loss": "apo_zero"},
    {"type": "dpo", "loss": "robust", "label_smoothing": 0.1}, {"type": "dpo", "sft_weight": 1.0},
    "orpo", "simpo", "cpo",
]  # fmt: skip


@pytest.mark.parametrize("objective", RECIPES, ids=str)
def test_every_objective_learns_to_prefer_and_resumes(fit: Fit, tmp_path: Path, objective: Any) -> None:
    run = pairs.fitted(fit, tmp_path, objective=objective, train={"epochs": 5, "save_every": 4})
    straight = run("straight")
    assert straight.column("loss")[-1] < straight.column("loss")[0]
    first, *_, last = straight.events("eval")
    assert last["loss"] < first["loss"]
    if objective != "orpo":  # its weight is small beside the cross entropy
        assert last["margin"] > first["margin"]
    if objective not in ("orpo", "cpo"):  # cpo sums over tokens: longer answers are behind at first
        assert last["accuracy"] > 0.7
        assert last["logp_chosen"] > last["logp_rejected"]
    with _stop_after(6):
        run("stopped")
    assert (straight.folder / REFERENCE).exists() == (straight.recipe.objective.type == "dpo")
    assert _exactly(run("stopped", resume=True)) == _exactly(straight)


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"type": "dpo", "loss": "ipo", "label_smoothing": 0.1}, "has no effect on `loss: ipo`"),
        ({"type": "dpo", "loss": "robust"}, "without `label_smoothing` is `sigmoid`"),
        ({"type": "dpo", "label_smoothing": 0.5}, "below 0.5"),
        ({"type": "dpo", "beta": 0}, "above 0"),
        ("ipo", "write `{type: dpo, loss: ipo}`"),
        ("orpos", "did you mean `orpo`?"),
    ],
    ids=str,
)
def test_keys_that_make_no_loss(tmp_path: Path, base: Path, objective: Any, told: str) -> None:
    path = tiny.write_recipe(tmp_path, base, objective=objective, data={"format": "preference"})
    with pytest.raises(RecipeError, match=re.escape(told)):
        loratune.load_recipe(path)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_dropout_and_a_reference(tmp_path: Path, base: Path, method: str) -> None:
    given = {"method": {"type": method, "lora_dropout": 0.1}, "data": {"format": "preference"}}
    with pytest.raises(RecipeError, match="remove `lora_dropout`"):
        loratune.load_recipe(tiny.write_recipe(tmp_path, base, objective="dpo", **given))
    assert loratune.load_recipe(tiny.write_recipe(tmp_path, base, objective="orpo", **given)).method.dropout == 0.1


def test_the_dropout_of_the_base_is_off(fit: Fit, tmp_path: Path) -> None:
    """Else the loss of the first step would not be log 2."""
    tokens = tiny.tokenizer()
    config = GPT2Config(
        vocab_size=len(tokens), n_positions=256, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None,
        attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokens.save_pretrained(tmp_path / "gpt2")
    run = pairs.fitted(fit, tmp_path, model={"base": str(tmp_path / "gpt2")}, train={"epochs": 0.5})
    done = run(method={"type": "lora", "r": 4, "target_modules": ["c_attn"]}, optimizer={"lr": 1e-12})
    assert done.column("loss") == pytest.approx([math.log(2)] * 2, abs=1e-5)
    llama_like = llama(attention_dropout=0.2)
    assert base_model.turn_off_dropout(llama_like)
    assert not base_model.turn_off_dropout(llama_like)


@pytest.mark.parametrize("method", ["lora", "full", "prompt", "adalora"])
def test_every_method_learns_to_prefer(fit: Fit, tmp_path: Path, method: str) -> None:
    done = pairs.fitted(fit, tmp_path)(method=method, train={"epochs": 5})
    assert done.column("loss")[-1] < math.log(2) - 0.02
    assert done.column("accuracy")[-1] > 0.7
    assert done.events("eval")[-1]["accuracy"] > 0.7
    assert done.events("eval")[-1]["loss"] < math.log(2)


def test_eval_tells_how_often_the_chosen_answer_is_likelier(fit: Fit, tmp_path: Path) -> None:
    done = pairs.fitted(fit, tmp_path)(train={"epochs": 8})
    found = loratune.evaluate(done.folder, max_new_tokens=4)
    assert (found.rows, found.generated) == (7, 7)
    assert found.scores["adapter"]["chosen preferred"].value > found.scores["base"]["chosen preferred"].value
    assert found.scores["adapter"]["chosen preferred"].value == 1.0
    assert found.examples[0]["reference"].startswith("yes")


def test_packed_and_padded_give_the_same_run(fit: Fit, tmp_path: Path) -> None:
    run = pairs.fitted(fit, tmp_path)
    shared, padded = run("shared"), run("padded", data={"packing": "off"})
    assert shared.facts()["batching"]["shared"]
    assert sum(shared.column("computed")) < 0.8 * sum(padded.column("computed"))
    assert shared.column("loss") == pytest.approx(padded.column("loss"), rel=1e-4)


@pytest.mark.parametrize("world", [2, 3])
def test_every_process_has_something_to_run(tmp_path: Path, world: int) -> None:
    from tests.data.test_preference import load_pairs

    rows = load_pairs(tmp_path, pairs.rows(7))
    seen: list[int] = []
    for rank in range(world):
        for batch in batches.batches(rows, 3, "auto", 0, 6, rank=rank, world=world, layout="shared", capacity=128):
            assert batch.micro
            assert batch.samples in (1, 3)
            learned = sum(Dpo().count(collate(part)) for part in batch.micro)
            seen.append(learned)
    assert sum(seen) == 14, "two epochs of seven pairs, each on one process"


# ---------------------------------------------------------------- the reference


def test_the_reference_lies_in_the_run_folder_and_is_not_taken_again(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = pairs.fitted(fit, tmp_path, method="prompt", train={"epochs": 4, "save_every": 2})
    straight = run("straight")
    with _stop_after(5):
        run("stopped")
    known = json.loads((straight.folder / REFERENCE).read_text())
    assert {len(known["train"][name]) for name in Dpo.values} == {32}
    assert {len(known["eval"][name]) for name in Dpo.values} == {7}
    monkeypatch.setattr(Dpo, "once", lambda *_: pytest.fail("taken again"))
    assert _exactly(run("stopped", resume=True)) == _exactly(straight)


def test_the_reference_is_log_p_of_the_base(fit: Fit, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.data.test_preference import load_pairs

    done = pairs.fitted(fit, tmp_path)()
    net = AutoModelForCausalLM.from_pretrained(done.recipe.model.base, dtype=torch.float32)
    known = json.loads((done.folder / REFERENCE).read_text())["train"]
    rows = load_pairs(tmp_path, pairs.rows(32))
    for index in range(0, 32, 5):
        for row, name in zip(rows.sample(index).rows, Dpo.values, strict=True):
            ids = torch.from_numpy(row.ids).long()
            with torch.no_grad():
                logp = net(input_ids=ids[None]).logits[0].log_softmax(-1)
            wanted = sum(float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if row.trained[t])
            assert known[name][index] == pytest.approx(wanted, rel=1e-5)


def test_a_lost_reference_is_taken_from_the_base_where_it_is_the_start(fit: Fit, tmp_path: Path) -> None:
    run = pairs.fitted(fit, tmp_path, train={"epochs": 4, "save_every": 2})
    straight = run("straight")
    with _stop_after(5):
        run("stopped")
    file = straight.folder.parent.parent / "stopped" / "run" / REFERENCE
    before = json.loads(file.read_text())
    file.unlink()
    _forget()
    resumed = run("stopped", resume=True)
    after = json.loads(file.read_text())
    for name in Dpo.values:
        assert after["train"][name] == pytest.approx(before["train"][name], rel=1e-5)
    assert resumed.column("loss") == pytest.approx(straight.column("loss"), rel=1e-4)


@pytest.mark.parametrize("method", ["full", "prompt", {"init": "loftq"}], ids=str)
def test_a_lost_reference_ends_a_resume_where_the_start_is_gone(fit: Fit, tmp_path: Path, method: Any) -> None:
    model = {"quantization": "nf4"} if isinstance(method, dict) else {}
    run = pairs.fitted(fit, tmp_path, method=method, model=model, train={"epochs": 4, "save_every": 2})
    with _stop_after(5):
        run("stopped")
    (tmp_path / "stopped" / "run" / REFERENCE).unlink()
    _forget()
    with pytest.raises(RunFolderError, match="log probabilities are missing"):
        run("stopped", resume=True)


def test_other_rows_make_it_anew(fit: Fit, tmp_path: Path) -> None:
    """What lies there is keyed by the rows: with others, which drift allows, it would be of the wrong samples."""
    run = pairs.fitted(fit, tmp_path, train={"epochs": 4, "save_every": 2})
    with _stop_after(5):
        run("stopped")
    file = tmp_path / "stopped" / "run" / REFERENCE
    before = json.loads(file.read_text())
    tiny.write_jsonl(tmp_path / "pairs.jsonl", pairs.rows(31, seed=8))
    run("stopped", resume=True, allow_drift=True)
    after = json.loads(file.read_text())
    assert after["key"] != before["key"]
    assert len(after["train"]["reference_chosen"]) == 31


def test_off_is_the_start_or_it_is_said_not_to_be() -> None:
    batch = collate(samples(3))
    for method, is_start in ((Lora(), True), (Lora(bias="all"), False), (Lora(init="pissa"), False), (Full(), False)):
        tuned = method.apply(llama(), Setup(1))
        assert tuned.off_is_start is is_start
    tuned = Lora().apply(llama(), Setup(1))
    with torch.no_grad():
        start = tuned.policy().logps(batch)
        for parameter in tuned.net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        assert not torch.allclose(tuned.policy().logps(batch), start)
        with tuned.policy().reference() as before:
            torch.testing.assert_close(before.logps(batch), start, rtol=0, atol=0)


# ---------------------------------------------------------------- a generator before the loop


def test_a_generator_before_the_loop_may_ask_the_model() -> None:
    """Rollouts don't change the loop: what makes batches sees the weights of the step before, and each list is one."""
    net = llama()
    tuned = Lora(r=2).apply(net, Setup(6))
    policy, seen = tuned.policy(), []

    def rounds() -> Any:
        for start in range(3):
            asked = samples(4, seed=start)
            with torch.no_grad():
                once = Dpo().once(policy, collate(asked).to(torch.device("cpu")))
            seen.append(once["reference_chosen"].sum().item())
            known = [
                Sample(one.rows, {name: float(value[i]) for name, value in once.items()}) for i, one in enumerate(asked)
            ]
            for cut in (known[:2], known[2:]):
                yield batches.Batch([cut], float(start), len(cut))

    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1.0)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    rates: list[int] = []
    done = list(
        loop.steps(
            policy, Dpo(), tuned, rounds(), optimizer, lambda n: rates.append(n) or 1.0, _Alone(), 1.0, ahead=False
        )  # type: ignore[func-returns-value]
    )
    assert [step.number for step in done] == [1, 2, 3, 4, 5, 6]
    assert rates == [0, 1, 2, 3, 4, 5]
    assert done[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert done[1].loss != pytest.approx(math.log(2), abs=1e-6), "the second step of a round is off its policy"
    assert all(step.loss == pytest.approx(math.log(2), abs=1e-5) for step in done[::2])


# ---------------------------------------------------------------- TRL


def _of_trl(trl: Any, net: Any, some: list[Sample], objective: Any, folder: Path) -> torch.Tensor:
    """Return the mean loss of DPOTrainer on the same rows and reference."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    types, weights = [objective.loss], [1.0]
    if objective.sft_weight:
        types, weights = [*types, "sft"], [*weights, objective.sft_weight]
    config = trl.DPOConfig(
        output_dir=str(folder), beta=objective.beta, loss_type=types, loss_weights=weights, report_to=[], use_cpu=True,
        bf16=False, max_length=None, gradient_checkpointing=False, precompute_ref_log_probs=False,
        label_smoothing=objective.label_smoothing,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    trainer = trl.DPOTrainer(net, ref_model=llama(), args=config, train_dataset=rows, processing_class=TOKENS)
    examples = []
    for sample in some:
        cut = int(np.argmax(sample.rows[0].trained))
        chosen, rejected = (row.ids[cut:].tolist() for row in sample.rows)
        examples.append(
            {"prompt_ids": sample.rows[0].ids[:cut].tolist(), "chosen_ids": chosen, "rejected_ids": rejected}
            | {"ref_chosen_logps": sample.values["reference_chosen"]}
            | {"ref_rejected_logps": sample.values["reference_rejected"]}
        )
    inputs = DataCollatorForPreference(pad_token_id=0)(examples)
    trainer.precompute_ref_logps = True
    net.eval()
    loss: torch.Tensor = trainer._compute_loss(net, inputs, return_outputs=False)
    return loss


def _of_trl_without_reference(net: Any, some: list[Sample], objective: Any) -> torch.Tensor:
    """Return the mean loss by TRL's functions for CPO, SimPO and ORPO, on log p of full logits."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    sums, means = [], []
    for place in (0, 1):
        rows = [sample.rows[place] for sample in some]
        ids = [torch.from_numpy(row.ids).long() for row in rows]
        logps = [net(input_ids=one[None]).logits[0].log_softmax(-1) for one in ids]
        said = [
            sum(logp[t - 1, one[t]] for t in range(1, len(one)) if row.trained[t])
            for row, one, logp in zip(rows, ids, logps, strict=True)
        ]
        sums.append(torch.stack(said))
        means.append(sums[-1] / torch.tensor([int(row.trained[1:].sum()) for row in rows]))
    about = SimpleNamespace(
        alpha=0.0, accelerator=SimpleNamespace(device="cpu"), label_smoothing=0.0,
        beta=objective.weight if objective.type == "orpo" else objective.beta,
        loss_type="simpo" if objective.type == "simpo" else "sigmoid",
        simpo_gamma=getattr(objective, "gamma", 0.0),
    )  # fmt: skip
    if objective.type == "orpo":
        return (-means[0] - ORPOTrainer.odds_ratio_loss(about, *means)[0]).mean()
    losses = CPOTrainer.cpo_loss(about, *(means if objective.type == "simpo" else sums))[0]
    return (losses - objective.sft_weight * means[0]).mean()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=_id)
def test_loss_and_gradient_are_those_of_trl(tmp_path: Path, objective: Any) -> None:
    """TRL 1.16: the same rows and reference, in float32, to 1e-5 of the largest gradient.

    Where TRL differs from the papers: `sigmoid` ignores its label smoothing, the cross entropy that DPO adds is a mean
    over the tokens of all answers, ORPO's is over the prompt as well. There the equation is the reference (above).
    """
    trl = pytest.importorskip("trl")
    if objective.type == "dpo" and (
        (objective.loss == "sigmoid" and objective.label_smoothing) or objective.sft_weight
    ):
        pytest.skip("TRL has no such loss")
    some, net = samples(5), llama()
    loss = (
        _of_trl(trl, net, some, objective, tmp_path)
        if objective.type == "dpo"
        else _of_trl_without_reference(net, some, objective)
    )
    loss.backward()
    wanted = gradients(net)
    total, _ = objective.total(Tuned(net).policy(), collate(some))
    (total / len(some)).backward()
    got = gradients(net)
    assert total.item() / len(some) == pytest.approx(loss.item(), rel=1e-5)
    largest = max(float(one.abs().max()) for one in wanted.values())
    assert max(float((got[name] - wanted[name]).abs().max()) for name in wanted) < 1e-5 * largest


def test_blocks_of_the_reference_are_cut_where_rows_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.data.test_preference import load_pairs

    monkeypatch.setattr(reference, "BLOCK", 4)
    rows = load_pairs(tmp_path, pairs.rows(11))
    for layout in ("shared", "padded"):
        found = list(reference._parts(rows, layout, 200))  # type: ignore[arg-type]
        assert sorted(number for numbers, _ in found for number in numbers) == list(range(11))
        for numbers, some in found:
            assert [one.place for one in some] == [rows.sample(number).place for number in numbers]


def _change(file: Path, change: str) -> None:
    """Damage a file of reference log probabilities that stays JSON."""
    known = json.loads(file.read_text())
    if change == "number":
        known["train"]["reference_chosen"][3] += 1.0
    elif change == "nan":
        known["train"]["reference_chosen"][3] = float("nan")
    elif change == "set":
        del known["eval"]
    else:
        known["train"] = {}
    file.write_text(json.dumps(known))


@pytest.mark.parametrize("change", ["number", "nan", "set", "names"])
def test_a_damaged_reference_is_not_used(fit: Fit, tmp_path: Path, change: str) -> None:
    run = pairs.fitted(fit, tmp_path, train={"epochs": 2, "save_every": 2})
    straight = run("straight")
    with _stop_after(3):
        run("stopped")
    file = tmp_path / "stopped" / "run" / REFERENCE
    before = json.loads(file.read_text())
    _change(file, change)
    assert run("stopped", resume=True).column("loss") == pytest.approx(straight.column("loss"), rel=1e-4)
    assert json.loads(file.read_text())["key"] == before["key"]


def test_another_beta_keeps_the_reference(fit: Fit, tmp_path: Path) -> None:
    """It is log p of the answers, whatever is made of it, and a full fine-tuning can't take it again."""
    run = pairs.fitted(fit, tmp_path, method="full", train={"epochs": 2, "save_every": 2})
    with _stop_after(3):
        run("stopped")
    file = tmp_path / "stopped" / "run" / REFERENCE
    before = file.read_text()
    run("stopped", resume=True, allow_drift=True, objective={"type": "dpo", "beta": 0.3})
    assert file.read_text() == before


@pytest.mark.parametrize("own", [False, True])
def test_starting_over_without_pairs_takes_the_reference_away(fit: Fit, tmp_path: Path, own: bool) -> None:
    """But not a file of that name that no run wrote."""
    pairs.fitted(fit, tmp_path)("a")
    file = tmp_path / "a" / "run" / REFERENCE
    if own:
        file.write_text('{"mine": 1}')
    fit("a", overwrite=True)
    assert file.exists() == own


def test_progress_of_the_reference_counts_through_both_sets(tmp_path: Path, base: Path) -> None:
    tiny.write_recipe(tmp_path, base, objective="dpo", data={"eval": "eval.jsonl"})
    tiny.write_jsonl(tmp_path / "train.jsonl", pairs.rows(9))
    tiny.write_jsonl(tmp_path / "eval.jsonl", pairs.rows(3, seed=7))
    told: list[loratune.Counted] = []
    loratune.train(
        loratune.load_recipe(tmp_path / "recipe.yaml"),
        on_event=lambda e: told.append(e) if isinstance(e, loratune.Counted) and "log p" in e.what else None,
    )
    counts = [event.count for event in told]
    assert counts == sorted(counts)
    assert (counts[-1], told[-1].share, told[-1].over) == (12, 1.0, True)
