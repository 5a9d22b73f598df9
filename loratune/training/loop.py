"""The training loop: a generator of steps. It knows no recipe, no method and no objective by name."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object

from loratune.data.batches import Batch as Samples
from loratune.data.batches import split
from loratune.data.collate import collate
from loratune.data.sample import Sample
from loratune.errors import TrainingError
from loratune.events import Step
from loratune.methods.tuned import Tuned
from loratune.models.base_model import is_out_of_memory
from loratune.models.batch import Batch
from loratune.models.policy import Policy
from loratune.objectives.section import NUMBER, ObjectiveSection

SKIPPED = 24  # steps in a row: torch's scaler begins at 2^16 and halves each time


class OutOfMemory(torch.OutOfMemoryError):
    """Out of memory in a forward or backward pass: weights and optimizer are unchanged, random numbers were drawn."""


def steps(
    policy: Policy, objective: ObjectiveSection, tuned: Tuned, batches: Iterable[Samples], optimizer: Any,
    factor: Callable[[int], float], accelerator: Any, max_grad_norm: float, start: int = 0,
    poll: Callable[[], None] = lambda: None, ahead: bool = True,
) -> Iterator[Step]:  # fmt: skip
    """Train on batches, one optimizer step each, and yield after each step.

    The gradient is that of the summed loss, divided once by the count over all micro-batches and processes, so it does
    not depend on how a batch is split. Between two steps the caller may `measure` or save.

    Args:
        policy: its model is prepared by `accelerator` where there are several processes.
        objective: gives the summed loss and the count of a micro-batch, and what it asks of a whole step before.
        tuned: what is trained; its `penalty` is added to a step's loss, its `after_step` follows the optimizer's.
        batches: the samples of each step.
        optimizer: its groups hold `initial_lr`.
        factor: part (0-1) of `initial_lr` at a step, counted from 0.
        accelerator: accelerate's, for gradient synchronisation and fp16 scaling.
        max_grad_norm: largest L2 norm of the gradient; a larger one is scaled down to it.
        start: number of steps already done.
        poll: called before each micro-batch; what it raises abandons the step before the optimizer has stepped.
        ahead: prepare the next batch while the device is at work; not for batches that depend on the model.

    Raises:
        OutOfMemory: in a forward or backward pass.
        TrainingError: when loss or gradient are not finite (in float16: in `SKIPPED` steps in a row), or the first step
            shows that a parameter would never be trained. The optimizer has not stepped then.
    """
    params, scaled = [p for group in optimizer.param_groups for p in group["params"]], accelerator.scaler is not None
    number, skipped = start, 0  # skipped: steps in a row
    policy.net.train()  # once: it visits thousands of modules
    following = next(prepared := _prepared(policy, objective, batches, accelerator), None)
    while following is not None:
        began = time.perf_counter()
        number, (batch, micro, (count, tokens, trained, computed)) = number + 1, following
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor(number - 1)
        with tuned.step():
            if objective.probed:
                most = max(part.computed for part in micro)
                probed = _probed(policy, objective, batch.whole(), most, accelerator, poll)
                micro = [_with(part, probed) for part in micro]
            sums = _backward(policy, objective, tuned, micro, count, accelerator, poll)
        if scaled:
            accelerator.unscale_gradients(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
        means = torch.stack(list(sums.values())) / max(count, 1)
        values = torch.cat([norm.to(means)[None], means])
        following = next(prepared, None) if ahead else None
        norm_value, loss_value, *others = values.tolist()  # the only synchronisation with the device
        skipped = 0 if math.isfinite(norm_value) else skipped + 1
        _check_finite(number, batch, loss_value, skipped, scaled)
        if number == start + 1:
            _check_first(policy.net, number, loss_value, norm_value)
        optimizer.step()
        if not skipped:
            tuned.after_step(number)
        optimizer.zero_grad(set_to_none=True)
        yield Step(
            number, batch.epoch, loss_value, norm_value, float(optimizer.param_groups[0]["lr"]),
            batch.samples, tokens, trained, computed, time.perf_counter() - began,
            _means(dict(zip([*sums][1:], others, strict=True))),
        )  # fmt: skip
        following = following if ahead else next(prepared, None)


def _means(found: dict[str, float]) -> dict[str, float]:
    """Return the means of an objective's figures; one that is of some samples only has their number beside it."""
    means: dict[str, float] = {}
    for name, value in found.items():
        if not name.endswith(NUMBER):
            number = found.get(name + NUMBER, 1.0)
            means |= {name: value / number} if number else {}
    return means


def _backward(
    policy: Policy, objective: ObjectiveSection, tuned: Tuned, micro: list[Batch], count: int, accelerator: Any,
    poll: Callable[[], None],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Add the gradient of a step; return its summed loss and the objective's other sums, over all processes."""
    world = accelerator.num_processes
    sums = {"loss": torch.zeros((), device=accelerator.device)}
    for index, part in enumerate(micro):
        poll()
        last = index == len(micro) - 1
        with _whole(), contextlib.nullcontext() if last else accelerator.no_sync(policy.net):
            loss, others = objective.total(policy, part)
            mean = loss * (world / max(count, 1))  # DDP averages over processes
            penalty = tuned.penalty() if last else None
            accelerator.backward(mean if penalty is None else mean + penalty)
        for name, value in (("loss", loss), *others.items()):
            sums[name] = value.detach() + sums.get(name, 0)
        # frees the graph: its many small tensors would fragment the memory that the next activations need
        del loss, mean, penalty, value
    if world > 1:
        sums = dict(zip(sums, accelerator.reduce(torch.stack(list(sums.values())), reduction="sum"), strict=True))
    return sums


def _probed(
    policy: Policy, objective: ObjectiveSection, samples: Sequence[Sample], tokens: int, accelerator: Any,
    poll: Callable[[], None],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return the means over an objective's probes, float32, shape () each.

    They are those of all samples of a step or an evaluation, whatever the number of processes: each asks the model
    about its share, in micro-batches of `tokens` tokens with padding.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    probes, alone = objective.probes(samples), policy.alone()
    mine = sorted(probes[rank::world], key=lambda one: -one.padded)
    sums = torch.zeros(len(objective.probed), dtype=torch.float64, device=accelerator.device)
    with _whole(), torch.no_grad():
        for part in split(mine, "auto", tokens):
            poll()
            batch = collate(part, virtual_tokens=policy.virtual_tokens).to(accelerator.device)
            found = objective.probe(alone, batch)
            sums += torch.stack([found[name].double().sum() for name in objective.probed])
    if world > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    means = (sums / max(len(probes), 1)).float()
    return dict(zip(objective.probed, means, strict=True))


def _with(batch: Batch, probed: dict[str, torch.Tensor]) -> Batch:
    """Return a micro-batch with the means of a step's probes as values of each of its samples."""
    return replace(batch, values={**batch.values, **{name: v.expand(batch.samples) for name, v in probed.items()}})


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Raise `OutOfMemory` for memory that runs out before the optimizer's step, where nothing is half done."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from None


def _prepared(
    policy: Policy, objective: ObjectiveSection, batches: Iterable[Samples], accelerator: Any
) -> Iterator[tuple[Samples, list[Batch], tuple[int, int, int, int]]]:
    """Yield each batch with its micro-batches on the device and its `_sizes`."""
    for batch in batches:
        micro = [collate(part, batch.layout, policy.virtual_tokens) for part in batch.micro]
        sizes = _sizes(objective, micro, accelerator)
        yield batch, [part.to(accelerator.device) for part in micro], sizes


def _sizes(objective: ObjectiveSection, micro: list[Batch], accelerator: Any) -> tuple[int, int, int, int]:
    """Return the divisor of the loss, and numbers of tokens, label tokens and computed tokens, over all processes."""
    counted = [part for part in micro if objective.count(part)]  # padding samples of an idle process have none
    sizes = torch.tensor(
        [
            sum(objective.count(part) for part in counted),
            sum(part.tokens for part in counted),
            0 if objective.pooled else sum(len(part.targets) for part in counted),
            sum(part.computed for part in micro),
        ]
    )
    if accelerator.num_processes > 1:
        sizes = accelerator.reduce(sizes.to(accelerator.device), reduction="sum")
    count, tokens, trained, computed = (int(size) for size in sizes)
    return count, tokens, trained, computed


def measure(
    policy: Policy, objective: ObjectiveSection, micro_batches: Sequence[list[Sample]], accelerator: Any,
    when: str = "", poll: Callable[[], None] = lambda: None,
) -> tuple[float, int, dict[str, float]]:  # fmt: skip
    """Return mean loss, count and other means over micro-batches without training; the model is left as it was.

    Under several processes each takes its share of the micro-batches.

    Args:
        policy: its model is prepared by `accelerator` where there are several processes.
        objective: gives the summed loss and the count of a micro-batch.
        micro_batches: the samples of each.
        accelerator: accelerate's, for the device and the other processes.
        when: beginning of the error message.
        poll: called before each micro-batch; what it raises comes out.

    Raises:
        TrainingError: when the loss is not finite; it names the rows of the first such micro-batch.
    """
    device = accelerator.device
    rank, world = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, count
    measured: list[tuple[list[Sample], torch.Tensor]] = []
    others: dict[str, torch.Tensor] = {}
    net, was_training = policy.net, policy.training
    net.eval()
    alone = policy.alone()  # processes may have different numbers of micro-batches: no DDP forward here
    try:
        probed = {}
        if objective.probed:
            everything = [sample for samples in micro_batches for sample in samples]
            tokens = max(len(samples) * max(one.padded for one in samples) for samples in micro_batches)
            probed = _probed(policy, objective, everything, tokens, accelerator, poll)
        with torch.no_grad():
            for index, samples in enumerate(micro_batches):
                poll()
                if index % world == rank:
                    part = collate(samples, virtual_tokens=policy.virtual_tokens)
                    total, found = objective.total(alone, _with(part.to(device), probed))
                    measured.append((samples, total))
                    others = {name: value.double() + others.get(name, 0) for name, value in found.items()}
                    sums += torch.stack(
                        [total.double(), torch.tensor(float(objective.count(part)), dtype=torch.float64, device=device)]
                    )
    finally:
        net.train(was_training)
    known = [{name: float(value) for name, value in others.items()}]
    if world > 1:
        sums = accelerator.reduce(sums, reduction="sum")
        known = gather_object(known)  # a process without micro-batches knows none of the names
    total_loss, count = sums.tolist()
    if not math.isfinite(total_loss):
        bad = next((samples for samples, total in measured if not bool(total.isfinite())), [])
        raise TrainingError(
            f"{when}the eval loss is {total_loss}" + (f". Rows: {_places(bad)}" if bad else ""),
            "check these rows; lower optimizer.lr, or set model.dtype: float32",
        )
    names = dict.fromkeys(name for one in known for name in one)
    means = {name: sum(one.get(name, 0.0) for one in known) / max(count, 1) for name in names}
    return total_loss / max(count, 1), int(count), _means(means)


def _check_finite(number: int, batch: Samples, loss: float, skipped: int, scaled: bool) -> None:
    """Check loss and gradient of a step; a gradient in fp16 may overflow, as its scaler skips such a step."""
    if not math.isfinite(loss) or (skipped and not scaled):
        raise _not_finite(number, batch, loss)
    if skipped == SKIPPED:
        raise _never_finite(number)


def _check_first(model: Any, number: int, loss: float, norm: float) -> None:
    """Check on the first step that every trained parameter gets a gradient."""
    if number == 1 and loss == 0.0:
        raise TrainingError("step 1: the loss is exactly 0: nothing would be learned", "check rows and base model")
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # an expert that no token was sent to has no gradient yet
    without = [name for name, p in trained if p.grad is None and not re.search(r"(^|[._])experts?[._]", name)]
    if without:
        names = ", ".join(f"`{name}`" for name in without[:4]) + (", ..." if len(without) > 4 else "")
        raise TrainingError(
            f"step {number}: {len(without)} of {len(trained)} trained tensors have no gradient: {names}",
            "the model does not use them: leave them out of method.target_modules, or set model.attention: eager",
        )
    if number == 1 and norm == 0.0:
        raise TrainingError("step 1: the gradient is exactly 0: nothing would be learned", "check rows and method")


def _not_finite(number: int, batch: Samples, loss: float) -> TrainingError:
    what = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
    return TrainingError(
        f"step {number}: the {what}; stopped before the optimizer stepped. "
        f"Its rows: {_places([sample for part in batch.micro for sample in part])}",
        "check these rows; lower optimizer.lr, or set model.dtype: float32",
    )


def _never_finite(number: int) -> TrainingError:
    return TrainingError(
        f"step {number}: the gradient has not been finite in {SKIPPED} steps in a row, at any loss scale of float16: "
        "nothing is learned",
        "set model.dtype: bfloat16 or float32, or lower optimizer.lr",
    )


def _places(samples: Iterable[Sample]) -> str:
    places = list(dict.fromkeys(str(sample.place) for sample in samples))
    return ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
