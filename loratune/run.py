"""One training, from a recipe to a run folder: the one place that joins things. Read `train` from top to bottom."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import loratune
from loratune import card, checkpoint, data, loop, model, plot
from loratune.checkpoint import Progress
from loratune.data import Rows
from loratune.encode import Encoder
from loratune.errors import LoratuneError, Place, Problem, RunFolderError, SetupError
from loratune.methods import saved
from loratune.recipe import Recipe
from loratune.report import Report, duration, size
from loratune.schedules import rate

VERSIONS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers", "safetensors")


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
    first = accelerator.is_main_process
    report = Report(active=first, metrics=folder / "metrics.jsonl")
    if first:
        checkpoint.check_free(folder, resume, overwrite)
    accelerator.wait_for_everyone()
    facts = _facts(recipe, accelerator)
    status = "failed"
    try:
        run = _train(recipe, folder, accelerator, report, facts, resume)
        status = "complete"
        return run
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except torch.OutOfMemoryError:
        raise SetupError(
            f"out of memory on {facts['device']}",
            "cheapest first: train.micro_batch_size: 1, train.gradient_checkpointing: all, model.quantization: nf4, a smaller data.max_length",
        ) from None
    finally:
        if first and "steps" in facts:  # before that there is no run to speak of
            checkpoint.write_json(folder / "run.json", {**facts, "status": status})


def _train(
    recipe: Recipe, folder: Path, accelerator: Accelerator, report: Report, facts: dict[str, Any], resume: bool
) -> Run:
    method, settings, first = recipe.method, recipe.train, accelerator.is_main_process
    # -- base model and rows
    tokenizer = model.load_tokenizer(recipe.model)
    with report.counting("reading rows") as counting:
        train_rows, eval_rows = data.of(recipe, Encoder(tokenizer), counting)
    loaded = model.load(recipe.model, full=method.type == "full", where=accelerator.device)
    set_seed(settings.seed)
    # -- what is trained
    net = method.apply(loaded.model, lambda: _first_batches(recipe, train_rows, accelerator.device))
    checkpointing = model.checkpoint_activations(loaded.model, settings.gradient_checkpointing, loaded.device)
    initial = method.initial(net)
    on_disk = saved.bytes_on_disk(method.state(net, initial), loaded.dtype)
    optimizer = recipe.optimizer.build(_trainable(net), loaded.device.type)
    # -- how long
    per_epoch = -(-data.rows_per_epoch(train_rows.weights) // settings.batch_size)
    steps = settings.max_steps or math.ceil(settings.epochs * per_epoch)
    warmup = settings.warmup if isinstance(settings.warmup, int) else round(settings.warmup * steps)
    _tell_start(report, recipe, loaded, net, train_rows, eval_rows, steps, on_disk, checkpointing)
    facts.update(
        base=str(loaded.model.config._name_or_path) if recipe.model.base.endswith(".gguf") else recipe.model.base,
        data={"train": _counts(train_rows), "eval": _counts(eval_rows) if eval_rows else None},
        steps=steps, adapter_bytes_predicted=on_disk, dtype=str(loaded.dtype).removeprefix("torch."),
    )  # fmt: skip
    # -- where it stands
    if first:
        checkpoint.make_run(folder, resume)
    accelerator.wait_for_everyone()
    progress = Progress(0)
    set_seed(settings.seed, device_specific=True)
    if resume and (found := checkpoint.newest(folder)):
        place, progress, bad = found
        for line in bad:
            report.problem(line)
        try:
            method.load(net, place)
            checkpoint.restore(place, optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            what = str(error).splitlines()[0]
            hint = "resume with the recipe it was begun with (recipe.yaml there), or --overwrite it"
            raise RunFolderError(
                Problem(f"{place.name} does not fit this recipe: {what}", Place(str(folder)), hint)
            ) from None
        report.go_on_from(progress.step)
        report.note(f"resuming after step {progress.step}")
    elif resume:
        report.go_on_from(0)
        report.note("no checkpoint to resume from: beginning at step 1")
    if first:
        checkpoint.write_text(folder / "recipe.yaml", recipe.dump())
        checkpoint.write_json(folder / "run.json", {**facts, "status": "running"})
    # -- the loop
    wrapped = (
        accelerator.prepare_model(net) if accelerator.num_processes > 1 or accelerator.mixed_precision != "no" else net
    )
    if accelerator.scaler is not None:
        optimizer = accelerator.prepare_optimizer(optimizer)
    batches = data.batches(
        train_rows, settings.batch_size, settings.micro_batch_size, settings.seed,
        progress.step if _out_of_patience(recipe, progress) else steps, progress.step,
        loaded.device.type, accelerator.process_index, accelerator.num_processes,
    )  # fmt: skip
    log_every, eval_every, save_every = (
        _in_steps(cadence, per_epoch) for cadence in (settings.log_every, settings.eval_every, settings.save_every)
    )
    last_loss = report.train[-1][1] if report.train else math.nan
    about = {"recipe": recipe.hash(), "versions": facts["versions"]}
    with report.training(progress.step, steps, log_every):
        for step in loop.steps(
            wrapped, recipe.objective, batches, optimizer, lambda n: rate(settings.schedule, n, steps, warmup),
            accelerator, settings.max_grad_norm, progress.step,
        ):  # fmt: skip
            report.step(step)
            last_loss = step.loss
            progress = replace(progress, step=step.number)
            end = step.number == steps
            better = False
            if eval_rows and (step.number % eval_every == 0 or end):
                better, progress = _evaluate(recipe, wrapped, eval_rows, accelerator, report, progress)
            stop = _out_of_patience(recipe, progress)
            if first and (step.number % save_every == 0 or better or end or stop):
                checkpoint.save(folder, progress, lambda f: method.save(net, f, None, {}), optimizer, about)
                checkpoint.rotate(folder, settings.keep, progress.best_step)
            accelerator.wait_for_everyone()
            if stop:
                report.note(
                    f"step {step.number}: the eval loss has not fallen for {progress.evaluations_without_better} evaluations: stopping"
                )
                break
    # -- what is left
    if progress.best_step is not None and progress.best_step != progress.step:
        method.load(net, checkpoint.path_of(folder, progress.best_step))
        report.note(f"the saved {method.type} is that of step {progress.best_step}, where the eval loss was lowest")
    facts.update(
        step=progress.step, saved_step=progress.best_step or progress.step, train_loss=last_loss,
        best_eval_loss=progress.best_loss, seconds=report.seconds, tokens_per_second=report.tokens_per_second,
    )  # fmt: skip
    if first:
        _finish(recipe, folder, net, tokenizer, loaded.dtype, initial, report, facts)
    accelerator.wait_for_everyone()
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
    for batch in data.batches(rows, settings.batch_size, settings.micro_batch_size, settings.seed, 16, 0, device.type):
        for part in batch.micro:
            yield {key: value.to(device) for key, value in recipe.objective.collate(part).items()}


def _in_steps(cadence: int | float, per_epoch: int) -> int:
    return cadence if isinstance(cadence, int) else max(1, round(cadence * per_epoch))


def _evaluate(
    recipe: Recipe, net: Any, rows: Rows, accelerator: Accelerator, report: Report, progress: Progress
) -> tuple[bool, Progress]:
    began = time.perf_counter()
    parts = data.in_length_order(rows, recipe.train.micro_batch_size, accelerator.device.type)
    loss, count = loop.measure(net, recipe.objective, parts, accelerator)
    early = recipe.train.early_stopping
    margin = early.min_delta if early else 0.0
    better = progress.best_loss is None or loss < progress.best_loss - margin
    report.evaluated(progress.step, loss, count, better, time.perf_counter() - began)
    if better:
        return True, replace(progress, best_loss=loss, best_step=progress.step, evaluations_without_better=0)
    return False, replace(progress, evaluations_without_better=progress.evaluations_without_better + 1)


def _out_of_patience(recipe: Recipe, progress: Progress) -> bool:
    early = recipe.train.early_stopping
    return early is not None and progress.evaluations_without_better >= early.patience


def _facts(recipe: Recipe, accelerator: Accelerator) -> dict[str, Any]:
    versions = {"loratune": loratune.__version__, "python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cuda = accelerator.device.type == "cuda"
    return {
        "recipe_sha256": recipe.hash(),
        "seed": recipe.train.seed,
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({torch.get_num_threads()} threads)",
        "processes": accelerator.num_processes,
        "versions": versions,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _counts(rows: Rows) -> dict[str, Any]:
    return {**rows.counts.__dict__, "rows": len(rows)}


def _tell_start(
    report: Report, recipe: Recipe, loaded: model.Loaded, net: Any, rows: Rows, held_out: Rows | None, steps: int,
    on_disk: int, checkpointing: bool,
) -> None:  # fmt: skip
    """Print what is about to happen: model, rows, what is trained, and what was chosen for the user."""
    quantization = recipe.model.quantization.type
    name = str(loaded.dtype).removeprefix("torch.")
    report.note(
        f"base     {recipe.model.base}: {name}{f', {quantization}' if quantization != 'none' else ''}, on "
        f"{loaded.device}{', activations checkpointed' if checkpointing else ''}"
    )
    counts = rows.counts
    changed = "".join(
        f", {number:,} {what}"
        for number, what in ((counts.dropped, "dropped"), (counts.truncated, "truncated"), (counts.split, "split"))
        if number
    )
    report.note(
        f"rows     {len(rows):,} to train on ({counts.tokens:,} tokens, {counts.trained_tokens:,} trained{changed})"
        + (f", {len(held_out):,} held out" if held_out else "")
    )
    for line in counts.first:
        report.problem(f"         {line}")
    trainable, total = model.count_parameters(net)
    what = "adapter" if recipe.method.type == "lora" else "model"
    report.note(
        f"method   {recipe.method.type}: {trainable:,} of {total:,} parameters trained ({100 * trainable / total:.2f} %), "
        f"{what} of {size(on_disk)} on disk"
    )
    report.note(f"steps    {steps:,} of {recipe.train.batch_size} rows")
    for note in (*loaded.notes, recipe.optimizer.note(loaded.device.type)):
        if note:
            report.note(f"note     {note}")


def _finish(
    recipe: Recipe, folder: Path, net: Any, tokenizer: Any, dtype: torch.dtype, initial: dict[str, torch.Tensor],
    report: Report, facts: dict[str, Any],
) -> None:  # fmt: skip
    """Write the adapter (or model), tokenizer, loss curve and card into the run folder."""
    staging = folder / "checkpoints" / "final"

    def write(target: Path) -> None:
        recipe.method.save(net, target, dtype, initial)
        tokenizer.save_pretrained(target)

    checkpoint.commit(staging, write, {"step": facts["saved_step"], "recipe": facts["recipe_sha256"]})
    try:
        for file in sorted(staging.iterdir(), key=lambda f: f.name == "MANIFEST.json"):
            file.replace(folder / file.name)
        staging.rmdir()
    except OSError as error:
        raise LoratuneError(f"{folder}: can't be written: {error.strerror}") from None
    title = f"{folder.name}: {recipe.method.type} on {Path(recipe.model.base).name}"
    checkpoint.write_text(folder / "loss.svg", plot.loss_svg(report.train, report.evaluation, title))
    checkpoint.write_text(folder / "README.md", card.write(recipe, facts))
    weights = [f.stat().st_size for f in folder.glob("*.safetensors")]
    facts["adapter_bytes"] = sum(weights)
    report.note(
        f"done     {facts['step']} steps in {duration(report.seconds)}, {report.tokens_per_second:,.0f} tokens/s; "
        f"{size(sum(weights))} in {folder}"
    )
