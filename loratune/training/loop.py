"""The training loop: a generator of steps. It knows no recipe, no method and no objective by name."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from loratune.data.batches import Batch
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.errors import TrainingError
from loratune.models.base_model import is_out_of_memory

SKIPPED = 24  # steps in a row: torch's scaler begins at 2^16 and halves each time


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out on the way to a gradient: weights and optimizer are as before, random numbers were drawn."""


class Objective(Protocol):
    """What the loop needs of an objective: a sum and what to divide it by."""

    def collate(self, rows: list[Row], layout: Layout = "padded") -> dict[str, Any]: ...
    def count(self, batch: dict[str, Any]) -> int: ...
    def total(self, model: Any, batch: dict[str, Any]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Step:
    """One optimizer step, over all processes.

    Attributes:
        number: of the step, from 1.
        epoch: how many epochs have been seen.
        loss: sum over trained tokens divided by their count, before the step.
        grad_norm: length of the gradient before clipping.
        lr: learning rate of the first parameter group.
        rows, tokens, trained_tokens: in this step; tokens without padding.
        computed: tokens that went through the model: padding counts, what rows share counts once.
        seconds: from the first micro-batch to the end of the optimizer's step.
    """

    number: int
    epoch: float
    loss: float
    grad_norm: float
    lr: float
    rows: int
    tokens: int
    trained_tokens: int
    computed: int
    seconds: float


def steps(
    model: Any, objective: Objective, batches: Iterable[Batch], optimizer: Any, factor: Callable[[int], float],
    accelerator: Any, max_grad_norm: float, start: int = 0, poll: Callable[[], None] = lambda: None,
) -> Iterator[Step]:  # fmt: skip
    """Train on batches, one optimizer step each, and yield after each step.

    The gradient is that of the summed loss divided once by the count over all micro-batches and all processes, so it
    does not depend on how a batch is split. Between two steps the caller may `measure` or save.

    Args:
        model: prepared by `accelerator` where there are several processes.
        objective: gives the summed loss and the count of a micro-batch.
        batches: the rows of each step.
        optimizer: its groups hold `initial_lr`.
        factor: part (0-1) of `initial_lr` at a step, counted from 0.
        accelerator: accelerate's, for gradient synchronisation and fp16 scaling.
        max_grad_norm: longest gradient; a longer one is scaled down.
        start: number of steps already done.
        poll: called before each micro-batch; what it raises gives the step up before the optimizer has stepped.

    Raises:
        OutOfMemory: in a forward or backward pass.
        TrainingError: when loss or gradient are not finite (in float16: in `SKIPPED` steps in a row), or the first step
            shows that something would never be trained; the optimizer has not stepped then.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    device, world = accelerator.device, accelerator.num_processes
    scaled = accelerator.scaler is not None
    skipped = 0  # steps in a row
    model.train()  # once: there are thousands of modules to tell
    for number, batch in enumerate(batches, start + 1):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor(number - 1)
        micro = [objective.collate(part, batch.layout) for part in batch.micro]
        count, tokens, computed = _sizes(objective, micro, accelerator)
        total = torch.zeros((), device=device)
        for index, part in enumerate(micro):
            poll()
            last = index == len(micro) - 1
            with _whole(), contextlib.nullcontext() if last else accelerator.no_sync(model):
                loss = objective.total(model, on(device, part))
                accelerator.backward(loss * (world / max(count, 1)))  # DDP averages over processes
            total += loss.detach()
            del loss  # its graph: thousands of small things between the activations' places, which the next ones want
        if world > 1:
            total = accelerator.reduce(total, reduction="sum")
        if scaled:
            accelerator.unscale_gradients(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
        loss_value, norm_value = torch.stack(
            [total / max(count, 1), norm.to(device, torch.float32)]
        ).tolist()  # the one sync
        if not math.isfinite(loss_value) or not (math.isfinite(norm_value) or scaled):
            raise _not_finite(number, batch, loss_value)  # fp16 may overflow: its scaler skips such a step
        skipped = 0 if math.isfinite(norm_value) else skipped + 1
        if skipped == SKIPPED:
            raise TrainingError(
                f"step {number}: the gradient has not been finite in {SKIPPED} steps in a row, whatever float16 was "
                "scaled by: nothing is learned",
                "set model.dtype: bfloat16 or float32, or lower optimizer.lr",
            )
        if number == start + 1:
            _check_first(model, number, loss_value, norm_value)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Step(
            number, batch.epoch, loss_value, norm_value, float(optimizer.param_groups[0]["lr"]),
            batch.rows, tokens, count, computed, time.perf_counter() - began,
        )  # fmt: skip


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """Tell memory that runs out where nothing is half done from memory that runs out in the optimizer's step."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error)) from None


def _sizes(objective: Objective, micro: list[dict[str, Any]], accelerator: Any) -> tuple[int, int, int]:
    """Return what the loss is divided by, tokens, and tokens that are computed, over all processes."""
    counted = [part for part in micro if objective.count(part)]  # one without keeps this process in step, no more
    sizes = torch.tensor(
        [
            sum(objective.count(part) for part in counted),
            sum(part["tokens"] for part in counted),
            sum(part["input_ids"].numel() for part in micro),
        ]
    )
    if accelerator.num_processes > 1:
        sizes = accelerator.reduce(sizes.to(accelerator.device), reduction="sum")
    count, tokens, computed = (int(size) for size in sizes)
    return count, tokens, computed


def measure(
    model: Any, objective: Objective, micro_batches: Iterable[list[Row]], accelerator: Any, when: str = ""
) -> tuple[float, int]:
    """Return (loss per count, count) over micro-batches without training; the model is left as it was.

    Under several processes each takes its share of the micro-batches.

    Args:
        model: prepared by `accelerator` where there are several processes.
        objective: gives the summed loss and the count of a micro-batch.
        micro_batches: the rows, as they are measured together.
        accelerator: accelerate's, for the device and the other processes.
        when: what an error begins with.

    Raises:
        TrainingError: when the loss is not finite; it names the rows of the first micro-batch of that kind.
    """
    device = accelerator.device
    rank, world = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, count
    measured: list[tuple[list[Row], torch.Tensor]] = []
    was_training = model.training
    model.eval()
    inner = accelerator.unwrap_model(model)  # shares may differ in number: no DDP forward here
    try:
        with torch.no_grad():
            for index, rows in enumerate(micro_batches):
                if index % world == rank:
                    part = objective.collate(rows)
                    total = objective.total(inner, on(device, part))
                    measured.append((rows, total))
                    sums += torch.stack(
                        [total.double(), torch.tensor(float(objective.count(part)), dtype=torch.float64, device=device)]
                    )
    finally:
        model.train(was_training)
    if world > 1:
        sums = accelerator.reduce(sums, reduction="sum")
    total_loss, count = sums.tolist()
    if not math.isfinite(total_loss):
        rows = next((rows for rows, total in measured if not bool(total.isfinite())), [])
        raise TrainingError(
            f"{when}the eval loss is {total_loss}" + (f". Rows: {_places(rows)}" if rows else ""),
            "look at these rows; lower optimizer.lr, or set model.dtype: float32",
        )
    return total_loss / max(count, 1), int(count)


def on(device: torch.device, part: dict[str, Any]) -> dict[str, Any]:
    """Return a micro-batch with its tensors on a device."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in part.items()
    }


def _check_first(model: Any, number: int, loss: float, norm: float) -> None:
    """Check on the first step that something is learned, and by everything that is to be trained."""
    if number == 1 and loss == 0.0:
        raise TrainingError("step 1: the loss is exactly 0: nothing would be learned", "look at rows and base model")
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    # an expert that no token was sent to has no gradient yet
    without = [name for name, p in trained if p.grad is None and not re.search(r"(^|[._])experts?[._]", name)]
    if without:
        names = ", ".join(f"`{name}`" for name in without[:4]) + (", ..." if len(without) > 4 else "")
        raise TrainingError(
            f"step {number}: {len(without)} of {len(trained)} trained tensors have no gradient: {names}",
            "the model passes them by: leave them out of method.target_modules, or set model.attention: eager",
        )
    if number == 1 and norm == 0.0:
        raise TrainingError("step 1: the gradient is exactly 0: nothing would be learned", "look at rows and method")


def _not_finite(number: int, batch: Batch, loss: float) -> TrainingError:
    what = f"loss is {loss}" if not math.isfinite(loss) else "gradient is not finite"
    return TrainingError(
        f"step {number}: the {what}; stopped before the optimizer stepped. "
        f"Its rows: {_places([row for part in batch.micro for row in part])}",
        "look at these rows; lower optimizer.lr, or set model.dtype: float32",
    )


def _places(rows: Iterable[Row]) -> str:
    places = list(dict.fromkeys(str(row.place) for row in rows))
    return ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
