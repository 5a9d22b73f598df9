"""Which modules of a model get low-rank matrices and which don't, and the notes and errors about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from loratune.config.section import as_tuple
from loratune.errors import ModelError, Place, Problem, listed
from loratune.system import regex_match

if TYPE_CHECKING:
    from peft import LoraConfig

_KEYS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
_REPEATS = re.compile(r"[*+?{]")  # without these an expression is fast


def _modules(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        try:
            re.compile(value)
        except re.error as error:
            raise PydanticCustomError("expected", f"is not a regular expression ({error})") from None
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise PydanticCustomError("expected", "must be `all-linear`, a list of module names, or a regular expression")


Modules = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_modules),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]

Layers = Annotated[tuple[int, ...] | None, BeforeValidator(as_tuple)]


class Method(Protocol):
    """The fields that decide which modules get matrices; see `Lora`."""

    @property
    def target_modules(self) -> str | tuple[str, ...]: ...  # noqa: D102
    @property
    def layers_to_transform(self) -> tuple[int, ...] | None: ...  # noqa: D102
    @property
    def modules_to_save(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def trainable_token_indices(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def rank_pattern(self) -> Mapping[str, int]: ...  # noqa: D102
    @property
    def alpha_pattern(self) -> Mapping[str, float]: ...  # noqa: D102
    @property
    def router(self) -> str: ...  # noqa: D102


def whole(word: str) -> str:
    """Return the regular expression over full names that PEFT makes from a key of `rank_pattern`."""
    return rf"(.*\.)?({word})$"


def check_expressions(
    config: Mapping[str, Any], names: Sequence[str], place: Place | None = None, patience: float = regex_match.PATIENCE
) -> None:
    """Check that a LoRA configuration's regular expressions run in bounded time: PEFT matches them with every name.

    Args:
        config: with `target_modules` and the like, of a recipe or an adapter.
        names: of a model's modules.
        place: of the configuration, if it is a file.
        patience: seconds for all of them.

    Raises:
        ModelError: when they take longer. Invalid expressions are reported elsewhere.
        SetupError: when no child process can be started.
    """
    asked = {key: [one for one in _expressions(config.get(key)) if _REPEATS.search(one)] for key in _KEYS}
    patterns = [whole(one) for some in asked.values() for one in some]
    if patterns and not regex_match.end(patterns, names, patience):
        keys = listed([key for key, some in asked.items() if some])
        told = f"{keys}: an expression takes more than {patience:g} s on the names of {len(names):,} modules"
        raise ModelError(Problem(told, place, regex_match.SIMPLER))


def _expressions(value: object) -> list[str]:
    """Return what PEFT treats as regular expressions in a value: a text, or the keys of an object."""
    if isinstance(value, str):
        return [value]
    return [one for one in value if isinstance(one, str)] if isinstance(value, dict | list) else []


def names(method: Method, model: Any) -> str | list[str]:
    """Return `target_modules` for PEFT's config."""
    wanted = method.target_modules
    if wanted == "all-linear" and method.layers_to_transform is not None:  # PEFT needs names together with layers
        return sorted({name.rpartition(".")[2] for name in _linear(model)})
    return wanted if isinstance(wanted, str) else list(wanted)


def excluded(method: Method, model: Any) -> str | None:
    """Return `exclude_modules` for PEFT's config: a regular expression over full names, or None.

    A user's own regular expression is used as it is. Else no matrices are added to modules that text does not reach,
    such as a vision tower, nor to a router: under `all-linear` it is frozen, or trained in full if the recipe says so.
    """
    if isinstance(method.target_modules, str) and method.target_modules != "all-linear":
        return None
    out = [*_outside(model), *_score_head(model)]
    if method.target_modules == "all-linear" or method.router == "trained":
        out += _routers(model)
    return rf"({'|'.join(map(re.escape, out))})(\..*)?" if out else None


def settle(method: Method, config: LoraConfig, model: Any) -> None:
    """Let PEFT list the tensors of a mixture's experts, as it does later anyway, and remove the routers' from them.

    For models whose experts and routers were linear layers before transformers 5, PEFT derives `target_parameters` from
    their old names. `all-linear` includes both, and `exclude_modules` does not apply to them.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    convert_peft_config_for_transformers(config, model, None)
    asked = method.target_modules != "all-linear" and method.router == "frozen"
    if not config.target_parameters or asked:
        return
    routers = {f"{name}.{part}" for name in _routers(model) for part, _ in model.get_submodule(name).named_parameters()}
    config.target_parameters = sorted(
        word for word in config.target_parameters if not any(name.endswith(f".{word}") for name in routers)
    )


def in_full(method: Method, model: Any) -> list[str]:
    """Return `modules_to_save` for PEFT's config: modules trained in full."""
    routers = _endings(_routers(model)) if method.router == "trained" else []
    return [*method.modules_to_save, *routers, *_score_head(model)]


def notes(method: Method, model: Any) -> list[str]:
    """Return notes on which modules have matrices and which don't.

    Args:
        method: the recipe's.
        model: the base with the matrices.
    """
    told = []
    if out := _outside(model):
        told.append(f"no matrices in {listed(out)}: not used for text")
    routers = listed(_endings(_routers(model)))
    if routers and method.router == "trained":
        told.append(f"the routers ({routers}) are trained in full and saved with the adapter")
    elif routers and method.target_modules == "all-linear":
        # AdaLoRA has no such key
        how = " (`method.router: trained` trains them)" if "router" in vars(method) else ""
        told.append(f"the routers ({routers}) are frozen{how}")
    if method.target_modules == "all-linear" and method.layers_to_transform is None:
        told += _without(model)
    return told + _tied(model)


def check(method: Method, model: Any) -> None:
    """Check that names in a recipe exist in a model.

    Raises:
        ModelError: when one matches nothing.
    """
    problems = [*_unknown_names(method, model), *_unknown_numbers(method, model)]
    if method.router == "trained" and not _routers(model):
        problems.append(Problem("`method.router: trained`: this model has no router: it is not a mixture of experts"))
    wanted = method.target_modules
    if isinstance(wanted, str) and wanted != "all-linear" and method.layers_to_transform:
        problems.append(
            Problem(
                "`method.layers_to_transform` does not combine with a regular expression in `target_modules`",
                hint="write the layers into the expression",
            )
        )
    if problems:
        raise ModelError(problems)


def _unknown_names(method: Method, model: Any) -> Iterator[Problem]:
    known = [name for name, _ in model.named_modules() if name]
    linear = sorted({name.rpartition(".")[2] for name in _linear(model, head=True)})

    def ends(word: str) -> bool:
        return any(name == word or name.endswith(f".{word}") for name in known)

    if isinstance(method.target_modules, tuple):
        for word in method.target_modules:
            if not ends(word):
                yield _nothing("target_modules", word, linear)
    elif method.target_modules != "all-linear" and not any(re.fullmatch(method.target_modules, name) for name in known):
        yield _nothing("target_modules", method.target_modules, linear)
    for word in method.modules_to_save:
        if not ends(word):
            yield _nothing("modules_to_save", word, sorted({name.rpartition(".")[2] for name in known}))
    for key, pattern in (("rank_pattern", method.rank_pattern), ("alpha_pattern", method.alpha_pattern)):
        for word in pattern:
            if not any(re.match(whole(word), name) for name in known):
                yield _nothing(key, word, linear)


def _unknown_numbers(method: Method, model: Any) -> Iterator[Problem]:
    layers = model.config.get_text_config().num_hidden_layers
    for number in method.layers_to_transform or ():
        if not 0 <= number < layers:
            yield Problem(f"`method.layers_to_transform`: no layer {number}; they go from 0 to {layers - 1}")
    rows = model.get_input_embeddings().weight.shape[0]
    for index in method.trainable_token_indices:
        if not 0 <= index < rows:
            yield Problem(f"`method.trainable_token_indices`: no token {index}; they go from 0 to {rows - 1}")


def _nothing(key: str, word: str, known: list[str]) -> Problem:
    return Problem(f"`method.{key}`: `{word}` matches no module of this model; known: {listed(known)}")


def _score_head(model: Any) -> list[str]:
    """Return the name of the head that scores rows, where the model has one."""
    from loratune.models import score_head

    return [] if score_head.of(model) is None else [score_head.NAME]


def _linear(model: Any, head: bool = False) -> list[str]:
    """Return the full names of the linear layers: torch's, its subclasses (quantized ones), and GPT-2's Conv1D."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from loratune.models import score_head

    last = None if head else model.get_output_embeddings()
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)))
    return [name for name, module in found if module is not last and name.split(".")[0] != score_head.NAME]


def _outside(model: Any) -> list[str]:
    """Return the outermost modules with linear layers outside of the language model, such as a vision tower."""
    decoder = model.get_decoder()
    inside = next((name for name, module in model.named_modules() if module is decoder), "")
    if not inside:
        return []
    found = []
    for name in _linear(model):
        words = name.split(".")
        above = (".".join(words[:end]) for end in range(1, len(words) + 1))
        first = next((part for part in above if not f"{inside}.".startswith(f"{part}.")), None)
        if first is not None and not name.startswith(f"{inside}.") and first not in found:
            found.append(first)
    return found


def _routers(model: Any) -> list[str]:
    """Return the names of a mixture's routers.

    They are found by name, `router`, or a gate beside experts: a list of classes would be outdated with each new model.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        children = [child for child, _ in module.named_children()]
        beside_experts = any("expert" in child for child in children)
        for child in children:
            inside = any(name == one or name.startswith(f"{one}.") for one in found)
            if not inside and (child == "router" or (beside_experts and child.endswith("gate"))):
                found.append(f"{name}.{child}")
    return found


def _endings(modules: list[str]) -> list[str]:
    """Return the last two parts of each name, each once: the same modules in all layers."""
    return sorted({".".join(name.split(".")[-2:]) for name in modules})


def _without(model: Any) -> list[str]:
    """Return a line on modules of the language model that `all-linear` did not reach.

    Experts may be tensors that PEFT does not know, and PEFT mistakes some names of linear layers for experts.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    reached = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    passed = [*_routers(model), *_outside(model), *reached]
    experts = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.dim() > 2 and "expert" in name]
    left = [n for n in (*_linear(model), *experts) if not any(n == one or n.startswith(f"{one}.") for one in passed)]
    return [f"no matrices in {listed(_endings(left))}: frozen, PEFT's `all-linear` does not cover it"] if left else []


def _tied(model: Any) -> list[str]:
    """Return a line where embedding and head share weights and matrices prevent a merge."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    adapted = [name for name, module in found.items() if isinstance(module, BaseTunerLayer)]
    weights = {id(m.base_layer.weight if name in adapted else m.weight) for name, m in found.items() if m is not None}
    if not adapted or None in found.values() or len(weights) > 1:
        return []
    return [f"embedding and head share their weights: matrices in the {' and the '.join(adapted)} can't be merged"]
