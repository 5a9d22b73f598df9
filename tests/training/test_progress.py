"""What a person sees of a step on a terminal."""

from __future__ import annotations

import io
import math

from rich.console import Console

from loratune.training.loop import Step
from loratune.training.progress import RunReport

STEP = Step(7, 0.5, 1.25, 0.75, 2e-4, 4, 400, 100, 400, 0.5)


def seen(report: RunReport) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100).print(report._table(STEP))
    return " ".join(stream.getvalue().split())


def test_the_view_shows_speed_and_the_best_step() -> None:
    report = RunReport(active=False)
    told = seen(report)
    assert told.startswith("loss 1.2500 eval loss not yet best not yet lr 2.00e-04 grad norm 0.75 epoch 0.50")
    assert "tokens/s 800 label tokens/s 200 step time 0.50 s memory " in told
    report.evaluation += [(2, 2.5), (4, 2.25), (6, math.nan)]
    assert "eval loss nan best 2.2500, step 4" in seen(report)
