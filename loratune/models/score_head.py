"""A head that scores a whole row at its last token: one output for a reward, or one for each class.

It is a linear layer without bias beside the language model's own head, under the name that transformers' sequence
classifiers give it, so that weights and adapters have the same names in both.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from loratune.errors import ModelError

NAME = "score"
REWARD = "score"  # the name of a reward model's only output
WEIGHT = f"{NAME}.weight"


def add(model: Any, outputs: int, settings: dict[str, Any]) -> None:
    """Give a causal language model a head with zero weights, float32, (outputs, width), on its device.

    Args:
        model: the language model; its config gets the settings.
        outputs: of the head.
        settings: transformers' of the classifier: `problem_type`, `id2label` and `label2id`.

    Raises:
        ModelError: when transformers has no sequence classifier for this model with such a head.
    """
    model.config.num_labels = outputs
    for name, value in settings.items():
        setattr(model.config, name, value)
    classifier = classifier_of(model)
    wanted = dict(classifier.named_parameters())
    own = {name for name, _ in model.named_parameters()}
    if WEIGHT not in wanted or not wanted.keys() - {WEIGHT} <= own:
        kind = str(model.config.model_type)
        raise ModelError(f"transformers' sequence classifier for `{kind}` has other names than its language model")
    layer = torch.nn.Linear(wanted[WEIGHT].shape[1], outputs, bias=False, dtype=torch.float32)
    torch.nn.init.zeros_(layer.weight)
    model.add_module(NAME, layer.to(model.get_input_embeddings().weight.device))


def classifier_of(model: Any) -> Any:
    """Return transformers' sequence classifier for a model, without weights (on the meta device).

    Raises:
        ModelError: when there is none.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(_base(model).config)
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        raise ModelError(
            f"transformers has no sequence classifier for `{config.model_type}`, which would load the head",
            "use another base, such as a Llama, Qwen, Mistral or Gemma",
        ) from None


def load(model: Any, file: Path, settings: dict[str, Any] | None = None) -> None:
    """Give a language model the head of a file with tensors of a classifier or an adapter, if it has one.

    Args:
        model: the language model.
        file: safetensors.
        settings: as in `add`; None for those of the model's config.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        name = next((name for name in tensors.keys() if name == WEIGHT or name.endswith(f".{WEIGHT}")), None)  # noqa: SIM118
        if name is None:
            return
        weight = tensors.get_tensor(name)
    add(model, len(weight), settings if settings is not None else {})
    with torch.no_grad():
        of(model).weight.copy_(weight)


def settings_of(config: Any) -> dict[str, Any]:
    """Return a classifier's settings from its config, as `add` takes them."""
    return {name: getattr(config, name) for name in ("problem_type", "id2label", "label2id")}


def config_of(model: Any) -> Any:
    """Return the config of a model, possibly in PEFT's wrapper."""
    return _base(model).config


def choose_padding(model: Any, tokenizer: Any, last: Collection[int]) -> list[str]:
    """Give tokenizer and config a padding token that no row ends with; return notes on it.

    transformers' classifiers score a row at its last token that is not the padding token, even in a row of its own.

    Args:
        model: the language model.
        tokenizer: saved with the head.
        last: ids of the tokens that rows end with.
    """
    given, notes = tokenizer.pad_token_id, []
    if given is None or given in last:
        free = [token for token in (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) if token is not None]
        free += [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        found = next((token for token in free if tokenizer.convert_tokens_to_ids(token) not in last), None)
        if found is not None:
            why = "the tokenizer has none" if given is None else f"rows end with `{tokenizer.pad_token}`"
            tokenizer.pad_token = found
            notes.append(f"the padding token is `{found}`, as {why}: it is saved with the tokenizer")
    model.config.pad_token_id = tokenizer.pad_token_id
    return notes


def as_classifier(model: Any) -> Any:
    """Return a language model with this head as transformers' sequence classifier, with the same tensors."""
    classifier = classifier_of(model)
    names = classifier.state_dict().keys()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    classifier.load_state_dict(state, assign=True)
    return classifier


def unused(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters that scoring rows does not use: of the language model's head, unless it is tied."""
    if of(model) is None:
        return []
    tied = model.get_input_embeddings().weight
    return [parameter for parameter in model.get_output_embeddings().parameters() if parameter is not tied]


def of(model: Any) -> Any:
    """Return the head of a model, possibly in PEFT's wrapper, or None where it has none."""
    return getattr(_base(model), NAME, None)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
