"""The run folder of a training: locked, opened, resumed, saved to. What is trained, and how, is decided elsewhere."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed

from loratune.errors import Place, Problem, RunFolderError
from loratune.events import Report
from loratune.kernels.layer_kinds import name_of
from loratune.models import base_files, base_model, config_files, end_tokens, fingerprint, model_folder, tokenizer_files
from loratune.runs import changes, checkpoint, lock, training_state
from loratune.runs.checkpoint import Found, Progress
from loratune.runs.training_state import Randomness
from loratune.system import storage  # fmt: skip
from loratune.training import memory_plan, memory_use, start_report
from loratune.training.job import Job
from loratune.training.memory_plan import Plan


@contextmanager
def alone(folder: Path, first: bool, report: Report) -> Iterator[None]:
    """Hold the run folder's lock, taken before anything slow is read; the first process holds it for all."""
    if not first:
        yield
        return
    with lock.held(folder) as before:
        if before:
            report.problem(before)
        yield


def find(folder: Path, resume: bool, overwrite: bool, accelerator: Accelerator, report: Report) -> Found | None:
    """Return the checkpoint to resume from, the same one on every process."""
    found = None
    if accelerator.is_main_process:
        checkpoint.check_free(folder, resume, overwrite)
        found = checkpoint.newest(folder) if resume else None
        for line in found.bad if found else ():
            report.problem(line)
        if resume and checkpoint.status(folder) == "running":
            report.note("the previous run was killed")
    if accelerator.num_processes > 1:
        (found,) = broadcast_object_list([found])
    return found


def start(job: Job, resume: bool) -> Progress:
    """Begin at the first step."""
    set_seed(job.recipe.train.seed, device_specific=True)
    if resume:
        job.report.note("no checkpoint to resume from: starting at step 1")
    return Progress(0)


def resume(job: Job, found: Found, allow_drift: bool, allow_base_mismatch: bool) -> Progress:
    """Restore everything from a checkpoint; return the run's progress."""
    base = fingerprint.compare(found.folder, job.recipe.model, allow_base_mismatch, job.tokenizer)
    for line in base.notes:
        job.report.problem(line)
    if base.differences:
        job.facts.base_differs = list(base.differences)
    changed = changes.of_run(found.seal, job.recipe, job.facts, found.finished)
    changes.check(job.folder, found, changed, allow_drift, job.facts, job.report)
    progress = found.progress
    try:
        job.tuned.load(found.folder)
        checkpoint.restore(found.folder, job.optimizer, job.accelerator.scaler, job.accelerator.process_index)
    except (RuntimeError, ValueError, KeyError) as error:
        if base_model.is_out_of_memory(error):
            raise
        what = str(error).splitlines()[0]
        hint = "resume with the recipe it was started with (recipe.yaml there), or --overwrite it"
        where = Place(str(job.folder))
        raise RunFolderError(Problem(f"{found.folder.name} does not fit this recipe: {what}", where, hint)) from None
    left = job.length.steps - progress.step
    job.report.note(f"resuming after step {progress.step}" + ("" if left > 0 else ": nothing left to train"))
    return progress


def open_folder(job: Job, progress: Progress, resume: bool) -> None:
    """Write this run's files into the run folder: run.json, recipe.yaml, the ledger, and the metrics so far."""
    if job.first:
        for line in checkpoint.make_run(job.folder, job.facts, resume):
            job.report.problem(line)
        if resume:
            job.report.go_on_from(progress.step, evaluated=not progress.pending)
        storage.write_text(job.folder / "recipe.yaml", job.recipe.dump())
        for rows in (job.data.train, *([job.data.held_out] if job.recipe.data.eval and job.data.held_out else [])):
            rows.append_ledger(job.folder / "ledger.jsonl")
    elif resume:
        job.report.go_on_from(progress.step, evaluated=not progress.pending)
    job.accelerator.wait_for_everyone()


def lighter(job: Job, resumed: bool) -> Plan | None:
    """Return a plan for a run that ran out of memory with its own; the micro-batches of a resumed run stay."""
    plan = job.memory.plan
    begun = {"tokens": plan.tokens, "again": plan.again, "offload": plan.offload} if resumed else None
    movable = memory_use.movable_bytes(job.base.loaded)
    device, world = job.accelerator.device.type, job.accelerator.num_processes
    return memory_plan.lighter(
        job.recipe, job.memory.cost, job.data.train, job.packing, device, plan, world, begun, movable
    )


def take(job: Job, plan: Plan) -> None:
    """Use a lighter plan after one ran out of memory: nothing remains of the first try but the random numbers drawn."""
    job.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()
    job.report.problem(f"out of memory: retrying with {plan.told()}")
    wish, known = job.recipe.train.gradient_checkpointing, job.memory
    switched = memory_plan.switch(job.base.loaded.model, known.layers, plan, wish, known.cost.draws)
    job.memory = replace(known, plan=switched)
    memory = memory_use.measure(job.recipe, job.base.loaded, job.net, job.data.train, job.memory.cost, plan)
    job.facts.setup = replace(job.facts.prepared, memory=memory, activations=plan.as_json())


def save(job: Job, progress: Progress, random: Randomness) -> Progress:
    """Commit a checkpoint; every process gives its random state, the first one writes. Return the saved progress."""
    everybody = gather_object([random.as_json()])

    def write(folder: Path) -> None:
        job.tuned.save(folder)
        write_origin(job, folder)
        if job.recipe.method.output == "model" and not job.recipe.method.frozen:
            config_files.write_config(
                folder, base_files.folder_of(job.recipe.model), job.net.config, name_of(job.net.dtype)
            )

    if job.first:
        training_state.check_finite(dict(trainable(job.net)), f"step {progress.step}: a trained tensor")
        hint = "earlier checkpoints are intact: free some space, then --resume"
        storage.check_space(job.folder, job.checkpoint_bytes, f"the checkpoint of step {progress.step}", hint)
        job.checkpoint_bytes = checkpoint.save(
            job.folder, progress, write, job.optimizer,
            job.accelerator.scaler, everybody, about(job),
        )  # fmt: skip
        for line in checkpoint.rotate(job.folder, job.recipe.train.keep, progress):
            job.report.problem(line)
    job.accelerator.wait_for_everyone()
    return progress


def write_origin(job: Job, folder: Path) -> None:
    """Write beside an adapter or model its base's fingerprint and its end-of-turn tokens."""
    fingerprint.write(folder, job.base.origin)
    end_tokens.write_config(folder, base_files.folder_of(job.recipe.model), job.base.ends)


def write_readable(job: Job, folder: Path) -> None:
    """Write the tokenizer, and other files that other programs expect beside the weights."""
    base, padding = base_files.folder_of(job.recipe.model), job.recipe.objective.pooled
    if job.recipe.method.output == "model":
        trust = job.facts.start.trust_remote_code
        dtype = name_of(job.base.loaded.dtype)
        model_folder.complete(folder, base, job.net.config, dtype, job.tokenizer, trust=trust, padding=padding)
    else:
        tokenizer_files.write(folder, base, job.tokenizer, alone=True, padding=padding)


def check_code(job: Job) -> None:
    """Check that the base's own code files, which are copied with a full model, overwrite nothing in the run folder.

    Raises:
        RunFolderError: when the folder has a file of such a name that no run wrote.
    """
    if job.first and job.recipe.method.output == "model" and job.facts.start.trust_remote_code:
        checkpoint.check_foreign(job.folder, model_folder.code(base_files.folder_of(job.recipe.model)))


def check_space(job: Job, resume: bool) -> None:
    """Check that the disk will hold the checkpoints that are kept, the one being written and the final files."""
    if not job.first:
        return
    settings = job.recipe.train
    saves = -(-job.length.steps // in_steps(settings.save_every, job.length.per_epoch))
    kept = min(saves, settings.keep) + (1 if job.data.held_out else 0)  # the best checkpoint
    final = 2 * job.facts.prepared.adapter_bytes_predicted
    there = storage.size(job.folder / "checkpoints") if resume else 0
    needed = max(job.checkpoint_bytes, (kept + 1) * job.checkpoint_bytes + final - there)
    what = f"{kept} checkpoints, one more while it is written, and the {start_report.product(job.recipe)}"
    hint = "free some space, lower train.keep, or give another `output`"
    storage.check_space(job.folder, needed, what, hint)


def about(job: Job) -> dict[str, Any]:
    """Return the part of a manifest that describes the run."""
    setup = job.facts.prepared
    return {
        "recipe": job.recipe.hash(), "settings": job.recipe.model_dump(mode="json"), "drift": job.facts.drift or [],
        "fingerprints": setup.fingerprints, "sources": setup.sources, "steps": setup.steps,
        "processes": job.facts.start.processes, "versions": job.facts.start.versions,
        "activations": setup.activations, "compiled": setup.compiled, "kernels": setup.kernels,
        "dtype": setup.dtype,
    }  # fmt: skip


def trainable(net: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield name and parameter of everything that is trained."""
    return ((name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad)


def in_steps(cadence: int | float, per_epoch: int) -> int:
    """Return an interval in steps: an integer is steps already, a fraction is a part of an epoch."""
    return cadence if isinstance(cadence, int) else max(1, round(cadence * per_epoch))
