"""Memory and disk that a training needs, and what is free: for its plan, its check, and advice when memory ran out.

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
from loratune.kernels import linear_cross_entropy, offload
from loratune.models import quantization
from loratune.models.base_model import Loaded, count_parameters
from loratune.recipe import Recipe
from loratune.runs.facts import Setup
from loratune.system import limits
from loratune.training.activation_memory import Cost
from loratune.training.memory_plan import Plan

_ROOM = 128 * 1024  # bytes of a checkpoint apart from its tensors: random states, configuration, manifest
_SUM = 6  # bytes per weight of a trained head: its gradient in float32, and a chunk's summand in 16 bits
_NF4 = 0.52  # bytes per weight, scales included
_WORKSPACE = 128 * 2**20  # bytes on a GPU: cuBLAS's workspace (64 MiB on Hopper), and fragmentation


def checkpoint_bytes(recipe: Recipe, net: Any) -> int:
    """Return about how many bytes a checkpoint takes: trained weights and their optimizer state."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    weights: int = sum(parameter.numel() * parameter.itemsize for parameter in trained)
    return weights + _states(recipe, net) + _ROOM


def free_memory(where: torch.device, processes: int = 1) -> int | None:
    """Return the bytes that are free for this process, or None where that is unknown.

    On a GPU memory that torch has reserved but not used counts as free. On a CPU it is what the kernel or a cgroup
    allows, divided by the number of processes.
    """
    if where.type == "cuda":
        free, _ = torch.cuda.mem_get_info(where)
        return int(free) + torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    found = [left for left in (*_available(), limits.memory_left()) if left is not None]
    return min(found) // processes if found else None


def least(free: int | None) -> int | None:
    """Return the smallest free memory of all processes, so that all make the same choice."""
    everybody = [one for one in gather_object([free]) if one is not None]
    return min(everybody) if everybody else None


def fixed_bytes(recipe: Recipe, loaded: Loaded, net: Any) -> int:
    """Return the bytes, not allocated yet, that a step needs besides activations, whatever its number of tokens.

    They are gradients, optimizer states, copies of float32 adapter weights in the precision of the layers, a chunk of
    logits, one layer's dequantized weight, and on a GPU workspace.
    """
    trained = [p for p in net.parameters() if p.requires_grad]
    gradients: int = sum(p.numel() * p.itemsize for p in trained)
    width = loaded.dtype.itemsize
    copies: int = 0 if recipe.method.trains_base else sum(p.numel() * width for p in trained if p.itemsize > width)
    words = int(loaded.model.config.get_text_config().to_dict().get("vocab_size") or 0)
    about = (loaded.device.type, words, loaded.dtype.itemsize)
    logits = linear_cross_entropy.chunk_bytes(*about, trained=False) + _of_trained_head(loaded, net, words)
    working = _WORKSPACE if loaded.device.type == "cuda" else 0
    dequantized = quantization.largest_dequantized(net, loaded.dtype)
    return gradients + copies + _states(recipe, net) + logits + dequantized + working


def movable_bytes(loaded: Loaded) -> int:
    """Return the bytes of embedding and head that can be moved to main memory; 0 where nothing can."""
    half = loaded.dtype is torch.float16  # computed under autocast, which sees where a weight is
    return offload.movable_bytes(loaded.model) if loaded.device.type == "cuda" and not half else 0


def scoring_tokens(loaded: Loaded, longest: int, most: int, plain: bool) -> int:
    """Return how many tokens a micro-batch may have where rows are only scored: `most`, halved until they fit.

    Half of the free memory is left for what is not counted. A longer row is a micro-batch of its own.

    Args:
        loaded: the model.
        longest: tokens of the longest row.
        most: tokens.
        plain: whether its full logits are never in memory; see `linear_cross_entropy.is_plain`.
    """
    free = free_memory(loaded.device)
    config = loaded.model.config.get_text_config().to_dict()
    width, words = int(config.get("hidden_size") or 0), int(config.get("vocab_size") or 0)
    between = int(config.get("intermediate_size") or config.get("n_inner") or 4 * width)
    # of the running layer: a few copies of the hidden state, the intermediate state, a row of the mask; then logits and
    # a capped copy
    numbers = max(8 * width + 4 * between + longest, 0 if plain else 3 * words)
    while free is not None and most > longest and most * numbers * loaded.dtype.itemsize > free // 2:
        most //= 2
    return most


def operations(net: Any, rows: Rows, shown: int) -> float:
    """Return roughly the floating-point operations of a training on `shown` rows: 4 per weight and token."""
    return 4.0 * count_parameters(net)[1] * shown * rows.counts.tokens / max(rows.samples, 1)


def measure(recipe: Recipe, loaded: Loaded, net: Any, rows: Rows, cost: Cost, plan: Plan) -> dict[str, int]:
    """Return the memory of a step by purpose, in bytes, for run.json and `advice`.

    Returns:
        weights: of the whole model; linear: the part that nf4 would quantize; states: the optimizer's; per_token:
        activations with no layer recomputed; per_token_checkpointed: with all layers recomputed; per_token_now: as it
        is trained; longest: tokens of the longest row; tokens: of the largest micro-batch.
    """
    width = max(loaded.dtype.itemsize, 2)
    return {
        "weights": sum(p.numel() * p.itemsize for p in net.parameters()),
        "linear": sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear)) * width,
        "states": _states(recipe, net),
        "per_token": int(cost.per_token(0)),
        "per_token_checkpointed": int(cost.per_token(plan.layers)),
        "per_token_now": int(cost.per_token(plan.again, plan.offload)),
        "longest": int(rows.lengths.max()),
        "tokens": plan.largest,
    }


def advice(recipe: Recipe, setup: Setup | None) -> str:
    """Return ways to need less memory, cheapest first, with about how much each saves.

    Args:
        recipe: whose training ran out of memory.
        setup: of the run; None where memory ran out while the base was loaded.
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
    """Return the extra bytes of a trained head: larger chunks of logits, and in 16 bits its float32 gradient."""
    trained = [p.numel() for p in net.get_output_embeddings().parameters() if p.requires_grad]
    half = loaded.device.type == "cuda" or loaded.dtype is not torch.float32
    about = (loaded.device.type, words, loaded.dtype.itemsize)
    frozen, whole = (linear_cross_entropy.chunk_bytes(*about, trained=one) for one in (False, True))
    return whole - frozen + half * _SUM * sum(trained) if trained else 0


def _states(recipe: Recipe, net: Any) -> int:
    """Return the bytes of the optimizer's state."""
    return sum(recipe.optimizer.state_bytes(tuple(p.shape)) for p in net.parameters() if p.requires_grad)


def _available() -> Iterator[int]:
    """Yield the available memory that the kernel reports, in bytes."""
    file = Path("/proc/meminfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
