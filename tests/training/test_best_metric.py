"""`train.best_metric`: what the best evaluation, early stopping and the notes go by; and figures that are watched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loratune
from loratune.errors import RecipeError, TrainingError
from loratune.objectives import Dpo, Orpo, Sft
from loratune.objectives.section import Watch
from loratune.runs.checkpoint import Progress
from loratune.system import run_files, storage
from loratune.training import loop
from loratune.training.watcher import LAST, Watcher
from tests import pairs, tiny
from tests.conftest import Fit
from tests.oracle.test_resume import _exactly, _stop_after

ACCURACIES = [0.5, 0.75, 0.7, 0.75, 1.0, 0.9, 0.8, 0.7]  # after each step; the losses fall all the time


def measured(monkeypatch: pytest.MonkeyPatch, name: str = "accuracy", begin: int = 0) -> None:
    """Let evaluations have a falling loss and these values of a figure."""
    values = enumerate(ACCURACIES[begin:], begin)

    def measure(*_: Any) -> tuple[float, int, dict[str, float]]:
        number, value = next(values)
        return 0.6 - 0.05 * number, 7, {"margin": 1.0, name: value}

    monkeypatch.setattr(loop, "measure", measure)


EVERY = {"epochs": 2, "eval_every": 1, "save_every": 1, "keep": 1}


@pytest.mark.parametrize("stopped", [None, 2, 6])
@pytest.mark.parametrize(("name", "step"), [("accuracy", 5), ("logp_rejected", 1), ("loss", 8)])
def test_the_best_evaluation_goes_by_it_in_its_direction(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, step: int,
    stopped: int | None,
) -> None:  # fmt: skip
    metric = {} if name == "loss" else {"best_metric": name}
    run = pairs.fitted(fit, tmp_path, train={**EVERY, **metric})
    measured(monkeypatch, name)
    if stopped:
        with _stop_after(stopped):
            run()
        kept = sorted(json.loads(file.read_text())["progress"]["step"] for file in tmp_path.rglob("state.json"))
        assert kept[0] == min(step, stopped - 1), "the best checkpoint is kept"
        measured(monkeypatch, name, stopped - 1)  # the evaluation after the stop is still due
    done = run(resume=bool(stopped))
    facts = done.facts()
    assert facts["saved_step"] == step
    loss = 0.6 - 0.05 * (step - 1)
    assert done.run.eval_loss == facts["best_eval_loss"] == pytest.approx(loss)
    best = facts["best_evaluation"]
    assert (best["step"], best["metric"]) == (step, name)
    assert best["figures"]["loss"] == {"value": pytest.approx(loss), "unit": "per pair", "better": "lower"}
    assert best["figures"]["margin"]["value"] == 1.0
    told = capsys.readouterr().err
    if name != "loss":
        direction = "higher" if name == "accuracy" else "lower"
        assert best["figures"][name]["value"] == ACCURACIES[step - 1]
        assert best["figures"][name]["better"] == direction
        assert f"is that of step {step}, where the eval {name} was {direction.replace('er', 'est')}" in told
    card = (done.folder / "README.md").read_text()
    assert f"| held out, after step {step} (the best by its {name}) | | unit | better |" in card
    assert "| margin | 1.0000 | in the terms of the loss | higher |" in card


def test_early_stopping_goes_by_it(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """0.75 after 0.5 counts; 0.75 and 1.0 after it are less than 0.3 higher."""
    measured(monkeypatch)
    early = {"patience": 3, "min_delta": 0.25}
    train = {**EVERY, "best_metric": "accuracy", "early_stopping": early}
    done = pairs.fitted(fit, tmp_path, train=train)()
    assert "step 4: the eval accuracy has not risen for 3 evaluations: stopping" in capsys.readouterr().err
    assert (done.run.steps, done.facts()["saved_step"]) == (4, 2), "of equal ones the first is kept"


def test_a_change_of_it_begins_anew() -> None:
    progress = Progress(4).evaluated(0.5, 0.0)
    changed = Progress(6, 0.5, 4, 0.5, 1).evaluated(0.8, 0.1, "accuracy", higher=True)
    assert (progress.best_value, progress.metric) == (0.5, "loss")
    assert changed == Progress(6, 0.8, 6, 0.8, 0, metric="accuracy")
    assert changed.evaluated(0.85, 0.1, "accuracy", higher=True) == Progress(6, 0.85, 6, 0.8, 1, metric="accuracy")
    assert changed.evaluated(0.7, 0.1, "accuracy", higher=True).best_value == 0.8


def _of_an_older_version(folder: Path) -> None:
    """Rewrite a checkpoint as it was before there were these keys and names."""
    seal = storage.read_json(folder / run_files.MANIFEST)
    del seal["settings"]["train"]["best_metric"], seal["settings"]["objective"]["reference"]
    state = storage.read_json(folder / "state.json")
    known = state["progress"]
    del known["metric"]
    for old, new in (("best_loss", "best_value"), ("patience_loss", "patience_value")):
        known[old] = known.pop(new)
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != run_files.MANIFEST}
    files["state.json"] = json.dumps(state).encode()

    def write(target: Path) -> None:
        for name, data in files.items():
            (target / name).write_bytes(data)

    storage.commit(folder, write, {key: seal[key] for key in seal if key not in ("schema", "files", "seal")})


def test_a_checkpoint_of_an_older_version_resumes_to_the_bit(fit: Fit, tmp_path: Path) -> None:
    run = pairs.fitted(fit, tmp_path, train={"epochs": 2, "eval_every": 1, "save_every": 2})
    straight = run("straight")
    with _stop_after(5):
        run("stopped")
    for folder in (tmp_path / "stopped" / "run" / "checkpoints").glob("step-*"):
        _of_an_older_version(folder)
    resumed = run("stopped", resume=True)
    assert _exactly(resumed) == _exactly(straight)
    assert resumed.facts()["best_evaluation"] == straight.facts()["best_evaluation"]
    assert resumed.facts()["drift"] == []


def test_a_figure_that_is_not_there_or_no_number_ends_the_run(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for means in ({}, {"accuracy": float("nan")}):
        monkeypatch.setattr(loop, "measure", lambda *_, means=means: (0.5, 7, means))
        with pytest.raises(TrainingError, match="step 4: the eval accuracy is nan"):
            pairs.fitted(fit, tmp_path)(overwrite=True, train={"best_metric": "accuracy"})


@pytest.mark.parametrize(
    ("objective", "data", "told", "hint"),
    [
        ("sft", {}, "`train.best_metric: accuracy` is none of `objective: sft`", "use `loss`"),
        ("dpo", {"format": "preference"}, "`train.best_metric` compares evaluations, but no rows are held out", ""),
    ],
    ids=str,
)
def test_metrics_that_there_are_not(
    tmp_path: Path, base: Path, objective: str, data: dict[str, Any], told: str, hint: str
) -> None:  # fmt: skip
    path = tiny.write_recipe(tmp_path, base, objective=objective, data=data, train={"best_metric": "accuracy"})
    with pytest.raises(RecipeError, match=re.escape(told)) as failed:
        loratune.load_recipe(path)
    assert hint in str(failed.value)
    if objective == "dpo":
        wrong = tiny.write_recipe(tmp_path, base, objective="dpo", data=data, train={"best_metric": "acuracy"})
        with pytest.raises(RecipeError, match="use `loss`, `accuracy`, `margin`, `logp_chosen`"):
            loratune.load_recipe(wrong)


def test_figures_are_those_that_each_returns() -> None:
    assert Dpo.figures.keys() > Orpo.figures.keys()
    assert Sft().measures.keys() == {"loss"}
    assert all(figure.unit for figure in Dpo().measures.values())


# ---------------------------------------------------------------- figures that are watched


def _told(values: list[float | None], fall: float = 1.0) -> list[str]:
    watcher = Watcher({"logp": Watch(fall, "a remedy")})
    return [line for n, value in enumerate(values, 1) for line in watcher.see(n, {"logp": value, "other": 3.0})]


def test_a_fall_is_told_once() -> None:
    assert _told([-1.0, -1.5, -1.9, -1.9, -1.9, -1.9]) == []
    assert _told([-1.0, -2.5, -2.5, -2.5, -2.5, -2.5, -4.0, -5.0]) == [
        "step 5: logp has fallen from -1.00 to -2.20: a remedy"
    ]
    assert _told([-1.0, -9.0, -1.0, -1.0, -1.0, -1.0], fall=2.0) == [], "one batch may have unlikely answers"
    assert _told([-1.0] + [-9.0] * (LAST - 2)) == [], "nor is a few steps' mean enough"
    assert _told([None, -1.0, None, -2.5, -2.5, -2.5, -2.5, -2.5])[0].startswith("step 7: ")


def test_likelihood_displacement_is_told_once_also_over_a_resume(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    each = Dpo.each
    falling: Iterator[int] = iter(range(99))

    def sinking(self: Dpo, policy: Any, batch: Any) -> Any:
        found = each(self, policy, batch)
        if policy.training:
            found["logp_chosen"] = found["logp_chosen"] * 0 - 1 - 0.5 * next(falling)
        return found

    run = pairs.fitted(fit, tmp_path, train={"epochs": 3, "save_every": 1, "micro_batch_size": 8})
    capsys.readouterr()
    monkeypatch.setattr(Dpo, "each", sinking)
    with _stop_after(9):
        run()
    told = capsys.readouterr().err
    line = r"step 6: logp_chosen has fallen from (-.*) to (-.*): the chosen .* less likely; `objective.sft_weight`"
    (found,) = re.findall(line, told)
    assert float(found[0]) - float(found[1]) == pytest.approx(1.5)
    run(resume=True)
    assert "has fallen" not in capsys.readouterr().err
