"""Secrets in the environment, in URLs and in recipes: in no output, whatever fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loratune
from loratune import recipe, redact
from loratune.errors import LoratuneError, Place, Problem, RecipeError
from loratune.system import storage
from loratune.training.progress import RunReport
from tests import tiny

# made up, in the shapes of real ones
TOKEN = "hf_" + "CanaryAbcdefghijklmnopqrstuvwxyz12"
OPENAI = "sk-" + "proj-canary1234567890abcdefghij"
GITHUB = "ghp_" + "Canary1234567890abcdefghijklmnopqrst"
AMAZON = "AKIA" + "CANARY1234567890"
PASSWORD = "canary-hunter2-pässword"
URL = f"https://someone:{PASSWORD}@example.org/rows.jsonl"
SHAPES = [TOKEN, OPENAI, GITHUB, AMAZON, "xoxb-" + "123456789012-canary", "glpat-" + "canary1234567890abcd",
          "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiJjYW5hcnkifQ.sig"]  # fmt: skip
ENVIRONMENT = {
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "canary0123456789abcdef0123456789abcdef01",
    "AWS_SECRET_ACCESS_KEY": 'canary/with"quotes\\and+slashes',
    "DB_PASSWORD": PASSWORD,
    "MY_CREDENTIALS": "canary of two\nlines",
}
SECRETS = [*SHAPES, *ENVIRONMENT.values(), PASSWORD]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def hits(text: str) -> list[str]:
    """Return the secrets that stand in a text, also the part of one that is left when it is cut."""
    return [secret for secret in SECRETS if secret in text or secret[:12] in text or json.dumps(secret)[1:-1] in text]


# ---------------------------------------------------------------- what is hidden


@pytest.mark.parametrize("secret", SECRETS)
def test_redact(environment: None, secret: str) -> None:
    for text in (secret, f"a {secret} b", f"'{secret}'", json.dumps({"a": secret}), repr(secret), f"key={secret},"):
        assert not hits(redact.redact(text)), text
        assert redact.HIDDEN in redact.redact(text)


@pytest.mark.parametrize("text", [
    "num_memory_tokens", "use_cls_token: true", "hf_hub_download", "1,725 tokens, 397 trained", "task-oriented-dialogue-2024-large",
    "sk-learn", "https://huggingface.co/a/b?revision=main", "org/model@main", "me@example.org", "s3://bucket/key", "eos_token",
    "max_new_tokens: 256", "sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08", "the key `token` is unknown",
    "risk-adjusted-return-1234567890", "/home/me/.cache/huggingface/token",
])  # fmt: skip
def test_what_is_no_secret_stays(environment: None, text: str) -> None:
    assert redact.redact(text) == text
    assert not redact.looks_secret(text)


def test_common_words_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("SSH_KEY_FILE", str(tmp_path))
    assert redact.redact(f"false {tmp_path}") == f"false {tmp_path}"


@pytest.mark.parametrize("key", ["token", "hf_token", "HF_TOKEN", "password", "db_password", "api_key", "wandb-api-key", "client_secret", "access_token", "use_auth_token"])  # fmt: skip
def test_names_of_secrets(key: str) -> None:
    assert redact.names_secret(key)


@pytest.mark.parametrize("key", ["num_memory_tokens", "use_cls_token", "tokenizer", "max_new_tokens", "keep", "monkey", "bos_token", "trainable_token_indices", "keys"])  # fmt: skip
def test_names_of_other_things(key: str) -> None:
    assert not redact.names_secret(key)


def test_a_url_keeps_what_is_no_secret() -> None:
    assert redact.redact(f"no data at {URL}?token=canary1&split=a") == (
        "no data at https://***@example.org/rows.jsonl?token=***&split=a"
    )


def test_problems_reports_and_files(environment: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem(f"can't load {URL}", Place(f"file-{TOKEN}", 1, 3, f"password: {PASSWORD}"), f"not {AMAZON}")
    assert not hits(str(problem))
    assert not hits(str(LoratuneError(problem)))
    report = RunReport(metrics=tmp_path / "metrics.jsonl")
    report.note(OPENAI)
    report.problem(f"{ENVIRONMENT['MY_CREDENTIALS']}")
    assert not hits(capsys.readouterr().err)
    storage.write_json(tmp_path / "run.json", {"a": [SECRETS]})
    assert not hits((tmp_path / "run.json").read_text())
    assert json.loads((tmp_path / "run.json").read_text())["a"][0][0] == "***"


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("secret", [*SHAPES, URL])
@pytest.mark.parametrize("place", ["output", "model.base", "data.train", "model.nonsense", "train.seed"])
def test_a_recipe_with_a_secret_is_refused(tmp_path: Path, base: Path, secret: str, place: str) -> None:
    path = tiny.write_recipe(tmp_path, base)
    for attempt in (
        lambda: recipe.load(path, [f"{place}={secret}"]),
        lambda: recipe.load(_written(path, place, secret)),
    ):
        with pytest.raises(RecipeError) as caught:
            attempt()
        told = str(caught.value)
        assert f"`{place}" in told
        assert "looks like a secret" in told
        assert "hf auth login" in told
        assert not hits(told)
        assert not hits(repr(caught.value.problems))


def _written(path: Path, place: str, value: str) -> Path:
    import yaml

    tree = yaml.safe_load(path.read_text())
    *above, last = place.split(".")
    section = tree
    for name in above:
        section = section.setdefault(name, {})
    section[last] = value
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    return path


@pytest.mark.parametrize("text", [
    f"token: {PASSWORD}", f"hf_token: '{PASSWORD}'", f"model: {{base: x, api_key: {PASSWORD}}}", f"password: {PASSWORD}\npassword: {PASSWORD}",
    f"model:\n  token: {PASSWORD}\n   bad: 1", f"secret: '{PASSWORD}", f"{TOKEN}: 1", f"password: {PASSWORD}: x", f"model: {TOKEN} x: y",
    f"model: {{base: a, auth_token: {PASSWORD}, seed: 1}}", f"data: {{train: ['{URL}', {URL}]}}", f"- {TOKEN}", TOKEN,
])  # fmt: skip
def test_no_recipe_error_shows_a_secret(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(tmp_path / "r.yaml")
    assert not hits(str(caught.value)), str(caught.value)
    with pytest.raises(RecipeError) as caught:
        recipe.load(tmp_path / "r.yaml", [text.splitlines()[0].replace(": ", "=", 1)])
    assert not hits(str(caught.value)), str(caught.value)


# ---------------------------------------------------------------- 30 forced failures, as a person sees them

Force = Callable[[Path], tuple[list[str], str]]


def fails(*words: str, prepare: str = "") -> Force:
    """Return a failure: words of the command line (FOLDER is put in), and Python run in the process before."""
    return lambda folder: ([word.replace("FOLDER", str(folder)) for word in words], prepare)


BREAK = "import loratune.{0} as m\ndef broken(*a, **k): raise {1}\nm.{2} = broken\n"
RAISE = f"RuntimeError('{TOKEN} {URL}', dict(__import__('os').environ))"
TRAIN, RECIPE = "train", "FOLDER/recipe.yaml"
FAILURES: dict[str, Force] = {
    "a token as output": fails(TRAIN, RECIPE, "--set", f"output={TOKEN}"),
    "a URL as data": fails(TRAIN, RECIPE, "--set", f"data.train={URL}"),
    "a URL as base": fails(TRAIN, RECIPE, "--set", f"model.base={URL}"),
    "a token as a key": fails(TRAIN, RECIPE, "--set", f"{OPENAI}=1"),
    "no setting at all": fails(TRAIN, RECIPE, "--set", TOKEN),
    "a password as a key": fails(TRAIN, RECIPE, "--set", f"model.password={PASSWORD}"),
    "no such recipe": fails(TRAIN, f"FOLDER/{GITHUB}.yaml"),
    "no such option": fails(TRAIN, RECIPE, f"--token={TOKEN}"),
    "no such command": fails(TOKEN),
    "check": fails("check", RECIPE, "--set", f"model.token={PASSWORD}"),
    "check as JSON": fails("check", RECIPE, "--json", "--set", f"model.base={URL}"),
    "a recipe of nothing": fails("check", "FOLDER/token.yaml"),
    "inspect": fails("inspect", RECIPE, "--set", f"data.train={URL}"),
    "chat with a URL": fails("chat", URL, "-p", "a"),
    "chat with a token": fails("chat", f"FOLDER/{TOKEN}", "-p", "a"),
    "eval with a URL": fails("eval", "FOLDER/base", "--data", URL),
    "eval with a base of a URL": fails("eval", "FOLDER/adapter", "--data", "FOLDER/eval.jsonl", "--base", URL),
    "eval with a token as format": fails("eval", "FOLDER/base", "--data", "FOLDER/eval.jsonl", "--format", TOKEN),
    "eval with a broken expression": fails("eval", "FOLDER/base", "--data", "FOLDER/eval.jsonl", "--regex", f"({TOKEN}"),
    "merge with a token": fails("merge", "FOLDER/adapter", "--out", "FOLDER/merged", "--dtype", TOKEN),
    "merge of a URL": fails("merge", URL, "--out", "FOLDER/merged"),
    "an adapter's base is a URL": fails("chat", "FOLDER/secret-base", "-p", "a"),
    "the loading breaks": fails(TRAIN, RECIPE, prepare=BREAK.format("models.base_model", RAISE, "load")),
    "the tokenizer breaks": fails(TRAIN, RECIPE, prepare=BREAK.format("models.tokenizing", RAISE, "load")),
    "the rows break": fails(TRAIN, RECIPE, prepare=BREAK.format("data.dataset", RAISE, "of")),
    "the loop breaks": fails(TRAIN, RECIPE, prepare=BREAK.format("training.loop", RAISE, "steps")),
    "the card breaks": fails(TRAIN, RECIPE, prepare=BREAK.format("runs.model_card", RAISE, "write")),
    "the disk breaks": fails(TRAIN, RECIPE, prepare=BREAK.format("system.storage", f"OSError(28, '{TOKEN}')", "_seal")),
    "a traceback is asked for": fails(TRAIN, RECIPE, prepare="import os; os.environ['LORATUNE_TRACEBACK'] = '1'\n" + BREAK.format("data.dataset", f"__import__('loratune').DataError('{URL}')", "of")),
    "a library prints": fails(TRAIN, RECIPE, prepare=f"import sys, logging\nprint({OPENAI!r}); print({URL!r}, file=sys.stderr); logging.warning({TOKEN!r})\n" + BREAK.format("data.dataset", RAISE, "of")),
    "a device's name": fails(TRAIN, RECIPE, prepare=BREAK.format("training.run", RAISE, "_finish")),
    "the facts": fails(TRAIN, RECIPE, prepare=f"import loratune.training.start_report as m\nf = m.start\nm.start = lambda *a: __import__('dataclasses').replace(f(*a), device=' '.join([{URL!r}, *__import__('os').environ.values()]))\n" + BREAK.format("runs.loss_plot", RAISE, "loss_svg")),
}  # fmt: skip
# in a process of its own, as `main` is called; `prepare` runs once its streams are guarded
_PROGRAM = """
import sys
from loratune import cli
from loratune.system import streams
streams.guard()
exec(sys.argv.pop(1))
cli.main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Return a folder with a recipe, a base, a run, and an adapter that names a base with a password."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(base, folder / "base")
    path = tiny.write_recipe(folder, folder / "base", rows=8, output="adapter")
    loratune.train(recipe.load(path))
    tiny.write_recipe(folder, folder / "base", rows=8)
    (folder / "token.yaml").write_text(f"token: {PASSWORD}\n  hf_token: [{TOKEN}\n")
    (folder / "secret-base").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "adapter" / file, folder / "secret-base" / file)
    config = json.loads((folder / "secret-base" / "adapter_config.json").read_text())
    (folder / "secret-base" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": URL.replace("https://", "https:/")})
    )
    return folder


def force(name: str, place: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Force a failure and yield everything it wrote: name and text."""
    copy = folder / "place"
    shutil.copytree(place, copy)
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*") if file.is_file()}
    words, prepare = FAILURES[name](copy)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, prepare, *words],
        capture_output=True, text=True, cwd=copy, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1", "COLUMNS": "400"},
    )  # fmt: skip
    assert done.returncode != 0, done.stdout + done.stderr
    assert done.stderr or done.stdout
    yield "stdout", done.stdout
    yield "stderr", done.stderr
    for file in copy.rglob("*"):
        if file.is_file() and before.get(file) != file.stat().st_mtime_ns:
            yield str(file), file.read_text(errors="replace")


def test_there_are_thirty_failures() -> None:
    assert len(FAILURES) >= 30


QUICK = ["a URL as base", "no such option", "check as JSON", "the facts", "a library prints"]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow, pytest.mark.faults]) for name in FAILURES
])  # fmt: skip
def test_a_failure_shows_no_secret(place: Path, tmp_path: Path, name: str) -> None:
    seen: list[Any] = []
    for where, text in force(name, place, tmp_path):
        seen.append(where)
        assert not hits(text), (where, text)
    if name == "the facts":
        assert any(where.endswith("run.json") for where in seen), "nothing was tested"
    if name == "a library prints":
        assert seen[:2] == ["stdout", "stderr"]
