"""What has changed between a stop and a resume: shown, and refused where it would be another training."""

from __future__ import annotations

import json
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from loratune import recipe
from loratune.errors import Interrupted, RunFolderError
from loratune.events import Event, StepDone
from loratune.optim.schedules import Constant, Cosine
from loratune.recipe import Recipe
from loratune.runs import changes
from loratune.runs.facts import Facts, Setup, Start
from tests import tiny
from tests.conftest import Fit
from tests.faults import scene


def _leaves(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{path}.{key}" if path else key)]
    return [path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return recipe.load(tiny.write_recipe(tmp_path_factory.mktemp("a"), tiny.save(tmp_path_factory.mktemp("base"))))


def _seal(known: Recipe) -> dict[str, Any]:
    fingerprints = {"data": "1", "eval": None, "base": "2"}
    return {
        "settings": json.loads(json.dumps(known.model_dump(mode="json"))), "fingerprints": fingerprints, "sources": [],
        "steps": 9, "step": 5, "versions": {"torch": "2"}, "processes": 1,
    }  # fmt: skip


def _facts(
    fingerprints: dict[str, Any], steps: int = 9, processes: int = 1, versions: dict[str, str] | None = None
) -> Facts:
    unknown = {field.name: None for field in (*fields(Start), *fields(Setup))}
    start = {**unknown, "processes": processes, "versions": versions or {"torch": "2"}}
    setup = {**unknown, "fingerprints": fingerprints, "steps": steps, "sources": []}
    names = {field.name for field in fields(Start)}
    return Facts(
        Start(**{name: start[name] for name in names}),
        setup=Setup(**{name: value for name, value in setup.items() if name not in names}),
    )


def test_every_key_of_a_recipe_is_told_or_refused(whole: Recipe):
    """Whatever is not known to be harmless is refused, so that no key is ever forgotten."""
    leaves = _leaves(whole.model_dump(mode="json"))
    assert len(leaves) > 50
    refused, told = set(), set()
    for leaf in leaves:
        seal = _seal(whole)
        place = seal["settings"]
        for key in leaf.split(".")[:-1]:
            place = place[key]
        place[leaf.split(".")[-1]] = "another"
        early = changes.of_recipe(seal, whole)
        late = changes.of_run(seal, whole, _facts(seal["fingerprints"]), finished=False)
        assert len(early.refused + early.told + late.refused + late.told) == 1, leaf
        (refused if early.refused or late.refused else told).add(leaf)
    assert {leaf for leaf in told if not leaf.startswith("data.")} == {
        "model.base", "model.revision", "output", "train.compile", "train.best_metric", "train.early_stopping", "train.epochs",
        "train.eval_every",
        "train.gradient_checkpointing", "train.keep", "train.kernels", "train.log_every", "train.max_steps", "train.micro_batch_size", "train.offload",
        "train.save_every",
    }  # fmt: skip
    assert {
        "data.packing",
        "data.prefix_sharing",
        "optimizer.lr",
        "method.r",
        "train.seed",
        "train.batch_size",
        "train.schedule.type",
    } <= refused
    seal = _seal(whole)
    for name, refusals in (
        ("data", 1),
        ("base", 0),
    ):  # of the base `fingerprint.compare` speaks, with another exit code
        other = {**seal["fingerprints"], name: "other"}
        assert len(changes.of_run(seal, whole, _facts(other), finished=False).refused) == refusals
    seal = _seal(whole)
    seal["settings"]["model"]["base"] = "another"
    unknown = {"data": "1", "eval": None}
    assert changes.of_run(seal, whole, _facts(unknown), finished=False).refused == [
        f"model.base: another -> {whole.model.base}"
    ]


@pytest.mark.parametrize(
    ("section", "key", "now", "refused"),
    [("method", "router", "frozen", []), ("method", "router", "trained", ["method.router: none -> trained"])],
)
def test_a_key_that_a_run_was_begun_without(whole: Recipe, section: str, key: str, now: str, refused: list[str]):
    """A key of a later version changes nothing at its default: a run of an older version can be resumed."""
    seal = _seal(whole)
    del seal["settings"][section][key]
    settings = whole.model_dump(mode="json")
    settings[section][key] = now
    found = changes.of_recipe(seal, Recipe.model_validate(settings))
    assert (found.refused, found.told) == (refused, [])


@pytest.mark.parametrize(
    ("schedule", "finished", "refused"),
    [("constant", False, False), ("cosine", False, True), ("cosine", True, False)],
)
def test_another_length_is_refused_where_it_moves_the_rates_of_a_run_that_was_cut(
    whole: Recipe, schedule: str, finished: bool, refused: bool
):
    kinds = {"constant": Constant(), "cosine": Cosine()}
    train = whole.train.model_copy(update={"epochs": 2.0, "warmup": 0, "schedule": kinds[schedule]})
    longer = whole.model_copy(update={"train": train})
    seal = _seal(longer)
    seal["settings"]["train"]["epochs"] = 1.0
    found = changes.of_run(seal, longer, _facts(seal["fingerprints"], steps=18), finished)
    (line,) = found.refused or found.told
    assert bool(found.refused) == refused
    if schedule == "constant":
        assert line == "train.epochs: 1.0 -> 2.0"
    else:
        assert line == "train.epochs: 1.0 -> 2.0 (9 -> 18 steps: `cosine` continues at 0.821 of the rate, was at 0.413)"


def test_versions_and_processes_are_told(whole: Recipe):
    seal = _seal(whole)
    found = changes.of_run(seal, whole, _facts({}, processes=2, versions={"torch": "3"}), finished=False)
    assert found.refused == []
    assert found.told == [
        "processes: 1 -> 2; sums are rounded in a different order",
        "torch: 2 -> 3; the last digits may differ",
    ]


# ---------------------------------------------------------------- in a run


def _stopped(fit: Fit, **sections: Any) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, StepDone) and event.number == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        fit("a", on_event=stop, **{**scene.SECTIONS, **sections})


def test_a_changed_recipe_is_refused_with_all_its_changes_and_allowed_when_asked(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _stopped(fit)
    before = {f: f.read_bytes() for f in (tmp_path / "a" / "run").rglob("*") if f.is_file()}
    changed = {**scene.SECTIONS, "optimizer": {"type": "adamw", "lr": 1e-3}, "train": {**scene.SECTIONS["train"], "seed": 1, "keep": 5}}  # fmt: skip
    with pytest.raises(RunFolderError) as caught:
        fit("a", resume=True, **changed)
    assert caught.value.exit_code == 6
    text = str(caught.value)
    assert "changed since step-000005: optimizer.lr: 0.01 -> 0.001" in text
    assert "changed since step-000005: train.seed: 0 -> 1" in text
    assert "train.keep" not in text
    assert "--allow-drift" in text
    assert "changed since step-000005: train.keep: 2 -> 5" in capsys.readouterr().err
    assert {f: f.read_bytes() for f in (tmp_path / "a" / "run").rglob("*") if f.is_file()} == before
    done = fit("a", resume=True, allow_drift=True, **changed)
    assert done.facts()["drift"] == ["after step 5: optimizer.lr: 0.01 -> 0.001", "after step 5: train.seed: 0 -> 1"]
    assert done.column("lr")[5] < done.column("lr")[4] / 5
    again = fit("a", resume=True, **changed)
    assert again.facts()["drift"] == done.facts()["drift"], "it is not forgotten by the next resume"


def test_a_changed_data_file_is_named(fit: Fit, tmp_path: Path):
    _stopped(fit)
    size = (tmp_path / "a" / "train.jsonl").stat().st_size
    with pytest.raises(RunFolderError) as caught:
        fit("a", resume=True, rows=23, **scene.SECTIONS)
    file = tmp_path / "a" / "train.jsonl"
    said = f"the training rows are not the same ({file} has changed: {size:,} -> {file.stat().st_size:,} bytes"
    assert f"changed since step-000005: {said}" in str(caught.value)


def test_rows_may_move(fit: Fit, tmp_path: Path):
    straight = fit("straight", **scene.SECTIONS)
    _stopped(fit)
    tiny.write_jsonl(tmp_path / "a" / "moved.jsonl", tiny.chats(24))
    done = fit("a", resume=True, **{**scene.SECTIONS, "data": {**scene.SECTIONS["data"], "train": "moved.jsonl"}})
    assert scene.result(done.folder) == scene.result(straight.folder)


def test_the_manifest_says_what_it_was_made_with(fit: Fit):
    done = fit("a", **scene.SECTIONS)
    for folder in (done.folder, scene.saved(done.folder)[-1]):
        seal = json.loads((folder / "MANIFEST.json").read_text())
        assert seal["recipe"] == done.recipe.hash()
        assert Recipe.model_validate_json(json.dumps(seal["settings"])) == done.recipe
        assert set(seal["fingerprints"]) >= {"data", "eval"}
        assert all(len(value) == 64 for value in seal["fingerprints"].values())
        assert (seal["steps"], seal["step"], seal["processes"]) == (12, 12, 1)
        assert [Path(one["path"]).name for one in seal["sources"]] == ["train.jsonl", "eval.jsonl"]
