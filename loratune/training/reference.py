"""Values of the model before step 1 for each sample, such as DPO's reference log p; computed once.

They are kept in the run folder, as a resumed run no longer has that model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from loratune.data import batches, prefix_sharing
from loratune.data.collate import collate
from loratune.data.dataset import Rows
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample
from loratune.errors import Place, Problem, RunFolderError
from loratune.events import Progress
from loratune.models.policy import Policy
from loratune.system import storage
from loratune.system.run_files import REFERENCE
from loratune.training.job import Job

BLOCK = 1024  # samples that are searched for common prefixes at once


def take(job: Job, resumed: bool) -> None:
    """Add to the samples, trained and held out, the values that the objective needs of the model before step 1.

    Raises:
        RunFolderError: when a run is resumed, its file with them is missing or of other rows, and the method can't
            restore the model before step 1.
    """
    if not job.recipe.objective.values:
        return
    file, key = job.folder / REFERENCE, _key(job)
    sets = {"train": job.data.train, **({"eval": job.data.held_out} if job.data.held_out else {})}
    found = _read(file, key, sets) if resumed else None
    if found is None:
        policy = job.tuned.policy()
        if resumed and not job.tuned.off_is_start:
            told = "the reference's log probabilities are missing, or of other rows or another base"
            hint = "start over with --overwrite: this method can't restore that model"
            raise RunFolderError(Problem(told, Place(str(file)), hint))
        told = "log p of the model before step 1"
        before = policy.reference() if resumed else nullcontext(policy)
        with job.report.counting(told) as counting, before as start:
            found = _of_all(job, start, sets, counting)
        if job.first:
            known = {name: {value: array.tolist() for value, array in of.items()} for name, of in found.items()}
            storage.write_json(file, {"key": key, "sha256": storage.json_sha256(known), **known})
    train, held_out = job.data.train, job.data.held_out
    held = None if held_out is None else replace(held_out, values=found["eval"])
    job.data = replace(job.data, train=replace(train, values=found["train"]), held_out=held)


def _of_all(job: Job, policy: Policy, sets: dict[str, Rows], counting: Progress) -> dict[str, dict[str, np.ndarray]]:
    """Return the values of each sample of each set; what is told counts through all of them."""
    whole, done = sum(rows.samples for rows in sets.values()), 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        counting(done, done / whole)

    return {name: _of(job, policy, rows, more) for name, rows in sets.items()}


def _of(job: Job, policy: Policy, rows: Rows, more: Callable[[int], None]) -> dict[str, np.ndarray]:
    """Return the values of each sample of a set, (samples,) each; every process computes its share of the samples.

    `more` is called with the number of samples after each micro-batch.
    """
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    layout: Layout = "shared" if job.packing.layout == "shared" else "padded"
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


def _key(job: Job) -> str:
    """Return a hash (hex) of everything that these values depend on."""
    setup, recipe = job.facts.prepared, job.recipe
    parts = {
        "rows": setup.fingerprints, "dtype": setup.dtype, "quantization": setup.quantization,
        "method": recipe.method.model_dump(mode="json"), "objective": recipe.objective.type,
        "seed": recipe.train.seed,
    }  # fmt: skip
    return storage.json_sha256(parts)


def _read(file: Path, key: str, sets: dict[str, Rows]) -> dict[str, dict[str, np.ndarray]] | None:
    """Return the values in a run folder, or None where there are none for these rows."""
    known = storage.read_json(file)
    if known.pop("key", None) != key or known.pop("sha256", None) != storage.json_sha256(known):
        return None
    return {
        name: {value: np.array(numbers, dtype=np.float32) for value, numbers in known[name].items()} for name in sets
    }
