"""SIGTERM, SIGINT and SIGUSR1 at any moment: a valid checkpoint, the right exit code, and soon."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import Interrupted
from loratune.runs import checkpoint
from loratune.training import setup, signals
from tests.conftest import Fit, Trained
from tests.faults import scene
from tests.faults.child import Child, Plan
from tests.faults.child import run as run_child

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 129}


def _stopped(tmp_path: Path, base: Path, times: int) -> None:
    straight = scene.write(tmp_path / "straight", base)
    first = run_child(straight)
    seconds = run_child(straight, "--overwrite").seconds
    assert first.code == 0
    rng = random.Random(3)
    slowest, ended, where = 0.0, 0, {"before": 0, "in": 0}
    for number in range(times):
        recipe = scene.write(tmp_path / f"stop{number}", base)
        folder = recipe.parent / "run"
        which = rng.choice(list(CODES))
        child, after = Child(recipe), rng.uniform(0.1, seconds)
        time.sleep(after)
        asked = time.monotonic()
        child.send(which)
        done = child.wait()
        slowest = max(slowest, time.monotonic() - asked)
        what = f"{which.name} after {after:.2f} s: {done.told}"
        if done.code == 0:
            ended += 1  # it came after the last step: then the run is finished first
            assert scene.result(folder) == scene.result(straight.parent / "run")
            continue
        assert done.code == CODES[which], what
        assert "Traceback" not in done.told, what
        scene.check_saved(folder)
        assert scene.leftovers(folder) == [], what
        assert not (folder / "adapter_model.safetensors").exists()
        if "stopped after step" in done.told:
            step = int(done.told.split("stopped after step ")[1].split(",")[0])
            assert scene.newest_step(folder) == step, what
            assert checkpoint.status(folder) == "interrupted"
            where["in"] += 1
        else:
            assert not scene.saved(folder), what
            where["before"] += 1
        again = run_child(recipe, "--resume")
        assert again.code == 0, again.told
        assert scene.result(folder) == scene.result(straight.parent / "run"), what
    print(
        f"{times} signals: {where['before']} before the first step, {where['in']} later, {ended} at the end; "
        f"the slowest left {slowest:.2f} s after it was asked"
    )


def test_stopped_at_a_few_moments(tmp_path: Path, base: Path):
    _stopped(tmp_path, base, 2)


@pytest.mark.faults
def test_stopped_at_twenty_moments(tmp_path: Path, base: Path):
    _stopped(tmp_path, base, 20)


def test_a_second_signal_leaves_at_once(tmp_path: Path, base: Path):
    """Also in the middle of a save; one that comes at once is the same one, passed on by a launcher."""
    recipe = scene.write(tmp_path, base)
    folder = tmp_path / "run"
    child = Child(recipe, plan=Plan(str(folder), slow=150))  # a save that only the signal can cut short
    until = time.monotonic() + 60
    while not list(folder.glob("checkpoints/.staging-*")) and time.monotonic() < until:
        time.sleep(0.02)
    child.send(signal.SIGINT)
    time.sleep(0.2)
    child.send(signal.SIGINT)
    time.sleep(signals.SAME)
    assert child.process.is_alive(), "the second came with the first"
    # a busy machine may hand the first one over late, and then counts this one as the same, too
    for _ in range(20):
        child.send(signal.SIGINT)
        child.process.join(2 * signals.SAME)
    done = child.wait(1)
    assert done.code == -signal.SIGINT, "a shell calls that 130"
    assert scene.saved(folder) == []
    assert run_child(recipe).code == 0
    assert scene.leftovers(folder) == []


# ---------------------------------------------------------------- what a signal cuts short is done again


def _ask_at(monkeypatch: pytest.MonkeyPatch, turn: int) -> None:
    """Let a signal come before the given call of `poll` (from 1)."""
    poll, calls = signals.Signals.poll, iter(range(1, 10_000))

    def asked(self: Any) -> None:
        if next(calls) == turn:
            self.note(signal.SIGTERM, None)
        poll(self)

    monkeypatch.setattr(signals.Signals, "poll", asked)


def _same(one: Trained, other: Trained) -> bool:
    return scene.result(one.folder) == scene.result(other.folder)


# 12 steps of 2 micro-batches; evaluations of 3 micro-batches after steps 3, 6, 9 and 12: 36 polls
@pytest.mark.parametrize("turn", [1, 2, 4, 6, 7, 8, 16, 36], ids=lambda turn: f"poll {turn}")
def test_a_step_or_an_evaluation_that_was_cut_short_is_done_again(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
):
    straight = fit("straight", **scene.SECTIONS)
    with monkeypatch.context() as patch:
        _ask_at(patch, turn)
        with pytest.raises(Interrupted) as caught:
            fit("a", **scene.SECTIONS)
    assert caught.value.exit_code == 143
    folder = tmp_path / "a" / "run"
    done = len(scene.events(folder))
    assert scene.newest_step(folder) == done == {1: 0, 2: 0, 4: 1, 6: 2, 7: 3, 8: 3, 16: 6, 36: 12}[turn]
    if done:
        state = json.loads((checkpoint.path_of(folder, done) / "state.json").read_text())
        assert state["progress"]["pending"] == (turn in (7, 8, 16, 36))
        assert f"SIGTERM: stopped after step {done}, a checkpoint is saved" in str(caught.value)
    else:
        assert "stopped before the first step: nothing to save" in str(caught.value)
    assert not (folder / "adapter_model.safetensors").exists()
    assert _same(fit("a", resume=True, **scene.SECTIONS), straight)


def test_a_signal_while_rows_are_read_leaves_nothing(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepare = setup.prepare

    def asked(*args: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return prepare(*args)

    monkeypatch.setattr(setup, "prepare", asked)
    with pytest.raises(Interrupted, match="SIGUSR1: stopped before the first step: nothing to save") as caught:
        fit("a", **scene.SECTIONS)
    assert caught.value.exit_code == 143
    assert not (tmp_path / "a" / "run").exists()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL, "the handlers before are back"


def test_polls_are_between_micro_batches(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    polls: list[int] = []
    monkeypatch.setattr(signals.Signals, "poll", lambda self: polls.append(1))
    fit("a", **scene.SECTIONS)
    assert len(polls) == 36
