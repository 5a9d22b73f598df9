"""What `on_event` gets, and what becomes of a call whose `on_event` raises."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loratune
from loratune.events import Answered, Begun, Counted, Ended, Evaluated, Event, Report, Saved, StepDone, Told
from loratune.system import storage
from tests import tiny
from tests.conftest import Fit
from tests.faults import scene


class Mine(Exception):
    """An error of the caller's own."""


def raising(error: BaseException, when: Callable[[Event], bool], calls: list[Event] | None = None) -> Any:
    """Return a listener that raises at the first event that is meant, and must not be called again."""
    raised: list[Event] = []

    def hear(event: Event) -> None:
        assert not raised, "called again"
        if calls is not None:
            calls.append(event)
        if when(event):
            raised.append(event)
            raise error

    return hear


def status(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["status"])


# ---------------------------------------------------------------- what is told


def test_events_of_a_run_are_what_metrics_and_checkpoints_hold(fit: Fit) -> None:
    heard: list[Event] = []
    done = fit(on_event=heard.append, **scene.SECTIONS)
    steps = [event for event in heard if isinstance(event, StepDone)]
    known = [{k: v for k, v in s.__dict__.items() if k not in ("steps", "metrics")} for s in steps]
    assert [{"kind": "step", **one} for one in known] == done.events()
    assert {step.steps for step in steps} == {12}
    evaluated = [event for event in heard if isinstance(event, Evaluated)]
    told = [(e["number"], e["loss"], e["trained_tokens"], e["seconds"]) for e in done.events("eval")]
    assert [(e.number, e.loss, e.trained_tokens, e.seconds) for e in evaluated] == told
    assert min(e.loss for e in evaluated if e.best) == done.run.eval_loss
    saved = [event for event in heard if isinstance(event, Saved)]
    assert [event.number for event in saved] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert saved[-1].folder == scene.saved(done.folder)[-1]
    assert [event for event in heard if isinstance(event, Begun)] == [Begun(0, 12, 10)]
    (end,) = [event for event in heard if isinstance(event, Ended)]
    assert heard[-1] is end
    assert (end.folder, end.steps, end.seconds) == (done.folder, 12, done.run.seconds)
    assert (end.product, end.size) == ("adapter", (done.folder / "adapter_model.safetensors").stat().st_size)
    lines = [event.line for event in heard if isinstance(event, Told)]
    assert any(line.startswith("method   lora: ") for line in lines)
    assert Counted("reading rows", 24, None, 0.0).what in {e.what for e in heard if isinstance(e, Counted)}


def test_a_resumed_run_tells_where_it_goes_on(fit: Fit) -> None:
    hear = raising(Mine(), lambda event: isinstance(event, StepDone) and event.number == 5)
    with pytest.raises(Mine):
        fit(on_event=hear, **scene.SECTIONS)
    heard: list[Event] = []
    done = fit(on_event=heard.append, resume=True, **scene.SECTIONS)
    first = done.events("eval")[0]
    assert [event for event in heard if isinstance(event, Begun)] == [
        Begun(5, 12, 10, ((3, first["loss"]),), best=(3, first["loss"]))
    ]
    assert [event.number for event in heard if isinstance(event, StepDone)] == list(range(6, 13))


def test_nothing_is_printed_and_lines_are_logged(
    tmp_path: Path, base: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loratune")
    rows = {"data": {"eval": "eval.jsonl"}}
    run = loratune.train(loratune.load_recipe(tiny.write_recipe(tmp_path, base, **rows))).folder
    loratune.evaluate(run, max_new_tokens=4)
    loratune.merge(run, tmp_path / "merged")
    loratune.chat(run, "hello", max_new_tokens=4)
    loratune.inspect(loratune.load_recipe(tmp_path / "recipe.yaml"))
    assert capfd.readouterr() == ("", "")
    told = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "loratune"]
    assert ("INFO", "evaluating base on 6 rows") in told
    assert any(line.startswith("verified: largest logit difference") for _, line in told)


def test_what_must_not_be_missed_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "loratune")
    report = Report()
    report.note("a note")
    report.problem("a problem")
    report.field("rows", "two", problem=True)
    report.field("", "")
    seen = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert seen == [("INFO", "a note"), ("WARNING", "a problem"), ("WARNING", "rows     two")]


def test_lines_hide_secrets() -> None:
    heard: list[Any] = []
    report = Report(heard.append)
    for tell in (report.note, report.problem, lambda line: report.field("note", line)):
        tell("token hf_abcdefghijklmnopqrstuvwxyzABCDEFGHIJ")
    assert len(heard) == 3
    assert not any("hf_abc" in event.text for event in heard)


def test_another_process_tells_nothing() -> None:
    report = Report(raising(Mine(), lambda event: True), active=False)
    report.note("a note")


# ---------------------------------------------------------------- what a listener raises


@pytest.mark.parametrize(
    ("when", "saved"),
    [
        (lambda event: isinstance(event, StepDone) and event.number == 1, 1),
        (lambda event: isinstance(event, StepDone) and event.number == 5, 5),
        (lambda event: isinstance(event, StepDone) and event.number == 6, 6),
        (lambda event: isinstance(event, Evaluated) and event.number == 6, 6),
        (lambda event: isinstance(event, Saved) and event.number == 4, 4),
        (lambda event: isinstance(event, StepDone) and event.number == 12, 12),
    ],
    ids=["step 1", "step 5", "step 6, to be evaluated", "evaluation", "checkpoint", "last step"],
)  # fmt: skip
def test_a_run_goes_on_where_a_listener_ended_it(
    fit: Fit, tmp_path: Path, when: Callable[[Event], bool], saved: int
) -> None:
    straight = scene.result(fit("straight", **scene.SECTIONS).folder)
    error = Mine("enough")
    with pytest.raises(Mine) as caught:
        fit("a", on_event=raising(error, when), **scene.SECTIONS)
    assert caught.value is error
    run = tmp_path / "a" / "run"
    assert status(run) == "failed"
    assert scene.newest_step(run) == saved == len(scene.events(run)), "no step is lost"
    scene.check_saved(run)
    assert scene.result(fit("a", resume=True, **scene.SECTIONS).folder) == straight
    assert scene.leftovers(run) == []


def test_what_can_not_be_saved_is_said_beside_the_error(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hear(event: Event) -> None:
        if isinstance(event, StepDone) and event.number == 5:
            monkeypatch.setattr(storage, "check_space", full)
            raise Mine

    def full(*_: Any) -> None:
        raise loratune.StorageError("no space left")

    with pytest.raises(Mine) as caught:
        fit("a", on_event=hear, **scene.SECTIONS)
    assert caught.value.__notes__ == ["the last complete step is not saved: no space left"]
    run = tmp_path / "a" / "run"
    assert scene.newest_step(run) == 4
    monkeypatch.undo()
    assert storage.verify(scene.saved(run)[-1], alone=True) is None


def test_an_interrupt_by_a_listener(fit: Fit, tmp_path: Path) -> None:
    hear = raising(KeyboardInterrupt(), lambda event: isinstance(event, StepDone) and event.number == 5)
    with pytest.raises(KeyboardInterrupt):
        fit("a", on_event=hear, **scene.SECTIONS)
    assert status(tmp_path / "a" / "run") == "interrupted"
    assert scene.newest_step(tmp_path / "a" / "run") == 5
    straight = scene.result(fit("straight", **scene.SECTIONS).folder)
    assert scene.result(fit("a", resume=True, **scene.SECTIONS).folder) == straight


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory", "theirs"), RuntimeError("CUDA out of memory"), MemoryError(),
        loratune.DataError("theirs"), SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("kind", [Told, StepDone], ids=["at the start", "at a step"])
def test_an_error_of_a_listener_is_never_put_into_other_words(
    fit: Fit, tmp_path: Path, error: BaseException, kind: type[Event]
) -> None:
    with pytest.raises(type(error)) as caught:
        fit("a", on_event=raising(error, lambda event: isinstance(event, kind)))
    assert caught.value is error
    assert (tmp_path / "a" / "run").exists() == (kind is StepDone), "before the first step nothing is left behind"


def test_an_error_at_the_end_comes_after_the_end(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(Mine):
        fit("a", on_event=raising(Mine(), lambda event: isinstance(event, Ended)))
    assert status(tmp_path / "a" / "run") == "complete"
    assert storage.verify(tmp_path / "a" / "run") is None


def test_other_calls_end_with_what_a_listener_raises(fit: Fit, tmp_path: Path) -> None:
    run = fit("a", data={"eval": "eval.jsonl"}).folder
    recipe = loratune.load_recipe(tmp_path / "a" / "recipe.yaml")
    calls: list[tuple[Callable[..., Any], type[Event]]] = [
        (lambda hear: loratune.evaluate(run, max_new_tokens=4, on_event=hear), Counted),
        (lambda hear: loratune.merge(run, tmp_path / "merged", on_event=hear), Told),
        (lambda hear: loratune.chat(run, "hello", max_new_tokens=4, on_event=hear), Answered),
        (lambda hear: loratune.inspect(recipe, on_event=hear), Counted),
    ]
    for call, kind in calls:
        for error in (Mine(), RuntimeError("out of memory"), KeyboardInterrupt()):
            with pytest.raises(type(error)) as caught:
                call(raising(error, lambda event, kind=kind: isinstance(event, kind)))  # type: ignore[misc]
            assert caught.value is error
    assert not (tmp_path / "merged").exists()
    assert not (run / "predictions.jsonl").exists()


def test_what_was_swallowed_on_the_way_comes_out_all_the_same() -> None:
    error = Mine()
    report = Report(raising(error, lambda event: True))

    def swallow() -> None:
        with report.unchanged():
            with contextlib.suppress(Mine):
                report.note("a note")
            report.note("not heard any more")

    with pytest.raises(Mine) as caught:
        swallow()
    assert caught.value is error
