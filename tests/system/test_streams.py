"""Closed streams, full disks behind them and readers that leave: no training ends with them, and no file gets what was meant for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

PROGRAM = f"{sys.executable} -m loratune"


def _shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Return a folder with recipe.yaml."""
    folder = tmp_path_factory.mktemp("streams")
    tiny.write_recipe(folder, base, rows=8)
    return folder


@pytest.mark.parametrize(
    "streams", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", "2>&1 >/dev/null | head -1", "2> >(true)"]
)
def test_a_training_outlives_its_stderr(place: Path, streams: str) -> None:
    done = _shell(f"{PROGRAM} train recipe.yaml --overwrite {streams}", place)
    assert done.returncode == 0, done.stderr + done.stdout
    run = place / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "complete"
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events] == ["step"], "nothing else was written to a file that took a number"
    assert "Traceback" not in done.stderr + done.stdout


def test_a_result_that_can_not_be_written_is_an_error(place: Path) -> None:
    done = _shell(f"{PROGRAM} schema > /dev/full", place)
    assert done.returncode == 5
    assert done.stderr.splitlines()[0] == "the result can't be written to stdout: No space left on device"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["schema", "--help", "inspect recipe.yaml", "check recipe.yaml"])
def test_a_reader_may_leave(place: Path, command: str) -> None:
    done = _shell(f"{PROGRAM} {command} | head -c 1", place)
    assert len(done.stdout) == 1
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.parametrize("command", ["schema", "--help", "check recipe.yaml"])
def test_a_closed_stdout_is_no_traceback(place: Path, command: str) -> None:
    done = _shell(f"{PROGRAM} {command} >&- <&-", place)
    assert (done.returncode, done.stderr) == (0, "")
