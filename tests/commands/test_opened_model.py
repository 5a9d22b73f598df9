"""Which base belongs to an adapter, also where folders were moved, and names that stand for nothing."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loratune import cli
from loratune.commands import opened_model
from loratune.commands.chat import chat
from loratune.commands.evaluate import evaluate
from loratune.commands.merge import merge
from loratune.errors import ModelError
from loratune.models import base_files
from loratune.models.section import Model
from tests import tiny
from tests.conftest import Fit


@pytest.fixture
def moving(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "models" / "base")


def test_a_moved_run_still_has_its_base(
    fit: Fit, moving: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(on=moving).folder
    shutil.move(run, tmp_path / "elsewhere")
    copied = tmp_path / "files alone"
    copied.mkdir()
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "loratune.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        shutil.copy(tmp_path / "elsewhere" / name, copied / name)
    for folder in (tmp_path / "elsewhere", copied):
        assert opened_model.open_subject(str(folder)).base.base == str(moving)
        rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chats(4))
        found = evaluate(folder, data=str(rows), generate=False)
        assert set(found.scores) == {"base", "adapter"}
        chat(folder, "a", max_new_tokens=1)
        merge(folder, tmp_path / f"merged {folder.name}")
    capsys.readouterr()


@pytest.mark.parametrize("left", ["the run", "the adapter's files", "an adapter of another program"])
def test_a_base_that_moved(left: str, fit: Fit, moving: Path, tmp_path: Path) -> None:
    run = fit(on=moving).folder
    if left != "the run":
        (run / "recipe.yaml").unlink()
    if left == "an adapter of another program":
        config = (run / "adapter_config.json").read_text()
        assert '"base_model_name_or_path": null' in config
        (run / "adapter_config.json").write_text(config.replace('path": null', f'path": "{moving}"'))
        (run / "loratune.json").unlink()
    now = tmp_path / "moved"
    moving.rename(now)
    for ask in (
        lambda: evaluate(run, data="x.jsonl"), lambda: chat(run, "a"), lambda: merge(run, tmp_path / "merged"),
    ):  # fmt: skip
        with pytest.raises(ModelError) as error:
            ask()
        (problem,) = error.value.problems
        assert str(problem.place) == str(moving)
        assert problem.message == "no such folder: the base it was trained on was here"
        assert problem.hint == "give its new path with --base"
        assert "repo" not in str(error.value).lower()
    assert opened_model.open_subject(str(run), str(now)).base.base == str(now)
    merge(run, tmp_path / "merged", base=str(now))


def test_a_full_model_is_compared_with_the_base_that_is_named(fit: Fit, moving: Path, tmp_path: Path) -> None:
    run = fit(on=moving, method={"type": "full"}, optimizer={"lr": 1e-3}).folder
    moving.rename(tmp_path / "moved")
    rows = str(tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chats(4)))
    with pytest.raises(ModelError, match="no such folder"):
        evaluate(run, data=rows, generate=False)
    found = evaluate(run, data=rows, generate=False, base=str(tmp_path / "moved"))
    assert set(found.scores) == {"base", "model"}


def test_an_adapter_of_a_hub_model_names_it(monkeypatch: pytest.MonkeyPatch, fit: Fit) -> None:
    run = fit().folder
    (run / "recipe.yaml").unlink()
    config = (run / "adapter_config.json").read_text()
    (run / "adapter_config.json").write_text(config.replace('path": null', 'path": "owner/name"'))
    assert opened_model.open_subject(str(run)).base.base == "owner/name"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a run and something else in it, and go there; nothing may be asked of a hub."""
    for name, file in (("runs/first", "run.json"), ("models/tiny", "config.json"), ("runs/frist-notes", "notes.txt")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(base_files, "_check_reachable", None)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("runs/frist", "did you mean `runs/first`?"),
        ("./runs/fisrt", "did you mean `runs/first`?"),
        ("runs/somewhere-else", "`runs` is a folder here; a model on the hub is named OWNER/NAME"),
        ("runs/first/checkpoints/step-000001", None),
        ("models/tiny.gguf", "did you mean `models/tiny`?"),
        ("runs/first/", None),
        ("a name with blanks", None),
        ("owner/name--x", None),
        ("owner/na..me", None),
        ("-x/y", None),
    ],
)
@pytest.mark.parametrize("command", ["eval", "chat", "merge"])
def test_a_name_that_is_no_folder_and_no_hub_id(command: str, name: str, hint: str | None, folders: Path) -> None:
    words = [command, "--", name] if command != "merge" else ["merge", "--out", "merged", "--", name]
    if name == "runs/first/":
        shutil.rmtree(folders / "runs" / "first")
    done = CliRunner().invoke(cli.app, words)
    assert isinstance(done.exception, ModelError)
    (problem,) = done.exception.problems
    assert problem.message == "no such folder"
    if command != "merge" or (hint and "did you mean" in hint):
        assert problem.hint == hint


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "Qwen/Qwen2.5-0.5B-Instruct", "a", "owner/with_underscore-1.0"])
def test_names_a_hub_may_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base_files.check_name(name)


class Silence:
    """A hub that never answers: how often it is asked is counted."""

    asked = 0

    def model_info(self, name: str, revision: str | None = None, timeout: float | None = None) -> Any:
        Silence.asked += 1
        assert timeout is not None
        assert timeout <= 5
        raise ConnectionError("no network")


@pytest.mark.parametrize("name", ["frist", "owner/nmae"])
def test_without_a_network_one_try_is_made(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi", Silence)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    Silence.asked = 0
    began = time.perf_counter()
    with pytest.raises(ModelError) as error:
        base_files.check(Model(base=name), name, False)
    assert Silence.asked == 1
    assert time.perf_counter() - began < 60
    (problem,) = error.value.problems
    assert problem.message == "no such folder, and the hub can't be asked for it (ConnectionError)"
    assert problem.hint == ("did you mean `first`?" if name == "frist" else None)


def test_a_cached_model_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi", Silence)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, revision: "/cached/config.json")
    Silence.asked = 0
    base_files._check_reachable(Model(base="owner/name"), "owner/name")
    assert Silence.asked == 0
