"""Set up a training from a recipe, in stages: rows, base, method, layout, memory, steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from loratune.data import batches, chat_template, collate, dataset, labels, model_limits, turn_ends
from loratune.data.dataset import Rows
from loratune.data.encode import Encoder
from loratune.errors import ModelError, Place, Problem, listed
from loratune.kernels import gpu_self_test, torch_compile
from loratune.kernels.layer_kinds import name_of
from loratune.methods import Lora, targets, tensor_files
from loratune.methods.tuned import Setup as MethodSetup
from loratune.methods.tuned import Tuned
from loratune.models import base_model, end_tokens, fingerprint, generate, score_head
from loratune.models.base_model import Loaded
from loratune.objectives.compared import Compared
from loratune.recipe import Recipe
from loratune.runs.checkpoint import Found
from loratune.runs.facts import Facts, Setup
from loratune.training import (
    activation_memory,
    layout_test,
    memory_plan,
    memory_use,
    reference_model,
    session,
    start_report,
)
from loratune.training.job import Base, Data, Job, Length, Memory
from loratune.training.layout_test import Packing
from loratune.training.progress import RunReport


def prepare(recipe: Recipe, accelerator: Accelerator, report: RunReport, facts: Facts, found: Found | None) -> Job:
    """Set up a training, and report what is about to happen.

    Args:
        recipe: of the training.
        accelerator: accelerate's.
        report: to print to.
        facts: filled with what is known now.
        found: the checkpoint to resume from, or None.

    Raises:
        LoratuneError: any of its subclasses.
    """
    where, seal = accelerator.device, found.seal if found else {}
    data = read_rows(recipe, facts.start.trust_remote_code, accelerator, report)
    recipe = recipe.model_copy(update={"objective": recipe.objective.of_rows(data.train, recipe.data)})
    base = load_base(recipe, data, where, facts.start.trust_remote_code, seal.get("dtype"))
    others = check_reference(recipe, data, base.loaded, facts.start.trust_remote_code)
    length = length_of(recipe, data.train)
    tuned = apply_method(recipe, base.loaded, data, length, where)
    on_disk = tensor_files.bytes_on_disk(tuned.state(final=True), base.loaded.dtype)
    kernels = use_kernels(recipe, base.loaded, tuned.net, seal.get("kernels"))
    packing = layout_test.choose(recipe, base.loaded, tuned.net, data.train, accelerator)
    memory = plan_memory(recipe, base.loaded, tuned, data.train, packing, accelerator, seal.get("activations"))
    optimizer = recipe.optimizer.build(session.trainable(tuned.net), where.type)
    fused = {"norm", "gate"} <= set(kernels)
    compiled = use_compiler(recipe, base.loaded, tuned.net, data.train, length, report, seal.get("compiled"), fused)
    batching = start_report.batching(recipe, packing, data.train, accelerator.num_processes)
    start_report.tell_start(
        report, recipe, base.loaded, tuned.net, data.train, data.held_out, length.steps, on_disk, memory.plan,
        batching,
    )  # fmt: skip
    facts.setup = _setup(
        recipe, data, base, tuned.net, on_disk, memory, length, batching, compiled, kernels, others
    )  # fmt: skip
    return Job(
        recipe, Path(recipe.output), accelerator, report, facts, data, base, tuned, optimizer, packing, memory, length,
        memory_use.checkpoint_bytes(recipe, tuned.net),
    )  # fmt: skip


def read_rows(recipe: Recipe, trust: bool, accelerator: Accelerator, report: RunReport) -> Data:
    """Read and tokenize the rows on the first process; the others read them from the cache."""
    tokenizer = chat_template.tokenizer_of(recipe.model, recipe.data, trust)
    with report.counting("reading rows") as counting, accelerator.main_process_first():
        encoder, form = Encoder(tokenizer), recipe.data.format
        notes = labels.check_verbalizers(form, encoder)
        found = dataset.of(recipe.data, recipe.train.seed, encoder, counting, recipe.objective.pooled)
        return Data(encoder, *found, (*notes, *labels.check_seen(form, found[0])))


def load_base(recipe: Recipe, data: Data, where: torch.device, trust: bool, dtype: str | None) -> Base:
    """Load the base and check it against method and rows; `dtype` is that of a resumed run."""
    full, encoder = recipe.method.trains_base, data.encoder
    loaded = base_model.load(base_model.as_begun(recipe.model, dtype), full, where, trust, encoder.tokenizer)
    if isinstance(recipe.method, Lora) and recipe.method.continue_from is not None:
        start, hint = Path(recipe.method.continue_from), "set `model.base` to the base the adapter was trained on"
        loaded.notes += fingerprint.compare(start, recipe.model, False, encoder.tokenizer, hint).notes
        _check_head(start, recipe)
    over = recipe.method.refused_over(loaded.quantization, "use the model it was made from, which is not quantized")
    if refused := [Problem(one.message, Place(recipe.model.base), one.hint) for one in over]:
        raise ModelError(refused)
    targets.check_expressions(dict(recipe.method), [name for name, _ in loaded.model.named_modules()])
    loaded.notes += base_model.precision_notes(recipe.model.dtype, loaded.dtype, where, full)
    sets, before = [rows for rows in (data.train, data.held_out) if rows is not None], recipe.method.before_rows
    reached = [model_limits.check(loaded.model, rows, _remedy(loaded.model, before), before) for rows in sets]
    loaded.notes += dict.fromkeys(note for note in reached if note)
    trained: tuple[int, ...] = ()
    if recipe.objective.pooled:
        loaded.notes += score_head.choose_padding(loaded.model, encoder.tokenizer, data.train.last_tokens())
    elif recipe.objective.generates:
        trained, known = turn_ends.of_rows(data.train, encoder), end_tokens.of_model(loaded.model, encoder.tokenizer)
        loaded.notes += end_tokens.notes(trained, known, encoder.tokenizer)
    if recipe.objective.values and base_model.turn_off_dropout(loaded.model):
        loaded.notes.append("the base's dropout is off, as the model is compared with itself before step 1")
    chat = bool(encoder.turns.template) and not data.train.formats.keys() <= {"text", "completion", "pattern"}
    loaded.notes += [note] if chat and (note := encoder.turns.note()) else []
    loaded.notes += data.notes
    origin = {
        **fingerprint.record(recipe.model, encoder.tokenizer),
        "turn_ends": end_tokens.named(trained, encoder.tokenizer),
        **({"head": recipe.objective.head()} if recipe.objective.outputs else {}),
    }
    return Base(loaded, origin, end_tokens.joined(trained, turn_ends.of_template(encoder)), chat)


def _check_head(start: Path, recipe: Recipe) -> None:
    """Check that the head of an adapter to continue, if it has one, has the outputs of this run's in their order."""
    its, own = (one.get("id2label", {}) for one in (fingerprint.head(start), recipe.objective.head()))
    if its and its != own:
        now = listed(list(own.values()), 8) if own else f"`objective: {recipe.objective.type}` has none"
        told = f"the head of the adapter to continue is for {listed(list(its.values()), 8)}; now: {now}"
        raise ModelError(Problem(told, Place(str(start)), "start a new adapter, or train on rows of these classes"))


def check_reference(recipe: Recipe, data: Data, loaded: Loaded, trust: bool) -> dict[str, str]:
    """Check the reference that the recipe names, and return its fingerprint under `reference`; nothing without one."""
    objective = recipe.objective
    if not isinstance(objective, Compared) or objective.named is None:
        return {}
    other = reference_model.named(recipe, objective.named, loaded)
    sets = [rows for rows in (data.train, data.held_out) if rows is not None]
    found, notes = reference_model.check(other, data.encoder.tokenizer, sets, trust)
    loaded.notes += notes
    return {"reference": found}


def _remedy(net: Any, before: int) -> str:
    """Return what can be done about rows that are longer than a model's positions after so many virtual tokens."""
    left = (generate.positions(net) or 0) - before
    remedy = f"data.max_length: {left}, and data.on_long says what happens to longer rows"
    if not before:
        return remedy
    return f"fewer `method.virtual_tokens`, or {remedy}" if left > 1 else "fewer `method.virtual_tokens`"


def apply_method(recipe: Recipe, loaded: Loaded, data: Data, length: Length, where: torch.device) -> Tuned:
    """Apply the method to the base: add or select the trained parameters."""
    set_seed(recipe.train.seed)
    if recipe.objective.outputs:
        score_head.add(loaded.model, recipe.objective.outputs, recipe.objective.head())
    about = MethodSetup(
        length.steps, data.encoder.tokenizer, lambda: _first_batches(recipe, data.train, where), recipe.model.revision
    )
    return recipe.method.apply(loaded.model, about)


def use_kernels(recipe: Recipe, loaded: Loaded, net: Any, begun: list[str] | None) -> list[str]:
    """Turn on our kernels that pass their self-test on a GPU; return their names. `begun`: those of a resumed run."""
    used, notes = gpu_self_test.install(net, loaded.dtype, [] if recipe.train.kernels == "off" else begun)
    loaded.notes += notes
    return used


def plan_memory(
    recipe: Recipe, loaded: Loaded, tuned: Tuned, rows: Rows, packing: Packing, accelerator: Accelerator,
    begun: dict[str, int] | None,
) -> Memory:  # fmt: skip
    """Measure activations, and decide how many layers are recomputed; `begun` is the plan of a resumed run."""
    where, processes = accelerator.device, accelerator.num_processes
    cost, layers = activation_memory.measure(recipe, tuned.policy(), rows, packing, accelerator)
    free = memory_use.least(memory_use.free_memory(where, processes))
    fixed = memory_use.fixed_bytes(recipe, loaded, tuned.net)
    movable = memory_use.movable_bytes(loaded)
    plan = memory_plan.choose(recipe, cost, rows, packing, where.type, free, fixed, processes, begun, movable)
    plan = memory_plan.switch(loaded.model, layers, plan, recipe.train.gradient_checkpointing, cost.draws)
    return Memory(cost, layers, plan)


def length_of(recipe: Recipe, rows: Rows) -> Length:
    """Return the number of steps of an epoch and of the run."""
    per_epoch = -(-batches.samples_per_epoch(rows.sample_weights) // recipe.train.batch_size)
    return Length(per_epoch, recipe.train.max_steps or math.ceil(recipe.train.epochs * per_epoch))


def use_compiler(
    recipe: Recipe, loaded: Loaded, net: Any, rows: Rows, length: Length, report: RunReport, begun: bool | None,
    fused: bool,
) -> bool:  # fmt: skip
    """Let torch's compiler fuse small operations where that is faster and none of our kernels has `fused` them already.

    `begun` is what a resumed run did.
    """
    operations = memory_use.operations(net, rows, length.steps * recipe.train.batch_size)
    if not torch_compile.is_wanted(recipe.train.compile, loaded.device.type, operations, begun, fused):
        return False
    compiled, note = torch_compile.install(net, loaded.dtype, recipe.train.compile, report.note)
    loaded.notes += [note] if note else []
    return compiled


def _setup(
    recipe: Recipe, data: Data, base: Base, net: Any, on_disk: int, memory: Memory, length: Length,
    batching: dict[str, Any], compiled: bool, kernels: list[str], others: dict[str, str],
) -> Setup:  # fmt: skip
    loaded = base.loaded
    return Setup(
        base=str(loaded.model.config._name_or_path) if recipe.model.base.endswith(".gguf") else recipe.model.base,
        data={
            "train": start_report.counts(data.train),
            "eval": start_report.counts(data.held_out) if data.held_out else None,
        },
        batching=batching,
        steps=length.steps,
        adapter_bytes_predicted=on_disk,
        dtype=name_of(loaded.dtype),
        quantization=loaded.quantization,
        fingerprints={
            **start_report.fingerprints(data.train, data.held_out),
            "base": base.origin["base"]["sha256"],
            "tokenizer": base.origin["tokenizer"]["sha256"],
            **others,
        },
        sources=start_report.sources(recipe),
        turn_ends=base.origin["turn_ends"],
        chat=base.chat,
        memory=memory_use.measure(recipe, loaded, net, data.train, memory.cost, memory.plan),
        activations=memory.plan.as_json(),
        compiled=compiled,
        kernels=kernels,
    )


def _first_batches(recipe: Recipe, rows: Rows, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield micro-batches of the first 16 steps, for an initialization that depends on the data."""
    settings = recipe.train
    for batch in batches.batches(
        rows, settings.batch_size, settings.micro_batch_size, settings.seed, 16, 0, batches.AUTO_TOKENS[device.type]
    ):
        for part in batch.micro:
            known = collate.collate(part)
            whole = {**known.inputs, "labels": collate.labels(known)}
            yield {name: tensor.to(device) for name, tensor in whole.items()}
