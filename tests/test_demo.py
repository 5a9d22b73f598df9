"""The demo keeps its word: a real model, real rows, intervals that don't overlap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_exact_match_rises_beyond_its_interval() -> None:
    """Download the model from the package registry, train and measure: about eight minutes on two cores."""
    shown = subprocess.run([sys.executable, "demo/demo.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    run = ROOT / "demo" / "runs" / "demo"
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 128
    from loratune.objectives.metrics import exact_match, interval

    match = {who: [exact_match(row[who], row["reference"]) for row in rows] for who in ("base", "adapter")}
    assert interval(match["base"])[1] < interval(match["adapter"])[0]
    assert sum(match["adapter"]) / 128 > 0.5
    trained, tested = (_questions(ROOT / "demo" / "data" / name) for name in ("train.jsonl", "test.jsonl"))
    assert not trained & tested
    assert "exact match" in shown.stdout
    assert "intervals" in shown.stdout


def _questions(path: Path) -> set[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["messages"][0]["content"] for line in lines}
