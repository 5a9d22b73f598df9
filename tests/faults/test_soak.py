"""A long run neither grows nor leaves anything behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loratune.events import Event, StepDone
from tests.conftest import Fit
from tests.faults import scene


def _soak(fit: Fit, steps: int, saves: int) -> None:
    """Train for many steps and count memory and descriptors after the first fifth and at the end."""
    seen: dict[int, tuple[int, int]] = {}

    def count(event: Event) -> None:
        if isinstance(event, StepDone) and event.number in (steps // 5, steps - 1):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            seen[event.number] = (resident, len(os.listdir("/proc/self/fd")))

    done = fit(
        on_event=count,
        rows=8,
        data={"eval": None},
        train={"epochs": steps / 8, "save_every": steps // saves, "batch_size": 1, "log_every": steps},
    )
    (memory, handles), (later, more) = seen.values()
    growth = later / memory - 1
    print(f"{steps} steps, {saves} saves: memory {memory / 1e6:.0f} -> {later / 1e6:.0f} MB ({growth:+.1%}), {handles} -> {more} descriptors")  # fmt: skip
    assert growth < 0.05
    assert more == handles
    assert [folder.name for folder in scene.saved(done.folder)] == [f"step-{steps - steps // saves:06d}", f"step-{steps:06d}"]  # fmt: skip
    assert scene.leftovers(done.folder) == []


def test_a_few_hundred_steps(fit: Fit):
    _soak(fit, 300, 20)


@pytest.mark.faults
def test_ten_thousand_steps(fit: Fit):
    _soak(fit, 10_000, 200)
