"""A run that was stopped and resumed is the run that was not, bit for bit; damage is noticed, never trained on."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from loratune.errors import RunFolderError, StorageError
from loratune.models import base_model
from loratune.runs import checkpoint, training_state
from loratune.training.progress import RunReport
from tests.conftest import Fit, Trained

SECTIONS: dict[str, Any] = {
    "method": {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
    "data": {"eval": "eval.jsonl"},
    "train": {"batch_size": 8, "micro_batch_size": 2, "epochs": 3, "save_every": 2, "eval_every": 3, "keep": 3},
}  # 9 steps of 4 micro-batches, 3 epochs


class Stop(Exception):
    """The power fails."""


@contextmanager
def _stop_after(step: int) -> Iterator[None]:
    """Let the power fail after a step of the training inside."""
    record = RunReport.step

    def fail(self: RunReport, done: Any) -> None:
        record(self, done)
        if done.number == step:
            raise Stop

    with pytest.MonkeyPatch.context() as power:
        power.setattr(RunReport, "step", fail)
        with pytest.raises(Stop):
            yield


def _exactly(done: Trained) -> dict[str, Any]:
    """Return everything of a run that must not differ by a bit."""
    names = ("number", "epoch", "loss", "grad_norm", "lr", "rows", "tokens", "trained_tokens")
    return {
        "steps": [
            [value.hex() if isinstance(value := e[name], float) else value for name in names] for e in done.events()
        ],
        "eval": [(e["number"], e["loss"].hex()) for e in done.events("eval")],
        "adapter": hashlib.sha256((done.folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": {"type": "adamw", "lr": 1e-2, "weight_decay": 0.01}},
    # matrices of less than 4096 numbers keep 32-bit states
    "adamw_8bit": {"optimizer": {"type": "adamw_8bit", "lr": 1e-2}, "method": {**SECTIONS["method"], "r": 64}},
    "adafactor": {"optimizer": {"type": "adafactor", "lr": 1e-2}},
}


@pytest.mark.parametrize(
    ("optimizer", "stops"),
    [("adamw", [1]), ("adamw", [4]), ("adamw", [3, 8]), ("adamw_8bit", [5]), ("adafactor", [5])],
    ids=str,
)
def test_resumed_is_straight(fit: Fit, optimizer: str, stops: list[int]):
    sections = {**SECTIONS, **OPTIMIZERS[optimizer]}
    straight = fit("straight", **sections)
    for stop in stops:
        with _stop_after(stop):
            fit("stopped", resume=stop != stops[0], **sections)
        assert (
            json.loads((straight.folder.parent.parent / "stopped" / "run" / "run.json").read_text())["status"]
            == "failed"
        )
    resumed = fit("stopped", resume=True, **sections)
    assert _exactly(resumed) == _exactly(straight)
    assert len(resumed.events()) == 9
    assert resumed.facts()["status"] == "complete"
    if optimizer == "adamw_8bit":
        states = load_file(checkpoint.path_of(straight.folder, 9) / "optimizer.safetensors")
        assert any(str(tensor.dtype) == "torch.uint8" for tensor in states.values()), (
            "no state is 8-bit: nothing was tested"
        )


@pytest.mark.parametrize("begun", [True, False], ids=["begun in bfloat16", "begun in float32"])
def test_a_run_keeps_its_precision_on_another_machine(
    fit: Fit, begun: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """`dtype: auto` chooses by the device; a resume does not choose again."""
    sections = {**SECTIONS, "model": {"dtype": "auto"}}
    monkeypatch.setattr(base_model, "computes_in_bf16", lambda where: begun)
    straight = fit("straight", **sections)
    with _stop_after(5):
        fit("stopped", **sections)
    capsys.readouterr()
    monkeypatch.setattr(base_model, "computes_in_bf16", lambda where: not begun)
    resumed = fit("stopped", resume=True, **sections)
    dtype = "bfloat16" if begun else "float32"
    assert resumed.facts()["dtype"] == straight.facts()["dtype"] == dtype
    assert _exactly(resumed) == _exactly(straight)
    assert f"note     {dtype}, as when the run started" in capsys.readouterr().err
    assert fit("other", **sections).facts()["dtype"] != dtype, "guard: a run that begins here chooses otherwise"


def test_dropout_is_on_and_its_randomness_matters(fit: Fit):
    """Guard of the test above: other random states, or none restored, would be seen."""
    with_dropout = fit("a", **SECTIONS)
    without = fit("b", **{**SECTIONS, "method": {**SECTIONS["method"], "lora_dropout": 0.0}})
    assert with_dropout.column("loss")[1:] != without.column("loss")[1:]
    other_start = fit("c", **SECTIONS)
    assert _exactly(other_start) == _exactly(with_dropout)


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_resumed_is_straight_where_the_start_is_made_from_the_base_or_the_rows(fit: Fit, init: str):
    """The start is made again on resuming, and with it what is subtracted in the end."""
    sections = {**SECTIONS, "method": {**SECTIONS["method"], "init": init}}
    straight = fit("straight", **sections)
    with _stop_after(5):
        fit("stopped", **sections)
    assert _exactly(fit("stopped", resume=True, **sections)) == _exactly(straight)


def test_full_fine_tuning_resumes_too(fit: Fit):
    sections = {**SECTIONS, "method": {"type": "full"}, "optimizer": {"type": "adamw", "lr": 1e-3}}
    straight = fit("straight", **sections)
    with _stop_after(5):
        fit("stopped", **sections)
    resumed = fit("stopped", resume=True, **sections)
    assert resumed.column("loss") == straight.column("loss")
    assert (resumed.folder / "model.safetensors").read_bytes() == (straight.folder / "model.safetensors").read_bytes()


def test_a_finished_run_goes_on_with_more_epochs(fit: Fit):
    sections = {**SECTIONS, "train": {**SECTIONS["train"], "schedule": "constant", "warmup": 0}}
    straight = fit("straight", **sections)
    shorter = {**sections, "train": {**sections["train"], "epochs": 2}}
    assert len(fit("longer", **shorter).events()) == 6
    resumed = fit("longer", resume=True, **sections)
    assert _exactly(resumed) == _exactly(straight)


def test_a_finished_run_that_is_resumed_stays_what_it_is(fit: Fit):
    done = fit("a", **SECTIONS)
    before = _exactly(done)
    again = fit("a", resume=True, **SECTIONS)
    assert _exactly(again) == before
    assert again.run.train_loss == done.run.train_loss
    assert again.facts()["status"] == "complete"


def test_resume_without_a_checkpoint_begins_at_the_start(fit: Fit, capsys: pytest.CaptureFixture[str]):
    straight = fit("straight", **SECTIONS)
    fresh = fit("fresh", resume=True, **SECTIONS)
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert _exactly(fresh) == _exactly(straight)


# ---------------------------------------------------------------- damage


def _stopped(fit: Fit, tmp_path: Path, sections: dict[str, Any] = SECTIONS) -> list[Path]:
    """Stop a run after step 7; return its checkpoints, oldest first."""
    with _stop_after(7):
        fit("a", **sections)
    found = sorted((tmp_path / "a" / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in found] == ["step-000003", "step-000004", "step-000006"]
    return found


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "state.json", "adapter_config.json"],
)
def test_one_flipped_bit_in_the_newest_checkpoint_is_named_and_the_one_before_used(
    fit: Fit, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    straight = fit("straight", **SECTIONS)
    found = _stopped(fit, tmp_path)
    _flip(found[-1] / name)
    capsys.readouterr()
    resumed = fit("a", resume=True, **SECTIONS)
    told = capsys.readouterr().err
    assert f"step-000006 `{name}` has changed since it was written: not used" in told
    assert "resuming after step 4" in told
    assert _exactly(resumed) == _exactly(straight)


@pytest.mark.parametrize(
    "damage",
    ["a missing file", "no manifest", "half a manifest", "a manifest without files", "a manifest that is no mapping"],
)
def test_other_damage_is_noticed_too(fit: Fit, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]):
    newest = _stopped(fit, tmp_path)[-1]
    manifest = newest / "MANIFEST.json"
    if damage == "a missing file":
        (newest / "optimizer.safetensors").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_bytes(manifest.read_bytes()[:100])
    else:
        manifest.write_text('{"schema": 1}' if damage == "a manifest without files" else "[]")
    fit("a", resume=True, **SECTIONS)
    told = capsys.readouterr().err
    assert "step-000006" in told
    assert "not used" in told
    assert "resuming after step 4" in told


def test_when_every_checkpoint_is_damaged_nothing_is_trained(fit: Fit, tmp_path: Path):
    found = _stopped(fit, tmp_path)
    metrics = (tmp_path / "a" / "run" / "metrics.jsonl").read_bytes()
    for folder in found:
        _flip(folder / "adapter_model.safetensors")
    with pytest.raises(StorageError, match="no valid checkpoint") as caught:
        fit("a", resume=True, **SECTIONS)
    assert caught.value.exit_code == 5
    for folder in found:
        assert folder.name in str(caught.value)
    assert (tmp_path / "a" / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_crash_while_saving_leaves_the_checkpoint_before(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    straight = fit("straight", **SECTIONS)
    save = training_state.save_optimizer

    def fail(optimizer: Any, folder: Path) -> None:
        if "step-000006" in folder.name:
            raise OSError(28, "No space left on device")
        save(optimizer, folder)

    with monkeypatch.context() as disk:
        disk.setattr(training_state, "save_optimizer", fail)
        with pytest.raises(StorageError, match="No space left on device"):
            fit("a", **SECTIONS)
    left = sorted(path.name for path in (tmp_path / "a" / "run" / "checkpoints").iterdir())
    assert left == ["step-000002", "step-000003", "step-000004"], "no half checkpoint, no staging folder"
    assert _exactly(fit("a", resume=True, **SECTIONS)) == _exactly(straight)


def test_a_half_line_of_metrics_is_cut_off(fit: Fit, tmp_path: Path):
    straight = fit("straight", **SECTIONS)
    _stopped(fit, tmp_path)
    metrics = tmp_path / "a" / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    assert _exactly(fit("a", resume=True, **SECTIONS)) == _exactly(straight)


# ---------------------------------------------------------------- what is kept


def test_rotation_keeps_the_newest_and_the_best(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    losses = iter([3.0, 2.0, 1.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0])
    monkeypatch.setattr("loratune.training.loop.measure", lambda *_: (next(losses), 10, {}))
    done = fit(**{**SECTIONS, "train": {**SECTIONS["train"], "eval_every": 1, "save_every": 1, "keep": 2}})
    kept = sorted(folder.name for folder in (done.folder / "checkpoints").iterdir())
    assert kept == ["step-000003", "step-000008", "step-000009"]
    assert done.facts()["saved_step"] == 3
    assert done.run.eval_loss == 1.0
    best = load_file(checkpoint.path_of(done.folder, 3) / "adapter_model.safetensors")
    final = load_file(done.folder / "adapter_model.safetensors")
    last = load_file(checkpoint.path_of(done.folder, 9) / "adapter_model.safetensors")
    assert all((best[name] == final[name]).all() for name in final)
    assert any((last[name] != final[name]).any() for name in final)


EARLY = {
    **SECTIONS,
    "train": {**SECTIONS["train"], "eval_every": 1, "early_stopping": {"patience": 2, "min_delta": 0.5}},
}


def test_early_stopping_stops_and_keeps_the_best(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    losses = iter([3.0, 2.0, 1.9, 1.8, 0.0])
    monkeypatch.setattr("loratune.training.loop.measure", lambda *_: (next(losses), 10, {}))
    done = fit(**EARLY)
    assert done.run.steps == len(done.events()) == 4
    assert done.facts()["status"] == "complete"
    assert done.facts()["saved_step"] == 4, "1.9 and 1.8 are no reason to go on, and 1.8 is the lowest all the same"
    assert "has not fallen for 2 evaluations: stopping" in capsys.readouterr().err
    best = load_file(checkpoint.path_of(done.folder, 4) / "adapter_model.safetensors")
    final = load_file(done.folder / "adapter_model.safetensors")
    assert all((best[name] == final[name]).all() for name in final)


def test_a_run_that_stopped_early_does_not_go_on_when_it_is_resumed(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    losses = iter([3.0, 2.0, 1.9, 1.8])
    monkeypatch.setattr("loratune.training.loop.measure", lambda *_: (next(losses), 10, {}))
    done = fit(**EARLY)
    before = _exactly(done)
    again = fit(resume=True, **EARLY)
    assert _exactly(again) == before


def test_patience_is_remembered_over_a_resume(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    sections = {**EARLY, "train": {**EARLY["train"], "save_every": 1}}
    losses = iter([3.0, 2.0, 1.9])
    monkeypatch.setattr("loratune.training.loop.measure", lambda *_: (next(losses), 10, {}))
    with _stop_after(4):
        fit(**sections)
    losses = iter([1.95])  # one more evaluation that is no reason to go on, and no other
    done = fit(resume=True, **sections)
    assert done.run.steps == 4
    assert done.facts()["saved_step"] == 3
    assert done.run.eval_loss == 1.9


@pytest.mark.parametrize("stopped", [None, 3])
def test_the_best_step_has_the_lowest_loss_whatever_patience_asks_for(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, stopped: int | None
):
    """A loss may fall in steps that are each too small to count, and still be the lowest in the end."""
    sections = {**SECTIONS, "train": {**SECTIONS["train"], "eval_every": 1, "save_every": 1, "keep": 2}}
    sections["train"]["early_stopping"] = {"patience": 9, "min_delta": 0.3}
    losses = iter([5.9, 5.8, 5.7, 5.65, 5.62, 5.61, 5.75, 5.8, 5.9])
    monkeypatch.setattr("loratune.training.loop.measure", lambda *_: (next(losses), 10, {}))
    if stopped:
        with _stop_after(stopped):
            fit(**sections)
    done = fit(resume=bool(stopped), **sections)
    assert (done.facts()["saved_step"], done.run.eval_loss) == (6, 5.61)


def test_a_loss_that_was_no_number_is_not_the_best_for_ever(fit: Fit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As a checkpoint of an earlier version may say."""
    state = {"step": 4, "best_loss": math.nan, "best_step": 2, "evaluations_without_better": 2, "pending": False}
    assert checkpoint._progress(state).best_value is None
    assert checkpoint._progress(state).evaluated(5.0, 0.0).best_step == 4
    assert checkpoint._progress({**state, "best_loss": 3.0}).evaluated(2.9, 0.2) == checkpoint.Progress(
        4, 2.9, 4, 3.0, 3, False
    )


# ---------------------------------------------------------------- folders in use


def test_a_finished_run_is_not_overwritten_unasked(fit: Fit):
    done = fit(**SECTIONS)
    before = {f: f.read_bytes() for f in done.folder.rglob("*") if f.is_file()}
    with pytest.raises(RunFolderError, match="this run is finished") as caught:
        fit(**SECTIONS)
    assert caught.value.exit_code == 6
    assert {f: f.read_bytes() for f in done.folder.rglob("*") if f.is_file()} == before
    again = fit(overwrite=True, **SECTIONS)
    assert again.column("loss") == done.column("loss")
    assert len(again.events()) == 9


def test_a_stopped_run_is_not_overwritten_unasked(fit: Fit, tmp_path: Path):
    _stopped(fit, tmp_path)
    with pytest.raises(RunFolderError, match="this folder holds a run that is failed") as caught:
        fit("a", **SECTIONS)
    assert caught.value.exit_code == 6
    shutil.rmtree(tmp_path / "a" / "run" / "checkpoints")  # nothing to lose: it may begin anew
    assert len(fit("a", **SECTIONS).events()) == 9


def test_a_folder_with_other_things_is_left_alone(fit: Fit, tmp_path: Path):
    (tmp_path / "a" / "run").mkdir(parents=True)
    (tmp_path / "a" / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="not empty, and not a run"):
        fit("a", **SECTIONS)
    assert [f.name for f in (tmp_path / "a" / "run").iterdir()] == ["thesis.tex"]


def test_an_overwritten_run_that_fails_leaves_no_adapter_of_the_old_one(fit: Fit):
    done = fit("a", **SECTIONS)
    with _stop_after(1):
        fit("a", overwrite=True, **SECTIONS)
    assert done.facts()["status"] == "failed"
    assert not (done.folder / "adapter_model.safetensors").exists(), "it would pass for the new run's"


def test_overwrite_is_for_runs_only(fit: Fit, tmp_path: Path):
    (tmp_path / "a" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "run" / "checkpoints" / "of-another-tool.bin").write_bytes(b"weeks of work")
    with pytest.raises(RunFolderError, match="not empty, and not a run"):
        fit("a", overwrite=True, **SECTIONS)
    assert (tmp_path / "a" / "run" / "checkpoints" / "of-another-tool.bin").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {**SECTIONS["method"], "r": 8}}, "size mismatch|Error"),
        ({"method": {**SECTIONS["method"], "target_modules": ["q_proj"]}}, "is not in both checkpoint and model"),
        ({"method": {**SECTIONS["method"], "modules_to_save": ["lm_head"]}}, "is not in both checkpoint and model"),
        ({"optimizer": {"type": "adafactor", "lr": 1e-2}}, "its optimizer is different"),
    ],
    ids=["rank", "fewer targets", "more modules", "optimizer"],
)
def test_a_run_of_another_kind_is_not_resumed(fit: Fit, tmp_path: Path, change: dict[str, Any], said: str):
    _stopped(fit, tmp_path)
    with pytest.raises(RunFolderError, match=rf"step-000006 does not fit this recipe: .*({said})") as caught:
        fit("a", resume=True, allow_drift=True, **{**SECTIONS, **change})
    assert "\n" not in caught.value.problems[0].message
    assert len(fit("a", resume=True, **SECTIONS).events()) == 9, "with its own recipe it still goes on"


def test_another_rate_holds_from_the_resume_on(fit: Fit, tmp_path: Path):
    sections = {**SECTIONS, "train": {**SECTIONS["train"], "schedule": "constant", "warmup": 0}}
    _stopped(fit, tmp_path, sections)
    resumed = fit("a", resume=True, allow_drift=True, **{**sections, "optimizer": {"lr": 1e-3}})
    assert resumed.column("lr") == [1e-2] * 6 + [1e-3] * 3
