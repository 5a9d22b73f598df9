"""Check the environment that a launcher (torchrun, accelerate) leaves, and create accelerate's Accelerator.

accelerate reads environment variables, and they override its arguments. So variables that would change the training are
not passed on; a launch that asks for another engine, or whose processes could not find one another, fails here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from loratune.errors import Problem, SetupError
from loratune.models import base_model
from loratune.recipe import Recipe

_TORCHRUN = "start with `torchrun --nproc_per_node N -m loratune train RECIPE`, or with no launcher for one process"
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}
# variables that accelerate would read, those that change nothing, and what decides instead
_NOT_READ = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("", "1"), "train.batch_size sets the rows of a step"),
    "ACCELERATE_MIXED_PRECISION": (("", "no"), "model.dtype sets the precision"),
    "ACCELERATE_DYNAMO_BACKEND": (("", "no"), "train.compile sets whether to compile"),
}
_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def accelerator(recipe: Recipe) -> Accelerator:
    """Return accelerate's Accelerator for a recipe: device, precision and processes, independent of other settings.

    Raises:
        SetupError: when the launch asks for an engine that is not used here, or its processes can't meet.
    """
    check(os.environ)
    where = base_model.device()
    dtype = base_model.dtype_of(recipe.model.dtype, where)
    mixed = "no"
    if dtype is torch.float16:
        mixed = "fp16"  # small gradients need the scaler
    elif (
        recipe.method.trains_base and recipe.model.dtype == "auto" and dtype is torch.bfloat16 and where.type == "cuda"
    ):
        mixed = "bf16"  # float32 weights, bf16 matrix products
    try:
        return Accelerator(
            mixed_precision=mixed,
            cpu=where.type == "cpu",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="no",
        )
    except (ValueError, RuntimeError, OSError) as error:
        if base_model.is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SetupError(f"the processes of this training can't be set up: {reason}", _TORCHRUN) from None


def part() -> None:
    """Leave the group of processes, if there is one: its threads would end the process by a signal at its exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def not_read(environment: Mapping[str, str]) -> list[str]:
    """Return a line for each variable that accelerate would have used to change the training, and that is ignored."""
    return [
        f"{name}={value} is not used: {instead}"
        for name, (same, instead) in _NOT_READ.items()
        if (value := environment.get(name, "")).lower() not in same
    ]


def check(environment: Mapping[str, str]) -> None:
    """Check that the variables a launcher set describe a launch that loratune supports.

    Raises:
        SetupError: naming every variable that is missing, wrong, or asks for another engine.
    """
    problems = [
        Problem(f"{name} is set: this launch asks for {engine}, which is not supported", hint=_TORCHRUN)
        for name, engine in _ENGINES.items()
        if base_model.is_true(environment.get(name, ""))
    ]
    if device := environment.get("ACCELERATE_TORCH_DEVICE"):
        hint = "CUDA_VISIBLE_DEVICES selects the GPUs"
        problems.append(Problem(f"ACCELERATE_TORCH_DEVICE={device}: a device can't be chosen like this", hint=hint))
    problems += [Problem(text, hint=_TORCHRUN) for text in _wrong_ranks(environment)]
    if problems:
        raise SetupError(problems)


def _wrong_ranks(environment: Mapping[str, str]) -> list[str]:
    """Return what is wrong with rank and number of the processes, as torchrun names them."""
    numbers: dict[str, int] = {}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", *_OF_MPI):
        text = environment.get(name, "")
        try:
            numbers |= {name: int(text)} if text else {}
        except ValueError:
            return [f"{name}={text} is not an integer"]
    world = max((numbers.get(name, 1) for name in ("WORLD_SIZE", *_OF_MPI)), default=1)
    if world <= 1 and numbers.get("LOCAL_RANK", -1) < 0:
        return []  # one process
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in numbers]
    missing += [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        given = ", ".join(f"{name}={number}" for name, number in numbers.items())
        return [f"{given}, but no {', '.join(missing)}: the processes would not find one another"]
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        return [f"RANK={numbers['RANK']} of WORLD_SIZE={numbers['WORLD_SIZE']}: ranks go from 0"]
    return []
