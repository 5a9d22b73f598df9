"""Which other programs can load an adapter: some features of LoRA are supported by few.

Source: `vllm/lora/peft_helper.py` and `utils.py` of vLLM, `convert_lora_to_gguf.py` and `src/llama-adapter.h` of
llama.cpp; PEFT under transformers 4.57 by `make other-readers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VLLM, LLAMA_CPP, OLDER = "vLLM", "llama.cpp", "transformers 4"
_VLLM_RANK = 512  # the largest that it supports
# key of adapter_config.json -> name of the feature, programs that can't load it
_REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "use_dora": ("DoRA", (VLLM, LLAMA_CPP)),
    "modules_to_save": ("modules trained in full", (VLLM, LLAMA_CPP)),
    "trainable_token_indices": ("trained rows of the embedding", (VLLM, LLAMA_CPP)),
    "bias": ("trained biases", (VLLM, LLAMA_CPP)),
    "target_parameters": ("matrices on fused experts", (LLAMA_CPP, OLDER)),
}
# ... and programs that load it with another scale: vLLM has one rank and alpha, llama.cpp divides one alpha by each
# rank
_SCALED: dict[str, tuple[str, tuple[str, ...]]] = {
    "alpha_pattern": ("`alpha_pattern`", (VLLM, LLAMA_CPP)),
    "rank_pattern": ("`rank_pattern`", (VLLM,)),
    "use_rslora": ("rsLoRA", (LLAMA_CPP,)),
}


def notes(config: Mapping[str, Any]) -> list[str]:
    """Return one line on the programs that can't load an adapter or would load it wrongly, or nothing.

    Args:
        config: adapter_config.json; empty for a full model.
    """
    if config.get("peft_type") == "PROMPT_TUNING":
        return ["vLLM and llama.cpp can't load this adapter (a soft prompt), and it can't be merged: PEFT can load it"]
    if config.get("task_type") == "SEQ_CLS":
        return []  # transformers' sequence classifier with PEFT loads it, as the card shows
    refused = [_REFUSED[key] for key in _REFUSED if config.get(key) not in (None, False, "none", [], {})]
    if config.get("peft_type") == "ADALORA":
        refused = [("AdaLoRA", (VLLM, LLAMA_CPP))]
    elif isinstance(config.get("r"), int) and config["r"] > _VLLM_RANK:
        refused.append((f"a rank above {_VLLM_RANK}", (VLLM,)))
    scaled = [_SCALED[key] for key in _SCALED if config.get(key) and config.get("peft_type") != "ADALORA"]
    told = [f"{who} can't load this adapter ({', '.join(what)})" for who, what in _by_program(refused)]
    told += [f"{who} would scale it wrongly ({', '.join(what)})" for who, what in _by_program(scaled)]
    return [f"{'; '.join(told)}: give them the output of `loratune merge`"] if told else []


def _by_program(found: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, list[str]]]:
    """Return groups of programs with the same problems, and those problems, each once."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for what, programs in found:
        groups.setdefault(programs, []).append(what)
    return [(" and ".join(programs), what) for programs, what in groups.items()]
