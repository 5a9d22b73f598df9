"""The commands named at the end of another: they fit the run, and none of them fails."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loratune.cli import app
from loratune.commands import next_steps
from tests import pairs, tiny
from tests.conftest import Fit

ALL = ("eval", "chat", "merge")


def names(commands: list[str]) -> list[str]:
    return [command.split()[1] for command in commands]


def test_all_that_is_named_after_a_training_works(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    recipe = tiny.write_recipe(tmp_path / "a b", base, data={"eval_fraction": 0.25})
    done = CliRunner().invoke(app, ["train", str(recipe)])
    assert done.exit_code == 0, done.output
    told = [line.removeprefix("next: ").strip() for line in done.stderr.splitlines() if "loratune " in line]
    run = "'a b/run'"
    assert told == [f"loratune eval {run}", f"loratune chat {run}", f"loratune merge {run} --out 'a b/run-merged'"]
    for command in told:
        result = CliRunner().invoke(app, shlex.split(command)[1:], input="Hi\n")
        assert result.exit_code == 0, result.output
    assert "verified: largest logit difference" in result.stderr
    assert result.stderr.endswith("next: loratune chat 'a b/run-merged'\n")
    assert names(next_steps.of_run(Path("a b/run"), ALL)) == ["eval", "chat"], "it is merged already"


def test_only_what_fits_a_run_is_named(fit: Fit, tmp_path: Path) -> None:
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {n} of some"} for n in range(8)])
    text = fit("text", data={"train": str(rows), "format": "text"})
    assert names(next_steps.of_run(text.folder, ALL)) == ["merge"]
    assert names(next_steps.of_run(fit("full", method="full").folder, ALL)) == ["chat"]
    assert next_steps.of_run(tmp_path, ALL) == []


def test_chat_is_named_where_there_is_something_to_say(fit: Fit, tmp_path: Path) -> None:
    texts = [{"text": f"{word} {number}", "label": word} for number in range(4) for word in ("red", "blue")]
    rows = {"labelled": texts, "preference": pairs.rows(8)}
    for format, objective, wanted in (("labelled", "classify", ["chat"]), ("preference", "reward", [])):
        train = str(tiny.write_jsonl(tmp_path / f"{format}.jsonl", rows[format]))
        done = fit(objective, data={"train": train, "format": format}, objective=objective)
        assert names(next_steps.of_run(done.folder, ALL)) == wanted
