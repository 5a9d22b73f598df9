"""What a forward pass keeps in memory until the way back, and how much of it is computed a second time instead.

It is measured, not derived from shapes: one forward pass of the real model over two short rows, in which autograd
tells every tensor it saves. So kernels, adapters, quantization and packing all count as they are. The first layers are
the ones that are computed again: when the way back reaches them, what the last ones kept is gone already.

Which layers that are changes no bit of the result: dropout draws the same numbers again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers.modeling_layers import GradientCheckpointingLayer

from loratune import batches, loop, tiles
from loratune.apart import Packing
from loratune.data import Rows
from loratune.encode import Row
from loratune.errors import ModelError
from loratune.recipe import Recipe
from loratune.report import size

LENGTH = 23  # tokens of the longer of the two rows it is measured on: no width of a model
# tokens of a micro-batch of `auto`, best first: more keep a GPU busy, less than the last are slow
BUDGETS = {"cpu": (4096, 2048, 1024), "cuda": (65536, 32768, 16384, 8192, 4096)}
USABLE = 0.9  # part (0-1) of the free memory that is planned with


@dataclass(frozen=True)
class Cost:
    """What is kept until the way back, in bytes per token.

    Attributes:
        layers: of each decoder layer that can be computed again, first to last.
        inputs: of the same, where only what a layer is given is kept.
        outside: of embedding, head and loss, and of layers that can't be computed again.
    """

    layers: tuple[float, ...]
    inputs: tuple[float, ...]
    outside: float

    def per_token(self, again: int) -> float:
        """Return bytes per token with the first `again` layers computed a second time."""
        return self.outside + sum(self.inputs[:again]) + sum(self.layers[again:])

    def at_once(self, tokens: int, again: int) -> float:
        """Return bytes at the turning point of a micro-batch: what is kept, and what one layer and the head work in."""
        return tokens * (self.per_token(again) + max(self.layers, default=self.outside) + self.outside)


@dataclass(frozen=True)
class Plan:
    """How much is computed again, and how much at once.

    Attributes:
        layers: number of layers that can be computed again.
        again: how many are, the first ones.
        tokens: budget of a micro-batch of `auto`.
        largest: tokens of the largest micro-batch the rows can make.
        needed: bytes it takes at once.
        free: bytes that were free for it, or None where that can't be known.
        short: whether that is less than a careful estimate asks for.
        note: what a person must know, or nothing.
    """

    layers: int
    again: int
    tokens: int
    largest: int
    needed: int
    free: int | None
    short: bool = False
    note: str = ""

    def as_json(self) -> dict[str, int | None]:
        """Return what run.json and a manifest say."""
        known = ("layers", "again", "tokens", "largest", "needed", "free")
        return {name: self.__dict__[name] for name in known}

    def told(self) -> str:
        """Return a line for the start report."""
        kept = self.layers - self.again
        if not self.layers:
            what = "activations"  # a note says what became of them
        elif not self.again or not kept:
            what = f"activations of all {self.layers} layers {'kept' if kept else 'computed again'}"
        else:
            what = f"activations of {kept} of {self.layers} layers kept, {self.again} computed again"
        free = f", {size(self.free)} free" if self.free is not None else ""
        free += ": it may not fit" if self.short else ""
        return f"{what}: about {size(self.needed)} for {self.largest:,} tokens at once{free}"


def measure(recipe: Recipe, net: Any, rows: Rows, packing: Packing, accelerator: Accelerator) -> tuple[Cost, list[Any]]:
    """Measure what a forward pass of `net` keeps, on short rows made of real ones, together as the others will be.

    What grows with the square of a row's length (scores that are written out or kept) is taken for the longest row.

    Returns:
        The cost, and the layers that can be computed again one by one; towers no text passes are none.
    """
    made = _made(rows, recipe.data.max_length, packing.saved)
    batch = loop.on(accelerator.device, recipe.objective.collate(made, packing.layout))
    tokens, width = batch["input_ids"].numel(), batch["input_ids"].shape[1]
    longest = recipe.data.max_length if packing.by == "mask" else int(rows.lengths.max())
    layers = _layers(net)
    given: dict[int, int] = {}
    saved = [0.0] * (len(layers) + 1)  # the last is outside
    by_tiles = _growth_by_tiles(batch, rows) if packing.by == "rows" else 1.0
    for index, tensor in _saved(net, layers, given, lambda: recipe.objective.total(net, batch), accelerator.autocast):
        grown = 1.0
        if tensor.shape[-2:] == (width, width):  # scores that the model writes out
            grown = longest / width
        elif tensor.dim() == 5:  # nothing else has (rows, heads, group, queries, keys)
            grown = by_tiles
        saved[index] += tensor.untyped_storage().nbytes() / tokens * grown
    ran = sorted(given)
    cost = Cost(tuple(saved[i] for i in ran), tuple(given[i] / tokens for i in ran), saved[-1])
    return cost, [layers[i] for i in ran]


def choose(
    recipe: Recipe, cost: Cost, rows: Rows, packing: Packing, device: str, free: int | None, fixed: int,
    world: int = 1, begun: Mapping[str, int] | None = None,
) -> Plan:  # fmt: skip
    """Decide how many layers are computed again, and how many tokens a micro-batch of `auto` has.

    As many tokens as are good for the device with everything kept; fewer, as long as that costs no speed to speak of;
    only then layers are computed again, no more than must be.

    Args:
        recipe: its `train` says what is left to choose.
        cost: of the model.
        rows: to train on.
        packing: how they are put together.
        device: `cpu` or `cuda`.
        free: bytes for this process; None where that can't be known: everything is kept.
        fixed: bytes of gradients, optimizer states and the head's chunk, which are not there yet.
        world: number of processes.
        begun: what was chosen when the run was begun: the budget stays, as it decides the order of sums; no fewer
            layers are computed again.

    Raises:
        ModelError: when the recipe asks for more layers than there are.
    """
    settings, layers = recipe.train, len(cost.layers)
    wish = settings.gradient_checkpointing
    if isinstance(wish, int) and wish > layers > 0:
        raise ModelError(
            f"`train.gradient_checkpointing: {wish}`: this model has {layers} layers",
            f"use {layers} or fewer, or `all`",
        )
    usable = None if free is None else int(free * USABLE) - fixed
    capacity = recipe.data.max_length if packing.packed else None
    alone = packing.by == "mask"  # then one pack is a micro-batch

    def planned(budget: int, again: int) -> Plan:
        micro = 1 if alone and settings.micro_batch_size == "auto" else settings.micro_batch_size
        largest = batches.largest(rows.lengths, rows.weights, settings.batch_size, micro, budget, capacity, world)
        return Plan(layers, again, budget, largest, int(cost.at_once(largest, again)), free)

    budgets = (begun["tokens"],) if begun else BUDGETS[device]
    if settings.micro_batch_size != "auto":
        budgets = budgets[:1]
    if wish == "auto":
        least = min(begun["again"], layers) if begun else 0
        wishes = [(budget, least) for budget in budgets] + [(budgets[-1], k) for k in range(least + 1, layers + 1)]
    else:
        again = wish if isinstance(wish, int) else layers if wish == "all" else 0
        wishes = [(budget, min(again, layers)) for budget in budgets]
    for plan in itertools.starmap(planned, wishes):
        if usable is None or plan.needed <= usable:
            return plan
    return replace(planned(*wishes[-1]), short=True)


def switch(model: Any, layers: list[Any], plan: Plan, wish: str | int) -> Plan:
    """Have the first layers computed a second time as planned; return the plan with what a person must know.

    A model whose layers can't be switched one by one is switched as a whole, where that was asked for or memory is
    short. Non-reentrant, so that inputs need no gradient and DDP sees each parameter once.

    Args:
        model: the base model.
        layers: its layers that can be switched.
        plan: from `choose`.
        wish: the recipe's.

    Raises:
        ModelError: when it was asked for and the model has nothing of the kind.
    """
    whole = not layers and wish != "none" and (wish != "auto" or plan.short)
    if not (plan.again or whole):
        return plan
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError:  # transformers' word for it
        if wish == "auto":
            return replace(plan, note="this model can't compute activations a second time: they are kept")
        hint = "use `none`, and a smaller train.micro_batch_size or data.max_length"
        message = f"`train.gradient_checkpointing: {wish}`: this model can't compute activations a second time"
        raise ModelError(message, hint) from None
    for layer in layers[plan.again :]:
        layer.gradient_checkpointing = False
    if not whole:
        return plan
    return replace(plan, note="this model's layers can't be switched one by one: all activations are computed again")


def _layers(net: Any) -> list[Any]:
    """Return the layers of a model that transformers can compute a second time one by one, first to last."""
    found = [(name, module) for name, module in net.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    outer: list[str] = []
    layers = []
    for name, module in found:  # parents come before children
        if not any(name.startswith(f"{parent}.") for parent in outer):
            outer.append(name)
            layers.append(module)
    return layers


def _made(rows: Rows, max_length: int, shared: float) -> list[Row]:
    """Return two rows of unlike length made of the tokens of real ones, with as large a trained part as those have.

    Where rows share, there are as many and they begin so far alike that they share the same part (0-1) of their tokens.
    """
    ids = np.concatenate([rows[i].ids for i in range(min(len(rows), LENGTH))])
    share = rows.counts.trained_tokens / max(rows.counts.tokens, 1)
    known = np.unique(ids)
    number = max(2, math.ceil(1 / (1 - shared)))
    lengths = [max(2, min(LENGTH - (n == number - 1), max_length)) for n in range(number)]
    common = min(round(shared * sum(lengths) / (number - 1)), min(lengths) - 1)
    made = []
    for n, length in enumerate(lengths):
        trained = np.diff(np.floor(np.arange(length + 1) * share)) > 0
        trained[-1] = True  # whatever the share
        own = np.resize(ids, length).astype(np.int32)
        own[common] = known[n % len(known)]  # unlike from here on
        made.append(Row(own, trained, rows.place(0)))
    return made


def _growth_by_tiles(batch: Mapping[str, Any], rows: Rows) -> float:
    """Return how much more probabilities tiles.py keeps per token of the longest rows it does so for than of a pack."""
    own = batch["cu_seq_lens_q"].diff().tolist()
    lengths = batch.get("cu_seq_lens_k", batch["cu_seq_lens_q"]).diff().tolist()
    short = rows.lengths[rows.lengths <= tiles.KEPT]
    if not len(short):
        return 0.0
    times = short.max() / max(lengths)
    there = tiles.scores_kept(*([math.ceil(length * times) for length in part] for part in (own, lengths)))
    return float(there / (tiles.scores_kept(own, lengths) * times))


def _saved(
    net: Any, layers: list[Any], given: dict[int, int], run: Callable[[], Any],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Iterator[tuple[int, torch.Tensor]]:  # fmt: skip
    """Run a forward pass; yield what autograd saves, each storage once, with the number of its layer (-1: outside).

    Weights are there anyway, and so are not yielded; nor are copies of them in another precision, which don't grow
    with the tokens. `given` gets the bytes of what each layer that ran was given.
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
    never = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)  # nothing goes backward from here
    with _watched(net, layers, inside, given, keep), never, autocast():
        run()
    yield from kept.values()


@contextmanager
def _watched(
    net: Any, layers: list[Any], inside: list[int], given: dict[int, int], keep: Callable[[torch.Tensor, int], None]
) -> Iterator[None]:
    """Keep the number of the layer that is running in `inside`.

    What all layers are given alike (a mask, the angles of positions) is kept once, outside of them.
    What an int8 layer is given counts to what its decoder layer is given: bitsandbytes keeps it where checkpointing
    doesn't see it, so it stays when the layer is computed again.
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
            if torch.is_grad_enabled():  # the head is tried without, on a few tokens
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
    int8 = [module for module in net.modules() if type(module).__name__ == "Linear8bitLt"]
    hooks += [module.register_forward_pre_hook(held) for module in int8]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
