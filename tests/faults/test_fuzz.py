"""The fuzzer sees what it is there to see; some of its cases, all of which `make test-fuzz` runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loratune import cli
from tests.faults import fuzz

pytestmark = pytest.mark.faults


def test_some_cases() -> None:
    line = [sys.executable, "-m", "tests.faults.fuzz", "--seed", "7", "--cases", "60"]
    done = subprocess.run(line, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "seed 7: 60 cases in " in done.stdout


def test_what_goes_wrong_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(how: str) -> fuzz.Outcome:
        def main() -> None:
            if how == "traceback":
                raise RuntimeError("nobody expected this")
            if how == "memory":
                kept = bytearray(fuzz.LARGEST + (64 << 20))
                kept[::4096] = b"x" * len(kept[::4096])
            if how == "long":
                os.read(os.pipe()[0], 1)
            raise SystemExit(3 if how == "code" else 0)

        monkeypatch.setattr(cli, "main", main)
        return fuzz.run(fuzz.Case("", ("check",)), tmp_path)

    assert ends("well").wrong() == ""
    assert ends("code").wrong() == ""
    assert ends("traceback").wrong() == "exit code 1"
    assert "nobody expected this" in ends("traceback").text
    assert ends("memory").wrong().endswith(" GB")
    monkeypatch.setattr(fuzz, "LONGEST", 1.0)
    assert ends("long").wrong() == "2 s"
