"""Pattern-exploiting training: loss and gradient by hand, figures, and a run from its first step to its evaluation."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loratune
from loratune.commands import evaluate
from loratune.data.collate import collate
from loratune.data.encode import Encoder, Row
from loratune.data.formats import Plain
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample
from loratune.errors import Place, RecipeError, UsageError
from loratune.kernels import packed_attention
from loratune.methods.tuned import Tuned
from loratune.objectives import Pattern
from tests import labelled, tiny
from tests.conftest import Fit
from tests.objectives.test_preference import gradients
from tests.objectives.test_sft import gemma2, llama
from tests.oracle.test_resume import _exactly, _stop_after

TOKENS = tiny.tokenizer()
BOTH = [Pattern(), Pattern(normalise="mean")]


def samples(number: int, patterns: int = 2, labels: int = 3, seed: int = 0) -> list[Sample]:
    """Return rows of random tokens: each pattern with each label's, of one to three tokens."""
    draw = np.random.default_rng(seed)

    def ids(count: int) -> np.ndarray:
        return draw.integers(2, len(TOKENS), count).astype(np.int32)

    words = [ids(1 + index % 3) for index in range(labels)]
    made = []
    for index in range(number):
        rows = []
        for _ in range(patterns):
            before = ids(int(draw.integers(2, 9)))
            for word in words:
                whole = np.concatenate([before, word])
                rows.append(Row(whole, np.arange(len(whole)) >= len(before), Place("made", index + 1)))
        known = np.eye(labels, dtype=np.float32)[int(draw.integers(labels))]
        rows[0] = Row(rows[0].ids, rows[0].trained, rows[0].place, known)
        made.append(Sample(tuple(rows)))
    return made


def scores(net: Any, sample: Sample, normalise: str) -> torch.Tensor:
    """Return the scores of a row's patterns and labels, float64, (patterns, labels), from full logits of each alone."""
    found = []
    for row in sample.rows:
        ids = torch.from_numpy(row.ids).long()
        logp = net(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        each = torch.stack([logp[t - 1, ids[t]] for t in range(1, len(ids)) if row.trained[t]])
        found.append(each.sum() if normalise == "sum" else each.mean())
    return torch.stack(found).reshape(-1, len(sample.labels))


def by_hand(net: Any, some: list[Sample], objective: Pattern) -> torch.Tensor:
    """Return the summed loss, float64, in plain arithmetic."""
    total = torch.zeros((), dtype=torch.float64)
    for sample in some:
        its = int(sample.labels.argmax())
        of_patterns = [one[its] - one.exp().sum().log() for one in scores(net, sample, objective.normalise)]
        total = total - sum(of_patterns) / len(of_patterns)
    return total


@pytest.mark.parametrize("objective", BOTH, ids=lambda one: one.normalise)
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize(("patterns", "labels"), [(1, 2), (2, 3)])
def test_loss_and_gradient_are_those_of_the_equation(
    layout: Layout, objective: Pattern, patterns: int, labels: int
) -> None:
    net, some = llama(), samples(5, patterns, labels)
    if layout != "padded":
        packed_attention.register()
        net.set_attn_implementation(packed_attention.NAME)
    batch = collate(some, layout)
    total, sums = objective.total(Tuned(net).policy(), batch)
    total.backward()
    got = gradients(net)
    net.set_attn_implementation("eager")
    wanted = by_hand(net, some, objective)
    wanted.backward()
    assert objective.count(batch) == 5
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, one in gradients(net).items():
        torch.testing.assert_close(got[name], one, rtol=1e-4, atol=1e-5, msg=name)
    assert 0 <= sums["accuracy"].item() <= 5


def test_a_head_that_caps_its_logits() -> None:
    net, some = gemma2(), samples(3)
    total, _ = Pattern().total(Tuned(net).policy(), collate(some))
    assert total.item() == pytest.approx(by_hand(net, some, Pattern()).item(), rel=1e-5)


def test_a_pattern_is_computed_once_for_all_labels() -> None:
    """With prefix sharing a label costs its own tokens but the last, which is only predicted."""
    some = samples(4)
    wanted = 0
    for sample in some:
        for first in range(0, 6, 3):
            rows = sample.rows[first : first + 3]
            before = int(np.argmax(rows[0].trained))
            wanted += before + sum(len(row.ids) - before - 1 for row in rows)
    assert collate(some, "shared").computed == wanted
    assert collate(some, "packed").computed == sum(sample.tokens for sample in some)


@pytest.mark.parametrize("objective", BOTH, ids=lambda one: one.normalise)
def test_figures(objective: Pattern) -> None:
    net, some = llama(), samples(9, patterns=3)
    with torch.no_grad():
        found = objective.each(Tuned(net).policy(), collate(some))
        by_row = [scores(net, sample, objective.normalise) for sample in some]
    its = [int(sample.labels.argmax()) for sample in some]
    assert set(found) == {"loss", "accuracy", "logp_label", *(f"accuracy_pattern_{n}" for n in (1, 2, 3))}
    chosen = [int(one.softmax(-1).mean(0).argmax()) for one in by_row]
    assert found["accuracy"].tolist() == [float(a == b) for a, b in zip(chosen, its, strict=True)]
    for n in range(3):
        alone = [float(int(one[n].argmax()) == its[i]) for i, one in enumerate(by_row)]
        assert found[f"accuracy_pattern_{n + 1}"].tolist() == alone
    label = [float(one[:, its[i]].mean()) for i, one in enumerate(by_row)]
    assert found["logp_label"].tolist() == pytest.approx(label, rel=1e-5)
    for name in found:
        assert name == "loss" or objective.figure(name).better == "higher"


def test_one_pattern_has_no_figure_of_its_own() -> None:
    found = Pattern().each(Tuned(llama()).policy(), collate(samples(2, patterns=1)))
    assert set(found) == {"loss", "accuracy", "logp_label"}


@pytest.mark.parametrize("objective", BOTH, ids=lambda one: one.normalise)
def test_the_split_does_not_matter(objective: Pattern) -> None:
    net, some = llama(), samples(7)
    policy = Tuned(net).policy()
    whole, _ = objective.total(policy, collate(some))
    whole.backward()
    wanted = gradients(net)
    parts = [objective.total(policy, collate(some[i : i + 1]))[0] for i in range(7)]
    sum(parts).backward()
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-6)
    largest = max(float(one.abs().max()) for one in wanted.values())
    got = gradients(net)
    assert max(float((got[name] - wanted[name]).abs().max()) for name in wanted) < 1e-6 * largest


def test_a_row_that_is_there_for_company_teaches_nothing() -> None:
    net = llama()
    (sample,) = samples(1)
    idle = tuple(Row(r.ids, np.zeros_like(r.trained), r.place, r.labels) for r in sample.rows)
    alone = collate([Sample(idle)])
    assert Pattern().count(alone) == 0
    total, sums = Pattern().total(Tuned(net).policy(), alone)
    assert total.item() == 0
    assert all(one.item() == 0 for one in sums.values())


# ---------------------------------------------------------------- a run


def test_before_training_the_loss_is_the_zero_shot_score(fit: Fit, tmp_path: Path) -> None:
    """Log softmax over the labels of log p of their bytes after the pattern, from full logits of the base."""
    done = labelled.fitted(fit, tmp_path, 8)(
        optimizer={"lr": 1e-12}, train={"epochs": 1, "batch_size": 8}, model={"dtype": "float32"}
    )
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(done.recipe.model.base, dtype=torch.float32)
    losses = []
    with torch.no_grad():
        for row in labelled.rows(8):
            for pattern in ("{text} It was", "Review: {text}\nSentiment:"):
                before = TOKENS(pattern.format(text=row["text"])).input_ids
                found = []
                for word in (" bad", " good"):
                    after = TOKENS(word).input_ids
                    logp = net(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(-1)
                    found.append(sum(float(logp[len(before) - 1 + i, token]) for i, token in enumerate(after)))
                its = found[("neg", "pos").index(row["label"])]
                losses.append(-(its - float(torch.tensor(found, dtype=torch.float64).logsumexp(0))))
    assert done.column("loss") == pytest.approx([sum(losses) / len(losses)], rel=1e-4)


def test_it_learns_and_resumes(fit: Fit, tmp_path: Path) -> None:
    run = labelled.fitted(fit, tmp_path, train={"epochs": 5, "save_every": 4})
    straight = run("straight")
    first, *_, last = straight.events("eval")
    assert last["loss"] < first["loss"]
    assert last["accuracy"] == 1.0
    assert {"accuracy_pattern_1", "accuracy_pattern_2", "logp_label"} <= set(last)
    assert last["trained_tokens"] == 8, "rows are what the loss is a mean of"
    assert straight.facts()["batching"]["shared"]
    with _stop_after(6):
        run("stopped")
    assert _exactly(run("stopped", resume=True)) == _exactly(straight)


def test_packed_and_padded_give_the_same_run(fit: Fit, tmp_path: Path) -> None:
    run = labelled.fitted(fit, tmp_path)
    shared, padded = run("shared"), run("padded", data={"packing": "off"})
    assert sum(shared.column("computed")) < 0.6 * sum(padded.column("computed"))
    assert shared.column("loss") == pytest.approx(padded.column("loss"), rel=1e-4)


@pytest.mark.parametrize("method", ["full", "prompt", "adalora"])
def test_every_method_learns(fit: Fit, tmp_path: Path, method: str) -> None:
    done = labelled.fitted(fit, tmp_path)(method=method, train={"epochs": 5})
    assert done.column("loss")[-1] < done.column("loss")[0]


def test_eval_compares_the_figures_of_the_objective(fit: Fit, tmp_path: Path) -> None:
    """Base beside adapter, as training measures them; no answers, and nothing of a pair though labels are two."""
    done = labelled.fitted(fit, tmp_path)(train={"epochs": 5})
    found = loratune.evaluate(done.folder)
    assert (found.rows, found.generated, found.predictions) == (8, 0, None)
    assert (found.objective, found.unit) == ("pattern", "nats per row")
    names = ["loss", "accuracy", "accuracy_pattern_1", "accuracy_pattern_2", "logp_label"]
    assert list(found.scores["base"]) == list(found.scores["adapter"]) == names
    best = min(done.events("eval"), key=lambda event: event["loss"])
    for name in names:
        assert found.scores["adapter"][name].value == pytest.approx(best[name], rel=1e-3, abs=1e-3)
    assert found.scores["adapter"]["accuracy"].value > found.scores["base"]["accuracy"].value
    score = found.scores["base"]["loss"]
    assert score.low < score.value < score.high
    table = evaluate.show(found)
    assert table.startswith(f"{done.folder}: 8 rows (mean, 95 % bootstrap interval; loss in nats per row)\n")
    assert re.search(r"^accuracy pattern 1 +\d", table, re.M)
    assert "pair" not in table
    assert found.as_json()["objective"] == "pattern"


def test_eval_on_other_rows_reads_them_with_the_run_s_patterns(fit: Fit, tmp_path: Path) -> None:
    done = labelled.fitted(fit, tmp_path)(train={"epochs": 1})
    other = tiny.write_jsonl(tmp_path / "other.jsonl", labelled.rows(3, seed=9))
    for format in (None, "pattern"):
        found = loratune.evaluate(done.folder, data=str(other), format=format)
        assert (found.rows, found.objective) == (3, "pattern")
    chats = tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.chats(3))
    found = loratune.evaluate(done.folder, data=str(chats), format="chat", generate=False)
    assert (found.objective, "perplexity" in found.scores["base"]) == ("", True)


@pytest.mark.parametrize("asked", [{"regex": "a"}, {"choices": ["a", "b"]}, {"out": Path("p.jsonl")}], ids=str)
def test_nothing_is_asked_of_answers_where_there_are_none(fit: Fit, tmp_path: Path, asked: dict[str, Any]) -> None:
    done = labelled.fitted(fit, tmp_path)(train={"epochs": 1})
    with pytest.raises(UsageError, match=f"`objective: pattern` learns no answers: `--{next(iter(asked))}`"):
        loratune.evaluate(done.folder, **asked)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"data": {}}, "`objective: pattern` needs patterns, and a text for each label"),
        ({"data": {"format": "chat"}}, "does not learn from rows of `data.format: chat`"),
        ({"data": {"format": {**labelled.FORMAT, "label": "text"}}}, "a pattern names the column `text`"),
        ({"data": {"format": labelled.FORMAT, "on_long": "truncate"}}, "which are compared whole"),
        ({"data": {"format": labelled.FORMAT}, "objective": "sft"}, "`objective: sft` does not learn from rows of"),
    ],
    ids=str,
)
def test_recipes_that_fit_no_pattern(tmp_path: Path, base: Path, sections: dict[str, Any], told: str) -> None:
    path = tiny.write_recipe(tmp_path, base, **{"objective": "pattern", **sections})
    with pytest.raises(RecipeError, match=re.escape(told)):
        loratune.load_recipe(path)


@pytest.mark.parametrize("normalise", ["sum", "mean"])
def test_the_code_on_the_card_labels_as_trained(fit: Any, tmp_path: Path, normalise: str) -> None:
    form = {**labelled.FORMAT, "verbalizers": {"neg": " bad", "pos": " good and red"}}
    done = labelled.fitted(fit, tmp_path)(
        data={"format": form}, objective={"type": "pattern", "normalise": normalise}
    )  # fmt: skip
    code = (done.folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    ran = subprocess.run([sys.executable, "-c", code], cwd=done.folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = ast.literal_eval(ran.stdout.splitlines()[-1])
    encoder, wanted = Encoder(tiny.tokenizer()), torch.zeros(2)
    for text in ("Once upon a time It was", "Review: Once upon a time\nSentiment:"):
        scores = []
        for words in form["verbalizers"].values():
            row = encoder.encode(Plain(((text, False), (words, True)), closed=False), Place("made"))
            ids = torch.tensor(row.ids.tolist())
            with torch.no_grad():
                logps = done.net.eval()(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            of_words = logps.gather(1, ids[1:, None])[:, 0][torch.tensor(row.trained[1:])]
            scores.append(of_words.sum() if normalise == "sum" else of_words.mean())
        wanted += torch.stack(scores).softmax(0) / 2
    assert list(found) == ["neg", "pos"]
    assert list(found.values()) == pytest.approx(wanted.tolist(), abs=1e-4)
