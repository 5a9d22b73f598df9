"""One training, from a recipe to a run folder; joins all other parts. Read `train` from top to bottom."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratune.data import batches
from loratune.errors import Interrupted, LoratuneError, Place, Problem, SetupError, StorageError, TrainingError
from loratune.events import Begun, Ended, Evaluated, Listener, Saved, Step
from loratune.kernels import gpu_kernels, torch_compile
from loratune.methods import other_programs
from loratune.models import base_model
from loratune.models.policy import Policy
from loratune.optim.schedules import rate, warmup_steps
from loratune.recipe import Recipe
from loratune.runs import changes, checkpoint, loss_plot, model_card, training_state
from loratune.runs.checkpoint import Progress
from loratune.runs.facts import End, Facts
from loratune.system import garbage, startup, storage  # fmt: skip
from loratune.training import (
    head_states,
    launcher,
    loop,
    memory_use,
    reference,
    session,
    setup,
    signals,
    start_report,
)
from loratune.training.job import Job
from loratune.training.progress import RunReport
from loratune.training.signals import Signals
from loratune.training.watcher import Watcher


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        folder: the run folder: the adapter (or model), its recipe, run.json, metrics.jsonl, loss.svg, README.md.
        steps: number of steps.
        train_loss: of the last step, in nats per label token (`dpo`: per pair).
        eval_loss: loss on held-out rows at the best evaluation, or None.
        seconds: spent in steps.
    """

    folder: Path
    steps: int
    train_loss: float
    eval_loss: float | None
    seconds: float


def train(
    recipe: Recipe, resume: bool = False, overwrite: bool = False, allow_drift: bool = False,
    allow_base_mismatch: bool = False, trust_remote_code: bool = False, on_event: Listener | None = None,
) -> Run:  # fmt: skip
    """Train as the recipe describes and fill its run folder.

    Args:
        recipe: from `load_recipe`.
        resume: resume from the newest valid checkpoint of the run folder.
        overwrite: start over in a run folder that holds a run.
        allow_drift: resume although recipe or rows have changed since the run began; recorded in run.json.
        allow_base_mismatch: resume on another base than the run began with; recorded in run.json.
        trust_remote_code: run code that comes with the base model; recorded in run.json.
        on_event: called with each event; None: lines go to Python's logging. An exception it raises ends the run and is
            raised here unchanged, after a checkpoint for `resume`. With several processes only the first calls it.

    Returns:
        The finished run.

    Raises:
        LoratuneError: any of its subclasses, each with its `exit_code`.
    """
    folder = Path(recipe.output)
    with startup.training(), gpu_kernels.for_now():
        accelerator = launcher.accelerator(recipe)
        first = accelerator.is_main_process
        report = RunReport(on_event, first, folder / "metrics.jsonl", Watcher(recipe.objective.watched))
        with report.unchanged(), signals.listening() as asked, session.alone(folder, first, report):
            for line in launcher.not_read(os.environ):
                report.problem(line)
            facts = Facts(start_report.start(recipe, accelerator, trust_remote_code))
            with _recorded(folder, facts, report) as begun, _in_words(recipe, facts, asked, report):
                found = session.find(folder, resume, overwrite, accelerator, report)
                if found:
                    facts.drift = found.seal["drift"]
                    changes.check(folder, found, changes.of_recipe(found.seal, recipe), allow_drift, facts, report)
                with garbage.seldom(), torch_compile.later():
                    job = setup.prepare(recipe, accelerator, report, facts, found)
                if found:
                    progress = session.resume(job, found, allow_drift, allow_base_mismatch)
                else:
                    progress = session.start(job, resume)
                session.check_code(job)
                session.check_space(job, resume)
                begun()  # from here on the run folder is this run's
                session.open_folder(job, progress, resume)
                reference.take(job, resumed=found is not None)
                head_states.take(job)
                run = _finish(job, _loop(job, progress, asked))
            report.tell(_ended(job, run))
    return run


@contextlib.contextmanager
def _recorded(folder: Path, facts: Facts, report: RunReport) -> Iterator[Callable[[], None]]:
    """Record in run.json how a run ended; write nothing unless the yielded function has been called."""
    status, begun = "failed", False

    def begin() -> None:
        nonlocal begun
        begun = True

    try:
        yield begin
        status = "complete"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        if report.active and begun:
            with contextlib.suppress(*([] if status == "complete" else [StorageError])):  # that is raised already
                storage.write_json(folder / "run.json", {**facts.as_json(), "status": status})


@contextlib.contextmanager
def _in_words(recipe: Recipe, facts: Facts, asked: Signals, report: RunReport) -> Iterator[None]:
    """Turn what ends a training into an error with a remedy.

    Raises:
        Interrupted: for a signal before the first step.
        SetupError: for memory that ran out.
        StorageError: for a file that can't be read or written.
    """
    try:
        yield
    except signals.Leave:
        report.hear_again()
        raise signals.interrupted(asked.number, 0) from None
    except (MemoryError, RuntimeError) as error:
        if not base_model.is_out_of_memory(error):
            raise
        raise SetupError(f"out of memory on {facts.start.device}", memory_use.advice(recipe, facts.setup)) from None
    except OSError as error:
        if error.filename is None or isinstance(error, ConnectionError):
            raise
        raise StorageError(Problem(f"{error.strerror}", Place(str(error.filename)))) from None


@dataclass
class _Course:
    """State of a training after its last complete step.

    Attributes:
        job: the training.
        progress: steps and evaluations done.
        random: states of the random number generators then.
        saved: progress of the last checkpoint.
    """

    job: Job
    progress: Progress
    random: training_state.Randomness
    saved: Progress

    def save(self) -> None:
        """Save a checkpoint and report it."""
        self.saved = session.save(self.job, self.progress, self.random)
        folder = checkpoint.path_of(self.job.folder, self.progress.step)
        self.job.report.tell(Saved(self.progress.step, folder))

    @contextlib.contextmanager
    def saved_first(self, asked: Signals) -> Iterator[None]:
        """Save the last complete step before a signal, or an exception of the listener, ends the training.

        The step in progress is abandoned, its random numbers too. With several processes nothing is saved for an error
        of the listener: the others wait in the next step.
        """
        try:
            yield
        except BaseException as error:
            by_signal, alone = isinstance(error, signals.Asked), self.job.accelerator.num_processes == 1
            if not by_signal and not (error is self.job.report.raised and alone):
                raise
            try:
                if self.saved != self.progress:
                    session.save(self.job, self.progress, self.random)
            except LoratuneError as failed:
                if by_signal:
                    raise
                error.add_note(f"the last complete step is not saved: {failed}")
            if not by_signal:
                raise
            raise signals.interrupted(asked.number, self.progress.step) from None


def _loop(job: Job, progress: Progress, asked: Signals) -> Progress:
    """Train step by step; evaluate, save and stop as the recipe says. Return the progress at the end."""
    recipe, settings, accelerator, report = job.recipe, job.recipe.train, job.accelerator, job.report
    steps = job.length.steps
    several = accelerator.num_processes > 1 or accelerator.mixed_precision != "no"
    policy = job.tuned.policy(accelerator.prepare_model(job.net, device_placement=False) if several else None)
    log_every, eval_every, save_every = (
        session.in_steps(cadence, job.length.per_epoch)
        for cadence in (settings.log_every, settings.eval_every, settings.save_every)
    )
    # several processes must stop at the same point, and only the end of a step is one
    poll = asked.poll if accelerator.num_processes == 1 else signals.never
    asked.training = True
    at = _Course(job, progress, training_state.randomness(), progress)
    with at.saved_first(asked):
        if progress.pending:
            at.progress = _evaluate(job, policy, progress, poll)[1]
            at.save()
        report.tell(_begun(job, at.progress, log_every))
        for step in _or_lighter(job, _steps(job, policy, at, poll), resumed=progress.step > 0):
            end, better = step.number == steps, False
            due = job.data.held_out is not None and (step.number % eval_every == 0 or end)
            at.progress = replace(at.progress, step=step.number, pending=due)
            try:
                report.step(step)
            finally:
                at.random = training_state.randomness()
            if due:
                better, at.progress = _evaluate(job, policy, at.progress, poll)
            stop, signalled = _out_of_patience(recipe, at.progress), signals.at_any(accelerator, asked)
            if step.number % save_every == 0 or better or end or stop or signalled:
                at.save()
            if signalled and not end:
                raise signals.interrupted(signalled, step.number)
            if stop:
                times = at.progress.evaluations_without_better
                moved = "risen" if _higher(job) else "fallen"
                what = settings.best_metric
                report.note(f"step {step.number}: the eval {what} has not {moved} for {times} evaluations: stopping")
                break
    return at.progress


def _steps(job: Job, policy: Policy, at: _Course, poll: Callable[[], None]) -> Callable[[], Iterator[Step]]:
    """Return a function that starts the steps of a training from its current progress and with its current plan."""
    recipe, settings, accelerator, steps = job.recipe, job.recipe.train, job.accelerator, job.length.steps
    optimizer = job.optimizer if accelerator.scaler is None else accelerator.prepare_optimizer(job.optimizer)
    schedule, warmup = settings.schedule, warmup_steps(settings.warmup, steps)

    def begin() -> Iterator[Step]:
        done = at.progress.step
        order = batches.batches(
            job.data.train, settings.batch_size, job.micro_batch_size, settings.seed,
            done if _out_of_patience(recipe, at.progress) else steps, done,
            job.memory.plan.tokens, accelerator.process_index, accelerator.num_processes,
            job.data.train.per_sample * recipe.data.max_length, job.packing.layout,
        )  # fmt: skip
        return loop.steps(
            policy, recipe.objective, job.tuned, order, optimizer, lambda n: rate(schedule, n, steps, warmup),
            accelerator, settings.max_grad_norm, done, poll,
        )  # fmt: skip

    return begin


def _or_lighter(job: Job, begin: Callable[[], Iterator[Step]], resumed: bool) -> Iterator[Step]:
    """Yield the steps of a training; where memory runs out in the first, start again with a lighter plan."""
    random, plan, steps = training_state.randomness(), None, begin()
    try:
        yield from itertools.islice(steps, 1)
    except loop.OutOfMemory:
        if job.accelerator.num_processes == 1:  # several would have to agree: the others wait for gradients
            plan = session.lighter(job, resumed)
        if plan is None:
            raise
    if plan is not None:  # outside of `except`, as the error keeps references to tensors
        session.take(job, plan)
        training_state.set_random_state(random.as_json())
        steps = begin()
    yield from steps


def _finish(job: Job, progress: Progress) -> Run:
    """Write the adapter (or model) of the best step, tokenizer, loss curve and card into the run folder."""
    recipe, folder, report, facts = job.recipe, job.folder, job.report, job.facts
    kept = progress.step
    where = f"where the eval {recipe.train.best_metric} was {'highest' if _higher(job) else 'lowest'}"
    if progress.best_step is not None and progress.best_step != progress.step:
        best = checkpoint.path_of(folder, progress.best_step)
        if wrong := storage.verify(best, alone=True):
            report.problem(f"{best.name}, {where}, {wrong}: not used, the last step is saved")
        else:
            kept = progress.best_step
            job.tuned.load(best)
            report.note(f"the saved {start_report.product(recipe)} is that of step {kept}, {where}")
    evaluated = _best_evaluation(job, progress)
    best_loss = evaluated["figures"]["loss"]["value"] if evaluated else None
    last_loss = report.train[-1][1] if report.train else math.nan
    facts.end = end = End(
        step=progress.step, saved_step=kept, train_loss=last_loss,
        best_eval_loss=best_loss, seconds=report.seconds, tokens_per_second=report.tokens_per_second,
        best_evaluation=evaluated,
    )  # fmt: skip
    if job.first:

        def write(target: Path) -> None:
            job.tuned.save(target, job.base.loaded.dtype, final=True)
            session.write_origin(job, target)
            session.write_readable(job, target)

        training_state.check_finite(dict(session.trainable(job.net)), f"the {start_report.product(recipe)}")
        storage.publish(folder, write, {"step": kept, **session.about(job)})
        title = f"{folder.name}: {recipe.method.type} on {Path(recipe.model.base).name}"
        curve = loss_plot.loss_svg(report.train, report.evaluation, title, recipe.objective.unit)
        storage.write_text(folder / "loss.svg", curve)
        storage.write_text(folder / "README.md", model_card.write(recipe, facts))
        end.adapter_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for line in other_programs.notes(storage.read_json(folder / "adapter_config.json")):
            report.note(line)
    job.accelerator.wait_for_everyone()
    return Run(folder, progress.step, last_loss, best_loss, report.seconds)


def _higher(job: Job) -> bool:
    """Return whether a higher `train.best_metric` is better."""
    return job.recipe.objective.measures[job.recipe.train.best_metric].better == "higher"


def _begun(job: Job, progress: Progress, log_every: int) -> Begun:
    """Return the event that the steps begin."""
    metric, figures = job.recipe.train.best_metric, job.recipe.objective.figures
    best = None
    if progress.metric == metric and progress.best_step is not None and progress.best_value is not None:
        best = (progress.best_step, progress.best_value)
    shown = tuple(name for name, figure in figures.items() if figure.shown)
    return Begun(progress.step, job.length.steps, log_every, tuple(job.report.evaluation), shown, metric, best)


def _best_evaluation(job: Job, progress: Progress) -> dict[str, Any] | None:
    """Return the best evaluation for run.json: its loss and figures, with unit and direction."""
    step, objective = progress.best_step, job.recipe.objective
    if step is None:
        return None
    values = {"loss": dict(job.report.evaluation).get(step), **job.report.figures.get(step, {})}
    values[progress.metric] = progress.best_value  # also where metrics.jsonl was lost
    figures = {"loss": objective.measures["loss"], **objective.figures}
    told = {
        name: {"value": values[name], "unit": figure.unit, "better": figure.better}
        for name, figure in figures.items()
        if values.get(name) is not None
    }
    return {"step": step, "metric": progress.metric, "figures": told}


def _ended(job: Job, run: Run) -> Ended:
    size = (job.facts.end.adapter_bytes if job.facts.end else None) or 0
    speed, product = job.report.tokens_per_second, start_report.product(job.recipe)
    return Ended(run.folder, run.steps, run.seconds, speed, product, size)


def _evaluate(job: Job, policy: Policy, progress: Progress, poll: Callable[[], None]) -> tuple[bool, Progress]:
    """Measure the eval loss; return whether it is the best so far, and the updated progress.

    Raises:
        TrainingError: when loss or `train.best_metric` are not finite, or no held-out row has that figure.
    """
    assert job.data.held_out is not None
    began = time.perf_counter()
    parts = batches.in_length_order(job.data.held_out, job.recipe.train.micro_batch_size, job.memory.plan.tokens)
    when = f"step {progress.step}: "
    loss, count, means = loop.measure(policy, job.recipe.objective, parts, job.accelerator, when, poll)
    early = job.recipe.train.early_stopping
    metric = job.recipe.train.best_metric
    value = loss if metric == "loss" else means.get(metric, math.nan)
    if not math.isfinite(value):
        raise TrainingError(
            f"{when}the eval {metric} is {value}", "set train.best_metric: loss, or hold out other rows"
        )
    progress = progress.evaluated(value, early.min_delta if early else 0.0, metric, _higher(job))
    better = progress.best_step == progress.step
    job.report.tell(Evaluated(progress.step, loss, count, better, time.perf_counter() - began, means))
    return better, progress


def _out_of_patience(recipe: Recipe, progress: Progress) -> bool:
    early = recipe.train.early_stopping
    return early is not None and progress.evaluations_without_better >= early.patience
