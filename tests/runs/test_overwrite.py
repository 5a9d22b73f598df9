"""What `--overwrite` and rotation take away: what a run wrote, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratune.errors import RunFolderError
from loratune.system import storage
from loratune.training import run
from tests import tiny
from tests.conftest import Fit

SAVING = {"save_every": 1, "keep": 2}
MINE = (
    "mine.safetensors", "my_config.json", "predictions.jsonl", "adapter_model.safetensors.bak", "checkpoints/notes.txt",
    "checkpoints/best/adapter_model.safetensors", "merged/model.safetensors", "merged/config.json", ".staging-mine",
)  # fmt: skip


def test_what_no_run_wrote_stays(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit(train=SAVING).folder
    for name in MINE:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    inside = sorted((run / "checkpoints").glob("step-*"))[0]
    (inside / "README.md").write_text("mine")
    capsys.readouterr()
    fit(overwrite=True, train=SAVING)
    assert [(run / name).read_text() for name in MINE] == ["mine"] * len(MINE)
    rest = run / "checkpoints" / ".quarantine" / inside.name
    assert [file.name for file in rest.iterdir()] == ["README.md"]
    assert (
        f"{inside.name} held files that its run did not write: moved to checkpoints/.quarantine"
        in capsys.readouterr().err
    )
    assert len([*(run / "checkpoints").glob("step-*")]) == 2
    assert storage.verify(run) is None


def test_links_are_taken_away_and_not_followed(fit: Fit, tmp_path: Path) -> None:
    run = fit(train=SAVING).folder
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    for name in ("metrics.jsonl", "README.md", "adapter_model.safetensors"):
        (run / name).rename(elsewhere / name)
        (run / name).symlink_to(elsewhere / name)
    before = {file: file.read_bytes() for file in elsewhere.rglob("*") if file.is_file()}
    fit(overwrite=True, train=SAVING)
    assert {file: file.read_bytes() for file in elsewhere.rglob("*") if file.is_file()} == before
    assert not (run / "checkpoints").is_symlink()
    one = sorted((run / "checkpoints").glob("step-*"))[0]
    (run / "checkpoints" / "step-000099").symlink_to(elsewhere / one.name)
    fit(overwrite=True, train=SAVING)
    assert not (run / "checkpoints" / "step-000099").is_symlink()
    assert {file: file.read_bytes() for file in elsewhere.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json", "config.json", "README.md"])
def test_a_file_that_the_run_would_write_over_is_told_first(fit: Fit, name: str) -> None:
    run = fit(train=SAVING).folder
    facts = json.loads((run / "run.json").read_text())
    for file in [*run.iterdir()]:
        if file.is_file():
            file.unlink()
    (run / "run.json").write_text(json.dumps({**facts, "status": "failed"}))
    (run / name).write_text("mine")
    for way in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(RunFolderError, match=f"`{name}` in this run folder was not written by the run") as caught:
            fit(train=SAVING, **way)
        assert caught.value.exit_code == 6
        assert (run / name).read_text() == "mine"


def test_a_checkpoint_that_is_rotated_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints" / "step-000001"

    def write(folder: Path) -> None:
        (folder / "state.json").write_text("{}")

    storage.commit(saved, write, {})
    (saved / "thesis.tex").write_text("mine")
    rest = storage.discard(saved)
    assert rest == tmp_path / "checkpoints" / ".quarantine" / "step-000001"
    assert [file.name for file in rest.iterdir()] == ["thesis.tex"]
    storage.commit(saved, write, {})
    (saved / storage.MANIFEST).write_text("torn")
    assert storage.discard(saved) is None, "its files are known by their names"
    assert [file.name for file in saved.parent.iterdir()] == [".quarantine"]


@pytest.mark.parametrize("trust", [True, False])
def test_code_of_a_base_overwrites_nobody_s(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    """It comes along with a whole model where it was let run; its own of an earlier run it may replace."""
    base = tiny.save(tmp_path / "base")
    (base / "modeling_own.py").write_text("own = 1\n")
    train = run.train
    monkeypatch.setattr(run, "train", lambda *given, **asked: train(*given, **asked, trust_remote_code=trust))
    done = fit(on=base, method={"type": "full"}, rows=4).folder
    assert (done / "modeling_own.py").exists() == trust
    (base / "modeling_own.py").write_text("own = 2\n")
    fit(on=base, method={"type": "full"}, rows=4, overwrite=True)
    if trust:
        assert (done / "modeling_own.py").read_text() == "own = 2\n"
        (done / "MANIFEST.json").unlink()
    else:
        (done / "modeling_own.py").write_text("mine")
        fit(on=base, method={"type": "full"}, rows=4, overwrite=True)
        assert (done / "modeling_own.py").read_text() == "mine"
        return
    for file in done.iterdir():  # nothing is the run's any more but what it is known by
        if file.is_file() and file.name not in ("run.json", "modeling_own.py"):
            file.unlink()
    (done / "modeling_own.py").write_text("mine")
    with pytest.raises(RunFolderError, match=r"`modeling_own.py` in this run folder was not written by the run"):
        fit(on=base, method={"type": "full"}, rows=4, overwrite=True)
    assert (done / "modeling_own.py").read_text() == "mine"
