"""The states that a head reads, computed once before step 1 where everything below the head is frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from loratune.console import size
from loratune.data.batches import in_length_order
from loratune.data.collate import collate
from loratune.data.dataset import Rows
from loratune.training import memory_use
from loratune.training.job import Job

SHARE = 0.25  # of the free main memory that they may take


def take(job: Job) -> None:
    """Give the rows, trained and held out, the states of their last tokens, float32, (rows, width).

    With several processes they are computed in each step: their gradients are averaged in the model's forward pass.
    """
    if not job.recipe.method.frozen or job.accelerator.num_processes > 1:
        return
    sets = [rows for rows in (job.data.train, job.data.held_out) if rows is not None]
    width = job.net.get_output_embeddings().weight.shape[-1]
    needed = 4 * width * sum(map(len, sets))
    free = memory_use.free_memory(torch.device("cpu"))
    if free is not None and needed > SHARE * free:
        job.report.note(f"the states that the head reads would take {size(needed)}: computed in each step")
        return
    whole, done = sum(rows.samples for rows in sets), 0
    with job.report.counting("states that the head reads") as counting:

        def more(count: int) -> None:
            nonlocal done
            done += count
            counting(done, done / whole)

        made = [replace(rows, states=_of(job, rows, width, more)) for rows in sets]
    job.data = replace(job.data, train=made[0], held_out=made[1] if len(made) > 1 else None)


def _of(job: Job, rows: Rows, width: int, more: Callable[[int], None]) -> np.ndarray:
    """Return the states of each row of a set, float32, (rows, width); `more` gets the samples of each micro-batch."""
    policy = job.tuned.policy()
    order = np.argsort(-rows.sizes, kind="stable")
    found = np.empty((rows.samples, rows.per_sample, width), dtype=np.float32)
    done, training = 0, policy.net.training
    policy.net.eval()
    try:
        with torch.no_grad(), job.accelerator.autocast():
            for part in in_length_order(rows, "auto", job.memory.plan.tokens):
                states = policy.last_states(collate(part).to(job.accelerator.device))
                numbers = order[done : done + len(part)]
                found[numbers] = states.float().cpu().numpy().reshape(len(part), rows.per_sample, width)
                done += len(part)
                more(len(part))
    finally:
        policy.net.train(training)
    return found.reshape(len(rows), width)
