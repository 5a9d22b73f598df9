"""The order of samples and their batches: pure functions of the data, the seed and the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from loratune.data import prefix_sharing
from loratune.data.bin_packing import pack
from loratune.data.dataset import Rows
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample

WINDOW = 16  # batches per window in which rows are sorted by length
LOOKED_AT = 512  # samples from which the savings of prefix sharing are estimated
AUTO_TOKENS = {"cpu": 4096, "cuda": 16384}  # tokens of a micro-batch with `auto`, without training


def samples_per_epoch(weights: np.ndarray) -> int:
    """Return the number of samples of one epoch, each counted by its weight."""
    return sum(_shown(weight, count) for weight, count in zip(*np.unique(weights, return_counts=True), strict=True))


def _shown(weight: float, count: int) -> int:
    """Return how many of `count` rows with a weight an epoch has in total: at least one, however small the weight."""
    return max(1, int(weight * count + 0.5))


def epoch_order(lengths: np.ndarray, weights: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of one epoch: a pure function of the data, the seed and the epoch.

    Rows are shuffled, then sorted by length within windows of 16 batches, so that a batch has little padding; then the
    batches are shuffled. With a weight of 2.5 each row occurs twice, and every other row of its source a third time.

    Args:
        lengths: of each sample in tokens, shape (samples,).
        weights: how often each sample is seen per epoch, shape (samples,).
        batch_size: samples per batch; the last may be smaller.
        seed: of the recipe.
        epoch: number of the epoch, from 0.

    Returns:
        Indices of the samples of each batch, longest first.
    """
    random = np.random.default_rng([seed, epoch])
    drawn = []
    for weight in np.unique(weights):
        members = np.flatnonzero(weights == weight)
        whole, rest = divmod(_shown(weight, len(members)), len(members))
        drawn += [members] * whole + [random.permutation(members)[:rest]]
    order = random.permutation(np.concatenate(drawn))
    window = WINDOW * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        batches += [part[cut : cut + batch_size] for cut in range(0, len(part), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


@dataclass(frozen=True)
class Batch:
    """The samples of one step, cut into micro-batches.

    Attributes:
        micro: samples of each micro-batch of this process, longest first.
        epoch: epochs done after this step, with fraction.
        samples: their number over all processes.
        layout: padded, packed, or packed with prefix sharing.
        read: returns the samples of all processes; None where they are those of `micro`.
    """

    micro: list[list[Sample]]
    epoch: float
    samples: int
    layout: Layout = "padded"
    read: Callable[[], list[Sample]] | None = None

    def whole(self) -> list[Sample]:
        """Return the samples of all processes, in an order that does not depend on their number."""
        return self.read() if self.read else [sample for part in self.micro for sample in part]


def batches(
    data: Rows,
    batch_size: int,
    micro_batch_size: int | str,
    seed: int,
    steps: int,
    start: int = 0,
    budget: int = AUTO_TOKENS["cpu"],
    rank: int = 0,
    world: int = 1,
    capacity: int = 0,
    layout: Layout = "padded",
) -> Iterator[Batch]:
    """Yield the batches of a run from step `start` (from 0) to step `steps`.

    The batches don't depend on `micro_batch_size`, `rank`, `world`, `capacity` or `layout`: each process gets its part
    of the same samples. A pack has at most `capacity` tokens; with packing a micro-batch consists of packs. `budget` is
    the number of tokens, padding included, of a micro-batch with `auto`.
    """
    per_epoch = -(-samples_per_epoch(data.sample_weights) // batch_size)
    epoch, order = -1, []
    for step in range(start, steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = epoch_order(data.sizes, data.sample_weights, batch_size, seed, epoch)
        chosen = order[step % per_epoch]
        mine = [data.sample(int(i)) for i in chosen[rank::world]]
        if not mine:  # fewer samples than processes: this one gets a padding sample without label tokens
            first = data.sample(int(chosen[0]))
            idle = tuple(replace(row, trained=np.zeros_like(row.trained), pooled=False) for row in first.rows)
            mine = [Sample(idle, first.values)]
        if layout == "padded":
            micro = split(mine, micro_batch_size, budget)
        elif layout == "packed":
            micro = split_packed(mine, capacity, micro_batch_size, budget)
        else:
            micro = prefix_sharing.cut(
                mine, budget if isinstance(micro_batch_size, str) else micro_batch_size * capacity
            )
        yield Batch(micro, (step + 1) / per_epoch, len(chosen), layout, partial(_all, data, chosen))


def _all(data: Rows, chosen: np.ndarray) -> list[Sample]:
    return [data.sample(int(i)) for i in chosen]


def split(chosen: list[Sample], micro_batch_size: int | str, tokens: int) -> list[list[Sample]]:
    """Cut samples (longest first) into micro-batches of a size, or for `auto` of `tokens` tokens with padding."""
    if isinstance(micro_batch_size, int):
        return [chosen[cut : cut + micro_batch_size] for cut in range(0, len(chosen), micro_batch_size)]
    parts: list[list[Sample]] = []
    while chosen:
        fits = max(1, tokens // chosen[0].padded)
        parts.append(chosen[:fits])
        chosen = chosen[fits:]
    return parts


def split_packed(chosen: list[Sample], capacity: int, micro_batch_size: int | str, tokens: int) -> list[list[Sample]]:
    """Pack samples and cut the packs into micro-batches of a number of packs, or for `auto` of `tokens` tokens.

    Returns:
        The samples of each micro-batch, pack by pack.
    """
    lengths = np.array([sample.tokens for sample in chosen])
    parts: list[list[Sample]] = []
    total = int(lengths.sum())
    even = total / -(-total // max(tokens, 1))  # parts of similar size: their peak is lower than with a small last one
    packs = filled = 0  # of the last part
    for members in pack(lengths, capacity):
        size = int(lengths[members].sum())
        if isinstance(micro_batch_size, int):
            full = packs == micro_batch_size
        else:
            full = filled + size > tokens or filled + size / 2 > even
        if full or not parts:
            parts.append([])
            packs = filled = 0
        parts[-1] += [chosen[i] for i in members]
        packs, filled = packs + 1, filled + size
    return parts


def filling(
    data: Rows, batch_size: int, seed: int, capacity: int, rank: int = 0, world: int = 1
) -> tuple[float, float]:
    """Return the mean number of samples of a pack and how full it is (0-1), over the first 256 steps."""
    rows = tokens = packs = 0
    each = data.lengths.reshape(-1, data.per_sample).sum(axis=1)
    for chosen in epoch_order(data.sizes, data.sample_weights, batch_size, seed, 0)[:256]:
        lengths = each[chosen[rank::world]]
        rows, tokens, packs = rows + len(lengths), tokens + int(lengths.sum()), packs + len(pack(lengths, capacity))
    return rows / packs, tokens / packs / capacity


def saved(
    data: Rows, batch_size: int, micro_batch_size: int | str, seed: int, budget: int, capacity: int, world: int = 1
) -> float:
    """Return the mean fraction (0-1) of a step's tokens that prefix sharing saves.

    It is estimated from the first steps of one process, up to a few hundred samples; the other arguments are those of
    `batches`.
    """
    steps = -(-LOOKED_AT // batch_size)
    tokens = computed = 0
    for batch in batches(data, batch_size, micro_batch_size, seed, steps, 0, budget, 0, world, capacity, "shared"):
        for part in batch.micro:
            tokens += sum(sample.tokens for sample in part)
            computed += prefix_sharing.computed([row for sample in part for row in sample.rows])
    return 1 - computed / tokens


def largest(
    lengths: np.ndarray, weights: np.ndarray, batch_size: int, micro_batch_size: int | str, budget: int,
    capacity: int | None = None, world: int = 1,
) -> int:  # fmt: skip
    """Return the most tokens, padding included, that a micro-batch of these rows can have on one process.

    The longest rows may be in the same step, so the maximum counts, not an average.

    Args:
        lengths: of each sample in tokens, its rows padded to the longest; shape (samples,).
        weights: how often each sample is seen per epoch, shape (samples,).
        batch_size: samples per step over all processes.
        micro_batch_size: samples, or packs where packed, or `auto`.
        budget: tokens of a micro-batch with `auto`.
        capacity: tokens of a pack; None without packing.
        world: number of processes.
    """
    each = -(-batch_size // world)
    known = np.sort(lengths)[-each:]
    shown = np.sort(np.repeat(known, int(np.ceil(weights.max()))))[-each:]
    longest, together = int(shown[-1]), int(shown.sum())
    unit = longest if capacity is None else capacity
    if capacity is None:
        together = longest * len(shown)
    if isinstance(micro_batch_size, int):
        return min(micro_batch_size * unit, together)
    return min(max(budget, unit), together)


def in_length_order(data: Rows, micro_batch_size: int | str, budget: int) -> list[list[Sample]]:
    """Return all samples once, in micro-batches of samples of similar length (for `auto` of `budget` tokens)."""
    order = np.argsort(-data.sizes, kind="stable")
    return split([data.sample(int(i)) for i in order], micro_batch_size, budget)
