"""DPO: loss and gradient by hand and by TRL, and the reference that is taken once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

import loratune
from loratune.data import batches
from loratune.data.collate import collate
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample
from loratune.errors import Place, RunFolderError
from loratune.kernels import packed_attention
from loratune.methods import Full, Lora
from loratune.methods.tuned import Setup, Tuned
from loratune.objectives import Dpo
from loratune.system.run_files import REFERENCE
from loratune.training import loop, reference
from tests import pairs, tiny
from tests.conftest import Fit
from tests.methods.test_adalora import _Alone
from tests.objectives.test_sft import gemma2, llama
from tests.oracle.test_resume import _exactly, _stop_after

TOKENS = tiny.tokenizer()


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


def by_hand(net: Any, some: list[Sample], beta: float) -> torch.Tensor:
    """Return the summed loss from full logits of each row alone; equation 7 of the paper."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in some:
        rewards = []
        for row, name in zip(sample.rows, Dpo.values, strict=True):
            ids = torch.from_numpy(row.ids).long()
            logp = net(input_ids=ids[None]).logits[0].double().log_softmax(-1)
            said = sum(logp[t - 1, ids[t]] for t in range(1, len(ids)) if row.trained[t])
            rewards.append(beta * (said - sample.values[name]))
        total = total - logsigmoid(rewards[0] - rewards[1])
    return total


def gradients(net: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_loss_and_gradient_are_those_of_the_equation(layout: Layout) -> None:
    net, some = llama(), samples(6)
    if layout != "padded":
        packed_attention.register()
        net.set_attn_implementation(packed_attention.NAME)
    batch = collate(some, layout)
    if layout == "shared":  # the prompt of a pair stands there once
        assert batch.computed < collate(some, "packed").computed - 6
    objective = Dpo(beta=0.3)
    total, sums = objective.total(Tuned(net).policy(), batch)
    total.backward()
    got = gradients(net)
    net.set_attn_implementation("eager")
    wanted = by_hand(net, some, 0.3)
    wanted.backward()
    assert objective.count(batch) == 6
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, one in gradients(net).items():
        torch.testing.assert_close(got[name], one, rtol=1e-4, atol=1e-5, msg=name)
    assert sums["margin"].item() == pytest.approx((sums["reward_chosen"] - sums["reward_rejected"]).item(), rel=1e-5)
    assert 0 <= sums["accuracy"].item() <= 6


def test_a_head_that_caps_its_logits() -> None:
    net, some = gemma2(), samples(3)
    total, _ = Dpo().total(Tuned(net).policy(), collate(some))
    assert total.item() == pytest.approx(by_hand(net, some, 0.1).item(), rel=1e-5)


def test_a_pair_that_is_there_for_company_teaches_nothing() -> None:
    """A process without a pair of its own runs one without trained tokens, as the others wait for it."""
    net, objective = llama(), Dpo()
    (sample,) = samples(1)
    idle = Sample(tuple(Row(r.ids, np.zeros_like(r.trained), r.place) for r in sample.rows), sample.values)
    alone = collate([idle])
    assert objective.count(alone) == 0
    total, sums = objective.total(Tuned(net).policy(), alone)
    assert total.item() == 0
    assert all(one.item() == 0 for one in sums.values())
    total.backward()
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


def test_before_step_1_the_loss_is_log_2(fit: Fit, tmp_path: Path) -> None:
    """Evaluation asks the objective as training does, with the reference: at the start neither answer is preferred."""
    done = pairs.fitted(fit, tmp_path)(optimizer={"lr": 1e-12}, train={"epochs": 0.5})
    assert done.column("loss") == pytest.approx([math.log(2)] * 2, abs=1e-5)
    assert done.events("eval")[-1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert done.events("eval")[-1]["trained_tokens"] == 7
    assert done.events("eval")[-1]["margin"] == pytest.approx(0, abs=1e-4)


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
    resumed = run("stopped", resume=True)
    after = json.loads(file.read_text())
    for name in Dpo.values:
        assert after["train"][name] == pytest.approx(before["train"][name], rel=1e-5)
    assert resumed.column("loss") == pytest.approx(straight.column("loss"), rel=1e-4)


@pytest.mark.parametrize("method", ["full", "prompt"])
def test_a_lost_reference_ends_a_resume_where_the_start_is_gone(fit: Fit, tmp_path: Path, method: str) -> None:
    run = pairs.fitted(fit, tmp_path, method=method, train={"epochs": 4, "save_every": 2})
    with _stop_after(5):
        run("stopped")
    (tmp_path / "stopped" / "run" / REFERENCE).unlink()
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


def test_loss_and_gradient_are_those_of_trl(tmp_path: Path) -> None:
    """TRL 1.16: the same rows and reference, in float32, to 1e-5 of the largest gradient."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    some, net = samples(5), llama()
    config = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.2, report_to=[], use_cpu=True, bf16=False, max_length=None,
        gradient_checkpointing=False, precompute_ref_log_probs=False,
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
    loss = trainer._compute_loss(net, inputs, return_outputs=False)
    loss.backward()
    wanted = gradients(net)
    total, _ = Dpo(beta=0.2).total(Tuned(net).policy(), collate(some))
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
