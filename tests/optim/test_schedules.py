from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter

from loratune.optim.schedules import Constant, Cosine, Linear, Schedule, WarmupStableDecay, rate

ALL = [
    Constant(),
    Linear(),
    Linear(floor=0.1),
    Cosine(),
    Cosine(floor=0.2),
    WarmupStableDecay(),
    WarmupStableDecay(decay=1),
]


@pytest.mark.parametrize("schedule", ALL, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_rates_rise_then_fall_between_0_and_1(schedule: Schedule, steps: int, warmup: int) -> None:
    warmup = min(warmup, steps)
    rates = [rate(schedule, step, steps, warmup) for step in range(steps)]
    assert all(0 < r <= 1 for r in rates)
    assert rates[:warmup] == [(i + 1) / warmup for i in range(warmup)]
    assert rates[max(warmup - 1, 0)] == 1
    falling = rates[warmup:]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("schedule", [s for s in ALL if s.type != "constant"], ids=str)
def test_after_the_last_step_the_rate_is_the_floor(schedule: Schedule) -> None:
    assert schedule.factor(50, 50) == pytest.approx(schedule.floor)
    assert schedule.factor(0, 50) == 1


def test_values() -> None:
    assert [Linear().factor(s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [Linear(floor=0.5).factor(s, 2) for s in range(2)] == [1, 0.75]
    assert [Cosine().factor(s, 4) for s in range(4)] == pytest.approx([1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4])
    assert Cosine(floor=0.2).factor(5, 10) == pytest.approx(0.6)
    assert [WarmupStableDecay(decay=0.4).factor(s, 10) for s in range(10)] == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert WarmupStableDecay(decay=0.5, floor=0.5).factor(3, 4) == pytest.approx(0.75)
    assert Constant().factor(9, 10) == 1


def test_cosine_equals_the_paper() -> None:
    """Equation 5 with eta_max 1 and eta_min the floor."""
    for step in range(30):
        wanted = 0.1 + 0.5 * (1 - 0.1) * (1 + math.cos(step / 30 * math.pi))
        assert Cosine(floor=0.1).factor(step, 30) == pytest.approx(wanted)


def test_warmup_is_taken_off_the_schedule() -> None:
    assert [rate(Linear(), step, 6, 2) for step in range(6)] == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_each_is_named_by_its_type() -> None:
    adapter = TypeAdapter(Schedule)
    for name, kind in (("constant", Constant), ("linear", Linear), ("cosine", Cosine), ("wsd", WarmupStableDecay)):
        assert type(adapter.validate_python({"type": name})) is kind
