"""The tokenizer of a base model, and its chat template."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

from loratune.errors import Place
from loratune.models import base_files, template_check
from loratune.models.section import Model
from loratune.system import child_process


def load(section: Model, folder: str | None = None, trust: bool = False) -> Any:
    """Load the tokenizer of a base model.

    Args:
        section: the recipe's `model`.
        folder: of its files, if not the model's.
        trust: run code that comes with the model; set only by the user on the command line.

    Raises:
        ModelError: when there is none.
        SafetyError: when its files would run code or refer to files outside of their folder.
    """
    folder = folder or base_files.local_folder(section)
    base_files.check(section, folder, trust)
    tokenizer = None if "torch" in sys.modules or trust else _by_child(folder, section.revision)
    if tokenizer is None:
        try:
            tokenizer = _transformers().from_pretrained(folder, revision=section.revision, trust_remote_code=trust)
        except Exception as error:  # foreign files can fail in any way
            raise base_files.unusable(section.base, error, "tokenizer") from None
    templates = tokenizer.chat_template or ()
    for template in templates.values() if isinstance(templates, dict) else [templates] if templates else ():
        check_template(template, tokenizer, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is always masked
    return tokenizer


def _transformers() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer


def _by_child(folder: str, revision: str | None) -> Any:
    """Load a tokenizer in a process without torch, or return None; reading rows then needs a third of the memory.

    transformers imports torch if it is installed, though no tokenizer needs it to be pickled or used.
    """
    done = subprocess.run(
        child_process.command("loratune.models.tokenizing"), input=pickle.dumps((folder, revision)),
        capture_output=True, env=child_process.environment(),
    )  # fmt: skip
    return None if done.returncode else pickle.loads(done.stdout)


def _serve() -> None:
    """Load the tokenizer named on stdin and write it to stdout."""
    answers = child_process.answers()
    folder, revision = pickle.load(sys.stdin.buffer)
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes an import of it fail
    pickle.dump(_transformers().from_pretrained(folder, revision=revision), answers, protocol=5)
    answers.flush()


def check_template(template: str, tokenizer: Any, source: str) -> None:
    """Refuse a harmful chat template before it is used; `source` is the folder or file it comes from.

    Raises:
        SafetyError: when it takes too long or too much memory, or leaves its sandbox.
    """
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template_check.check(template, tokens, Place(source), base_files.cache() / "templates")


def adds_bos_itself(tokenizer: Any) -> bool:
    """Return whether a tokenizer adds BOS to a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


if __name__ == "__main__":
    _serve()
