"""Wrong recipes and the exact words said about them.

`errors/<area>.yaml` holds the recipes, each behind a line `--- name`, and `errors/<area>.txt` the messages.
LORATUNE_UPDATE_SNAPSHOTS=1 writes the messages anew: read the difference as a user would before keeping it.

A recipe may begin with directives: `# set: a.b=c` is a setting of the command line, `# alone` leaves out the lines that
are otherwise put below it for every required section it does not have.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from loratune.errors import RecipeError
from loratune.recipe import load

HERE = Path(__file__).parent / "errors"
UPDATE = os.environ.get("LORATUNE_UPDATE_SNAPSHOTS") == "1"
REST = {"model": "model: {base: some/model}", "data": "data: {train: some/rows}", "output": "output: run"}
JARGON = re.compile(
    r"input should|valid dictionary|pydantic|NoneType|<class|Traceback|tagged-union|discriminator|\x1b|\x00", re.I
)


@dataclass(frozen=True)
class Case:
    area: str
    name: str
    text: bytes
    settings: tuple[str, ...] = ()


def read(path: Path) -> list[Case]:
    cases = []
    for part in re.split(r"^--- (?=\S)", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
        name, _, body = part.partition("\n")
        settings, alone = [], False
        while directive := re.match(r"# (set: (.*)|alone)\n", body):
            body = body[directive.end() :]
            alone = alone or directive[1] == "alone"
            settings += [directive[2]] if directive[2] else []
        if not alone:
            body += "".join(f"{line}\n" for key, line in REST.items() if not re.search(rf"^{key}:", body, re.M))
        cases.append(Case(path.stem, name, body.encode(), tuple(settings)))
    return cases


MINIMAL = b"model: {base: some/model}\ndata: {train: some/rows}\noutput: run\n"
# what a text file can't hold, or should not
BYTES = [
    Case("bytes", "empty file", b""),
    Case("bytes", "only blank lines", b"\n\n  \n"),
    Case("bytes", "not UTF-8", b"model:\n  base: caf\xe9\n"),
    Case("bytes", "UTF-16", "model: {base: x}\n".encode("utf-16")),
    Case("bytes", "NUL", b"model:\n  base: a\x00b\n"),
    Case("bytes", "escape character", b"output: \x1b[31mred\n"),
    Case("bytes", "a byte order mark does not move the columns", b"\xef\xbb\xbfmodle: {base: x}\n" + MINIMAL),
    Case("bytes", "Windows line ends", MINIMAL.replace(b"\n", b"\r\n") + b"train:\r\n  epochs: many\r\n"),
    Case("bytes", "larger than a mebibyte", b"# " + b"x" * (1 << 20)),
    Case("bytes", "100,000 brackets", b"model: " + b"[" * 100_000),
    Case("bytes", "100,000 braces", b"model: " + b"{a: " * 100_000),
    Case("bytes", "100,000 dashes", b"- " * 100_000),
    Case("bytes", "60,000 values", MINIMAL + b"train: [" + b"1," * 60_000 + b"]\n"),
    Case("bytes", "a bomb of aliases", b"a: &a [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (n + 1, n + 1, b", ".join([b"*%c" % n] * 10)) for n in range(97, 104)
    )),
    Case("bytes", "few aliases, many values", b"a: &a [" + b"x," * 5000 + b"]\nb: [" + b"*a," * 20 + b"]\n"),
    Case("bytes", "65 aliases", MINIMAL + b"method: &a lora\ntrain: [" + b"*a," * 65 + b"]\n"),
    Case("bytes", "an error far out on a long line", MINIMAL + b"method: {type: lora, target_modules: [" + b"q_proj, " * 40 + b"], rr: 8}\n"),
    Case("bytes", "a version of 5,000 digits", b"%YAML " + b"1" * 5000 + b".1\n---\n" + MINIMAL),
]  # fmt: skip

AREAS = {path.stem: read(path) for path in sorted(HERE.glob("*.yaml"))} | {"bytes": BYTES}
CASES = [case for cases in AREAS.values() for case in cases]


@pytest.fixture(autouse=True)
def _at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some files that recipes may name."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "folder").mkdir()
    (folder / "rows.jsonl").write_text('{"text": "a"}\n')
    (folder / "weights.bin").write_text("x")
    return folder


def fail(case: Case, folder: Path) -> RecipeError:
    (folder / "recipe.yaml").write_bytes(case.text)
    with pytest.raises(RecipeError) as caught:
        load("recipe.yaml", case.settings)
    return caught.value


def message(error: RecipeError, folder: Path) -> str:
    return str(error).replace(str(folder), "FOLDER")


@cache
def expected(area: str) -> dict[str, str]:
    path = HERE / f"{area}.txt"
    parts = re.split(r"^--- (?=\S)", path.read_text(encoding="utf-8"), flags=re.M)[1:] if path.exists() else []
    return {name: text.removesuffix("\n\n") for name, _, text in (part.partition("\n") for part in parts)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.area}: {case.name}")
def test_message(case: Case, folder: Path) -> None:
    """The words are as expected, every place lies inside the file, places come in order, and nothing is said twice."""
    error = fail(case, folder)
    if not UPDATE:
        assert message(error, folder) == expected(case.area)[case.name]
    assert not JARGON.search(str(error))
    lines = case.text.decode("utf-8", "replace").removeprefix("\ufeff").split("\n")
    order = []
    for problem in error.problems:
        assert problem.place is not None
        assert problem.place.source == "recipe.yaml" or problem.place.source.startswith("--set")
        if problem.place.line:
            assert 1 <= problem.place.column <= len(lines[problem.place.line - 1]) + 1
        order.append((problem.place.line, problem.place.column, problem.message))
    assert [key[:2] for key in order] == sorted(key[:2] for key in order)
    assert len(set(order)) == len(order)


def test_snapshots_are_complete(folder: Path) -> None:
    """No message without a recipe, no recipe without a message, no name twice; a few hundred of them."""
    assert len(CASES) >= 250
    for area, cases in AREAS.items():
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        if UPDATE:
            text = "".join(f"--- {case.name}\n{message(fail(case, folder), folder)}\n\n" for case in cases)
            (HERE / f"{area}.txt").write_text(text, encoding="utf-8")
            expected.cache_clear()
        assert list(expected(area)) == names
    assert {path.stem for path in HERE.glob("*.txt")} == set(AREAS)
