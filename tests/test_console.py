"""What a person sees: labelled lines wrapped on a terminal and whole elsewhere, steps, bars, answers."""

from __future__ import annotations

import io
import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from loratune.console import Terminal
from loratune.events import Answered, Begun, Counted, Ended, Evaluated, Event, Saved, StepDone, Told

TEXT = "lora: 4,884,480 of 139,399,488 parameters trained (3.50 %), adapter of 9.8 MB on disk"
STEP = StepDone(7, 0.5, 1.25, 0.75, 2e-4, 4, 400, 100, 400, 0.5, steps=20, memory=3_000_000)


def printed(*events: Event, width: int = 200, terminal: bool = False) -> list[str]:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=terminal, color_system=None, soft_wrap=True)
    with Terminal(console) as shown:
        for event in events:
            shown(event)
    return stream.getvalue().splitlines()


def test_a_log_has_whole_lines() -> None:
    assert printed(Told(TEXT, label="method"), width=80) == [f"method   {TEXT}"]
    assert printed(Told("of the label above", label=""), Told("alone")) == ["         of the label above", "alone"]


@pytest.mark.parametrize("width", [120, 80, 60])
def test_a_terminal_has_lines_that_fit(width: int) -> None:
    lines = printed(Told(TEXT, label="method"), width=width, terminal=True)
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("method   lora: ")
    assert all(line.startswith(" " * 9) and not line.startswith(" " * 10) for line in lines[1:])
    assert " ".join(line[9:] for line in lines) == TEXT
    assert len(lines) == (1 if width == 120 else 2)


def test_a_narrow_terminal_has_a_line_for_each_figure() -> None:
    assert printed(Told(TEXT, label="method"), width=50, terminal=True) == [
        "method   lora: 4,884,480 of 139,399,488 parameters",
        "         trained (3.50 %),",
        "         adapter of 9.8 MB on disk",
    ]


def test_a_log_has_a_line_every_few_steps() -> None:
    steps = [StepDone(n, 0.5, 1.25, 0.75, 2e-4, 4, 400, 100, 400, 0.5, steps=7, memory=3_000_000) for n in range(1, 8)]
    lines = printed(Begun(0, 7, 3), *steps, Evaluated(7, 2.5, 10, True, 1.0), Saved(7, Path("step-000007")))
    assert [line.split("  ")[0] for line in lines] == ["step 3/7", "step 6/7", "step 7/7", "step 7: eval loss 2.5000 (best so far)"]  # fmt: skip
    assert lines[0] == "step 3/7  epoch 0.50  loss 1.2500  lr 2.00e-04  grad norm 0.75  800 tokens/s  200 label tokens/s  3.0 MB  2 s left"  # fmt: skip


def test_rows_without_label_tokens_have_no_speed_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = replace(STEP, trained_tokens=0)
    (line,) = printed(Begun(0, 20, 1), scored)
    assert "  grad norm 0.75  800 tokens/s  3.0 MB  " in line
    monkeypatch.delenv("CI")
    seen = " ".join(" ".join(printed(Begun(0, 20, 1), scored, width=100, terminal=True)).split())
    assert "tokens/s 800 step time" in seen
    assert "label tokens/s" not in seen


def test_the_end_is_told() -> None:
    end = Ended(Path("runs/a"), 20, 48.2, 812.4, "adapter", 84_000_000)
    assert printed(end) == ["done     20 steps in 48 s, 812 tokens/s; adapter of 84.0 MB in runs/a"]


def test_the_view_shows_speed_and_the_best_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI")
    seen = " ".join(" ".join(printed(Begun(6, 20, 1), STEP, width=100, terminal=True)).split())
    assert "loss 1.2500 eval loss not yet epoch 0.50 best not yet lr 2.00e-04 grad norm 0.75" in seen
    assert "tokens/s 800 label tokens/s 200 step time 0.50 s memory 3.0 MB" in seen
    before = ((2, 2.5), (4, 2.25))
    evaluated = Evaluated(6, math.nan, 10, False, 1.0)
    seen = " ".join(
        " ".join(printed(Begun(4, 20, 1, before, best=(4, 2.25)), evaluated, STEP, width=100, terminal=True)).split()
    )
    assert "eval loss nan epoch 0.50 best 2.2500, step 4" in seen
    last = Evaluated(20, 1.75, 10, True, 1.0)
    seen = " ".join(
        " ".join(printed(Begun(4, 20, 1, before, best=(4, 2.25)), STEP, last, width=100, terminal=True)).split()
    )
    assert "eval loss 1.7500 epoch 0.50 best 1.7500, step 20" in seen, "also after the last step"


DPO = Begun(0, 20, 1, shown=("accuracy", "margin", "logp_chosen"), metric="logp_chosen")
FIGURES = {"accuracy": 0.9375, "margin": 0.2214, "logp_chosen": -12.3456, "reward_chosen": 0.1}


def test_figures_of_an_objective_in_a_log() -> None:
    evaluated = Evaluated(3, 0.5, 7, True, 1.0, {**FIGURES, "accuracy": 1.0})
    step, held_out = printed(DPO, replace(STEP, metrics=FIGURES), evaluated)
    assert "  loss 1.2500  accuracy 0.94  margin 0.22  logp_chosen -12.35  lr " in step
    assert held_out == "step 3: eval loss 0.5000  accuracy 1.00  margin 0.22  logp_chosen -12.35 (best so far)"


@pytest.mark.parametrize("evaluated", [False, True])
def test_figures_of_an_objective_in_a_terminal_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, evaluated: bool
) -> None:  # fmt: skip
    monkeypatch.delenv("CI")
    events: list[Event] = [DPO, replace(STEP, metrics=FIGURES)]
    events += [Evaluated(16, 0.5, 7, True, 1.0, {**FIGURES, "accuracy": 1.0})] if evaluated else []
    out = io.StringIO()
    shown = Terminal(Console(file=out, width=80, force_terminal=True, color_system=None))
    for event in events:
        shown(event)
    assert max(shown._view._widths) < 80
    assert len(shown._view._widths) == 9
    seen = " ".join(out.getvalue().split())
    assert "reward" not in seen
    if evaluated:
        assert "accuracy 0.938 eval accuracy 1.000 margin 0.221 eval margin 0.221" in seen
        assert "epoch 0.50 best logp_chosen -12.3456, step 16" in seen
    else:
        assert "logp_chosen -12.346 eval logp_chosen not yet epoch 0.50 best logp_chosen not yet" in seen


def test_a_log_has_a_line_about_long_work_now_and_then() -> None:
    told = [Counted("reading rows", n * 1000, n / 40, float(n)) for n in range(1, 41)]
    lines = printed(
        *told, Counted("reading rows", 40_000, 1.0, 40.0, over=True), Counted("reading rows", 9, None, 16.0)
    )
    assert lines == [
        "reading rows: 16,000, 1,000/s, 24 s left",
        "reading rows: 32,000, 1,000/s, 8 s left",
        "reading rows: 9, 1/s",
    ]


def test_what_is_counted_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI")
    threads, out = threading.active_count(), io.StringIO()
    with Terminal(Console(file=out, width=80, force_terminal=True)) as shown:
        shown(Counted("reading rows", 10, 0.5, 1.0))
        assert threading.active_count() == threads
        assert "reading rows" in out.getvalue()
        shown(Counted("reading rows", 10, 0.5, 1.0, over=True))
        assert out.getvalue().endswith("\r\x1b[J"), "the line is cleared"


@pytest.mark.parametrize(("width", "rows"), [(80, 6), (70, 6), (59, 6), (20, 18)])
def test_a_resize_leaves_no_pieces(monkeypatch: pytest.MonkeyPatch, width: int, rows: int) -> None:
    """What is there is erased by the rows it takes by then; no line is so long that a usual window wraps it."""
    monkeypatch.delenv("CI")
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    shown = Terminal(console)
    shown(Begun(0, 20, 1))
    shown(STEP)
    assert max(shown._view._widths) < 60
    assert len(shown._view._widths) == 6
    console.width = width
    before = len(out.getvalue())
    shown(Told("a line above"))
    assert out.getvalue()[before:].startswith(f"\r\x1b[{rows - 1}A\x1b[J")
    assert "a line above" in out.getvalue()[before:]
    assert "lr" in out.getvalue()[before:].partition("a line above")[2], "and the view is drawn again below it"


def test_an_answer_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    printed(Answered("a \x1b[31mred"), Answered(" cat\n"))
    assert capsys.readouterr() == ("a \x1b[31mred cat\n", "")


def test_secrets_are_hidden() -> None:
    assert "hf_" not in printed(Told("hf_abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"))[0]
