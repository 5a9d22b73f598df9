"""Imports go one way only, and what a recipe error passes through imports nothing heavy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "loratune"
ORDER = """
    errors console redact < system < kernels < config < models < data < methods objectives optim < recipe < runs
    < training < commands < __init__ < cli __main__
"""
RANK = {name: rank for rank, names in enumerate(ORDER.split("<")) for name in names.split()}
TOGETHER = {"errors", "console", "redact", "cli", "__main__"}  # of one rank, and may know each other
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"}
LIGHT = ("errors", "console", "redact", "config", "recipe", "cli", "__init__", "methods", "objectives", "optim")
LIGHT += ("data/formats", "data/section", "models/section", "models/chat_templates", "commands/init")
FILES = sorted(PACKAGE.rglob("*.py"))


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


def module_of(name: str) -> str | None:
    """Return the module of this package, dotted below it, that an imported name is or lies in; None for others."""
    parts = name.split(".")
    if parts[0] != PACKAGE.name:
        return None
    for length in range(len(parts), 1, -1):
        place = PACKAGE.joinpath(*parts[1:length])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            return ".".join(parts[1:length])
    return "__init__"


def own(path: Path) -> set[str]:
    """Return the modules of this package a file imports, anywhere in it."""
    found = imports(ast.parse(path.read_text(encoding="utf-8")).body, inside=True)
    return {module for name in found if (module := module_of(name)) is not None}


def name_of(path: Path) -> str:
    """Return a file as a module, dotted below the package."""
    name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    return name if name == "__init__" else name.removesuffix(".__init__")


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
