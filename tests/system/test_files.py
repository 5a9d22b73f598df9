"""What a user names and no file is: pipes, devices, loops, names beyond the system's; and files beyond all bounds."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import typer.testing

from loratune import cli, recipe
from loratune.commands import chat_input, inspect, opened_model
from loratune.config import yaml_nodes
from loratune.console import Terminal
from loratune.data import cache_key, prepare, row_files
from loratune.data.encode import Encoder
from loratune.data.row_files import Block
from loratune.data.section import Data, Source
from loratune.errors import DataError, LoratuneError, ModelError, Place, RecipeError, StorageError, UsageError
from loratune.methods import targets
from loratune.models import safety
from loratune.system import files, regex_match, storage
from loratune.training.progress import RunReport
from tests import tiny
from tests.conftest import Fit
from tests.test_cli import words_of

WAIT = 30  # seconds after which a child counts as hanging: it needs one or two


def command(*words: str | bytes, cwd: Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Run the program in a process of its own; it may not wait for ever."""
    return subprocess.run(
        [sys.executable, "-m", "loratune", *words], cwd=cwd, capture_output=True, stdin=subprocess.DEVNULL, timeout=WAIT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **env}, check=False,
    )  # fmt: skip


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path)[-100:] if len(str(path)) < 100 else os.path.relpath(path))


def to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def folder(path: Path) -> None:
    path.mkdir()


ODD: dict[Callable[[Path], None], str] = {
    pipe: "a pipe",
    endless: "a device",
    listening: "a socket",
    folder: "is a folder",
    to_itself: "Too many levels of symbolic links",
    dangling: "No such file or directory",
}


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_what_is_no_file_is_not_opened(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "x")
    with pytest.raises(OSError) as caught:
        files.opened(tmp_path / "x")
    assert ODD[make] in str(caught.value.strerror)
    for read in (
        cache_key._input,
        lambda name: yaml_nodes.read_text(Path(name)),
        lambda name: safety.read_object(Path(name)),
    ):
        with pytest.raises(LoratuneError) as told:
            read(str(tmp_path / "x"))
        assert str(tmp_path / "x") in str(told.value)
        assert told.value.exit_code == 2


@pytest.mark.parametrize("make", [pipe, endless, listening], ids=lambda make: make.__name__)
def test_rows_out_of_a_pipe_are_refused_with_a_remedy(
    tmp_path: Path, base: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tiny.write_recipe(tmp_path, base, rows=4)
    make(tmp_path / "x.jsonl")
    with pytest.raises(RecipeError, match="not a file") as caught:
        recipe.load(path, ["data.train=x.jsonl"])
    assert "write them to a file first" in str(caught.value)
    with pytest.raises(DataError, match="not a file"):
        row_files.files(tmp_path / "x.jsonl")
    (tmp_path / "more").mkdir()
    make(tmp_path / "more" / "y.jsonl")
    with pytest.raises(DataError, match="remove it from the folder"):
        row_files.files(tmp_path / "more")


def test_a_recipe_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    done = command("check", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == b"recipe.yaml: can't be read: a pipe, which may never end; write it to a file first\n"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "chat_template.jinja"]
)
def test_a_pipe_in_a_model_folder(base: Path, tmp_path: Path, name: str) -> None:
    """Whatever transformers would open, before it waits there."""
    home = tiny.save(tmp_path / "model")
    (home / name).unlink(missing_ok=True)
    os.mkfifo(home / name)
    with pytest.raises(ModelError, match=f"{name}: is a pipe, not a file"):
        safety.check_folder(home)


def test_nothing_is_put_in_the_place_of_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("out", "null"):
        with pytest.raises(StorageError, match="not a file"):
            storage.write_text(tmp_path / name, "x")
    assert sorted(os.listdir(tmp_path)) == ["null", "out"]
    assert (tmp_path / "null").is_symlink()


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", "~nobody-of-this-name/x"])
def test_names_the_system_does_not_take(tmp_path: Path, base: Path, name: str) -> None:
    path = tiny.write_recipe(tmp_path, base, rows=4)
    for words in (["data.train"], ["model.base"], ["data.chat_template"], ["output"]):
        if "\0" not in name and words != ["output"]:
            with pytest.raises(RecipeError):
                recipe.load(path, [f"{words[0]}=./{name}"])
    with pytest.raises(LoratuneError) as caught:
        opened_model.open_subject(f"./{name}")
    assert caught.value.exit_code == 2
    with pytest.raises(RecipeError):
        recipe.load(tmp_path / name)


@pytest.mark.parametrize("words", [
    ["check", b"\xff.yaml"], ["train", b"\xff.yaml"], ["eval", b"run\xff"], ["chat", b"x", b"-p", b"\xe4 prompt"],
    ["merge", b"x", b"--out", b"\xff"], ["init", b"\xff"], ["check", "recipe.yaml", b"--set", b"output=\xff"],
], ids=str)  # fmt: skip
def test_words_that_are_not_utf8(tmp_path: Path, words: list[str | bytes]) -> None:
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(b"not UTF-8: `")
    assert b"\\x" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path, base: Path) -> None:
    home = os.fsencode(tmp_path) + b"/\xff"
    os.mkdir(home)
    tiny.write_recipe(Path(os.fsdecode(home)), base, rows=4)
    done = command("train", "recipe.yaml", cwd=Path(os.fsdecode(home)))
    assert (done.returncode, b"its folder's name is not UTF-8" in done.stderr) == (2, True)
    (tmp_path / "data").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/data/\xfe.jsonl")).write_text('{"text": "a"}\n')
    for source in ("data", "data/*", "data/**/*.jsonl"):
        with pytest.raises(DataError, match=r"\\xfe.jsonl: its name is not UTF-8"):
            row_files.files(tmp_path / source)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_text_can_be_printed(tmp_path: Path, encoding: str) -> None:
    text = "import sys\nfrom loratune.system import streams\nstreams.guard()\nprint('ä', '\\udcff', '\\ud800')\n"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, check=False)  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == ("ä" if encoding == "utf-8" else "\\xe4").encode() + b" \xff \\ud800\n"


# ---------------------------------------------------------------- folders


def test_folders_that_lead_into_themselves(tmp_path: Path) -> None:
    """Each file once, however many ways lead to it, and without end in none: links are followed."""
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("data/a.jsonl", "data/deep/b.jsonl", "elsewhere/c.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    (tmp_path / "data" / "again").symlink_to(".")
    (tmp_path / "data" / "deep" / "up").symlink_to("..")
    (tmp_path / "data" / "more").symlink_to("../elsewhere")
    wanted = ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert sorted(file.name for file in row_files.files(tmp_path / "data")) == wanted
    assert sorted(file.name for file in row_files.files(tmp_path / "data" / "**" / "*.jsonl")) == wanted
    assert sorted(file.name for file in row_files.files(tmp_path / "data" / "**")) == wanted
    assert [file.name for file in row_files.files(tmp_path / "d*" / "*.jsonl")] == ["a.jsonl"]


def test_a_folder_that_may_not_be_read_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "closed").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "a"}\n')
    real = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for source in ("data", "data/**/*.jsonl"):
        with pytest.raises(DataError, match="closed: can't be read: Permission denied"):
            row_files.files(tmp_path / source)


# root reads whatever it likes, unless it lays that down
DROPPED = "-dac_override,-dac_read_search"
WITHOUT = [] if os.geteuid() else ["setpriv", f"--bounding-set={DROPPED}", f"--inh-caps={DROPPED}"]


@pytest.mark.skipif(bool(WITHOUT) and shutil.which("setpriv") is None, reason="root may read everything")
def test_somebody_who_may_not_read(tmp_path: Path) -> None:
    """As a user of the system sees it: recipe, data, a folder of the model and the place for the result."""
    path = tiny.write_recipe(tmp_path, tiny.save(tmp_path / "model"), rows=4)
    closed_folder = tmp_path / "closed"
    closed_folder.mkdir()

    def told(*words: str) -> tuple[int, str]:
        wide = {"COLUMNS": "400", "TERMINAL_WIDTH": "400"}  # else a name may be cut at the end of a line
        env = {**os.environ, **wide, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        line = [*WITHOUT, sys.executable, "-m", "loratune", *words]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=env, check=False)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    for closed, words, code in (
        (path, ["check", str(path)], 2),
        (tmp_path / "train.jsonl", ["inspect", str(path)], 2),
        (tmp_path / "model", ["inspect", str(path)], 2),
        (tmp_path / "model" / "config.json", ["inspect", str(path)], 2),
        (tmp_path / "model", ["chat", str(tmp_path / "model"), "-p", "hi"], 2),
        (closed_folder, ["init", str(closed_folder / "new")], 2),
    ):
        mode = closed.stat().st_mode
        closed.chmod(0)
        found, error = told(*words)
        closed.chmod(mode)
        assert found == code, (words, error)
        assert "Permission denied" in error or "not readable" in error
        assert closed.name in error


# ---------------------------------------------------------------- beyond all bounds


def test_a_line_that_does_not_end(tmp_path: Path) -> None:
    """100 MB in one line are refused with its number, without being read to their end."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "a"}\n\n{"text": "')
        stream.truncate(100 << 20)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError) as caught:
        list(row_files.read(Source(path=str(path))))
    assert str(caught.value).startswith(f"{path}:3: a line of more than 16,777,216 bytes")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 80 * 1024  # KiB
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\na\n" + b'"' + b"a," * (9 << 20))
    with pytest.raises(DataError, match=r"a.csv:3: a line of more than 16,777,216 bytes"):
        list(row_files.read(Source(path=str(path))))


def test_a_row_of_many_long_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is short enough, and so are their lines: what the row takes is what counts."""
    monkeypatch.setattr(row_files, "LONGEST", 1000)
    path = tmp_path / "a.csv"
    cell = '"' + "a\n" * 300 + '"'
    path.write_text(f"a,b\nx,{cell}\ny,{cell}\n{cell},{cell}\n")
    found = row_files.read(Source(path=str(path)))
    with pytest.raises(DataError, match=r"a.csv:1102: a line of more than 1,000 bytes"):
        list(found)
    path.write_text(f"a,b\nx,{cell}\ny,{cell}\n")
    assert len(list(row_files.read(Source(path=str(path))))) == 2


def test_a_text_beyond_all_bounds_is_a_row_that_can_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "TEXT", 100)
    block = Block(ready=tuple(row_files.RawRow(Place("a", line), {"text": "b" * (99 + line)}) for line in (1, 2)))
    kept, lost = prepare.prepare(block, tiny.data(format="text", max_length=200), Encoder(tiny.tokenizer()))
    assert (kept.fate, lost.fate) == ("kept", "refused")
    assert lost.reason == "a text of 101 characters; at most 100 are read: split it into several rows"


def test_a_long_line_is_still_a_row(tmp_path: Path) -> None:
    text = "a" * (3 << 20)
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": text}, {"text": "b"}])
    assert [row.value for row in row_files.read(Source(path=str(path)))] == [{"text": text}, {"text": "b"}]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.parquet.gz"])
def test_a_packed_file_that_grows_without_end(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "WHOLE", 1 << 20)
    monkeypatch.setattr(row_files._whole, "__defaults__", (None, 1 << 20))
    monkeypatch.setattr(row_files, "TEXT", 1 << 20)
    path = tmp_path / name
    path.write_bytes(gzip.compress(b" " * (2 << 20)))
    with pytest.raises(DataError, match="is longer than 1,048,576 bytes"):
        list(row_files.read(Source(path=str(path))))


def test_a_list_is_read_object_by_object(tmp_path: Path) -> None:
    """As large as it may be, no more of it is in memory than one row needs; an object without an end is told."""
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b"[\n")
        for _ in range(150):
            stream.write(b'{"text": "' + b"a" * (1 << 20) + b'", "n": 12},\n')
        stream.write(b'{"text": "' + b"a" * (20 << 20) + b'"}]')
    assert path.stat().st_size < 1 << 20
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = row_files.read(Source(path=str(path)))
    for row in islice(found, 149):
        assert row.value == {"text": "a" * (1 << 20), "n": 12}
    with pytest.raises(DataError) as caught:
        next(found)
    assert str(caught.value) == f"{path}:152: a value of more than 16,777,216 characters: split it into several"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - began < 150_000  # KiB


def test_a_conversation_of_millions_of_tokens(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * (5 << 20)}]}
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [row])
    source = Source(path=str(path))
    (block,) = row_files.blocks(source)
    assert isinstance(block, Block)
    (found,) = prepare.prepare(block, Data(train=(source,)), Encoder(tiny.tokenizer()))
    assert (found.fate, found.reason) == (
        "refused",
        "a conversation of 5,242,902 bytes; at most 4,194,304 are rendered: split it into several rows",
    )
    said = ({"role": role, "content": "ä"} for role in ("user", "assistant") * 1025)
    path = tiny.write_jsonl(tmp_path / "b.jsonl", [{"messages": list(said)}])
    (found,) = prepare.prepare(
        next(row_files.blocks(Source(path=str(path)))), Data(train=(source,)), Encoder(tiny.tokenizer())
    )
    told = "a conversation of 2,050 messages; at most 2,048 are rendered: split it into several rows"
    assert (found.fate, found.reason) == ("refused", told)


def test_configs_that_are_nested_without_end(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for depth, read in ((99, True), (101, False), (900, False), (100_000, False)):
        path.write_text('{"a":' * depth + "1" + "}" * depth)
        if read:
            assert safety.read_object(path)["a"]
            continue
        with pytest.raises(ModelError, match="is not JSON: "):
            safety.read_object(path)
    path.write_bytes(b'{"a": "' + b"a" * (40 << 20) + b'"}')
    with pytest.raises(ModelError, match="is longer than 33,554,432 bytes"):
        safety.read_object(path)


# ---------------------------------------------------------------- regular expressions


def test_a_pattern_that_takes_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.perf_counter()
    with pytest.raises(UsageError, match=r"takes more than 1 s on 2 texts") as caught:
        regex_match.found(r"(a+)+$", ["a", "a" * 60 + "b"], patience=1.0)
    assert "simplify it" in str(caught.value)
    assert time.perf_counter() - began < WAIT


SLOW = r"(\w+|\w+.?)*!"


@pytest.mark.parametrize("config", [
    {"target_modules": SLOW}, {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4, SLOW: 8}},
    {"alpha_pattern": {SLOW: 8}}, {"exclude_modules": SLOW}, {"layers_pattern": ["layers", SLOW]},
], ids=str)  # fmt: skip
def test_an_expression_for_modules_that_takes_for_ever(config: dict[str, object]) -> None:
    names = ["model", "model.layers.11.self_attn.q_proj_of_the_language_model_in_it"]
    key = list(config)[-1]
    with pytest.raises(ModelError, match=rf"`{key}`.*: an expression takes more than 1 s on the names of 2 modules"):
        targets.check_expressions(config, names, patience=1.0)


def test_sound_expressions_for_modules_ask_nobody_or_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in ({"target_modules": r".*\.(q|v)_proj"}, {"rank_pattern": {r"layers\.\d+\.x": 8, "(": 1, "a+(": 1}}):
        targets.check_expressions(config, ["model.layers.1.x", "model.q_proj"])
    monkeypatch.setattr(regex_match, "_ask", lambda *_: pytest.fail("asked"))
    for config in ({}, {"target_modules": ("q_proj", "v.proj")}, {"target_modules": "all-linear", "rank_pattern": {}}):
        targets.check_expressions(config, ["model"])


def test_adapters_and_recipes_are_asked_for_it(fit: Fit, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = fit(rows=4, method={"target_modules": r".*\.(q|v)_proj"}).folder
    monkeypatch.setattr(regex_match, "PATIENCE", 1.0)
    monkeypatch.setattr(targets.check_expressions, "__defaults__", (None, 1.0))
    with pytest.raises(ModelError, match=r"`target_modules`: an expression takes more than 1 s"):
        fit("b", rows=4, method={"target_modules": r"(.|..|\w+)*\.k_proj!"})
    file = run / "adapter_config.json"
    config = {**json.loads(file.read_text()), "rank_pattern": {r"(.|..|\w+)*!": 4}}
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"adapter_config.json: .*`rank_pattern`: an expression takes more than 1 s"):
        opened_model.load(opened_model.open_subject(str(run)))


@pytest.mark.parametrize("pattern", ["(", "(" * 5000, "a{99999999999}", ""])
def test_what_is_no_pattern(pattern: str) -> None:
    with pytest.raises(UsageError, match="--regex"):
        regex_match.check(pattern)


def test_what_a_pattern_finds() -> None:
    assert regex_match.found(r"x=(\d)?", ["x=3", "x=", "y", "äx= \ud800"]) == ["3", None, None, None]
    assert regex_match.found(r"\w+", ["äö b", " \n"]) == ["äö", None]


# ---------------------------------------------------------------- the cache


def test_any_flipped_bit_in_the_cache_is_seen(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every file of it, at both ends and between: rows are read anew, and that is said."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    loaded = recipe.load(tiny.write_recipe(tmp_path, base, rows=6))
    wanted = json.dumps(inspect.inspect(loaded).as_json())
    (home,) = (tmp_path / "cache" / "rows").iterdir()
    assert "read again" not in capsys.readouterr().err
    for name in ("rows.arrow", "ledger.jsonl", "about.json"):
        size = (home / name).stat().st_size
        for place in (0, size // 3, size // 2, size - 3):
            whole = bytearray((home / name).read_bytes())
            whole[place] ^= 4
            (home / name).write_bytes(whole)
            assert json.dumps(inspect.inspect(loaded, on_event=Terminal()).as_json()) == wanted
            assert "rows in the cache were damaged: read again" in capsys.readouterr().err
            inspect.inspect(loaded)
            assert "read again" not in capsys.readouterr().err


# ---------------------------------------------------------------- words of the command line and of the input


@pytest.mark.parametrize("words", [
    ["chat", "x", "-p", "a", "--seed", "99999999999999999999"], ["eval", "x", "--limit", "99999999999999999999"],
    ["chat", "x", "-p", "a", "--temperature", "nan"], ["merge", "x", "--out", "y", "--tolerance", "nan"],
    ["inspect", "recipe.yaml", "-n", "99999999999999999999"], ["eval", "x", "--batch-size", "99999999999999999999"],
], ids=str)  # fmt: skip
def test_numbers_beyond_all_bounds(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "recipe.yaml").touch()
    done = typer.testing.CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2
    said = words_of(done.stderr)
    assert re.search(rf"Invalid value for .*{words[-2]}", said), said


def test_a_page_that_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", "..", "/", str(tmp_path)):
        with pytest.raises(StorageError, match="is a folder"):
            storage.write_text(Path(name), "x")
    assert list(tmp_path.iterdir()) == []


def test_messages_that_are_not_utf8(base: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "loratune", "chat", str(base), "--max-new-tokens", "2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(line, input=b"hi\n\xe8", capture_output=True, timeout=WAIT * 2, env=env, check=False)
    assert (done.returncode, done.stderr.splitlines()[-2:]) == (
        2,
        [b"the input is not UTF-8", b"  give it as UTF-8"],
    )


def test_a_message_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_input, "LONGEST", 10)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 9 + "\n" + "b" * 11))
    assert chat_input.read() == "a" * 9
    with pytest.raises(UsageError, match="a message of more than 10 characters"):
        chat_input.read()


def test_metrics_that_are_damaged_or_no_file(tmp_path: Path) -> None:
    """A resume takes the lines that are whole; where a pipe lies in their place it does not wait for one."""
    path = tmp_path / "metrics.jsonl"
    step = {"kind": "step", "number": 1, "loss": 2.5, "seconds": 1.0, "tokens": 8}
    odd = [{**step, "loss": "x"}, {"kind": "step", "number": 1}, {"kind": ["step"]}, [step], {**step, "kind": "other"}]
    path.write_bytes(b"".join(json.dumps(one).encode() + b"\n" for one in [step, *odd]) + b'\xff{"kind": "st')
    taken = RunReport(metrics=path)
    taken.go_on_from(1)
    assert taken.train == [(1, 2.5)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [step]
    path.unlink()
    path.symlink_to("elsewhere")
    resumed = RunReport(metrics=path)
    resumed.go_on_from(1)
    resumed._write(step)
    assert not path.is_symlink()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StorageError, match="can't be read: a pipe"):
        RunReport(metrics=path).go_on_from(1)
