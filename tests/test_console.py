"""Labelled lines of the start report: wrapped at words and aligned on a terminal, whole elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from loratune import console

TEXT = "lora: 4,884,480 of 139,399,488 parameters trained (3.50 %), adapter of 9.8 MB on disk"


def printed(width: int, terminal: bool = True) -> list[str]:
    report, stream = console.Report(), io.StringIO()
    report.console = Console(file=stream, width=width, force_terminal=terminal, color_system=None, soft_wrap=True)
    report.field("method", TEXT)
    return stream.getvalue().splitlines()


def test_a_log_has_whole_lines() -> None:
    assert printed(80, terminal=False) == [f"method   {TEXT}"]


@pytest.mark.parametrize("width", [120, 80, 60])
def test_a_terminal_has_lines_that_fit(width: int) -> None:
    lines = printed(width)
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("method   lora: ")
    assert all(line.startswith(" " * 9) and not line.startswith(" " * 10) for line in lines[1:])
    assert " ".join(line[9:] for line in lines) == TEXT
    assert len(lines) == (1 if width == 120 else 2)


def test_a_narrow_terminal_has_a_line_for_each_figure() -> None:
    assert printed(50) == [
        "method   lora: 4,884,480 of 139,399,488 parameters",
        "         trained (3.50 %),",
        "         adapter of 9.8 MB on disk",
    ]
