"""What a training needs of memory and disk, roughly: for a check before it starts, and for advice when it did not fit.

The figures are estimates from shapes: weights and optimizer states are exact to a few percent, activations are good to
a factor of about two. Source of the sum over a layer: Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.1, without the
attention matrix, which a fused kernel does not keep, and with a gated feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from loratune.batches import AUTO_TOKENS
from loratune.data import Rows
from loratune.model import Loaded
from loratune.recipe import Recipe
from loratune.report import size

_ROOM = 128 * 1024  # bytes of a checkpoint beside its tensors: random states, configuration, manifest
_NF4 = 0.52  # bytes per weight, scales included


def checkpoint_bytes(recipe: Recipe, net: Any) -> int:
    """Return about how many bytes a checkpoint takes: what is trained, and the optimizer's state of it."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    weights: int = sum(parameter.numel() * parameter.itemsize for parameter in trained)
    moments: int = sum(recipe.optimizer.state_bytes(tuple(p.shape)) for p in trained)
    return weights + moments + _ROOM


def measure(recipe: Recipe, loaded: Loaded, net: Any, rows: Rows) -> dict[str, int]:
    """Return estimates in bytes of what is in memory during a step, for run.json and for `advice`.

    Returns:
        weights: of the whole model; linear: what of it nf4 would shrink; states: the optimizer's; activations: of the
        largest micro-batch as it is trained; kept: the same with and without checkpointing per token; longest: tokens
        of the longest row; tokens: of the largest micro-batch.
    """
    config = loaded.model.config.get_text_config().to_dict()
    hidden, layers = int(config.get("hidden_size") or 0), int(config.get("num_hidden_layers") or 0)
    inner = int(config.get("intermediate_size") or 4 * hidden)
    width = max(loaded.dtype.itemsize, 2)
    layer = width * (8 * hidden + 4 * inner)  # bytes per token
    trained = rows.counts.trained_tokens / max(rows.counts.tokens, 1)
    head = round(trained * int(config.get("vocab_size") or 0) * 8)  # float32 logits and their gradient
    longest, micro = int(rows.lengths.max()), recipe.train.micro_batch_size
    most = recipe.train.batch_size * longest
    tokens = micro * longest if isinstance(micro, int) else min(most, max(longest, AUTO_TOKENS[loaded.device.type]))
    return {
        "weights": sum(p.numel() * p.itemsize for p in net.parameters()),
        "linear": sum(m.weight.numel() for m in net.modules() if isinstance(m, torch.nn.Linear)) * width,
        "states": sum(recipe.optimizer.state_bytes(tuple(p.shape)) for p in net.parameters() if p.requires_grad),
        "per_token": layers * layer + head,
        "per_token_checkpointed": layers * width * hidden + layer + head,
        "longest": longest,
        "tokens": tokens,
    }


def advice(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """Return what would take less memory, cheapest first, with how much less that is about.

    Args:
        recipe: that did not fit.
        facts: of its run; where the base did not even load they hold no `memory`.
    """
    quantized = recipe.model.quantization.type != "none"
    if "memory" not in facts:
        smaller = "a smaller base model" if quantized else "model.quantization: nf4 (about a quarter of bfloat16)"
        return f"the base model itself does not fit: {smaller}"
    known: Mapping[str, int] = facts["memory"]
    checkpointed = recipe.train.gradient_checkpointing == "all" or (
        recipe.train.gradient_checkpointing == "auto" and not str(facts["device"]).startswith("CPU")
    )
    per_token = known["per_token_checkpointed" if checkpointed else "per_token"]
    tokens = known["tokens"]
    remedies: list[tuple[str, float]] = []
    if recipe.train.micro_batch_size != 1 and tokens > known["longest"]:
        remedies.append(("train.micro_batch_size: 1", (tokens - known["longest"]) * per_token))
        tokens = known["longest"]
    if not checkpointed:
        saved = tokens * (per_token - known["per_token_checkpointed"])
        remedies.append(("train.gradient_checkpointing: all", saved))
        per_token = known["per_token_checkpointed"]
    if not quantized and recipe.method.type == "lora":
        width = 2 if facts["dtype"] in ("bfloat16", "float16") else 4
        remedies.append(("model.quantization: nf4", known["linear"] * (1 - _NF4 / width)))
    if "8bit" not in recipe.optimizer.type and recipe.optimizer.type != "adafactor":
        remedies.append(("optimizer.type: adamw_8bit", known["states"] * 0.75))
    remedies.append((f"data.max_length: {max(known['longest'] // 2, 2)}", tokens / 2 * per_token))
    told = ", ".join(f"{what} (about {size(saved)} less)" for what, saved in remedies if saved > 0)
    return f"cheapest first, estimated: {told}"
