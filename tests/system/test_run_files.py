"""Inputs of a recipe that lie where its run would write, read or delete them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import RecipeError
from loratune.recipe import load
from loratune.system import run_files
from tests import tiny


def told(folder: Path, base: str, output: str, given: Sequence[str] = (), **data: Any) -> str:
    """Return what is said of a recipe in `folder`, or nothing where it is sound."""
    rows = tiny.write_jsonl(folder / "rows.jsonl", tiny.chats(2))
    path = tiny.write_recipe(folder, Path("placeholder"), data={"train": rows.name, **data}, output=output)
    path.write_text(path.read_text().replace("placeholder", base))
    try:
        load(path, given)
    except RecipeError as error:
        return "\n".join(f"{one.message} | {one.hint}" for one in error.problems)
    return ""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a folder with a base, a run that holds a merged model, links to both and rows in a folder."""
    for place in ("base", "run/merged", "run/checkpoints/step-000001"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "outer").symlink_to(".")
    for place in (
        "run/mine.jsonl",
        "run/metrics.jsonl",
        "run/predictions.jsonl",
        "more/a.jsonl",
        "more/run/ledger.jsonl",
    ):
        tiny.write_jsonl(tmp_path / place, tiny.chats(1))
    (tmp_path / "run" / "mine.jinja").write_text("x")
    (tmp_path / "run" / "chat_template.jinja").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("base", "output", "how"),
    [
        ("base", "base", "is the run folder"),
        ("base", "./more/../base/", "is the run folder"),
        ("base", "link", "is the run folder"),
        ("link", "base", "is the run folder"),
        ("base", "outer/base", "is the run folder"),
        ("base", "base/run", "holds the run folder"),
        ("base", "link/deep/run", "holds the run folder"),
        ("./", "new", "holds the run folder"),
        ("base", ".", "is in the run folder"),
        ("run/merged", "run", "is in the run folder"),
        ("run/checkpoints/step-000001", "run", "is in the run folder"),
        ("run/checkpoints/step-000001", "outer/run", "is in the run folder"),
    ],
)
def test_a_base_and_a_run_folder_lie_apart(work: Path, base: str, output: str, how: str) -> None:
    said = told(work, base, output)
    where = (work / base).resolve()
    assert said.startswith(f"`model.base` {where} {how} {os.path.normpath(work / output)}: ")
    assert said.endswith("name another folder for the run")
    assert not told(work, base, "elsewhere") or base == "./"


def test_it_is_a_mistake_in_the_recipe(work: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tiny.write_recipe(work, work / "base", output="base"))
    assert caught.value.exit_code == 2
    assert caught.value.problems[0].place is not None
    assert caught.value.problems[0].place.line > 1


def test_places_beside_one_another_are_apart(work: Path) -> None:
    assert told(work, "base", "base-tuned") == ""
    assert told(work, "run", "run2") == ""
    assert told(work, "some/model", "some/model") == "", "a model of the hub is no folder here"


def test_home_and_settings_are_seen(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(work))
    assert "is the run folder" in told(work, "~/base", "base")
    assert "is the run folder" in told(work, "base", "~/base")
    assert "is the run folder" in told(work, "base", "new", ("output=base",))
    assert "is the run folder" in told(work, "some/model", "base", ("model.base=base",))


@pytest.mark.parametrize(
    ("rows", "output"),
    [
        ("run/metrics.jsonl", "run"),
        ("run/predictions.jsonl", "run"),
        ("run/checkpoints", "run"),
        ("run", "run"),
        ("more", "more/run"),
        ("more", "outer/more/run"),
        ("more/**/*.jsonl", "more/run"),
        ("more/*/*.jsonl", "more/run"),
        ("*/*.jsonl", "run"),
        ("**", "more/run"),
    ],
)
@pytest.mark.parametrize("key", ["train", "eval"])
def test_what_a_run_writes_is_never_its_rows(work: Path, rows: str, output: str, key: str) -> None:
    said = told(work, "base", output, **dict[str, Any]({key: rows}))
    assert f"`data.{key}` {work / rows} includes files that a run writes into {work / output}" in said


@pytest.mark.parametrize(
    ("rows", "output"),
    [("run/mine.jsonl", "run"), ("*.jsonl", "run"), ("more/*.jsonl", "more/run"), ("more/**/a.jsonl", "more/run"), ("more", "run")],
)  # fmt: skip
def test_other_rows_may_lie_near(work: Path, rows: str, output: str) -> None:
    assert told(work, "base", output, train=rows) == ""


def test_a_template_that_a_run_writes(work: Path) -> None:
    said = told(work, "base", "run", chat_template="run/chat_template.jinja")
    assert said.startswith(
        f"`data.chat_template` {work}/run/chat_template.jinja is a file that a run writes into {work}/run"
    )
    assert told(work, "base", "run", chat_template="run/mine.jinja") == ""


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("adapter_model.safetensors", True), ("model-00001-of-00002.safetensors", True), ("tokenizer.json", True),
        ("additional_chat_templates/a.jinja", True), ("predictions-step-000002.jsonl", True), ("README.md", True),
        ("checkpoints/anything", True), (".staging-run.json-0123abcd", True), ("run.json", True),
        ("mine.safetensors", False), ("my_config.json", False), ("adapter_model.safetensors.bak", False),
        ("predictions-step-best.jsonl", False), ("sub/tokenizer.json", False), (".staging-mine", False),
        ("checkpoints.tar", False), ("mine/config.json", False),
    ],
)  # fmt: skip
def test_names_of_a_run(name: str, written: bool) -> None:
    assert run_files.is_written(name) is written


def test_a_run_in_a_place_that_stays_as_it_is_is_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other models than its base, checkpoints of other runs and the hub's cache, by any link, and any depth of them."""
    from huggingface_hub import constants

    saved = work / "other" / "checkpoints" / "step-000001"
    saved.mkdir(parents=True)
    for name in ("MANIFEST.json", "state.json", "adapter_config.json"):
        (saved / name).write_text("{}")
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text('{"model_type": "llama"}')
    (work / "tuned").mkdir()
    for name in ("config.json", "run.json"):
        (work / "tuned" / name).write_text('{"model_type": "llama"}')
    (work / "way").symlink_to("model")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(work / "hub"))
    for output, kind, place in (
        ("model", "is a base model", "model"),
        ("way/deep/run", "is in a base model", "model"),
        ("other/checkpoints/step-000001", "is a checkpoint", "other/checkpoints/step-000001"),
        ("other/checkpoints/step-000001/run", "is in a checkpoint", "other/checkpoints/step-000001"),
        ("outer/hub/models--a--b/run", "is in the hub's cache", "hub"),
    ):
        said = f"the run folder {work / output} {kind}, which is never written to: {work / place} | name another"
        assert said in told(work, "base", output)
    for output in ("tuned", "tuned/deeper", "other", "other/run"):
        assert told(work, "base", output) == ""
