"""The tokenizer of a base model, and its chat template."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from typing import Any

from loratune.data.assistant_turns import FOLD, marks_comment
from loratune.data.encode import adds_bos_itself
from loratune.errors import ModelError, Place, Problem, listed
from loratune.models import base_files, template_check
from loratune.models.chat_templates import TEMPLATES
from loratune.recipe import Data, Model, Recipe
from loratune.system import child_process, files


def of(recipe: Recipe, trust: bool = False) -> Any:
    """Load the tokenizer a recipe trains with: that of its base, with the chat template it names.

    Raises:
        ModelError: as `load` and `with_template`.
        SafetyError: as `load` and `with_template`.
    """
    return with_template(load(recipe.model, trust=trust), recipe.data)


def load(section: Model, folder: str | None = None, trust: bool = False) -> Any:
    """Load the tokenizer of a base model; it pads on the left when asked to generate.

    Args:
        section: the recipe's `model`.
        folder: where its files lie, if not with the model.
        trust: run code that comes with the model; only ever the user's word on the command line.

    Raises:
        ModelError: when there is none.
        SafetyError: when its files would run code or lead out of their folder.
    """
    folder = folder or base_files.local_folder(section)
    base_files.check(section, folder, trust)
    tokenizer = None if "torch" in sys.modules or trust else _by_child(folder, section.revision)
    if tokenizer is None:
        try:
            tokenizer = _transformers().from_pretrained(folder, revision=section.revision, trust_remote_code=trust)
        except Exception as error:  # its files come from elsewhere: they can fail in any way
            raise base_files.unusable(section.base, error, "tokenizer") from None
    templates = tokenizer.chat_template or ()
    for template in templates.values() if isinstance(templates, dict) else [templates] if templates else ():
        check_template(template, tokenizer, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only ever masked
    return tokenizer


def _transformers() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer


def _by_child(folder: str, revision: str | None) -> Any:
    """Load a tokenizer in a process that knows no torch, or return None: reading rows needs a third of the memory then.

    transformers imports torch where it can, for any tokenizer, though none needs it to be pickled or used.
    """
    done = subprocess.run(
        child_process.command("loratune.models.tokenizing"), input=pickle.dumps((folder, revision)), capture_output=True,
        env=child_process.environment(),
    )  # fmt: skip
    return None if done.returncode else pickle.loads(done.stdout)


def _serve() -> None:
    """Load the tokenizer asked for on stdin and write it to stdout."""
    answers = child_process.answers()
    folder, revision = pickle.load(sys.stdin.buffer)
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that a module can't be imported
    pickle.dump(_transformers().from_pretrained(folder, revision=revision), answers, protocol=5)
    answers.flush()


def check_template(template: str, tokenizer: Any, source: str) -> None:
    """Refuse a chat template that can harm, before it is used; `source` is the folder or file it comes from.

    Raises:
        SafetyError: when it takes too long, too much memory, or reaches out of its sandbox.
    """
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    template_check.check(template, tokens, Place(source), base_files.cache() / "templates")


def with_template(tokenizer: Any, data: Data) -> Any:
    """Give a tokenizer the chat template a recipe makes; it is saved with the tokenizer.

    What a recipe says of the template is written into it, so that whoever serves the adapter renders what was trained,
    and a row cache knows another template.

    Args:
        tokenizer: of the base model.
        data: its `chat_template` (one of `TEMPLATES`, or the path of a file; None: it keeps its own), the values of
            variables that it asks for, `system` and `turns`.

    Raises:
        SafetyError: when the template of a file takes too long, too much memory, or reaches out of its sandbox.
        ModelError: when the file can't be read, ChatML is asked of a tokenizer that has no token to end its turns,
            the template never asks for an argument, there is none to change, or turns end without a special token.
    """
    tokenizer = _chosen(tokenizer, data.chat_template)
    arguments, marks = data.chat_template_kwargs, data.turns
    if not arguments and data.system == "keep" and marks is None:
        return tokenizer
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    words = set(re.findall(r"\w+", template))
    if unused := [name for name in arguments if not name.isidentifier() or name not in words]:
        raise ModelError(f"`data.chat_template_kwargs`: the chat template does not know {listed(unused)}")
    if not template:
        key = "turns" if marks else "system"
        raise ModelError(f"`data.{key}`: this model has no chat template", "name one under `data.chat_template`")
    given = "".join(f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in arguments.items())
    if data.system == "fold":
        given = FOLD + given
    if marks is not None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        if not marks.end.rstrip().endswith(tuple(special)):
            hint = f"it must end with one of {listed(sorted(special)[:12])}, or the model would not learn to stop"
            raise ModelError(f"`data.turns.end`: `{marks.end}` ends with no special token of this tokenizer", hint)
        given = marks_comment(marks.assistant, marks.end) + given
    tokenizer.chat_template = given + template
    return tokenizer


def _chosen(tokenizer: Any, choice: str | None) -> Any:
    if choice is None:
        return tokenizer
    if choice in TEMPLATES:
        if choice == "chatml" and "<|im_end|>" not in tokenizer.get_added_vocab():
            hint = "`chat_template: alpaca` ends turns with the end of text, which every base model has"
            raise ModelError("`data.chat_template: chatml`: this tokenizer has no token `<|im_end|>`", hint)
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos_itself(tokenizer) else "") + TEMPLATES[choice]
        return tokenizer
    try:
        tokenizer.chat_template = files.text(choice)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ModelError(Problem(f"the chat template can't be read: {reason}", Place(choice))) from None
    check_template(tokenizer.chat_template, tokenizer, choice)
    return tokenizer


if __name__ == "__main__":
    _serve()
