"""The names other programs may rely on."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

import loratune
from tests import tiny

PUBLIC = [
    "Answered",
    "BaseMismatchError",
    "Begun",
    "Counted",
    "DataError",
    "Ended",
    "Evaluated",
    "Evaluation",
    "Event",
    "Inspection",
    "Interrupted",
    "LoratuneError",
    "Merge",
    "ModelError",
    "Recipe",
    "RecipeError",
    "Run",
    "RunFolderError",
    "SafetyError",
    "Saved",
    "SetupError",
    "StepDone",
    "StorageError",
    "Told",
    "TrainingError",
    "UsageError",
    "__version__",
    "chat",
    "evaluate",
    "inspect",
    "load_recipe",
    "merge",
    "train",
]
CODES = {"LoratuneError": 1, "UsageError": 2, "RecipeError": 2, "DataError": 2, "ModelError": 2, "SetupError": 3, "TrainingError": 4, "StorageError": 5, "RunFolderError": 6, "SafetyError": 7, "BaseMismatchError": 8}  # fmt: skip


def test_names() -> None:
    assert loratune.__all__ == PUBLIC


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in ("__version__", "Event")])
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
    for module in (
        "training.run",
        "recipe",
        "cli",
        *(f"commands.{name}" for name in ("evaluate", "merge", "chat", "inspect")),
    ):
        importlib.import_module(f"loratune.{module}")
    for name in ("train", "evaluate", "merge", "chat", "inspect", "load_recipe"):
        assert isinstance(getattr(loratune, name), types.FunctionType)
    assert loratune.load_recipe is importlib.import_module("loratune.recipe").load


RESULTS = ("Run", "Evaluation", "Merge", "Inspection")
KINDS = ("Told", "Counted", "Begun", "StepDone", "Evaluated", "Saved", "Answered", "Ended")


@pytest.mark.parametrize("name", [*RESULTS, *KINDS])
def test_a_result_or_event_is_frozen_and_says_what_each_field_is(name: str) -> None:
    kind = getattr(loratune, name)
    assert kind.__dataclass_params__.frozen
    doc = inspect.getdoc(kind) or ""
    _, _, told = doc.partition("Attributes:")
    for field in dataclasses.fields(kind):
        assert f"    {field.name}: " in told, field.name
        assert field.type != "Any"


def test_every_kind_of_event_is_one() -> None:
    assert [kind.__name__ for kind in typing.get_args(loratune.Event)] == list(KINDS)


def test_results_are_of_their_class(tmp_path: Path, base: Path) -> None:
    recipe = loratune.load_recipe(tiny.write_recipe(tmp_path, base, data={"eval": "eval.jsonl"}))
    run = loratune.train(recipe)
    assert type(run) is loratune.Run
    assert type(loratune.inspect(recipe)) is loratune.Inspection
    assert type(loratune.evaluate(run.folder, generate=False)) is loratune.Evaluation
    assert type(loratune.merge(run.folder, tmp_path / "merged")) is loratune.Merge


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        loratune.nothing  # noqa: B018


def test_import_is_light() -> None:
    code = (
        "import sys, loratune; print(sorted({'torch', 'transformers', 'pydantic', 'yaml', 'typer'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
