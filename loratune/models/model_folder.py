"""Files of a full model besides its weights; the same for merges, full fine-tuning and .gguf bases."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from loratune.models import config_files, tokenizer_files
from loratune.system import run_files


def complete(
    target: Path, base: Path, config: Any, dtype: str, tokenizer: Any, source: Path | None = None, trust: bool = False,
    padding: bool = False,
) -> None:  # fmt: skip
    """Write everything but generation_config.json into a folder that holds the weights and config.json of a model.

    Args:
        target: the folder; what transformers wrote into it is made readable for other programs.
        base: folder of the base model.
        config: of the model in memory.
        dtype: of the weights in `target`, such as `bfloat16`.
        tokenizer: as it was trained with.
        source: folder the tokenizer was loaded from; None for `base`.
        trust: the base's own code was allowed to run, so it is copied.
        padding: whether the tokenizer's padding token was chosen, and is written.
    """
    config_files.write_config(target, base, config, dtype)
    tokenizer_files.write(target, source or base, tokenizer, alone=False, padding=padding)
    copied = [*run_files.PROCESSORS, *(code(base) if trust else ())]
    for name in copied:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)


def code(base: Path) -> list[str]:
    """Return the names of a base's code files, which are copied where they were allowed to run."""
    return sorted(file.name for file in base.glob("*.py"))
