"""The names other programs may rely on."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import types

import pytest

import loratune

PUBLIC = [
    "BaseMismatchError",
    "DataError",
    "Interrupted",
    "LoratuneError",
    "ModelError",
    "Recipe",
    "RecipeError",
    "RunFolderError",
    "SafetyError",
    "SetupError",
    "StorageError",
    "TrainingError",
    "UsageError",
    "__version__",
    "chat",
    "evaluate",
    "load_recipe",
    "merge",
    "train",
]
CODES = {"LoratuneError": 1, "UsageError": 2, "RecipeError": 2, "DataError": 2, "ModelError": 2, "SetupError": 3, "TrainingError": 4, "StorageError": 5, "RunFolderError": 6, "SafetyError": 7, "BaseMismatchError": 8}  # fmt: skip


def test_names() -> None:
    assert loratune.__all__ == PUBLIC


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_docstrings(name: str) -> None:
    doc = inspect.getdoc(getattr(loratune, name))
    assert doc
    assert doc.splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize("name", CODES)
def test_exit_codes(name: str) -> None:
    error = getattr(loratune, name)
    assert issubclass(error, loratune.LoratuneError)
    assert error.exit_code == CODES[name]
    assert str(error("what is wrong", "what would do")) == "what is wrong\n  what would do"


def test_functions_stay_functions() -> None:
    """Also after every module was imported: none of them may take a function's place in the package."""
    for module in ("training.run", "commands.evaluate", "commands.merge", "commands.chat", "recipe", "cli"):
        importlib.import_module(f"loratune.{module}")
    for name in ("train", "evaluate", "merge", "chat", "load_recipe"):
        assert isinstance(getattr(loratune, name), types.FunctionType)
    assert loratune.load_recipe is importlib.import_module("loratune.recipe").load


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        loratune.nothing  # noqa: B018


def test_import_is_light() -> None:
    code = (
        "import sys, loratune; print(sorted({'torch', 'transformers', 'pydantic', 'yaml', 'typer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
