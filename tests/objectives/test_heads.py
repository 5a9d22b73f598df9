"""Objectives with a head of their own: reward and classify, and what transformers and PEFT make of their output."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid
from transformers import LlamaForSequenceClassification

import loratune
from loratune import recipe
from loratune.commands import evaluate, opened_model
from loratune.commands.labeller import Labeller
from loratune.data import dataset, labels
from loratune.data.collate import collate
from loratune.data.encode import Encoder, Row
from loratune.data.formats import Labelled
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample
from loratune.errors import DataError, ModelError, Place, RecipeError, RunFolderError, UsageError
from loratune.kernels import packed_attention
from loratune.models import score_head
from loratune.models.policy import Policy
from loratune.objectives import Classify, Reward
from loratune.training import head_states
from tests import pairs, tiny
from tests.conftest import Fit, Trained
from tests.objectives.test_sft import llama
from tests.oracle.test_resume import _stop_after
from tests.oracle.test_split import _two_processes

WORDS = {"good": ["yes", "red", "sun"], "bad": ["no", "blue", "rain"]}


def labelled(number: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        label = "good" if index % 2 else "bad"
        words = [WORDS[label][int(draw.integers(3))] for _ in range(int(draw.integers(1, 5)))]
        rows.append({"text": " ".join(words), "label": label})
    return rows


def kinds(number: int, kind: str) -> list[dict[str, Any]]:
    """Return rows whose label is one of three classes, several of them or none, or a number."""
    names = ["bad", "good", "ugly"]
    made = {"one": lambda n: names[n % 3], "several": lambda n: names[: n % 4], "number": lambda n: n % 3 - 0.5}
    return [{**row, "label": made[kind](n)} for n, row in enumerate(labelled(number))] if kind in made else []


def train(fit: Fit, folder: Path, name: str, rows: list[dict[str, Any]], format: Any = "labelled", **more: Any) -> Trained:  # fmt: skip
    data = {"train": str(tiny.write_jsonl(folder / "rows.jsonl", rows)), "format": format, "eval_fraction": 0.25}
    known: dict[str, Any] = {
        "objective": "classify", "method": {"type": "lora"}, "optimizer": {"lr": 1e-2},
        "train": {"epochs": 4, "batch_size": 8},
    }  # fmt: skip
    return fit(name, data=data, **tiny.joined(known, more))


def losses(done: Trained) -> list[float]:
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


# ---------------------------------------------------------------- the losses


def net_with(outputs: int) -> Any:
    """Return a tiny model with a head of random weights."""
    net = llama()
    settings = {"id2label": dict(enumerate(map(str, range(outputs)))), "problem_type": "regression"}
    score_head.add(net, outputs, settings)
    torch.manual_seed(3)
    torch.nn.init.normal_(net.score.weight)
    return net


def rows_of(number: int, labels: list[list[float]], seed: int = 0) -> list[Row]:
    draw = np.random.default_rng(seed)
    prompt = draw.integers(2, 40, 5).astype(np.int32)
    made = []
    for n in range(number):
        ids = np.concatenate([prompt, draw.integers(2, 40, int(draw.integers(1, 7))).astype(np.int32)])
        made.append(Row(ids, np.arange(len(ids)) >= 5, Place("made", n + 1), np.array(labels[n], np.float32), True))
    return made


def scores_of(net: Any, rows: list[Row]) -> torch.Tensor:
    """Return the scores from the hidden states of each row alone, float64, (rows, outputs)."""
    with torch.no_grad():
        found = [net.model(torch.from_numpy(row.ids).long()[None]).last_hidden_state[0, -1] for row in rows]
        return (torch.stack(found) @ net.score.weight.T).double()


LAYOUTS = ["padded", "packed", "shared"]


def prepared(net: Any, layout: Layout) -> Any:
    if layout != "padded":
        packed_attention.register()
        net.set_attn_implementation(packed_attention.NAME)
    return net


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_the_loss_of_a_reward_is_that_of_the_equation(layout: Layout, centre: float) -> None:
    net = net_with(1)
    rows = rows_of(8, [[1.5], [], [], [], [-0.5], [], [0.0], []])
    with torch.no_grad():
        s = scores_of(net, rows)[:, 0]
    margin = torch.tensor([1.5, 0, -0.5, 0], dtype=torch.float64)
    wanted = -logsigmoid(s[0::2] - s[1::2] - margin) + centre * (s[0::2] + s[1::2]).square()
    samples = [Sample((rows[n], rows[n + 1])) for n in range(0, 8, 2)]
    objective = Reward(centre=centre)
    batch = collate(samples, layout)
    loss, sums = objective.total(Policy(prepared(net, layout)), batch)
    assert objective.count(batch) == 4
    assert loss.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    assert sums["accuracy"].item() == (s[0::2] > s[1::2]).sum().item()
    assert sums["margin"].item() == pytest.approx((s[0::2] - s[1::2]).sum().item(), rel=1e-4)


def bound(kind: Any, classes: int, weights: tuple[float, ...] = ()) -> Classify:
    made = Classify()
    made._kind, made._classes, made._weights = kind, tuple(map(str, range(classes))), weights
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_losses_of_a_classifier_are_those_of_the_equations(layout: Layout) -> None:
    rows = rows_of(6, [[0], [2], [1], [2], [0], [1]])
    net = net_with(3)
    s, y = scores_of(net, rows), torch.tensor([0, 2, 1, 2, 0, 1])
    batch = collate([Sample((row,)) for row in rows], layout)
    policy = Policy(prepared(net, layout))
    loss, sums = bound("one", 3).total(policy, batch)
    assert loss.item() == pytest.approx(cross_entropy(s, y, reduction="sum").item(), rel=1e-5)
    assert sums["accuracy"].item() == (s.argmax(1) == y).sum().item()
    weights = (0.5, 1.0, 2.0)
    net.train()
    loss, _ = bound("one", 3, weights).total(policy, batch)
    each = cross_entropy(s, y, reduction="none") * torch.tensor(weights)[y]
    assert loss.item() == pytest.approx(each.sum().item(), rel=1e-5)
    net.eval()
    loss, _ = bound("one", 3, weights).total(policy, batch)
    assert loss.item() == pytest.approx(cross_entropy(s, y, reduction="sum").item(), rel=1e-5), "of an evaluation"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_classes_and_numbers(layout: Layout) -> None:
    rows = rows_of(4, [[0, 2], [], [1], [0, 1, 2]])
    net = net_with(3)
    s = scores_of(net, rows)
    wanted = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=torch.float64)
    loss, sums = bound("several", 3).total(Policy(prepared(net, layout)), collate([Sample((r,)) for r in rows], layout))
    assert loss.item() == pytest.approx(4 * binary_cross_entropy_with_logits(s, wanted).item(), rel=1e-5)
    assert sums["accuracy"].item() == ((s > 0) == (wanted > 0)).all(1).sum().item()
    rows = rows_of(4, [[0.5], [-3.0], [7.25], [0.0]])
    net = net_with(1)
    off = scores_of(net, rows)[:, 0] - torch.tensor([0.5, -3, 7.25, 0])
    loss, sums = bound("number", 0).total(Policy(prepared(net, layout)), collate([Sample((r,)) for r in rows], layout))
    assert loss.item() == pytest.approx(off.square().sum().item(), rel=1e-5)
    assert sums["error"].item() == pytest.approx(off.abs().sum().item(), rel=1e-5)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_classifier_trains(fit: Fit, tmp_path: Path, method: str) -> None:
    found = losses(train(fit, tmp_path, method, labelled(32), method={"type": method}))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1] < 0.6


def test_a_reward_model_trains(fit: Fit, tmp_path: Path) -> None:
    found = losses(train(fit, tmp_path, "a", pairs.rows(32), "preference", objective="reward"))
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1] < 0.4


READ = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, base, texts, names = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(folder)
if base:
    labels = dict(enumerate(names))
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(labels), id2label=labels, pad_token_id=tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(model, folder)
else:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert list(model.config.id2label.values()) == names, model.config.id2label
model.eval()
if isinstance(texts[0], str):
    given = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
else:
    given = tokenizer.apply_chat_template(
        texts, padding=True, return_dict=True, return_tensors="pt", tokenizer_kwargs={"padding_side": "right"}
    )
with torch.no_grad():
    print(json.dumps(model(**given).logits.double().tolist()))
"""


def read_elsewhere(folder: Path, base: Path | None, texts: list[Any], names: list[str]) -> torch.Tensor:
    """Return the scores that transformers and PEFT alone give, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder), str(base or ""), json.dumps(texts), json.dumps(names)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_transformers_and_peft_give_the_same_scores(fit: Fit, tmp_path: Path, base: Path, method: str) -> None:
    rows = labelled(32)
    done = train(fit, tmp_path, method, rows, method={"type": method}, train={"epochs": 1})
    encoder, data = Encoder(tiny.tokenizer()), done.recipe.data
    samples = dataset.load(data.train, data, encoder)
    batch = collate([Sample((Row(r.ids, r.trained, r.place, pooled=True),)) for r in (samples[i] for i in range(9))])
    with torch.no_grad():
        wanted = Policy(done.net.eval()).scores(batch)
    assert wanted.abs().max() > 0.01
    texts = [row["text"] for row in rows[:9]]
    got = read_elsewhere(done.folder, base if method == "lora" else None, texts, ["bad", "good"])
    torch.testing.assert_close(got, wanted.double(), rtol=0, atol=1e-6)


def test_transformers_and_peft_give_the_same_rewards(fit: Fit, tmp_path: Path, base: Path) -> None:
    rows = pairs.rows(32)
    done = train(fit, tmp_path, "a", rows, "preference", objective="reward", train={"epochs": 1})
    data = done.recipe.data
    samples = dataset.load(data.train, data, Encoder(tiny.tokenizer()))
    batch = collate([Sample((Row(r.ids, r.trained, r.place, pooled=True),)) for r in (samples[i] for i in range(8))])
    with torch.no_grad():
        wanted = Policy(done.net.eval()).scores(batch)
    assert wanted.abs().max() > 0.01
    talks = [row["prompt"] + row[name] for row in rows[:4] for name in ("chosen", "rejected")]
    torch.testing.assert_close(read_elsewhere(done.folder, base, talks, ["score"]), wanted.double(), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- using them


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_chat_answers_with_the_label(fit: Fit, tmp_path: Path, method: str) -> None:
    done = train(fit, tmp_path, method, labelled(48), method={"type": method}, train={"epochs": 8})
    for text, label in (("yes red sun", "good"), ("no rain", "bad")):
        answer = loratune.chat(done.folder, text)
        first, second = answer.split(", ")
        assert first.split()[0] == label
        assert float(first.split()[1]) + float(second.split()[1]) == pytest.approx(1, abs=2e-3)


def test_a_reward_model_has_no_labels(fit: Fit, tmp_path: Path) -> None:
    done = train(fit, tmp_path, "a", pairs.rows(32), "preference", objective="reward", train={"epochs": 1})
    with pytest.raises(UsageError, match="a reward model scores whole conversations"):
        loratune.chat(done.folder, "hello")


# ---------------------------------------------------------------- splits, resume, rows


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_the_split_does_not_matter(fit: Fit, tmp_path: Path, method: str) -> None:
    rows, found = labelled(32), {}
    for size in (1, 8):
        done = train(
            fit, tmp_path, f"{size}", rows, method={"type": method}, train={"micro_batch_size": size, "epochs": 2}
        )
        found[size] = losses(done)
    assert found[1] == pytest.approx(found[8], rel=1e-5)


RESUMED = [
    ("lora", "one"),
    ("full", "one"),
    ("head", "one"),
    ("lora", "several"),
    ("lora", "number"),
    ("lora", "reward"),
]


@pytest.mark.parametrize(("method", "kind"), RESUMED)
def test_resume_bit_for_bit(fit: Fit, tmp_path: Path, method: str, kind: str) -> None:
    """And the first loss of a classifier of C classes is log C, of several classes log 2, of a reward log 2."""
    rows, format, objective = kinds(33, kind), {"type": "labelled", "labels": kind}, "classify"
    if kind == "reward":
        rows, format, objective = pairs.rows(32), {"type": "preference"}, "reward"

    def run(name: str, **more: Any) -> Trained:
        more["train"] = {"epochs": 3, "save_every": 2, **more.get("train", {})}
        return train(fit, tmp_path, name, rows, format, objective=objective, method={"type": method}, **more)

    straight = run("straight")
    with _stop_after(5):
        run("stopped")
    resumed = run("stopped", resume=True)
    assert losses(resumed) == losses(straight)
    if kind != "number":
        assert losses(straight)[0] == pytest.approx(math.log(3 if kind == "one" else 2), abs=1e-6)
    for name, tensor in straight.net.state_dict().items():
        assert torch.equal(tensor, resumed.net.state_dict()[name]), name


def test_a_resume_with_other_classes_is_refused(fit: Fit, tmp_path: Path) -> None:
    """In another order they are other outputs of the head, though the rows are the same."""

    def run(order: list[str], **more: Any) -> Trained:
        form = {"type": "labelled", "classes": order}
        return train(fit, tmp_path, "a", labelled(32), form, train={"epochs": 3, "save_every": 2}, **more)

    with _stop_after(5):
        run(["good", "bad"])
    with pytest.raises(RunFolderError, match="the training rows are not the same"):
        run(["bad", "good"], resume=True)
    run(["good", "bad"], resume=True)


def test_a_head_is_continued_with_its_classes_only(fit: Fit, tmp_path: Path) -> None:
    one = train(fit, tmp_path, "one", labelled(32))
    method = {"type": "lora", "continue_from": str(one.folder)}
    assert losses(train(fit, tmp_path, "two", labelled(32), method=method))[0] < 0.1
    told = "the head of the adapter to continue is for `bad`, `good`; now: "
    others = [{**row, "label": {"good": "a", "bad": "b"}[row["label"]]} for row in labelled(32)]
    with pytest.raises(ModelError, match=f"{told}`a`, `b`"):
        train(fit, tmp_path, "three", others, method=method)
    with pytest.raises(ModelError, match=f"{told}`objective: sft` has none"):
        fit("four", method=method)


ROWS = [
    ({"label": "good"}, "`text` is missing"),
    ({"text": " ", "label": "good"}, "`text` is empty: there is nothing to classify"),
    ({"text": "a"}, "`label` is missing"),
    ({"text": "a", "label": None}, "`label` must be text, an integer or a boolean, given null"),
    ({"text": "a", "label": 0.5}, "given a number: to predict a number set `labels: number`"),
    ({"text": "a", "label": ["good"]}, "must be one class, given a list: for several set `labels: several`"),
    ({"text": "a", "label": " "}, "`label` is empty"),
]


@pytest.mark.parametrize(("row", "told"), ROWS)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [*labelled(4), row])
    data = tiny.data(train=str(file), format="labelled")
    with pytest.raises(DataError, match=f"rows.jsonl:5.*{re.escape(told)}"):
        dataset.load(data.train, data, Encoder(tiny.tokenizer()))
    skipping = tiny.data(train=str(file), format="labelled", on_bad_row="skip", max_lost=0.5)
    assert dataset.load(skipping.train, skipping, Encoder(tiny.tokenizer())).counts.skipped == 1


def load(folder: Path, rows: list[Any], held: list[Any] | None = None, **format: Any) -> Any:
    named = {"eval": str(tiny.write_jsonl(folder / "held.jsonl", held))} if held else {}
    file = str(tiny.write_jsonl(folder / "rows.jsonl", rows))
    data = tiny.data(train=file, format={"type": "labelled", **format}, overlap="allow", **named)
    return dataset.of(data, 0, Encoder(tiny.tokenizer()), pooled=True)


def test_classes_are_sorted_and_those_of_held_out_rows_are_the_same(tmp_path: Path) -> None:
    rows = [{"text": f"a {n}", "label": n} for n in (10, 2, 10, 1)]
    found, held = load(tmp_path, rows, [{"text": "b", "label": 1}, {"text": "c", "label": "10"}])
    assert found.classes == held.classes == ("1", "2", "10")
    assert [one.tolist() for one in found.labels] == [[2], [1], [2], [0]]
    assert [one.tolist() for one in held.labels] == [[0], [2]]
    with pytest.raises(DataError, match=r"held.jsonl:2.*no training row has; unknown: `3`"):
        load(tmp_path, rows, [{"text": "b", "label": 1}, {"text": "c", "label": 3}])
    found, _ = load(tmp_path, rows, classes=["10", "1", "2"])
    assert [one.tolist() for one in found.labels] == [[0], [2], [0], [1]]
    with pytest.raises(DataError, match=r"rows.jsonl:2.*`2` is not among `classes`: `10`, `1`"):
        load(tmp_path, rows, classes=["10", "1"])
    with pytest.raises(DataError, match="`x` is the only label: a classifier needs at least two classes"):
        load(tmp_path, [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])


def test_several_labels_and_numbers_are_read(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": ["x", "y", "x"]}, {"text": "b", "label": []}, {"text": "c", "label": '["z"]'}]
    found, _ = load(tmp_path, rows, labels="several")
    assert found.classes == ("x", "y", "z")
    assert [one.tolist() for one in found.labels] == [[0, 1], [], [2]]
    found, _ = load(tmp_path, [{"text": "a", "label": 1.5}, {"text": "b", "label": -2}], labels="number")
    assert (found.classes, [one.tolist() for one in found.labels]) == ((), [[1.5], [-2.0]])
    with pytest.raises(DataError, match="`label` must be a finite number"):
        load(tmp_path, [{"text": "a", "label": 1.5}, {"text": "b", "label": float("inf")}], labels="number")


def test_the_text_is_tokenized_as_it_is(tmp_path: Path) -> None:
    """Without an end token: as transformers' tokenizers do it."""
    tokens = tiny.tokenizer()
    found, _ = load(tmp_path, labelled(2))
    assert found[0].ids.tolist() == tokens(labelled(2)[0]["text"])["input_ids"]
    assert not found[0].trained.any()


def test_class_weights(tmp_path: Path) -> None:
    rows = [{"text": f"a {n}", "label": "x" if n else "y"} for n in range(4)]
    found, _ = load(tmp_path, rows)
    data = tiny.data(train="x", format="labelled")
    assert Classify(class_weights="balanced").of_rows(found, data)._weights == pytest.approx((4 / 6, 2.0))
    assert Classify(class_weights={"y": 3.0}).of_rows(found, data)._weights == (1.0, 3.0)
    with pytest.raises(DataError, match="names `z`; the classes: `x`, `y`"):
        Classify(class_weights={"z": 3.0}).of_rows(found, data)


def test_classes_are_balanced_over_what_an_epoch_shows(tmp_path: Path) -> None:
    """Rows count by the weight of their source; of several classes, each label of a row."""
    for name, told in (("x", ["x"] * 6), ("y", ["y"] * 4)):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}", "label": x} for n, x in enumerate(told)])
    sources = [{"path": str(tmp_path / "x.jsonl")}, {"path": str(tmp_path / "y.jsonl"), "weight": 3.0}]
    data = tiny.data(train=sources, format="labelled")
    rows, _ = dataset.of(data, 0, Encoder(tiny.tokenizer()), pooled=True)
    assert Classify(class_weights="balanced").of_rows(rows, data)._weights == pytest.approx((18 / 12, 18 / 24))
    some = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": ["x"]}]
    found, _ = load(tmp_path, some, labels="several")
    data = tiny.data(train="x", format={"type": "labelled", "labels": "several"})
    assert Classify(class_weights="balanced").of_rows(found, data)._weights == pytest.approx((3 / 4, 3 / 2))


@pytest.mark.parametrize("weight", [0, -1.0])
def test_a_weight_is_above_0(tmp_path: Path, base: Path, weight: float) -> None:
    objective = {"type": "classify", "class_weights": {"x": weight}}
    with pytest.raises(RecipeError, match="must be above 0"):
        recipe.load(tiny.write_recipe(tmp_path, base, objective=objective, data={"format": "labelled"}))


def test_a_class_that_only_lost_rows_have_is_none(tmp_path: Path) -> None:
    """Neither of the training rows nor of the held-out ones."""
    rows = [*labelled(6), {"text": "long " * 99, "label": "ugly"}]
    file, held = tiny.write_jsonl(tmp_path / "rows.jsonl", labelled(6)), tiny.write_jsonl(tmp_path / "held.jsonl", rows)
    fields = {"format": "labelled", "max_length": 64, "on_long": "drop", "max_lost": 0.5, "overlap": "allow"}
    encoder = Encoder(tiny.tokenizer())
    assert dataset.of(tiny.data(train=str(held), **fields), 0, encoder)[0].classes == ("bad", "good")
    found = dataset.of(tiny.data(train=str(file), eval=str(held), **fields), 0, encoder)[1]
    assert (len(found), found.classes) == (6, ("bad", "good"))


def test_the_order_of_several_classes_makes_no_other_row(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": ["x", "y"]}, {"text": "a", "label": ["y", "x"]}, {"text": "a", "label": ["x"]}]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    data = tiny.data(train=str(file), format={"type": "labelled", "labels": "several"}, duplicates="drop", max_lost=0.5)
    found, _ = dataset.of(data, 0, Encoder(tiny.tokenizer()))
    assert [one.tolist() for one in found.labels] == [[0, 1], [0]]


def test_a_label_that_some_rows_lack_can_be_learned(tmp_path: Path) -> None:
    form = Labelled(labels="several", classes=("x", "y"))
    rows, _ = load(tmp_path, [{"text": "a", "label": ["x"]}, {"text": "b", "label": []}], **form.model_dump())
    assert labels.check_seen(form, rows) == ["no training row has the label `y`"]
    rows, _ = load(tmp_path, [{"text": "a", "label": ["x"]}, {"text": "b", "label": ["x"]}], **form.model_dump())
    with pytest.raises(DataError, match="all 2 training rows have the label `x`"):
        labels.check_seen(form, rows)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"method": {"type": "prompt"}}, "`objective: classify` trains a head that scores rows, `method: prompt` does not"),
        ({"method": {"type": "head"}, "objective": "sft"}, "`method: head` trains a head that scores rows, which"),
        ({"data": {"format": "chat"}}, "`objective: classify` does not learn from rows of `data.format: chat`"),
        ({"method": {"type": "head"}, "model": {"quantization": "nf4"}}, "`method: head` writes a full model"),
    ],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(tmp_path: Path, base: Path, sections: Any, told: str) -> None:
    known: dict[str, Any] = {"objective": "classify", **sections}
    with pytest.raises(RecipeError, match=re.escape(told)):
        recipe.load(tiny.write_recipe(tmp_path, base, **known))


def test_a_frozen_model_runs_once(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before step 1; the same losses as with its states computed in each step."""
    states, seen = Policy.last_states, []

    def counted(self: Policy, batch: Any) -> torch.Tensor:
        seen.append(batch.samples)
        return states(self, batch)

    monkeypatch.setattr(Policy, "last_states", counted)
    once = losses(train(fit, tmp_path, "once", labelled(32), method={"type": "head"}))
    assert sum(seen[1:]) == 32, "the first is for the plan of the memory"
    monkeypatch.setattr(head_states, "SHARE", 0)
    each = losses(train(fit, tmp_path, "each", labelled(32), method={"type": "head"}))
    assert sum(seen) > 4 * 32
    assert once == pytest.approx(each, rel=1e-5)


# ---------------------------------------------------------------- beside TRL, and on two processes


@pytest.mark.parametrize("centre", [0.0, 0.3])
def test_the_loss_and_gradient_of_a_reward_are_those_of_trl(centre: float) -> None:
    """TRL 1.16 on transformers' own classifier, whose padding is on the right: to 1e-5."""
    trainer = pytest.importorskip("trl").RewardTrainer
    net = net_with(1)
    rows = rows_of(8, [[1.5], [], [], [], [-0.5], [], [0.0], []])
    samples = [Sample((rows[n], rows[n + 1])) for n in range(0, 8, 2)]
    batch = collate(samples)
    loss, _ = Reward(centre=centre).total(Policy(net), batch)
    (loss / 4).backward()
    got = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()

    net.config.pad_token_id = 0  # no row has it
    classifier = LlamaForSequenceClassification(net.config)
    classifier.load_state_dict(score_head.as_classifier(net).state_dict())
    order = [*range(0, 8, 2), *range(1, 8, 2)]  # chosen first
    inputs = {name: batch.inputs[name][order] for name in ("input_ids", "attention_mask")}
    inputs["margin"] = torch.tensor([1.5, 0.0, -0.5, 0.0])

    class Alone:
        def gather(self, given: torch.Tensor) -> torch.Tensor:
            return given

        gather_for_metrics = gather

    me = SimpleNamespace(
        model=classifier, accelerator=Alone(), _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        _tp_size=1, args=SimpleNamespace(center_rewards_coefficient=centre or None),
    )  # fmt: skip
    wanted = trainer.compute_loss(me, classifier, inputs)
    wanted.backward()
    assert loss.item() / 4 == pytest.approx(wanted.item(), rel=1e-5)
    parameters = dict(classifier.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in parameters.values() if p.grad is not None)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-5, atol=1e-5 * largest, msg=name)


@pytest.mark.parametrize("method", ["lora", "head"])
def test_two_processes_are_one(fit: Fit, base: Path, tmp_path: Path, method: str) -> None:
    rows, sections = labelled(24), {"objective": "classify", "method": {"type": method}, "optimizer": {"lr": 1e-2}}
    sections["train"] = {"epochs": 2, "batch_size": 8, "log_every": 1}
    data = {"train": str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows)), "format": "labelled", "eval_fraction": 0.2}
    one = fit("one", data=data, **sections)
    (tmp_path / "two").mkdir()
    folder = _two_processes(tiny.write_recipe(tmp_path / "two", base, data=data, **sections))
    two = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    assert [line["loss"] for line in two if line["kind"] == "step"] == pytest.approx(losses(one), rel=1e-5)


# ---------------------------------------------------------------- eval


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_eval_of_a_classifier(fit: Fit, tmp_path: Path, method: str) -> None:
    done = train(fit, tmp_path, method, labelled(48), method={"type": method}, train={"epochs": 8})
    found = loratune.evaluate(done.folder)
    (scores,) = found.scores.values()
    assert {"loss", "accuracy", "macro F1", "MCC", "AUROC"} <= scores.keys()
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if line["kind"] == "eval"), key=lambda line: line["loss"])
    assert scores["loss"].value == pytest.approx(best["loss"], rel=1e-4)
    assert scores["accuracy"].value == pytest.approx(best["accuracy"])
    assert found.classes == ("bad", "good")
    assert sum(map(sum, found.confusion)) == found.rows > 9
    right = found.confusion[0][0] + found.confusion[1][1]
    assert right / found.rows == pytest.approx(scores["accuracy"].value)
    other = str(
        tiny.write_jsonl(tmp_path / "other.jsonl", [{"text": "yes", "label": "good"}, {"text": "sun", "label": "good"}])
    )
    again = loratune.evaluate(done.folder, data=other)
    assert again.confusion[0] == (0, 0), "the classes are those of the run"
    told = evaluate.show(again)
    assert "taken for" in told
    assert "interval; loss per row)" in told
    assert re.search(r"AUROC +undefined", told), "with rows of one class"
    assert "NaN" not in json.dumps(again.as_json())
    assert again.as_json()["scores"]["adapter" if method == "lora" else "model"]["AUROC"]["value"] is None
    tiny.write_jsonl(tmp_path / "other.jsonl", [{"text": "yes", "label": "ugly"}])
    with pytest.raises(DataError, match=r"other.jsonl:1.*no training row has; unknown: `ugly`"):
        loratune.evaluate(done.folder, data=other)


def test_eval_takes_the_classes_of_the_head(fit: Fit, tmp_path: Path) -> None:
    """Not of the training file, which may have more by now; of a dozen integers, in their order."""
    rows = [{"text": f"{'yes' if n % 2 else 'no'} {n}", "label": n % 12} for n in range(48)]
    file, held = (tiny.write_jsonl(tmp_path / f"{name}.jsonl", some) for name, some in (("a", rows), ("b", rows[:12])))
    data = {"train": str(file), "eval": str(held), "format": "labelled", "overlap": "allow"}
    done = fit("run", data=data, objective="classify")
    before = loratune.evaluate(done.folder)
    assert before.classes == tuple(map(str, range(12)))
    tiny.write_jsonl(file, [*rows, {"text": "new", "label": -1}])
    assert loratune.evaluate(done.folder) == before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_eval_asks_a_classifier_for_no_answers(fit: Fit, tmp_path: Path, method: str) -> None:
    """A full one has no head of a language model any more: transformers would make one up."""
    done = train(fit, tmp_path, "a", labelled(32), method={"type": method}, train={"epochs": 1})
    chats = str(tiny.write_jsonl(tmp_path / "chats.jsonl", tiny.chats(4)))
    with pytest.raises(UsageError, match="has a head that scores rows: it writes no answers"):
        loratune.evaluate(done.folder, data=chats, format="chat")
    (done.folder / "recipe.yaml").unlink()
    with pytest.raises(UsageError, match="has a head that scores rows: it writes no answers"):
        loratune.evaluate(done.folder, data=chats)


def test_eval_of_a_reward_model(fit: Fit, tmp_path: Path) -> None:
    done = train(fit, tmp_path, "a", pairs.rows(32), "preference", objective="reward")
    found = loratune.evaluate(done.folder)
    (scores,) = found.scores.values()
    lines = [json.loads(line) for line in (done.folder / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if line["kind"] == "eval"), key=lambda line: line["loss"])
    for name in ("loss", "accuracy", "margin"):
        assert scores[name].value == pytest.approx(best[name], rel=1e-4)
    rows = dataset.of(done.recipe.data, 0, Encoder(tiny.tokenizer()), pooled=True)[1]
    lengths = [[row.count() for row in rows.sample(index).rows] for index in range(rows.samples)]
    wanted = np.mean([(np.sign(one - other) + 1) / 2 for one, other in lengths])
    assert scores["chosen is longer"].value == pytest.approx(wanted)
    assert "accuracy" in evaluate.show(found)


def test_eval_of_a_regression(fit: Fit, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": 1.5 if row["label"] == "good" else -1} for row in labelled(48)]
    done = train(fit, tmp_path, "a", rows, {"type": "labelled", "labels": "number"}, optimizer={"lr": 3e-3}, train={"epochs": 8})  # fmt: skip
    (scores,) = loratune.evaluate(done.folder).scores.values()
    assert {"loss", "error", "R2"} <= scores.keys()
    assert scores["R2"].value > 0
    assert float(loratune.chat(done.folder, "yes red")) == pytest.approx(1.5, abs=1)


@pytest.mark.parametrize("outputs", [1, 3])
def test_a_classifier_that_peft_alone_made(base: Path, tmp_path: Path, outputs: int) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    net = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    net.save_pretrained(tmp_path / "theirs")
    ids = AutoTokenizer.from_pretrained(base)("yes red", return_tensors="pt").input_ids
    with torch.no_grad():
        scores = net.eval()(input_ids=ids).logits[0]
    loaded = opened_model.load(opened_model.open_subject(str(tmp_path / "theirs"), str(base)), exact=True)
    said = Labeller(loaded, lambda _: None).say("yes red")
    if outputs == 1:
        assert float(said) == pytest.approx(scores[0].item(), rel=1e-4)
    else:
        assert said.startswith(f"LABEL_{scores.argmax()} {scores.softmax(-1).max():.3f}")


def test_a_missing_column_can_be_named_otherwise(tmp_path: Path) -> None:
    for row, told in (
        ({"sentence": "a", "label": "b"}, "columns: `sentence`, `label`; `data.format.text` names another"),
        ({"text": "a", "target": "b"}, "columns: `text`, `target`; `data.format.label` names another"),
    ):
        with pytest.raises(DataError, match=re.escape(told)):
            load(tmp_path, [row])
