"""Values of the reference model for each sample, such as DPO's reference log p; computed once, before step 1.

They are kept in the run folder, as a resumed run no longer has the model before step 1, and in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from loratune.data import batches, prefix_sharing
from loratune.data.collate import collate
from loratune.data.dataset import Rows
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample
from loratune.errors import Place, Problem, RunFolderError
from loratune.events import Progress
from loratune.models.policy import Policy
from loratune.objectives.compared import Compared
from loratune.system.run_files import REFERENCE
from loratune.training import reference_model, reference_store
from loratune.training.job import Job
from loratune.training.reference_model import Named
from loratune.training.reference_store import Values

BLOCK = 1024  # samples that are searched for common prefixes at once
START = "the model before step 1"


def take(job: Job, resumed: bool) -> None:
    """Add to the samples, trained and held out, the values that the objective needs of the reference.

    Raises:
        RunFolderError: when a run is resumed, its file with them is missing or of other rows, and the method can't
            restore the model before step 1.
        ModelError: when a reference that the recipe names can't be loaded.
    """
    objective = job.recipe.objective
    if not objective.values:
        return
    if isinstance(objective, Compared) and objective.is_live:
        job.report.field("note", "the reference is computed at each step with the adapter off: one more forward pass")
        return
    asked = objective.named if isinstance(objective, Compared) else None
    other = None if asked is None else reference_model.named(job.recipe, asked, job.base.loaded)
    sets = {"train": job.data.train, **({"eval": job.data.held_out} if job.data.held_out else {})}
    file, key = job.folder / REFERENCE, reference_store.run_key(job)
    found = reference_store.read(file, key, sets) if resumed else None
    if found is None:
        found = _of_run(job, other, sets, resumed)
        if job.first:
            reference_store.write(file, key, found)
    train, held_out = job.data.train, job.data.held_out
    held = None if held_out is None else replace(held_out, values=found["eval"])
    job.data = replace(job.data, train=replace(train, values=found["train"]), held_out=held)


def _of_run(job: Job, other: Named | None, sets: dict[str, Rows], resumed: bool) -> Values:
    """Return the values from the cache, or compute them and add them to it."""
    shared = other is None and job.packing.layout == "shared"
    layout: Layout = "shared" if shared else "padded"
    who = START if other is None else f"the reference {other.shown}"
    key = reference_store.cache_key(job, sets, layout)
    found = reference_store.find(key, sets) if job.first else None
    if job.accelerator.num_processes > 1:
        (found,) = broadcast_object_list([found])
    if found is not None:
        job.report.field("note", f"log p of {who}: from the cache")
        return found
    if resumed and other is None and not job.tuned.off_is_start:
        told = "the reference's log probabilities are missing, or of other rows or another base"
        hint = "start over with --overwrite: this method can't restore that model"
        raise RunFolderError(Problem(told, Place(str(job.folder / REFERENCE)), hint))
    found = _computed(job, other, sets, resumed, layout, who)
    if other is not None:
        reference_model.free()
    if job.first and (reason := reference_store.keep(key, found)):
        job.report.problem(f"log p of {who} is not cached for the next run: {reason}")
    return found


def _computed(
    job: Job, other: Named | None, sets: dict[str, Rows], resumed: bool, layout: Layout, who: str
) -> Values:  # fmt: skip
    """Compute the values; on return nothing refers to a reference of its own any more."""
    if other is None:
        policy = job.tuned.policy()
        before = policy.reference() if resumed else nullcontext(policy)
    else:
        trust = job.facts.start.trust_remote_code
        before = reference_model.opened(other, list(sets.values()), job.accelerator.device, trust, job.report)
    with before as model, job.report.counting(f"log p of {who}") as counting:
        return _of_all(job, model, sets, layout, counting)


def _of_all(job: Job, policy: Policy, sets: dict[str, Rows], layout: Layout, counting: Progress) -> Values:
    """Return the values of each sample of each set; what is told counts through all of them."""
    whole, done = sum(rows.samples for rows in sets.values()), 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        counting(done, done / whole)

    return {name: _of(job, policy, rows, layout, more) for name, rows in sets.items()}


def _of(
    job: Job, policy: Policy, rows: Rows, layout: Layout, more: Callable[[int], None]
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return the values of each sample of a set, (samples,) each; every process computes its share of the samples.

    `more` is called with the number of samples after each micro-batch.
    """
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    training = policy.net.training
    mine: list[tuple[list[int], dict[str, list[float]]]] = []
    policy.net.eval()
    try:
        with torch.no_grad(), job.accelerator.autocast():
            for index, (numbers, samples) in enumerate(_parts(rows, layout, job.memory.plan.tokens)):
                if index % world == rank:
                    batch = collate(samples, layout, policy.virtual_tokens).to(job.accelerator.device)
                    given = job.recipe.objective.once(policy, batch)
                    mine.append((numbers, {name: value.tolist() for name, value in given.items()}))
                more(len(numbers))
    finally:
        policy.net.train(training)
    found = {name: np.empty(rows.samples, dtype=np.float32) for name in job.recipe.objective.values}
    for numbers, given in gather_object(mine):
        for name, values in given.items():
            found[name][numbers] = values
    return found


def _parts(rows: Rows, layout: Layout, tokens: int) -> Iterator[tuple[list[int], list[Sample]]]:
    """Yield all samples in micro-batches, with their indices; with prefix sharing, grouped by common prefix."""
    order = np.argsort(-rows.sizes, kind="stable")
    for begin in range(0, rows.samples, BLOCK):
        chosen = [rows.sample(int(i)) for i in order[begin : begin + BLOCK]]
        number = {id(sample): int(i) for sample, i in zip(chosen, order[begin:], strict=False)}
        cut = prefix_sharing.cut(chosen, tokens) if layout == "shared" else batches.split(chosen, "auto", tokens)
        for part in cut:
            yield [number[id(sample)] for sample in part], part
