"""Imports go one way only, and what a recipe error passes through imports nothing heavy."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.imports import PACKAGE, imports, name_of, own

ORDER = """
    errors events console redact < system < kernels < config < models < data < methods objectives optim < recipe < runs
    < training < commands < __init__ < cli __main__
"""
RANK = {name: rank for rank, names in enumerate(ORDER.split("<")) for name in names.split()}
TOGETHER = {"errors", "events", "console", "redact", "cli", "__main__"}  # of one rank, and may know each other
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"}
LIGHT = (
    "errors",
    "events",
    "console",
    "redact",
    "config",
    "recipe",
    "cli",
    "__init__",
    "methods",
    "objectives",
    "optim",
)
LIGHT += ("data/formats", "data/section", "models/section", "models/chat_templates", "commands/init")
FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    me = name_of(path).split(".")[0]
    for module in own(path):
        other = module.split(".")[0]
        if me != other:
            allowed = RANK[other] < RANK[me] or (RANK[other] == RANK[me] and {me, other} <= TOGETHER)
            assert allowed, f"{name_of(path)} imports {module}"


def test_no_circles() -> None:
    """Whatever a module imports does not lead back to it."""
    left = {name_of(path): own(path) - {name_of(path)} for path in FILES if path.name != "__init__.py"}
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_heavy_on_the_way_of_a_recipe_error(path: Path) -> None:
    place = path.relative_to(PACKAGE).with_suffix("").as_posix()
    if any(place == light or place.startswith(f"{light}/") for light in LIGHT):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert not {name.split(".")[0] for name in imports(body, inside=False)} & HEAVY


def test_the_reader_of_imports_sees_them() -> None:
    text = "import torch\ntry:\n    from peft import x\nexcept ImportError:\n    import datasets\nif TYPE_CHECKING:\n    import a\ndef f():\n    import b\nclass C:\n    import c\n"
    assert set(imports(ast.parse(text).body, inside=False)) == {"torch", "peft.x", "datasets", "c"}
    assert set(imports(ast.parse(text).body, inside=True)) == {"torch", "peft.x", "datasets", "b", "c"}


OWN = {"__init__", "optim.adamw", "runs.facts", "system.limits"}  # by a name that is known: of a module, or of our own


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_objects_of_others_are_looked_into_in_kernels_and_models_alone(path: Path) -> None:
    """By the name of an attribute or of a class: what a library may change."""
    if name_of(path).split(".")[0] in ("kernels", "models") or name_of(path) in OWN:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    assert not [node.lineno for node in calls if node.func.id in ("getattr", "hasattr")]
    compared = (node.left for node in ast.walk(tree) if isinstance(node, ast.Compare))
    assert not [node.lineno for node in compared if isinstance(node, ast.Attribute) and node.attr == "__name__"]
