"""Imports go downwards only, and what a recipe error passes through imports nothing heavy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loratune"
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"}
# from the top down; a name stands for a module or for a folder of them
LEVELS = (
    ("cli", "__main__"),
    ("run", "evaluation", "merging", "chatting", "inspecting", "starter"),
    (
        "subject",
        "stops",
        "outputs",
        "conversation",
        "console",
        "generate",
        "metrics",
        "matching",
        "card",
        "plot",
        "loop",
        "batches",
        "data",
        "inputs",
        "workers",
        "child",
        "cgroup",
        "prepare",
        "store",
        "unread",
        "splits",
        "reach",
        "ledger",
        "encode",
        "longtext",
        "turns",
        "words",
        "rows",
        "pages",
        "tables",
        "apart",
        "activations",
        "footprint",
        "attention",
        "longrow",
        "tiles",
        "tiling",
        "packing",
        "bases",
        "tokenizing",
        "tokenizerfiles",
        "modelfolder",
        "configs",
        "readers",
        "ropes",
        "model",
        "quantization",
        "guard",
        "adapter",
        "templating",
        "_probe",
        "fingerprint",
        "checkpoint",
        "drift",
        "fit",
        "compiler",
        "keeping",
        "launcher",
        "lock",
        "signals",
        "states",
        "storage",
        "telling",
        "report",
    ),
    ("recipe",),
    ("methods", "formats", "objectives", "optimizers", "schedules"),
    ("decode", "nodes", "section", "sharing", "foreign", "templates", "runfiles"),
    ("errors", "secrecy", "streams", "garbage", "files"),
)
APART = {"methods", "formats", "objectives", "optimizers", "schedules"}  # these never import each other
LEVEL = {name: depth for depth, names in enumerate(LEVELS) for name in names}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
LIGHT = [p for p in FILES if LEVEL.get(p.relative_to(PACKAGE).parts[0].removesuffix(".py"), -1) >= LEVEL["recipe"]]
LIGHT += [PACKAGE / "__init__.py", PACKAGE / "cli.py", PACKAGE / "starter.py"]


def imports(body: list[ast.stmt], inside: bool) -> Iterator[str]:
    """Yield imported modules; those inside functions only if `inside`, those for type checking never."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(node.orelse, inside)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif inside or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from imports(
                    [child for child in ast.iter_child_nodes(node) if child in vars(node).get(field, [])], inside
                )


def own(path: Path) -> set[str]:
    """Return the modules and folders of this package a file imports, anywhere in it."""
    found = imports(ast.parse(path.read_text(encoding="utf-8")).body, inside=True)
    return {name.split(".")[1] for name in found if name.startswith("loratune.")} & set(LEVEL)


def test_every_module_has_a_level() -> None:
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} == set(LEVEL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    me = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in own(path) - {me}:
        if me == "__main__":
            continue  # only a door to cli
        assert LEVEL[other] >= LEVEL[me], f"{me} imports {other}, which stands above it"
        assert not (me in APART and other in APART), f"{me} and {other} are to know nothing of each other"
        assert LEVEL[me] != LEVEL["run"] or LEVEL[other] > LEVEL["run"], f"{me} and {other} are two commands"


def test_no_circles() -> None:
    """Also within one level: whatever a module imports does not lead back to it."""
    graph: dict[str, set[str]] = {}
    for path in FILES:
        me = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        graph.setdefault(me, set()).update(own(path) - {me})
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("path", LIGHT, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_heavy_on_the_way_of_a_recipe_error(path: Path) -> None:
    found = {name.split(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")).body, inside=False)}
    assert not found & HEAVY


def test_the_reader_of_imports_sees_them() -> None:
    text = "import torch\ntry:\n    from peft import x\nexcept ImportError:\n    import datasets\nif TYPE_CHECKING:\n    import a\ndef f():\n    import b\nclass C:\n    import c\n"
    assert set(imports(ast.parse(text).body, inside=False)) == {"torch", "peft.x", "datasets", "c"}
    assert set(imports(ast.parse(text).body, inside=True)) == {"torch", "peft.x", "datasets", "b", "c"}
