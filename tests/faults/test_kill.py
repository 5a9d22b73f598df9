"""kill -9 at any moment: the next start goes on by itself and ends at the same bytes."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from tests.faults import scene
from tests.faults.child import Child, Plan, run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, list[tuple[str, str]], float]:
    """Return the run folder of the uninterrupted run, its calls that write, and how long it took in seconds."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = scene.write(folder, base)
    run(recipe)  # the second one finds everything in the page cache
    trace = folder / "trace.jsonl"
    done = run(recipe, "--overwrite", plan=Plan(str(folder / "run"), trace=str(trace)))
    assert done.code == 0, done.told
    return folder / "run", [tuple(json.loads(line)) for line in trace.read_text().splitlines()], done.seconds


def _go_on(recipe: Path, straight: Path, kind: str) -> int:
    """Start again as a job script would, with --resume; return how many steps were done twice."""
    folder = recipe.parent / "run"
    done_before = max((e["number"] for e in scene.events(folder)), default=0)
    scene.check_saved(folder)
    saved = scene.newest_step(folder)
    again = run(recipe, "--resume")
    assert again.code == 0, f"{kind}: {again.told}"
    assert scene.result(folder) == scene.result(straight), kind
    assert scene.leftovers(folder) == [], kind
    return max(0, done_before - saved)


def _killed(tmp_path: Path, base: Path, straight: tuple[Path, list[tuple[str, str]], float], timed: int, inside: int) -> None:  # fmt: skip
    reference, calls, seconds = straight
    rng = random.Random(1)
    in_saves = [k for k, (_, path) in enumerate(calls, 1) if "/checkpoints/" in path]
    assert len(in_saves) > 100
    twice = []
    for number, k in enumerate(sorted(rng.sample(in_saves, inside))):
        recipe = scene.write(tmp_path / f"call{number}", base)
        done = run(recipe, plan=Plan(str(recipe.parent / "run"), kill_at=k))
        assert done.code == -9, done.told
        twice.append(_go_on(recipe, reference, f"killed at call {k}: {calls[k - 1]}"))
    for number in range(timed):
        recipe = scene.write(tmp_path / f"time{number}", base)
        child, after = Child(recipe), rng.uniform(0.02, seconds)
        time.sleep(after)
        child.send(9)
        child.wait()
        twice.append(_go_on(recipe, reference, f"killed after {after:.2f} s"))
    print(f"{timed + inside} killed, {timed + inside} went on; steps done twice: at most {max(twice)}")
    assert max(twice) <= 2, "one save interval"


def test_killed_at_a_few_moments(tmp_path: Path, base: Path, straight: tuple[Path, list[tuple[str, str]], float]):
    _killed(tmp_path, base, straight, timed=1, inside=2)


@pytest.mark.faults
def test_killed_at_fifty_moments(tmp_path: Path, base: Path, straight: tuple[Path, list[tuple[str, str]], float]):
    _killed(tmp_path, base, straight, timed=30, inside=20)


def test_a_killed_run_is_named_as_such(tmp_path: Path, base: Path):
    recipe = scene.write(tmp_path, base)
    folder = tmp_path / "run"
    plan = Plan(str(folder), hook="slow_steps")
    child = Child(recipe, plan=plan)
    until = time.monotonic() + 60
    while not scene.saved(folder) and time.monotonic() < until:
        time.sleep(0.05)
    from loratune.runs import checkpoint

    assert checkpoint.status(folder) == "running"
    child.send(9)
    child.wait()
    assert checkpoint.status(folder) == "killed"
    refused = run(recipe)
    assert refused.code == 6
    assert "this folder holds a run that was killed" in refused.told
    assert "taking over the lock of a run that was killed (process" in refused.told
    assert run(recipe, "--overwrite").code == 0
