"""The benchmarks run: a small model, few steps, no peers. Their figures are nobody's test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

FOLDER = Path(__file__).parents[1] / "benchmarks"
FIGURES = {"tokens_per_second", "peak_memory", "share_of_matrix_rate", "start_seconds", "losses"}


def run(program: str, *words: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORATUNE_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, str(FOLDER / program), *words], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peers_import_nothing_of_loratune() -> None:
    """They run in an environment without it."""
    code = "import sys; sys.modules['loratune'] = None; import train, gpu"
    done = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_gpu_with_a_tiny_model(tmp_path: Path) -> None:
    words = ["--shape", "tiny", "--shrink", "64", "--steps", "3", "--warm", "1", "--rounds", "1", "--arms", "loratune"]
    said = run("gpu.py", *words, "--cases", "lora-2x4096", "qlora-16xvaried", "--out", str(tmp_path), folder=tmp_path)
    assert said.count(" tokens/s, ") == 3
    table = next(tmp_path.glob("gpu-*.md")).read_text()
    assert "loratune, defaults" in table
    assert "loratune, rows padded" in table  # where lengths vary
    cases = json.loads(next(tmp_path.glob("gpu-*.json")).read_text())["cases"]
    found, varied = cases["lora-2x4096"], cases["qlora-16xvaried"]
    assert found["failed"] == {}
    assert found["median"]["loratune"].keys() >= FIGURES
    assert len(found["rounds"]["loratune"][0]["losses"]) == 3
    packed, padded = (varied["median"][arm] for arm in ("loratune", "loratune-padded"))
    assert packed["losses"] == pytest.approx(padded["losses"], rel=1e-3)


@pytest.mark.slow
def test_a_session_on_a_gpu_is_rehearsed(tmp_path: Path) -> None:
    """All steps of the visit to a GPU machine, with tiny shapes on a CPU; its tests are skipped there."""
    environment = {
        **os.environ, "SESSION_DRY": "1", "SESSION_PEERS": "", "SESSION_LIMIT": "900", "SESSION_RUN": "600",
        "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "TMPDIR": str(tmp_path),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(FOLDER / "gpu_session.sh")], cwd=FOLDER.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "out" / "table.txt").read_text()
    for step in (
        "[1] machine: exit code 0",
        "[2] run: exit code 0",
        "[3] tests: exit code 0",
        "[4] kernels: exit code 0",
        "[5] speed: exit code 0",
    ):
        assert step in table, table
    for kind in ("bf16", "nf4-paged", "checkpointed"):
        assert f"{kind} on " in table
    assert table.count("losses the same to the bit, adapter 0.0e+00 apart") == 3
    assert table.count(" tokens/s, ") == 12
    assert "no GPU is in reach: nothing is measured" in table
    assert (tmp_path / "out" / "profile.txt").read_text()
    assert len(list((tmp_path / "out").iterdir())) == 5


@pytest.mark.slow
def test_data_with_a_tiny_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("chitchat_dataset")
    base = tiny.save(tmp_path / "base")
    words = ["--rows", "50", "--arms", "loratune", "--tokenizer", str(base), "--out", str(tmp_path / "out.json")]
    run("data.py", *words, folder=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())["arms"]["loratune"]
    assert found["tokens"] > found["trained_tokens"] > 0
    assert found["packs"] > 0


@pytest.mark.slow
def test_growth_with_one_layer(tmp_path: Path) -> None:
    words = [
        "--lengths", "16", "64", "--numbers", "10", "40",
        "--tokens", "64", "--short", "8", "--layers", "1", "--rounds", "1",
    ]  # fmt: skip
    said = run("growth.py", *words, "--out", str(tmp_path / "growth"), folder=tmp_path)
    assert len(said.splitlines()) == 6
    found = json.loads((tmp_path / "growth.json").read_text())["cases"]
    assert [(one["rows"], one["length"]) for one in found] == [(16, 16), (4, 64), (10, 8), (40, 8)]
    assert all(one["tokens_per_second"] > 0 for one in found)
