"""One training, from a recipe to a run folder: the one place that joins things. Read `train` from top to bottom."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from loratune import batches, card, checkpoint, data, loop, model, plot, states, storage, telling
from loratune.checkpoint import Progress
from loratune.data import Rows
from loratune.encode import Encoder, with_template
from loratune.errors import Interrupted, Place, Problem, RunFolderError, SetupError
from loratune.methods import saved
from loratune.recipe import Recipe
from loratune.report import Report, duration, size
from loratune.schedules import rate


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        folder: the run folder: the adapter (or model), its recipe, run.json, metrics.jsonl, loss.svg, README.md.
        steps: number of steps.
        train_loss: of the last step, in nats per trained token.
        eval_loss: best loss on held-out rows, or None.
        seconds: spent in steps.
    """

    folder: Path
    steps: int
    train_loss: float
    eval_loss: float | None
    seconds: float


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False) -> Run:
    """Train what the recipe says and fill its run folder.

    Args:
        recipe: from `load_recipe`.
        resume: go on from the newest valid checkpoint of the run folder.
        overwrite: begin anew in a run folder that holds a run.

    Returns:
        The finished run.

    Raises:
        LoratuneError: any of its kinds; `exit_code` says which.
    """
    model.quiet()
    folder = Path(recipe.output)
    accelerator = _accelerator(recipe)
    report = Report(active=accelerator.is_main_process, metrics=folder / "metrics.jsonl")
    if accelerator.is_main_process:
        checkpoint.check_free(folder, resume, overwrite)
    accelerator.wait_for_everyone()
    facts = telling.facts(recipe, accelerator)
    status, begun = "failed", False
    try:
        job = _prepare(recipe, folder, accelerator, report, facts)
        progress = _begin(job, resume)
        begun = True  # from here on the run folder is this run's
        progress = _loop(job, progress)
        run = _finish(job, progress)
        status = "complete"
        return run
    except (KeyboardInterrupt, Interrupted):
        status = "interrupted"
        raise
    except torch.OutOfMemoryError:
        raise SetupError(
            f"out of memory on {facts['device']}",
            "cheapest first: train.micro_batch_size: 1, train.gradient_checkpointing: all, "
            "model.quantization: nf4, a smaller data.max_length",
        ) from None
    finally:
        if accelerator.is_main_process and begun:
            storage.write_json(folder / "run.json", {**facts, "status": status})


@dataclass
class _Job:
    """Everything one training needs, joined once; `facts` grows into run.json."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    report: Report
    facts: dict[str, Any]
    tokenizer: Any
    loaded: model.Loaded
    net: Any
    initial: dict[str, torch.Tensor]
    optimizer: Any
    train_rows: Rows
    eval_rows: Rows | None
    per_epoch: int
    steps: int

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)


def _prepare(recipe: Recipe, folder: Path, accelerator: Accelerator, report: Report, facts: dict[str, Any]) -> _Job:
    """Read the rows, load the base, put on it what is trained, and tell what is about to happen."""
    settings, where = recipe.train, accelerator.device
    tokenizer = with_template(model.load_tokenizer(recipe.model), recipe.data.chat_template)
    with report.counting("reading rows") as counting:
        train_rows, eval_rows = data.of(recipe, Encoder(tokenizer), counting)
    loaded = model.load(recipe.model, full=recipe.method.type == "full", where=where)
    set_seed(settings.seed)
    net = recipe.method.apply(loaded.model, lambda: _first_batches(recipe, train_rows, where), recipe.model.revision)
    checkpointing = model.checkpoint_activations(loaded.model, settings.gradient_checkpointing, where)
    initial = recipe.method.initial(net)
    on_disk = saved.bytes_on_disk(recipe.method.state(net, initial), loaded.dtype)
    optimizer = recipe.optimizer.build(_trainable(net), where.type)
    per_epoch = -(-batches.rows_per_epoch(train_rows.weights) // settings.batch_size)
    steps = settings.max_steps or math.ceil(settings.epochs * per_epoch)
    telling.tell_start(report, recipe, loaded, net, train_rows, eval_rows, steps, on_disk, checkpointing)
    facts.update(
        base=str(loaded.model.config._name_or_path) if recipe.model.base.endswith(".gguf") else recipe.model.base,
        data={"train": telling.counts(train_rows), "eval": telling.counts(eval_rows) if eval_rows else None},
        steps=steps, adapter_bytes_predicted=on_disk, dtype=str(loaded.dtype).removeprefix("torch."),
    )  # fmt: skip
    return _Job(
        recipe, folder, accelerator, report, facts, tokenizer, loaded, net, initial, optimizer,
        train_rows, eval_rows, per_epoch, steps,
    )  # fmt: skip


def _begin(job: _Job, resume: bool) -> Progress:
    """Make the run folder, or go on from its newest valid checkpoint; return where the run stands."""
    if job.first:
        checkpoint.make_run(job.folder, resume)
    job.accelerator.wait_for_everyone()
    set_seed(job.recipe.train.seed, device_specific=True)
    progress = Progress(0)
    if resume:
        found = checkpoint.newest(job.folder)
        if found is None:
            job.report.note("no checkpoint to resume from: beginning at step 1")
        else:
            place, progress, bad = found
            for line in bad:
                job.report.problem(line)
            _restore(job, place)
            left = job.steps - progress.step
            job.report.note(f"resuming after step {progress.step}" + ("" if left > 0 else ": nothing left to train"))
        job.report.go_on_from(progress.step)
    if job.first:
        storage.write_json(job.folder / "run.json", {**job.facts, "status": "running"})
        storage.write_text(job.folder / "recipe.yaml", job.recipe.dump())
        ledger = job.folder / "ledger.jsonl"
        ledger.unlink(missing_ok=True)
        for rows in (job.train_rows, *([job.eval_rows] if job.recipe.data.eval and job.eval_rows else [])):
            rows.ledger.append_to(ledger)
    return progress


def _restore(job: _Job, place: Path) -> None:
    try:
        job.recipe.method.load(job.net, place)
        checkpoint.restore(place, job.optimizer, job.accelerator.process_index)
    except (RuntimeError, ValueError, KeyError) as error:
        what = str(error).splitlines()[0]
        hint = "resume with the recipe it was begun with (recipe.yaml there), or --overwrite it"
        where = Place(str(job.folder))
        raise RunFolderError(Problem(f"{place.name} does not fit this recipe: {what}", where, hint)) from None
    if storage.read_json(place / "MANIFEST.json").get("recipe") != job.recipe.hash():
        job.report.problem(f"the recipe has changed since {place.name} was saved: going on with the new one")


def _loop(job: _Job, progress: Progress) -> Progress:
    """Train step by step; evaluate, save and stop where the recipe says. Return where the run ends."""
    recipe, settings, accelerator, report = job.recipe, job.recipe.train, job.accelerator, job.report
    schedule, steps = settings.schedule, job.steps
    warmup = settings.warmup if isinstance(settings.warmup, int) else round(settings.warmup * steps)
    several = accelerator.num_processes > 1 or accelerator.mixed_precision != "no"
    net = accelerator.prepare_model(job.net) if several else job.net
    optimizer = job.optimizer if accelerator.scaler is None else accelerator.prepare_optimizer(job.optimizer)
    order = batches.batches(
        job.train_rows, settings.batch_size, settings.micro_batch_size, settings.seed,
        progress.step if _out_of_patience(recipe, progress) else steps, progress.step,
        job.loaded.device.type, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    log_every, eval_every, save_every = (
        _in_steps(cadence, job.per_epoch) for cadence in (settings.log_every, settings.eval_every, settings.save_every)
    )
    with report.training(progress.step, steps, log_every), _signals() as asked:
        for step in loop.steps(
            net, recipe.objective, order, optimizer, lambda n: rate(schedule, n, steps, warmup),
            accelerator, settings.max_grad_norm, progress.step,
        ):  # fmt: skip
            report.step(step)
            progress = replace(progress, step=step.number)
            end, better = step.number == steps, False
            if job.eval_rows and (step.number % eval_every == 0 or end):
                better, progress = _evaluate(job, net, job.eval_rows, progress)
            stop, signalled = _out_of_patience(recipe, progress), _any_process(accelerator, asked)
            if step.number % save_every == 0 or better or end or stop or signalled:
                _save(job, progress)
            if signalled and not end:
                name = signal.Signals(signalled).name
                raise Interrupted(
                    f"{name}: stopped after step {step.number}, a checkpoint is saved", signalled, "go on with --resume"
                )
            if stop:
                times = progress.evaluations_without_better
                report.note(f"step {step.number}: the eval loss has not fallen for {times} evaluations: stopping")
                break
    return progress


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step; a second one of a kind acts at once."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody listen
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any_process(accelerator: Accelerator, asked: list[int]) -> int:
    """Return the signal that came to any of the processes, or 0: all must stop at the same step."""
    number = max(asked, default=0)
    if accelerator.num_processes > 1:
        number = int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())
    return number


def _save(job: _Job, progress: Progress) -> None:
    """Commit a checkpoint; every process gives its random state, the first one writes."""
    random = gather_object([states.random_state()])
    if job.first:
        about = {"recipe": job.recipe.hash(), "versions": job.facts["versions"]}
        method = job.recipe.method
        checkpoint.save(job.folder, progress, lambda f: method.save(job.net, f, None, {}), job.optimizer, random, about)
        checkpoint.rotate(job.folder, job.recipe.train.keep, progress.best_step)
    job.accelerator.wait_for_everyone()


def _finish(job: _Job, progress: Progress) -> Run:
    """Write the adapter (or model) of the best step, tokenizer, loss curve and card into the run folder."""
    recipe, folder, report, facts = job.recipe, job.folder, job.report, job.facts
    if progress.best_step is not None and progress.best_step != progress.step:
        recipe.method.load(job.net, checkpoint.path_of(folder, progress.best_step))
        report.note(
            f"the saved {telling.product(recipe)} is that of step {progress.best_step}, where the eval loss was lowest"
        )
    last_loss = report.train[-1][1] if report.train else math.nan
    facts.update(
        step=progress.step, saved_step=progress.best_step or progress.step, train_loss=last_loss,
        best_eval_loss=progress.best_loss, seconds=report.seconds, tokens_per_second=report.tokens_per_second,
    )  # fmt: skip
    if job.first:

        def write(target: Path) -> None:
            recipe.method.save(job.net, target, job.loaded.dtype, job.initial)
            job.tokenizer.save_pretrained(target)

        storage.publish(folder, write, {"step": facts["saved_step"], "recipe": facts["recipe_sha256"]})
        title = f"{folder.name}: {recipe.method.type} on {Path(recipe.model.base).name}"
        storage.write_text(folder / "loss.svg", plot.loss_svg(report.train, report.evaluation, title))
        storage.write_text(folder / "README.md", card.write(recipe, facts))
        facts["adapter_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        report.note(
            f"done     {progress.step} steps in {duration(report.seconds)}, {report.tokens_per_second:,.0f} tokens/s; "
            f"{telling.product(recipe)} of {size(facts['adapter_bytes'])} in {folder}"
        )
    job.accelerator.wait_for_everyone()
    return Run(folder, progress.step, last_loss, progress.best_loss, report.seconds)


def _accelerator(recipe: Recipe) -> Accelerator:
    where = model.device()
    dtype = model.dtype_of(recipe.model.dtype, where)
    mixed = "no"
    if dtype is torch.float16:
        mixed = "fp16"  # small gradients need the scaler
    elif (
        recipe.method.type == "full"
        and recipe.model.dtype == "auto"
        and dtype is torch.bfloat16
        and where.type == "cuda"
    ):
        mixed = "bf16"  # float32 weights, bf16 matrix products
    return Accelerator(mixed_precision=mixed, cpu=where.type == "cpu")


def _trainable(net: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad)


def _first_batches(recipe: Recipe, rows: Rows, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield micro-batches of the first 16 steps, for a start that looks at the data."""
    settings = recipe.train
    for batch in batches.batches(
        rows, settings.batch_size, settings.micro_batch_size, settings.seed, 16, 0, device.type
    ):
        for part in batch.micro:
            yield {key: value.to(device) for key, value in recipe.objective.collate(part).items()}


def _in_steps(cadence: int | float, per_epoch: int) -> int:
    return cadence if isinstance(cadence, int) else max(1, round(cadence * per_epoch))


def _evaluate(job: _Job, net: Any, rows: Rows, progress: Progress) -> tuple[bool, Progress]:
    """Measure the eval loss; return whether it is the best so far, and the progress that knows it."""
    began = time.perf_counter()
    parts = batches.in_length_order(rows, job.recipe.train.micro_batch_size, job.accelerator.device.type)
    loss, count = loop.measure(net, job.recipe.objective, parts, job.accelerator)
    early = job.recipe.train.early_stopping
    margin = early.min_delta if early else 0.0
    better = progress.best_loss is None or loss < progress.best_loss - margin
    job.report.evaluated(progress.step, loss, count, better, time.perf_counter() - began)
    if better:
        return True, replace(progress, best_loss=loss, best_step=progress.step, evaluations_without_better=0)
    return False, replace(progress, evaluations_without_better=progress.evaluations_without_better + 1)


def _out_of_patience(recipe: Recipe, progress: Progress) -> bool:
    early = recipe.train.early_stopping
    return early is not None and progress.evaluations_without_better >= early.patience
