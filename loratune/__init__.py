"""loratune: LoRA and QLoRA fine-tuning from a YAML recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.errors import (
    BaseMismatchError,
    DataError,
    Interrupted,
    LoratuneError,
    ModelError,
    RecipeError,
    RunFolderError,
    SafetyError,
    SetupError,
    StorageError,
    TrainingError,
    UsageError,
)
from loratune.events import Answered, Begun, Counted, Ended, Evaluated, Event, Saved, StepDone, Told
from loratune.system.version import VERSION

if TYPE_CHECKING:
    from loratune.commands.chat import chat
    from loratune.commands.evaluate import Evaluation, evaluate
    from loratune.commands.inspect import Inspection, inspect
    from loratune.commands.merge import Merge, merge
    from loratune.recipe import Recipe
    from loratune.recipe import load as load_recipe
    from loratune.training.run import Run, train

__version__ = VERSION

__all__ = [
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

# The modules have other names, as a module of the same name would replace the function in the package.
# names that need torch or pydantic are imported at first use, so that `import loratune` is fast (PEP 562)
_LATE = {
    "Recipe": ("loratune.recipe", "Recipe"),
    "load_recipe": ("loratune.recipe", "load"),
    "Run": ("loratune.training.run", "Run"),
    "train": ("loratune.training.run", "train"),
    "Evaluation": ("loratune.commands.evaluate", "Evaluation"),
    "evaluate": ("loratune.commands.evaluate", "evaluate"),
    "Merge": ("loratune.commands.merge", "Merge"),
    "merge": ("loratune.commands.merge", "merge"),
    "chat": ("loratune.commands.chat", "chat"),
    "Inspection": ("loratune.commands.inspect", "Inspection"),
    "inspect": ("loratune.commands.inspect", "inspect"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module 'loratune' has no attribute {name!r}")
    import importlib

    from loratune.system import garbage

    module, attribute = _LATE[name]
    with garbage.seldom():
        return getattr(importlib.import_module(module), attribute)
