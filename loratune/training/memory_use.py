"""What a training needs of memory and disk, and what is free: for its plan, its check, and advice when it did not fit.

Weights and optimizer states are known from shapes to a few percent, activations are measured (`activation_memory.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from loratune.console import size
from loratune.data.dataset import Rows
from loratune.kernels import linear_cross_entropy
from loratune.models import quantization
from loratune.models.base_model import Loaded, count_parameters
from loratune.recipe import Recipe
from loratune.runs.facts import Setup
from loratune.system import limits
from loratune.training.activation_memory import Cost
from loratune.training.memory_plan import Plan

_ROOM = 128 * 1024  # bytes of a checkpoint beside its tensors: random states, configuration, manifest
_SUM = 6  # bytes per weight of a trained head: its gradient in float32, and a part of it in 16 bit
_NF4 = 0.52  # bytes per weight, scales included
_WORKSPACE = 128 * 2**20  # bytes on a GPU: cuBLAS's own (64 MiB on Hopper), and what lies between tensors


def checkpoint_bytes(recipe: Recipe, net: Any) -> int:
    """Return about how many bytes a checkpoint takes: what is trained, and the optimizer's state of it."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    weights: int = sum(parameter.numel() * parameter.itemsize for parameter in trained)
    return weights + _states(recipe, net) + _ROOM


def free_memory(where: torch.device, processes: int = 1) -> int | None:
    """Return the bytes that are free for this process, or None where that can't be known.

    On a GPU what torch holds unused is free; on a CPU what the kernel or a cgroup lets us have, shared evenly.
    """
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        return int(free) + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    found = [left for left in (*_available(), limits.memory_left()) if left is not None]
    return min(found) // processes if found else None


def least(free: int | None) -> int | None:
    """Return the smallest free memory of all processes, so that all choose alike."""
    everybody = [one for one in gather_object([free]) if one is not None]
    return min(everybody) if everybody else None


def fixed_bytes(recipe: Recipe, loaded: Loaded, net: Any) -> int:
    """Return the bytes a step needs beside activations that are not there yet, however many tokens it has.

    Gradients, optimizer states, a chunk of logits, one layer's weight out of its few bits, and on a GPU working space.
    """
    gradients: int = sum(p.numel() * p.itemsize for p in net.parameters() if p.requires_grad)
    words = int(loaded.model.config.get_text_config().to_dict().get("vocab_size") or 0)
    about = (loaded.device.type, words, loaded.dtype.itemsize)
    logits = linear_cross_entropy.chunk_bytes(*about, trained=False) + _of_trained_head(loaded, net, words)
    working = _WORKSPACE if loaded.device.type == "cuda" else 0
    dequantized = quantization.largest_dequantized(net, loaded.dtype)
    return gradients + _states(recipe, net) + logits + dequantized + working


def scoring_tokens(loaded: Loaded, longest: int, most: int, plain: bool) -> int:
    """Return how many tokens a micro-batch may have where rows are only scored: `most`, halved until they fit.

    Half the free memory is left to what is not counted. A row that is longer goes alone.

    Args:
        loaded: the model.
        longest: tokens of the longest row.
        most: tokens.
        plain: whether its logits are never in memory at once; see `linear_cross_entropy.is_plain`.
    """
    free = free_memory(loaded.device)
    config = loaded.model.config.get_text_config().to_dict()
    width, words = int(config.get("hidden_size") or 0), int(config.get("vocab_size") or 0)
    between = int(config.get("intermediate_size") or config.get("n_inner") or 4 * width)
    # of the layer at work: some copies of the state, what is between, a row of the mask; then logits and a capped copy
    numbers = max(8 * width + 4 * between + longest, 0 if plain else 3 * words)
    while free is not None and most > longest and most * numbers * loaded.dtype.itemsize > free // 2:
        most //= 2
    return most


def operations(net: Any, rows: Rows, shown: int) -> float:
    """Return roughly how many floating point operations a training on `shown` rows takes: 4 a weight and token."""
    return 4.0 * count_parameters(net)[1] * shown * rows.counts.tokens / max(rows.samples, 1)


def measure(recipe: Recipe, loaded: Loaded, net: Any, rows: Rows, cost: Cost, plan: Plan) -> dict[str, int]:
    """Return in bytes what is in memory during a step, for run.json and for `advice`.

    Returns:
        weights: of the whole model; linear: what of it nf4 would shrink; states: the optimizer's; per_token: of
        activations, all kept; per_token_checkpointed: all layers computed again; per_token_now: as it is trained;
        longest: tokens of the longest row; tokens: of the largest micro-batch.
    """
    width = max(loaded.dtype.itemsize, 2)
    return {
        "weights": sum(p.numel() * p.itemsize for p in net.parameters()),
        "linear": sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear)) * width,
        "states": _states(recipe, net),
        "per_token": int(cost.per_token(0)),
        "per_token_checkpointed": int(cost.per_token(plan.layers)),
        "per_token_now": int(cost.per_token(plan.again)),
        "longest": int(rows.lengths.max()),
        "tokens": plan.largest,
    }


def advice(recipe: Recipe, setup: Setup | None) -> str:
    """Return what would take less memory, cheapest first, with how much less that is about.

    Args:
        recipe: that did not fit.
        setup: what is known of its run; None where the base did not even load.
    """
    quantized = (setup.quantization if setup else recipe.model.quantization.type) != "none"
    if setup is None:
        smaller = "a smaller base model" if quantized else "model.quantization: nf4 (about a quarter of bfloat16)"
        return f"the base model itself does not fit: {smaller}"
    known = setup.memory
    per_token, checkpointed = known["per_token_now"], known["per_token_checkpointed"]
    tokens = known["tokens"]
    remedies: list[tuple[str, float]] = []
    if recipe.train.micro_batch_size != 1 and tokens > known["longest"]:
        remedies.append(("train.micro_batch_size: 1", (tokens - known["longest"]) * per_token))
        tokens = known["longest"]
    if per_token > checkpointed:
        remedies.append(("train.gradient_checkpointing: all", tokens * (per_token - checkpointed)))
        per_token = checkpointed
    if not quantized and not recipe.method.trains_base:
        width = 2 if setup.dtype in ("bfloat16", "float16") else 4
        remedies.append(("model.quantization: nf4", known["linear"] * (1 - _NF4 / width)))
    if "8bit" not in recipe.optimizer.type and recipe.optimizer.type != "adafactor":
        remedies.append(("optimizer.type: adamw_8bit", known["states"] * 0.75))
    remedies.append((f"data.max_length: {max(known['longest'] // 2, 2)}", tokens / 2 * per_token))
    told = ", ".join(f"{what} (about {size(saved)} less)" for what, saved in remedies if saved > 0)
    return f"cheapest first, estimated: {told}"


def _of_trained_head(loaded: Loaded, net: Any, words: int) -> int:
    """Return what a head takes more where it is trained: larger chunks, in 16 bit its gradient's sum and summand."""
    trained = [p.numel() for p in net.get_output_embeddings().parameters() if p.requires_grad]
    half = loaded.device.type == "cuda" or loaded.dtype is not torch.float32
    about = (loaded.device.type, words, loaded.dtype.itemsize)
    frozen, whole = (linear_cross_entropy.chunk_bytes(*about, trained=one) for one in (False, True))
    return whole - frozen + half * _SUM * sum(trained) if trained else 0


def _states(recipe: Recipe, net: Any) -> int:
    """Return the bytes of the optimizer's state."""
    return sum(recipe.optimizer.state_bytes(tuple(p.shape)) for p in net.parameters() if p.requires_grad)


def _available() -> Iterator[int]:
    """Yield what the kernel says is available, in bytes."""
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
