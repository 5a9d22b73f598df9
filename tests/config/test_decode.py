"""Reading YAML text: what is accepted, what it becomes, and that nothing but a RecipeError ever comes out."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.config import decode, section, yaml_nodes
from loratune.errors import Place, Problem, RecipeError
from loratune.recipe import Recipe, from_tree

MINIMAL = "model: {base: some/model}\ndata: {train: some/rows}\noutput: run\n"


def value(text: str) -> object:
    return yaml_nodes.parse(f"x: {text}\n", "r.yaml").root.plain()["x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2e-4", 2e-4), ("1e5", 1e5), ("1E+5", 1e5), (".5", 0.5), ("5.", 5.0), ("-1.5e3", -1500.0), ("0.0", 0.0),
        ("0", 0), ("-7", -7), ("+7", 7), ("123456789012345678901234567890", 123456789012345678901234567890),
        ("true", True), ("True", True), ("TRUE", True), ("false", False), ("null", None), ("~", None), ("", None),
        ("yes", "yes"), ("no", "no"), ("on", "on"), ("off", "off"), ("y", "y"), ("tRUE", "tRUE"),
        ("12:30:00", "12:30:00"), ("2024-01-01", "2024-01-01"), ("0x1F", "0x1F"), ("0o17", "0o17"), ("1_000", "1_000"),
        (".inf", ".inf"), (".nan", ".nan"), ("1.2.3", "1.2.3"), ("1e", "1e"), ("e5", "e5"),
        ("'2e-4'", "2e-4"), ('"012"', "012"), ("'true'", "true"), ("''", ""), ("a b", "a b"), ("a#b", "a#b"), ("a #b", "a"),
        ('"\\u00e9\\t"', "é\t"), ("[1, '1', 1.0]", [1, "1", 1.0]), ("{a: 1, 'b': [x]}", {"a": 1, "b": ["x"]}),
        ("|\n  two\n  lines\n", "two\nlines\n"), (">-\n  one\n  line\n", "one line"),
    ],
)  # fmt: skip
def test_scalars(text: str, expected: object) -> None:
    read = value(text)
    assert read == expected
    assert type(read) is type(expected)


def test_aliases_stand_for_a_copy() -> None:
    tree = yaml_nodes.parse("a: &x {b: 1}\nc: *x\n", "r.yaml")
    assert tree.root.plain() == {"a": {"b": 1}, "c": {"b": 1}}
    decode.assign(tree, "c.b=2", Recipe)
    assert tree.root.plain() == {"a": {"b": 1}, "c": {"b": 2}}


def test_the_limits_themselves_are_allowed() -> None:
    deep = "[" * yaml_nodes.MAX_DEPTH + "]" * yaml_nodes.MAX_DEPTH  # the innermost list stands 32 levels below the root
    assert yaml_nodes.parse(f"x: {deep}", "r.yaml").problems == []
    aliases = ", ".join(["*a"] * yaml_nodes.MAX_ALIASES)
    assert len(yaml_nodes.parse(f"x: &a 1\ny: [{aliases}]", "r.yaml").root.plain()["y"]) == yaml_nodes.MAX_ALIASES
    filled = b"a: b\n#" + b"x" * (yaml_nodes.MAX_BYTES - 6)
    assert yaml_nodes.parse(filled, "r.yaml").root.plain() == {"a": "b"}


@pytest.mark.parametrize(
    "text", [MINIMAL, MINIMAL.replace("\n", "\r\n"), "\ufeff" + MINIMAL, "--- # first\n" + MINIMAL + "...\n"]
)
def test_how_a_file_may_be_written(text: str) -> None:
    assert yaml_nodes.parse(text.encode(), "r.yaml").root.plain() == yaml_nodes.parse(MINIMAL, "r.yaml").root.plain()


def test_places() -> None:
    tree = yaml_nodes.parse("a:\n  - x\n  - b: y\n", "r.yaml")
    assert tree.place("a", 1, "b") == Place("r.yaml", 3, 8, "  - b: y")
    assert tree.place("a", 1, "nothing") == Place("r.yaml", 3, 5, "  - b: y")
    assert yaml_nodes.parse("a: {b: y}", "r.yaml").place("a", 0, "b").column == 8  # one value stands for a list of one
    assert str(tree.place("a", 0)) == "r.yaml:2:5"


def test_more_problems_than_anyone_reads() -> None:
    with pytest.raises(RecipeError) as caught:
        from_tree(yaml_nodes.parse(MINIMAL + "".join(f"key{n}: 1\n" for n in range(120)), "r.yaml"), Path())
    assert len(caught.value.problems) == decode.MAX_PROBLEMS + 1
    assert str(caught.value).endswith("\nand 20 more problems")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (Problem("m"), "m"),
        (Problem("m", hint="h"), "m\n  h"),
        (Problem("m", Place("f")), "f: m"),
        (Problem("m", Place("f", 3), "h"), "f:3: m\n  h"),
        (Problem("m", Place("f", 3, 5, "ab: cd"), "h"), "f:3:5: m\n   |\n 3 | ab: cd\n   |     ^ h"),
        (Problem("m", Place("f", 12, 2, "\tab")), "f:12:2: m\n    |\n 12 |  ab\n    |  ^"),
    ],
)
def test_how_a_problem_is_printed(problem: Problem, expected: str) -> None:
    assert str(problem) == expected


def test_a_caret_stays_in_sight() -> None:
    line = "x" * 500 + "!" + "y" * 500
    shown = str(Problem("m", Place("f", 1, 501, line))).splitlines()
    assert all(len(text) <= 110 for text in shown)
    assert shown[2][shown[3].index("^")] == "!"


def keys() -> dict[str, list[tuple[str, str | None]]]:
    """Return every key of a recipe with the sections (and their types) it stands in."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    for path, type_, name in [*section.all_keys(Recipe), *(("", None, name) for name in Recipe.model_fields)]:
        found.setdefault(name, []).append((path, type_))
    return found


def recipe_with(key: str, path: str, type_: str | None) -> str:
    """Return a recipe whose only fault is `key` in the section at `path`."""
    recipe: dict[str, Any] = {
        "model": {"base": "some/model"},
        "data": {"train": {"path": "some/rows"}},
        "output": "run",
    }
    section = recipe
    for step in filter(None, path.split(".")):
        section = section.setdefault(step, {})
    if path == "data.eval":
        section["path"] = "some/rows"
    section |= {"type": type_, key: 1} if type_ else {key: 1}
    return yaml_nodes.write(recipe)


def edits(word: str, rng: random.Random) -> str:
    at, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase)
    kind = rng.choice(["delete", "insert", "swap", "replace"])
    if kind == "delete":
        return word[:at] + word[at + 1 :]
    if kind == "insert":
        return word[:at] + letter + word[at:]
    if kind == "swap":
        return word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    return word[:at] + letter + word[at + 1 :]


@pytest.mark.parametrize("number", [500, pytest.param(5_000, marks=pytest.mark.faults)])
def test_typos_get_the_right_suggestion(number: int) -> None:
    """Of typos of one edit at least 95 % are answered with the key that was meant."""
    rng = random.Random(0)
    known = keys()
    assert len(known) >= 60
    wrong, asked = [], 0
    while asked < number:
        name = rng.choice(sorted(known))
        typo = edits(name, rng)
        if typo in known or len(typo) < 2:
            continue
        asked += 1
        with pytest.raises(RecipeError) as caught:
            from_tree(yaml_nodes.parse(recipe_with(typo, *rng.choice(known[name])), "r.yaml"), Path())
        hints = [p.hint for p in caught.value.problems if f"`{typo}`" in p.message]
        if hints != [f"did you mean `{name}`?"]:
            wrong.append((typo, name, hints))
    print(f"{number:,} typos: {number - len(wrong):,} with the right suggestion")
    assert len(wrong) <= number / 20, wrong


RICH = """\
model: {base: some/model, revision: "012", quantization: {type: nf4, double_quant: false}}
method:
  type: lora
  r: 16
  target_modules: [q_proj, v_proj]
  rank_pattern: {q_proj: 8}
data:
  train:
    - some/rows
    - {path: other/rows, weight: 0.5}
  eval: more/rows
  format: {type: instruction, input: "in put"}
objective: sft
optimizer: &o {type: paged_adamw_8bit, lr: 2e-4, weight_decay: .01}
train: {max_steps: 100, micro_batch_size: auto, schedule: {type: wsd, decay: 0.1}, early_stopping: {patience: 2}}
output: 'runs/first'
"""
BITS = [":", " ", "\n", "\t", "-", "{", "}", "[", "]", "'", '"', "#", "&o", "*o", "!", "!!str ", "<<", "? ", "|", ">", "%", "@", "`", ",",
        "null", "012", "1e999", "true", "\\", "\\x", "\x00", "\x1b", "\u2028", "\x85", "\ufeff", "🙂", "\ud800", "---\n", "...", "~nobody/", "*.jsonl", "\r"]  # fmt: skip


def mutated(rng: random.Random) -> str:
    text = RICH
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        end = at + rng.choice([0, 0, 1, 1, 3, 10])
        bit = rng.choice(
            [rng.choice(BITS), rng.choice(string.printable), text[rng.randrange(len(text)) :][: rng.randint(1, 30)], ""]
        )
        text = text[:at] + bit + text[end:]
    return text


def check_any(text: str | bytes, folder: Path, given: tuple[str, ...] = ()) -> bool:
    """Return whether the text is a recipe; anything but a RecipeError with places fails."""
    try:
        from_tree(yaml_nodes.parse(text, "r.yaml"), folder, given)
    except RecipeError as caught:
        error = caught
    else:
        return True
    assert error.problems
    assert all(problem.place is not None and problem.message for problem in error.problems[: decode.MAX_PROBLEMS])
    assert str(error).replace("\n", "").isprintable()
    return False


@pytest.mark.parametrize("number", [1500, pytest.param(10_000, marks=pytest.mark.faults)])
def test_mutated_recipes(tmp_path: Path, number: int) -> None:
    rng = random.Random(0)
    valid = sum(check_any(mutated(rng), tmp_path) for _ in range(number))
    assert number / 50 < valid < number * 0.9  # the mutations neither break everything nor nothing
    print(f"{number:,} mutated recipes: {valid:,} valid, the others an error with a place")


def test_mutated_bytes(tmp_path: Path) -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = bytearray(RICH.encode())
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        check_any(bytes(text), tmp_path)


def test_mutated_settings(tmp_path: Path) -> None:
    rng = random.Random(2)
    paths = [
        "model.base",
        "method",
        "method.r",
        "data.train.0.weight",
        "data.train.7",
        "train.schedule.floor",
        "a.b",
        "output",
        "",
    ]
    for _ in range(300):
        value = "".join(rng.choice([*BITS, "lora", "5", "a: b"]) for _ in range(rng.randint(0, 4)))
        check_any(MINIMAL, tmp_path, (f"{rng.choice(paths)}{rng.choice(['=', '=', '=', ''])}{value}",))


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    check_any(text, Path())


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.dictionaries(st.text(min_size=1, max_size=8), trees, min_size=1, max_size=4))
def test_what_is_written_is_read_back(data: dict[str, object]) -> None:
    tree = yaml_nodes.parse(yaml_nodes.write(data), "r.yaml")
    assert tree.problems == []
    assert tree.root.plain() == data


@pytest.mark.parametrize(
    "text",
    [
        "1e5",
        "12e4567",
        "08",
        "012",
        "0",
        "1.5",
        ".5",
        "true",
        "null",
        "~",
        "",
        "<<",
        "yes",
        "=",
        "2024-01-01",
        "a: b",
        "#x",
        "*a",
    ],
)
def test_texts_that_look_like_something_else_are_quoted(text: str) -> None:
    assert yaml_nodes.parse(yaml_nodes.write({"a": text, "b": [text], text or "c": 1}), "r.yaml").root.plain() == {
        "a": text,
        "b": [text],
        text or "c": 1,
    }


def test_thousands_of_unknown_keys_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What keys there are is found out once, not once per unknown key: 24,000 of them took half a minute."""
    section.all_keys.cache_clear()
    asked: list[object] = []
    real = section._keys
    monkeypatch.setattr(section, "_keys", lambda model, prefix: asked.append(model) or real(model, prefix))
    text = "model: {base: some/model}\ndata: {train: some/rows}\noutput: run\n" + "".join(
        f"key{i}: 1\n" for i in range(500)
    )
    with pytest.raises(RecipeError) as caught:
        decode.decode(Recipe, yaml_nodes.parse(text, "recipe"))
    assert len(caught.value.problems) == decode.MAX_PROBLEMS + 1
    assert asked.count(Recipe) == 1
