"""Choose how many layers use gradient checkpointing, and how many tokens a micro-batch has.

The first layers are recomputed: when the backward pass reaches them, the activations of the last ones have been freed
already. Which layers are recomputed changes no bit of the result: dropout repeats its random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratune.console import size
from loratune.data import batches
from loratune.data.dataset import Rows
from loratune.errors import ModelError
from loratune.kernels import offload
from loratune.recipe import Recipe
from loratune.training.activation_memory import Cost
from loratune.training.layout_test import Packing

# tokens of a micro-batch with `auto`, best first: many keep a GPU busy, fewer than the last are slow
BUDGETS = {"cpu": (4096, 2048, 1024), "cuda": (16384, 8192, 4096, 2048)}
USABLE = 0.9  # fraction (0-1) of the free memory that a plan may use
LIGHTER = 0.75  # fraction (0-1) of a plan's memory that the next plan may use after the first ran out of memory


@dataclass(frozen=True)
class Plan:
    """How many layers are recomputed, and how many tokens run at once.

    Attributes:
        layers: number of layers that can be recomputed.
        again: how many of them are, counted from the first.
        tokens: budget of a micro-batch with `auto`.
        largest: tokens of the largest micro-batch the rows can make.
        needed: bytes it needs at its peak.
        free: bytes that were free for it, or None where that is unknown.
        short: whether that is less than a cautious estimate needs.
        offload: whether embedding, head and inputs of checkpointed layers are in main memory.
        moved: bytes of the weights among them, which are free then.
        note: for the start report, or nothing.
    """

    layers: int
    again: int
    tokens: int
    largest: int
    needed: int
    free: int | None
    short: bool = False
    offload: bool = False
    moved: int = 0
    note: str = ""

    @property
    def extra(self) -> int:
        """Bytes needed beyond those that were free; below 0 where offloading frees more than activations need."""
        return self.needed - self.moved

    def as_json(self) -> dict[str, int | None]:
        """Return the entry for run.json and a checkpoint's manifest."""
        known = ("layers", "again", "tokens", "largest", "needed", "free", "offload")
        return {name: self.__dict__[name] for name in known}

    def told(self) -> str:
        """Return a line for the start report."""
        what = "activations"
        if self.again:
            part = f"{self.again} of {self.layers}" if self.again < self.layers else f"all {self.layers}"
            what = f"gradient checkpointing on {part} layers, activations"
        if self.offload:
            what = f"embedding, head and layer inputs in main memory, {what}"
        free = f", {size(self.free + self.moved)} free" if self.free is not None else ""
        free += ": it may not fit" if self.short else ""
        return f"{what}: about {size(self.needed)} for a micro-batch of {self.largest:,} tokens{free}"


def choose(
    recipe: Recipe, cost: Cost, rows: Rows, packing: Packing, device: str, free: int | None, fixed: int,
    world: int = 1, begun: Mapping[str, int] | None = None, movable: int = 0,
) -> Plan:  # fmt: skip
    """Decide how many layers are recomputed, and how many tokens a micro-batch with `auto` has.

    First choice is the best number of tokens for the device and no layer recomputed; then fewer tokens, down to where
    that gets slow; only then layers are recomputed, no more than needed; last, a GPU offloads to main memory.

    Args:
        recipe: its `train` section limits the choice.
        cost: of the model.
        rows: to train on.
        packing: how they are put together.
        device: `cpu` or `cuda`.
        free: bytes for this process; None where that is unknown: then no layer is recomputed.
        fixed: bytes not allocated yet that don't depend on the number of tokens: see `memory_use.fixed_bytes`.
        world: number of processes.
        begun: the plan of a resumed run: the token budget stays, as it decides the order of sums; no fewer layers are
            recomputed, and it offloads if it did.
        movable: bytes of weights that offloading would move; 0 where it is not possible.

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
    plans = _plans(recipe, cost, rows, packing, device, free, world, begun, movable)
    for plan in plans:
        if usable is None or plan.extra <= usable:
            break
    else:
        plan = replace(plan, short=True)
    if settings.offload == "on" and not plan.offload:
        why = "there is no GPU" if device != "cuda" else "there are several processes" if world > 1 else (
            "embedding and head are trained, or in float16, or of a kind of their own"
        )  # fmt: skip
        return replace(plan, note=f"`train.offload: on` has no effect: {why}")
    return plan


def lighter(
    recipe: Recipe, cost: Cost, rows: Rows, packing: Packing, device: str, plan: Plan,
    world: int = 1, begun: Mapping[str, int] | None = None, movable: int = 0,
) -> Plan | None:  # fmt: skip
    """Return the next plan that needs clearly less memory than `plan`, which ran out of it; None if there is none.

    The other arguments are those of `choose`.
    """
    plans = _plans(recipe, cost, rows, packing, device, plan.free, world, begun, movable)
    less = [other for other in plans if other.extra < plan.extra]
    return next((other for other in less if other.extra <= LIGHTER * plan.needed), less[-1] if less else None)


def _plans(
    recipe: Recipe, cost: Cost, rows: Rows, packing: Packing, device: str, free: int | None, world: int,
    begun: Mapping[str, int] | None, movable: int,
) -> Iterator[Plan]:  # fmt: skip
    """Yield the plans that a recipe allows, best first; the arguments are those of `choose`."""
    settings, layers = recipe.train, len(cost.layers)
    wish = settings.gradient_checkpointing
    capacity = rows.per_sample * recipe.data.max_length if packing.packed else None
    alone = packing.by == "mask"  # then a micro-batch is one pack
    budgets = (begun["tokens"],) if begun else BUDGETS[device]
    if settings.micro_batch_size != "auto":
        budgets = budgets[:1]
    if wish == "auto":
        least = min(begun["again"], layers) if begun else 0
        wishes = [(budget, least) for budget in budgets] + [(budgets[-1], k) for k in range(least + 1, layers + 1)]
    else:
        again = wish if isinstance(wish, int) else layers if wish == "all" else 0
        wishes = [(budget, min(again, layers)) for budget in budgets]
    possible = device == "cuda" and world == 1 and movable > 0 and settings.offload != "off"
    always = possible and (settings.offload == "on" or bool(begun and begun.get("offload")))
    ways = [(*wish, always) for wish in wishes] + [(*wishes[-1], True)] * (possible and not always)
    for budget, again, away in ways:
        micro = 1 if alone and settings.micro_batch_size == "auto" else settings.micro_batch_size
        largest = batches.largest(rows.sizes, rows.sample_weights, settings.batch_size, micro, budget, capacity, world)
        if cost.virtual_tokens:  # most virtual tokens where rows are shortest
            largest += cost.virtual_tokens * rows.per_sample * -(-largest // int(rows.sizes.min()))
        needed = int(cost.at_once(largest, again, away))
        yield Plan(layers, again, budget, largest, needed, free, offload=away, moved=movable if away else 0)


def switch(model: Any, layers: list[Any], plan: Plan, wish: str | int, draws: bool = True) -> Plan:
    """Turn on gradient checkpointing for the first layers, and offloading, as planned; return the plan with a note.

    A model whose layers can't be switched one by one is switched as a whole, where that was asked for or memory is
    short. Checkpointing is non-reentrant, so that inputs need no gradient and DDP sees each parameter once.

    Args:
        model: the base model.
        layers: its layers that can be switched.
        plan: from `choose`.
        wish: the recipe's `train.gradient_checkpointing`.
        draws: whether a forward pass draws random numbers; else their state need not be saved for each layer.

    Raises:
        ModelError: when it was asked for and the model does not support it.
    """
    if plan.offload:
        offload.weights_to_host(model)
    whole = not layers and wish != "none" and (wish != "auto" or plan.short)
    if not (plan.again or whole):
        return plan
    try:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": draws}
        )
    except ValueError:  # what transformers raises for that
        if wish == "auto":
            return replace(plan, note="this model has no gradient checkpointing: all activations stay in memory")
        hint = "use `none`, and a smaller train.micro_batch_size or data.max_length"
        message = f"`train.gradient_checkpointing: {wish}`: this model has no gradient checkpointing"
        raise ModelError(message, hint) from None
    for layer in layers[plan.again :]:
        layer.gradient_checkpointing = False
    if plan.offload:
        offload.inputs_to_host(layers[: plan.again])
    if not whole:
        return plan
    return replace(plan, note="this model has gradient checkpointing for all layers or none: used for all")
