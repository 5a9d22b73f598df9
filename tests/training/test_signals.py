"""A signal ends a run after a checkpoint, with its own exit code, and the run goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from loratune.training import signals
from tests import tiny


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_says_so(tmp_path: Path, base: Path, number: signal.Signals) -> None:
    recipe = tiny.write_recipe(tmp_path, base, train={"epochs": 100_000, "save_every": 1_000_000, "log_every": 1})
    command = [sys.executable, "-m", "loratune", "train", str(recipe)]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup, or in a shell's background, it is ignored
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(run.pid, number)
    _, told = run.communicate(timeout=120)
    assert run.returncode == 128 + number, told
    last = told.strip().splitlines()[-2:]
    step = len(metrics.read_text().splitlines())
    assert last == [f"{number.name}: stopped after step {step}, a checkpoint is saved", "  continue with --resume"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "MANIFEST.json").exists()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
    again = subprocess.run(
        [*command, "--resume", "--allow-drift", "--set", f"train.epochs={(step + 3) / 3}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {step}" in again.stderr
    assert ", and allowed: train.epochs: 100000.0 -> " in again.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_a_signal_in_a_callback_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    class Interrupting:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            for _ in range(100):  # the handler runs somewhere in here
                pass

    def start() -> None:
        Interrupting()
        time.sleep(10)

    with signals.listening() as asked, pytest.raises(signals.Leave):
        start()
    assert asked.number == signal.SIGINT
    assert capfd.readouterr().err == ""


def test_a_signal_while_a_thread_starts_comes_after_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the pool would not know its thread, and the process would wait for that for ever."""
    start = threading._start_new_thread  # type: ignore[attr-defined]

    def interrupted(*args: Any) -> Any:
        monkeypatch.undo()
        started = start(*args)
        signal.raise_signal(signal.SIGTERM)
        return started

    monkeypatch.setattr(threading, "_start_new_thread", interrupted)
    jobs = []

    def work() -> None:
        jobs.append(pool.submit(int, "3"))
        time.sleep(10)

    with ThreadPoolExecutor(1) as pool, signals.listening() as asked, pytest.raises(signals.Leave):
        work()
    assert jobs[0].result() == 3
    assert asked.number == signal.SIGTERM


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.listening() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)
