"""The command line: what goes to stdout and stderr, with which exit code, and how little it imports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing

import loratune
from loratune import cli
from loratune.commands import init
from loratune.errors import RecipeError
from loratune.recipe import load
from tests import tiny

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes")
SOUND = "model: {base: some/model}\nmethod: {type: lora, r: 8}\ndata: {train: some/rows}\noutput: run\n"
WRONG = SOUND + "train: {epochs: many, sed: 1}\n"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(SOUND)
    return path


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    return path


def call(*words: object) -> typer.testing.Result:
    return typer.testing.CliRunner().invoke(cli.app, [str(word) for word in words])


def run(*words: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loratune", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **env}
    )


def words_of(text: str) -> str:
    """Return text without colours, frames and line ends, which follow the width of the terminal."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


def test_check(sound: Path) -> None:
    done = call("check", sound, "--set", "optimizer.lr=1e-4")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{sound}: ok\n")
    for line in ("base       some/model", "method     LoRA r 8", "rows       some/rows as auto", "adamw lr 0.0001, cosine", "1 epochs, 16 rows per step", f"output     {sound.parent}/run"):  # fmt: skip
        assert line in done.stdout
    assert done.stderr == ""


def test_check_names_every_problem(wrong: Path) -> None:
    """One process, as a user sees it: nothing on stdout, the problems with their places on stderr, exit code 2."""
    done = run("check", wrong.name, cwd=wrong.parent)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "wrong.yaml:5:17: `train.epochs` must be a number, given `many`\n"
        "   |\n 5 | train: {epochs: many, sed: 1}\n   |                 ^\n"
        "wrong.yaml:5:23: unknown key `sed` in `train`\n"
        "   |\n 5 | train: {epochs: many, sed: 1}\n   |                       ^ did you mean `seed`?\n"
    )


def test_check_json(sound: Path, wrong: Path) -> None:
    done = call("check", sound, "--json", "--set", "train.seed=7")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found == {"ok": True, "recipe": load(sound, ["train.seed=7"]).model_dump(mode="json")}

    done = call("check", wrong, "--json")
    assert done.exit_code == 2
    found = json.loads(done.stdout)
    assert found["ok"] is False
    assert [(p["line"], p["column"], p["hint"]) for p in found["problems"]] == [
        (5, 17, None),
        (5, 23, "did you mean `seed`?"),
    ]
    assert found["problems"][0]["place"] == f"{wrong}:5:17"
    assert found["problems"][0]["message"] == "`train.epochs` must be a number, given `many`"


def test_check_of_nothing(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.yaml", "no such recipe"), (tmp_path, "is a folder, not a recipe")):
        with pytest.raises(RecipeError, match=message):
            load(path)
        assert isinstance(call("check", path).exception, RecipeError)  # main() turns it into stderr and exit code 2


def test_schema() -> None:
    done = call("schema")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert found["title"] == "loratune recipe"
    assert {"model", "method", "data", "train"} <= set(found["properties"])


def test_init(tmp_path: Path) -> None:
    """Without a terminal nothing is asked, and the recipe is sound as it stands."""
    done = run("init", "first", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (
        0,
        "first/recipe.yaml\nfirst/loratune.schema.json\nfirst/data/train.jsonl\n",
    )
    assert done.stderr == "next: loratune train first/recipe.yaml\n"
    recipe = load(tmp_path / "first" / "recipe.yaml")
    assert recipe.model.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert recipe.data.eval_fraction == 0.2
    assert json.loads((tmp_path / "first/loratune.schema.json").read_text())["title"] == "loratune recipe"
    rows = [json.loads(line) for line in (tmp_path / "first/data/train.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in rows)


@pytest.mark.parametrize(("kind", "word"), [(k, {"preference": "orpo"}.get(k, k)) for k in init.KINDS])
def test_init_for(tmp_path: Path, kind: str, word: str) -> None:
    """Rows and recipe that train."""
    base = tiny.save(tmp_path / "base")
    assert call("init", tmp_path / "a", "--base", base, "--for", kind).exit_code == 0
    run = loratune.train(load(tmp_path / "a/recipe.yaml", ["train.epochs=1", "data.max_length=512"]))
    assert run.steps == 4
    assert word in (run.folder / "README.md").read_text()


def test_init_for_something_else(tmp_path: Path) -> None:
    done = call("init", tmp_path / "b", "--for", "preferences")
    assert done.exit_code == 2
    assert "must be one of `sft`, `preference`, " in done.output
    assert not (tmp_path / "b").exists()


def test_init_for_a_pattern(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    assert call("init", tmp_path / "a", "--base", base, "--for", "pattern").exit_code == 0
    loaded = load(tmp_path / "a/recipe.yaml", ["train.epochs=1"])
    assert loaded.data.format.patterns == ("Question: {text}\nDepartment:", "{text}\nThis is about the")
    run = loratune.train(loaded)
    assert run.steps == 4
    rows = [json.loads(line) for line in (tmp_path / "a/data/train.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows].count("order") == 8


def test_init_with_a_base(tmp_path: Path) -> None:
    done = call("init", tmp_path / "a", "--base", "some/model")
    assert done.exit_code == 0
    assert load(tmp_path / "a/recipe.yaml").model.base == "some/model"
    (tmp_path / "my: model").mkdir()
    assert call("init", tmp_path / "b", "--base", tmp_path / "my: model").exit_code == 0
    assert load(tmp_path / "b/recipe.yaml").model.base == str((tmp_path / "my: model").resolve())


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    done = call("init", tmp_path, "--base", "some/model")
    assert isinstance(done.exception, loratune.UsageError)
    assert str(done.exception) == f"{tmp_path}/recipe.yaml: already exists\n  nothing was written"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_version() -> None:
    done = call("--version")
    assert (done.exit_code, done.stdout) == (0, f"{loratune.__version__}\n")


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(word: str) -> None:
    done = call(word)
    assert done.exit_code == 0
    text = words_of(done.stdout)
    for command in ("train", "check", "schema", "init", "eval", "merge", "chat"):
        assert f" {command} " in text
    assert "Exit codes: 0 ok" in text


def test_every_command_and_option_has_a_help_text() -> None:
    group = typer.main.get_command(cli.app)
    assert len(group.commands) >= 7
    for name, command in group.commands.items():
        assert command.help, name
        for param in command.params:
            assert getattr(param, "help", None), (name, param.name)


@pytest.mark.parametrize(
    "words",
    [("trian",), ("check",), ("check", "a.yaml", "b.yaml"), ("check", "--sett", "a=b"), ("eval", "x", "--limit", "0")],
)
def test_wrong_words(words: tuple[str, ...]) -> None:
    done = call(*words)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Usage:" in done.stderr


def test_allow_drift_goes_with_resume(sound: Path) -> None:
    done = call("train", sound, "--allow-drift")
    assert isinstance(done.exception, loratune.UsageError)
    assert str(done.exception) == "--allow-drift needs --resume"


def test_resume_and_overwrite_exclude_each_other(sound: Path) -> None:
    done = call("train", sound, "--resume", "--overwrite")
    assert isinstance(done.exception, loratune.UsageError)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["check", "wrong.yaml"],
        ["train", "wrong.yaml"],
        ["check", "recipe.yaml"],
        ["schema"],
        ["init", "new"],
    ],
)
def test_nothing_heavy_is_imported(words: list[str], sound: Path, wrong: Path) -> None:
    """Help, a recipe error and everything else that needs no model come without torch and what builds on it."""
    code = (
        f"import sys; sys.argv = ['loratune', *{words!r}]\n"
        "from loratune.cli import main\n"
        "try: main()\n"
        f"finally: print('imported:', sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    env = {**os.environ, "CI": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=sound.parent, capture_output=True, text=True, env=env)
    assert done.returncode == (2 if "wrong.yaml" in words else 0)
    assert done.stderr.splitlines()[-1] == "imported: []"


def test_colours(tmp_path: Path) -> None:
    """NO_COLOR is kept even where colours are forced."""
    coloured = run("trian", cwd=tmp_path, FORCE_COLOR="1", TERM="xterm-256color")
    plain = run("trian", cwd=tmp_path, FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1")
    assert "\x1b[3" in coloured.stderr
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", plain.stderr)
    assert plain.returncode == coloured.returncode == 2


def test_traceback_only_on_demand(wrong: Path) -> None:
    done = run("check", wrong.name, cwd=wrong.parent, LORATUNE_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
