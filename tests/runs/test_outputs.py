from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from loratune import cli
from loratune.commands import init, inspect
from loratune.commands.evaluate import evaluate
from loratune.commands.merge import merge
from loratune.data import dataset
from loratune.errors import StorageError, UsageError
from loratune.runs import checkpoint, outputs
from loratune.system import storage
from tests import tiny
from tests.conftest import Fit

LINE = json.dumps({"place": "x:1", "prompt": "a", "reference": "b", "model": "c"}) + "\n"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(name: Path, out: Path | None, base: Path) -> str:
    with pytest.raises(UsageError) as caught:
        outputs.predictions(str(name), out, str(base))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_checkpoint_that_was_evaluated_is_as_it_was(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    data = {"eval": "eval.jsonl"}
    run = fit(data=data, train={"save_every": 1}).folder
    saved = sorted((run / "checkpoints").glob("step-*"))[-1]
    before = contents(saved)
    result = evaluate(saved, limit=2, max_new_tokens=4)
    assert result.predictions == run / f"predictions-{saved.name}.jsonl"
    assert len(result.predictions.read_text().splitlines()) == 2
    assert contents(saved) == before
    assert storage.verify(saved, alone=True) is None
    found = checkpoint.newest(run)
    assert found is not None
    assert (found.folder, found.bad) == (saved, [])
    for out in (saved / "x.jsonl", saved / "deeper" / "x.jsonl"):
        assert f"is in a checkpoint, which is never written to: {saved}" in refused(run, out, tmp_path)
    with pytest.raises(UsageError, match="is in a checkpoint"):
        merge(run, saved / "merged")
    again = fit(resume=True, data=data, train={"save_every": 1, "epochs": 2}, allow_drift=True)
    assert again.run.steps == 2 * int(saved.name[5:])
    assert not list(elsewhere.iterdir())


def test_a_base_that_was_evaluated_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save(tmp_path / "base")
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.chats(2))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    before = contents(base)
    result = evaluate(base, data=str(rows), max_new_tokens=2)
    assert result.predictions == here / "predictions.jsonl"
    assert len(result.predictions.read_text().splitlines()) == 2
    assert contents(base) == before
    told = f"is in a base model, which is never written to: {base}\n  choose another path with --out"
    assert refused(base, base / "x.jsonl", base).endswith(told)
    (tmp_path / "link").symlink_to(base)
    assert refused(base, tmp_path / "link" / "x.jsonl", base).endswith(told)
    monkeypatch.chdir(base)
    assert refused(Path(), None, base).endswith(told)
    assert contents(base) == before


def test_the_cache_of_the_hub_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    out = tmp_path / "hub" / "models--a--b" / "x.jsonl"
    assert "is in the hub's cache" in refused(Path("a/b"), out, Path("a/b"))


def test_only_predictions_are_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "predictions.jsonl"
    for text in ("", LINE, LINE + LINE):
        path.write_text(text)
        assert outputs.predictions("some/model", None, "some/model") == path
    for text in ("old", '{"prompt": "a"}\n', "[1]\n", "\xff"):
        path.write_text(text, encoding="latin-1")
        told = f"{path}: does not hold predictions, so it is not overwritten\n  name another file with --out"
        assert refused(Path("some/model"), None, Path("some/model")) == told
        assert refused(Path("some/model"), path, Path("some/model")) == told


def test_a_fully_fine_tuned_run_holds_its_own(tmp_path: Path) -> None:
    run = tiny.save(tmp_path / "run")
    (run / "run.json").write_text("{}")
    assert outputs.predictions(str(run), None, "a/b") == run / "predictions.jsonl"
    assert outputs.predictions(str(run), None, str(run)) == run / "predictions.jsonl"


def elsewhere(folder: Path) -> dict[str, Path]:
    """Return other ways to name `rows.jsonl` in a folder: links of both kinds, a link of the folder, and a way round."""
    (folder / "rows.jsonl").write_text(LINE)
    (folder / "link.jsonl").symlink_to("rows.jsonl")
    (folder / "hard.jsonl").hardlink_to(folder / "rows.jsonl")
    (folder / "again").symlink_to(".")
    (folder / "deep").mkdir()
    names = ("rows.jsonl", "link.jsonl", "hard.jsonl", "again/rows.jsonl", "deep/../rows.jsonl")
    return {name: folder / name for name in names}


@pytest.mark.parametrize("given", ["absolute", "relative", "folder", "glob", "link"])
def test_what_is_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """A file of predictions may be a file of rows, too; and a new one among rows would be read as one."""
    monkeypatch.chdir(tmp_path)
    ways = elsewhere(tmp_path)
    data = {"absolute": str(tmp_path / "rows.jsonl"), "relative": "rows.jsonl", "folder": "again", "glob": "./*.jsonl",
            "link": "link.jsonl"}[given]  # fmt: skip
    among = "is what --data names" if "." in data and given != "glob" else "is one of the files of --data "
    for out in (*ways.values(), *map(Path, ways)):
        with pytest.raises(UsageError) as caught:
            outputs.predictions("a/b", out, "a/b", [("--data", data)])
        assert str(caught.value).startswith(f"{out}: {among}"), out
        assert str(caught.value).endswith("choose another path with --out")
    for out in (Path("new.jsonl"), None, Path("again/new.jsonl")):
        if given in ("folder", "glob"):
            with pytest.raises(UsageError, match="is one of the files of --data"):
                outputs.predictions("a/b", out, "a/b", [("--data", data)])
        else:
            outputs.predictions("a/b", out, "a/b", [("--data", data)])
    assert outputs.predictions("a/b", Path("new.out"), "a/b", [("--data", data)]) == Path("new.out")


def test_rows_of_the_hub_are_nobody_s_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert outputs.predictions("a/b", Path("rows"), "a/b", [("--data", "some/rows")]) == Path("rows")


def test_eval_and_inspect_ask_before_any_work(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line does so, also with what the recipe of a run names."""
    recipe = tiny.write_recipe(tmp_path, base, rows=2, data={"eval": "eval.jsonl", "chat_template": "own.jinja"})
    (tmp_path / "own.jinja").write_text("")
    monkeypatch.setattr(inspect, "inspect", lambda *_, **__: pytest.fail("it began"))
    runner = CliRunner()
    for name, what in (("own.jinja", "`data.chat_template`"), ("link.html", "`data.chat_template`")):
        (tmp_path / "link.html").unlink(missing_ok=True)
        (tmp_path / "link.html").hardlink_to(tmp_path / "own.jinja")
        done = runner.invoke(cli.app, ["inspect", str(recipe), "--html", str(tmp_path / name)])
        assert isinstance(done.exception, UsageError)
        assert f"{name}: is what {what} names" in str(done.exception)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(LINE)
    monkeypatch.setattr(dataset, "load", lambda *_, **__: pytest.fail("it began"))
    with pytest.raises(UsageError, match="is what --data names"):
        evaluate(base, data=str(rows), out=rows)


def test_a_name_of_the_run_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "deeper").mkdir()
    for name in ("checkpoints/x.jsonl", "loss.svg", "recipe.yaml", ".lock"):
        assert f"{name}: has a name that the run in {tmp_path} writes itself" in refused(
            tmp_path, tmp_path / name, tmp_path
        )
    for name in ("predictions.jsonl", "mine.jsonl", "deeper/loss.svg"):
        assert outputs.predictions(str(tmp_path), tmp_path / name, "a/b") == tmp_path / name


def test_init_writes_into_nothing_that_stays_as_it_is(base: Path, tmp_path: Path) -> None:
    before = contents(base)
    for folder in (base, base / "deep"):
        with pytest.raises(UsageError, match="is in a base model, which is never written to"):
            init.write(folder)
    assert contents(base) == before
    (tmp_path / "recipe.yaml").symlink_to("elsewhere")
    with pytest.raises(StorageError, match=r"recipe.yaml: can't be written: File exists"):
        init.write(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_what_can_not_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for out, told in (
        (tmp_path / "folder.jsonl", "is a folder"), (tmp_path / "no" / "x.jsonl", "no such folder"),
        (Path("/dev/null"), "is a device, not a file"),
    ):  # fmt: skip
        with pytest.raises(StorageError, match=f"can't be written: {told}"):
            outputs.predictions("a/b", out, "a/b")
        with pytest.raises(StorageError, match=f"can't be written: {told}"):
            outputs.check_page(out)
