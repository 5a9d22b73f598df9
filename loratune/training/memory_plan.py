"""How much of what a forward pass keeps is computed a second time instead, and how many tokens go through it at once.

The first layers are the ones that are computed again: when the way back reaches them, what the last ones kept is gone
already. Which layers that are changes no bit of the result: dropout draws the same numbers again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratune.console import size
from loratune.data import batches
from loratune.data.dataset import Rows
from loratune.errors import ModelError
from loratune.recipe import Recipe
from loratune.training.activation_memory import Cost
from loratune.training.layout_test import Packing

# tokens of a micro-batch of `auto`, best first: more keep a GPU busy, less than the last are slow
BUDGETS = {"cpu": (4096, 2048, 1024), "cuda": (16384, 8192, 4096, 2048)}
USABLE = 0.9  # part (0-1) of the free memory that is planned with
LIGHTER = 0.75  # part (0-1) of a plan's memory that is tried where the plan did not fit


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
        what = "activations"
        if self.again:
            part = f"{self.again} of {self.layers}" if self.again < self.layers else f"all {self.layers}"
            what = f"gradient checkpointing on {part} layers, activations"
        free = f", {size(self.free)} free" if self.free is not None else ""
        free += ": it may not fit" if self.short else ""
        return f"{what}: about {size(self.needed)} for a micro-batch of {self.largest:,} tokens{free}"


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
        fixed: bytes that are not there yet and don't grow with the tokens: see `memory_use.fixed_bytes`.
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
    plans = _plans(recipe, cost, rows, packing, device, free, world, begun)
    for plan in plans:
        if usable is None or plan.needed <= usable:
            return plan
    return replace(plan, short=True)


def lighter(
    recipe: Recipe, cost: Cost, rows: Rows, packing: Packing, device: str, plan: Plan,
    world: int = 1, begun: Mapping[str, int] | None = None,
) -> Plan | None:  # fmt: skip
    """Return the next plan that takes clearly less memory than `plan`, which did not fit; None where there is none.

    The other arguments are those of `choose`.
    """
    plans = _plans(recipe, cost, rows, packing, device, plan.free, world, begun)
    less = [other for other in plans if other.needed < plan.needed]
    return next((other for other in less if other.needed <= LIGHTER * plan.needed), less[-1] if less else None)


def _plans(
    recipe: Recipe, cost: Cost, rows: Rows, packing: Packing, device: str, free: int | None, world: int,
    begun: Mapping[str, int] | None,
) -> Iterator[Plan]:  # fmt: skip
    """Yield what a recipe leaves to choose from, best first; the arguments are those of `choose`."""
    settings, layers = recipe.train, len(cost.layers)
    wish = settings.gradient_checkpointing
    capacity = rows.per_sample * recipe.data.max_length if packing.packed else None
    alone = packing.by == "mask"  # then one pack is a micro-batch
    budgets = (begun["tokens"],) if begun else BUDGETS[device]
    if settings.micro_batch_size != "auto":
        budgets = budgets[:1]
    if wish == "auto":
        least = min(begun["again"], layers) if begun else 0
        wishes = [(budget, least) for budget in budgets] + [(budgets[-1], k) for k in range(least + 1, layers + 1)]
    else:
        again = wish if isinstance(wish, int) else layers if wish == "all" else 0
        wishes = [(budget, min(again, layers)) for budget in budgets]
    for budget, again in wishes:
        micro = 1 if alone and settings.micro_batch_size == "auto" else settings.micro_batch_size
        largest = batches.largest(rows.sizes, rows.sample_weights, settings.batch_size, micro, budget, capacity, world)
        if cost.virtual_tokens:  # the shortest rows are the most of them
            largest += cost.virtual_tokens * rows.per_sample * -(-largest // int(rows.sizes.min()))
        yield Plan(layers, again, budget, largest, int(cost.at_once(largest, again)), free)


def switch(model: Any, layers: list[Any], plan: Plan, wish: str | int, draws: bool = True) -> Plan:
    """Have the first layers computed a second time as planned; return the plan with what a person must know.

    A model whose layers can't be switched one by one is switched as a whole, where that was asked for or memory is
    short. Non-reentrant, so that inputs need no gradient and DDP sees each parameter once.

    Args:
        model: the base model.
        layers: its layers that can be switched.
        plan: from `choose`.
        wish: the recipe's.
        draws: whether a forward pass draws random numbers; else their state need not be kept for each layer.

    Raises:
        ModelError: when it was asked for and the model has nothing of the kind.
    """
    whole = not layers and wish != "none" and (wish != "auto" or plan.short)
    if not (plan.again or whole):
        return plan
    try:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": draws}
        )
    except ValueError:  # transformers' word for it
        if wish == "auto":
            return replace(plan, note="this model has no gradient checkpointing: all activations stay in memory")
        hint = "use `none`, and a smaller train.micro_batch_size or data.max_length"
        message = f"`train.gradient_checkpointing: {wish}`: this model has no gradient checkpointing"
        raise ModelError(message, hint) from None
    for layer in layers[plan.again :]:
        layer.gradient_checkpointing = False
    if not whole:
        return plan
    return replace(plan, note="this model has gradient checkpointing for all layers or none: for all")
