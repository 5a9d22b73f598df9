"""Write a recipe's settings into the chat template, so that a server of the adapter renders what was trained."""

from __future__ import annotations

import json
import re
from typing import Any

from loratune.data.section import Data
from loratune.errors import ModelError, Place, Problem, listed
from loratune.models import tokenizing
from loratune.models.chat_templates import TEMPLATES
from loratune.models.section import Model
from loratune.models.tokenizing import adds_bos_itself, check_template
from loratune.system import files

MARKS = re.compile(r"\{#- turns: (\{.*?\}) -#\}")
# prepended to a template without a system role: puts the system text in front of the first user message
FOLD = (
    "{%- if messages | length > 1 and messages[0]['role'] in ('system', 'developer')"
    " and messages[1]['role'] == 'user' -%}"
    "{%- set messages = [dict(messages[1], content=messages[0]['content'] ~ '\\n\\n' ~ messages[1]['content'])]"
    " + messages[2:] -%}{%- endif -%}"
)


def marks_comment(assistant: str, end: str) -> str:
    """Return a comment for a chat template with the recipe's marks of the assistant's turns."""
    told = json.dumps({"assistant": assistant, "end": end}).replace("#", "\\u0023")  # `#}` would end the comment
    return f"{{#- turns: {told} -#}}"


def tokenizer_of(model: Model, data: Data, trust: bool = False) -> Any:
    """Load the tokenizer of a recipe: its base's, with the recipe's chat template.

    Raises:
        ModelError: as `tokenizing.load` and `with_template`.
        SafetyError: as `tokenizing.load` and `with_template`.
    """
    return with_template(tokenizing.load(model, trust=trust), data)


def with_template(tokenizer: Any, data: Data) -> Any:
    """Set a tokenizer's chat template as a recipe says; it is saved with the tokenizer.

    All settings are written into the template, so that a server of the adapter renders what was trained, and a row
    cache sees that the template has changed.

    Args:
        tokenizer: of the base model.
        data: its `chat_template` (one of `TEMPLATES`, or the path of a file; None: the tokenizer's own), the values of
            template variables, `system` and `turns`.

    Raises:
        SafetyError: when the template of a file takes too long or too much memory, or leaves its sandbox.
        ModelError: when the file can't be read, the tokenizer lacks ChatML's end token, the template does not use a
            given variable, there is no template to change, or turns end without a special token.
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
            raise ModelError(
                f"`data.turns.end`: `{marks.end}` does not end with a special token of this tokenizer", hint
            )
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
