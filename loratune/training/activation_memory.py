"""Measure the activations that a forward pass saves for the backward pass, layer by layer.

They are measured, not derived from shapes: the real model runs forward once on two short rows, and autograd reports
each tensor it saves. So kernels, adapters, quantization and packing are all included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers.modeling_layers import GradientCheckpointingLayer

from loratune.data.collate import collate
from loratune.data.dataset import Rows
from loratune.data.sample import Sample
from loratune.kernels import cpu_attention
from loratune.kernels.layer_kinds import is_of_bitsandbytes
from loratune.models.policy import Policy
from loratune.recipe import Recipe
from loratune.runs import training_state
from loratune.training.layout_test import Packing

LENGTH = 23  # tokens of the longer of the two measured rows; must equal no width of the model


@dataclass(frozen=True)
class Cost:
    """Activations saved for the backward pass, in bytes per token.

    Attributes:
        layers: of each decoder layer that can be checkpointed (recomputed), first to last.
        inputs: of the same layers when checkpointed: only their inputs are saved.
        outside: of embedding, head and loss, and of layers that can't be checkpointed.
        draws: whether a forward pass draws random numbers, which a recomputation must repeat.
        virtual_tokens: before each row; each costs as much as another token.
    """

    layers: tuple[float, ...]
    inputs: tuple[float, ...]
    outside: float
    draws: bool = True
    virtual_tokens: int = 0

    def per_token(self, again: int, offload: bool = False) -> float:
        """Return bytes per token with the first `again` layers recomputed in the backward pass.

        With `offload` the inputs of these are in main memory, but for those of two on their way.
        """
        inputs = 2 * max(self.inputs[:again], default=0.0) if offload else sum(self.inputs[:again])
        return self.outside + inputs + sum(self.layers[again:])

    def at_once(self, tokens: int, again: int, offload: bool = False) -> float:
        """Return peak bytes of a micro-batch: saved activations, and those of one layer and the head at work."""
        return tokens * (self.per_token(again, offload) + max(self.layers, default=self.outside) + self.outside)


def measure(
    recipe: Recipe, policy: Policy, rows: Rows, packing: Packing, accelerator: Accelerator
) -> tuple[Cost, list[Any]]:
    """Measure what a forward pass of a model saves, on short rows made of real tokens, in the layout of the training.

    What grows with the square of a row's length (saved attention scores) is extrapolated to the longest row.

    Returns:
        The cost, and the layers that can be checkpointed one by one. Layers that text does not pass through (of a
        vision tower) are left out.
    """
    net, virtual = policy.net, policy.virtual_tokens
    made = _made(rows, recipe.data.max_length, packing.saved, [*recipe.objective.values, *recipe.objective.probed])
    batch = collate(made, packing.layout, virtual).to(accelerator.device)
    tokens = batch.computed + virtual * len(batch.sample)
    width = virtual + batch.inputs["input_ids"].shape[1]
    longest = recipe.data.max_length if packing.by == "mask" else int(rows.lengths.max())
    layers = _layers(net)
    given: dict[int, int] = {}
    saved = [0.0] * (len(layers) + 1)  # the last is outside
    by_tiles = _growth_by_tiles(batch.inputs, rows) if packing.by == "rows" else 1.0
    before = training_state.drawn()
    for index, tensor in _saved(
        net, layers, given, lambda: recipe.objective.total(Policy(net), batch), accelerator.autocast
    ):
        grown = 1.0
        if tensor.shape[-2:] == (width, width):  # scores that the model writes out
            grown = longest / width
        elif tensor.dim() == 5:  # nothing else has (rows, heads, group, queries, keys)
            grown = by_tiles
        saved[index] += tensor.untyped_storage().nbytes() / tokens * grown
    ran = sorted(given)
    draws = before != training_state.drawn()
    cost = Cost(tuple(saved[i] for i in ran), tuple(given[i] / tokens for i in ran), saved[-1], draws, virtual)
    return cost, [layers[i] for i in ran]


def _layers(net: Any) -> list[Any]:
    """Return the layers of a model that transformers can checkpoint one by one, first to last."""
    found = [(name, module) for name, module in net.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    outer: list[str] = []
    layers = []
    for name, module in found:  # parents come before children
        if not any(name.startswith(f"{parent}.") for parent in outer):
            outer.append(name)
            layers.append(module)
    return layers


def _made(rows: Rows, max_length: int, shared: float, names: Sequence[str]) -> list[Sample]:
    """Return samples of two rows of different lengths, with real tokens and the same fraction of label tokens.

    With prefix sharing there are as many rows as needed, with so long a common prefix, that the fraction `shared` (0-1)
    of their tokens is saved.
    """
    ids = np.concatenate([rows[i].ids for i in range(min(len(rows), LENGTH))])
    share = rows.counts.trained_tokens / max(rows.counts.tokens, 1)
    known = np.unique(ids)
    each = rows.per_sample
    number = each * math.ceil(max(2, 1 / (1 - shared)) / each)
    lengths = [max(2, min(LENGTH - (n == number - 1), max_length)) for n in range(number)]
    common = min(round(shared * sum(lengths) / (number - 1)), min(lengths) - 1)
    made = []
    for n, length in enumerate(lengths):
        trained = np.diff(np.floor(np.arange(length + 1) * share)) > 0
        trained[-1] = True  # whatever the share
        own = np.resize(ids, length).astype(np.int32)
        own[common] = known[n % len(known)]  # different from here on
        made.append(replace(rows[n % each], ids=own, trained=trained))
    values = dict.fromkeys(names, 0.0)
    return [Sample(tuple(made[cut : cut + each]), values) for cut in range(0, number, each)]


def _growth_by_tiles(inputs: Mapping[str, Any], rows: Rows) -> float:
    """Return attention probabilities saved per token of the longest rows in tiles, relative to the measured pack."""
    own, lengths = (inputs[name].diff().tolist() for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
    short = rows.lengths[rows.lengths <= cpu_attention.KEPT]
    if not len(short):
        return 0.0
    times = short.max() / max(lengths)
    there = cpu_attention.scores_kept(*([math.ceil(length * times) for length in part] for part in (own, lengths)))
    return float(there / (cpu_attention.scores_kept(own, lengths) * times))


def _saved(
    net: Any, layers: list[Any], given: dict[int, int], run: Callable[[], Any],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[int, torch.Tensor]]:  # fmt: skip
    """Run a forward pass; yield each storage that autograd saves once, with the number of its layer (-1: outside).

    Weights are in memory anyway and are not yielded; nor are copies of them in another precision, whose size does not
    depend on the number of tokens. `given` gets the bytes of the inputs of each layer that ran.
    """
    there = {part.untyped_storage().data_ptr() for part in (*net.parameters(), *net.buffers())}
    shapes = {shape for part in net.parameters() for shape in (part.shape, part.shape[::-1])}  # transposed, too
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # by storage; alive, so that no address is used twice
    inside = [-1]

    nothing = torch.empty(0)  # in the place of what was saved

    def keep(tensor: torch.Tensor, index: int) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in there and tensor.shape not in shapes:
            kept.setdefault(address, (index, tensor.detach()))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        keep(tensor, inside[0])
        return nothing

    net.train()
    never = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)  # no backward pass follows
    with _watched(net, layers, inside, given, keep), never, autocast():
        run()
    yield from kept.values()


@contextmanager
def _watched(
    net: Any, layers: list[Any], inside: list[int], given: dict[int, int], keep: Callable[[torch.Tensor, int], None]
) -> Iterator[None]:
    """Keep the number of the layer that is running in `inside`.

    Inputs that all layers have in common (a mask, the angles of positions) count once, outside of the layers.
    The input of an int8 linear layer counts as input of its decoder layer: bitsandbytes saves it where checkpointing
    doesn't see it, so it stays in memory when the layer is recomputed.
    """
    seen: dict[int, torch.Tensor] = {}

    def held(module: Any, inputs: tuple[torch.Tensor]) -> None:
        address = inputs[0].data_ptr()
        if inside[0] >= 0 and torch.is_grad_enabled() and address not in seen:
            seen[address] = inputs[0]  # alive, so that no address is used twice
            given[inside[0]] += inputs[0].nbytes

    def enter(index: int) -> Callable[..., None]:
        def before(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            inside[0] = index
            tensors = [x for x in (*inputs, named.get("hidden_states")) if isinstance(x, torch.Tensor)]
            if torch.is_grad_enabled():  # the head's self-test runs without gradients
                for value in (part for name, part in named.items() if name != "hidden_states"):
                    for part in value if isinstance(value, tuple) else (value,):
                        if isinstance(part, torch.Tensor):
                            keep(part, -1)
                given[index] = given.get(index, 0) + sum(tensor.nbytes for tensor in tensors)

        return before

    def leave(module: Any, inputs: Any, output: Any) -> None:
        inside[0] = -1

    hooks = [
        hook
        for index, layer in enumerate(layers)
        for hook in (
            layer.register_forward_pre_hook(enter(index), with_kwargs=True),
            layer.register_forward_hook(leave),
        )
    ]
    int8 = [module for module in net.modules() if is_of_bitsandbytes(module, "Linear8bitLt")]
    hooks += [module.register_forward_pre_hook(held) for module in int8]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
