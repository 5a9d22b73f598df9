"""Adafactor beside torch's own, and that no step of it waits for a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from loratune.optim import Adafactor

SHAPES = {"matrix": (12, 40), "tall": (64, 3), "zeros.lora_B": (16, 4), "norm": (40,), "three": (3, 6, 10), "one": (1,)}


def parameters(dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    made = {name: torch.nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}
    made["zeros.lora_B"].data.zero_()
    return made


def moved(optimizer: Any, params: dict[str, torch.nn.Parameter], steps: int = 5) -> None:
    """Step with gradients small and large; a parameter is without one now and then, as an expert may be."""
    random = torch.Generator().manual_seed(1)
    for step in range(steps):
        for name, parameter in params.items():
            wild = 10.0 ** (step - 3) * torch.randn(parameter.shape, generator=random).to(parameter.dtype)
            parameter.grad = None if (step, name) == (2, "tall") else wild
        optimizer.step()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_steps_are_torchs(dtype: torch.dtype, foreach: bool, decay: float, relative: bool) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer = Adafactor(lr=1e-2, relative=relative, weight_decay=decay).build(ours.items(), "cpu")
    groups = [
        {"params": [theirs[name] for name in theirs if (theirs[name].ndim > 1 and name != "norm") is matrix], "weight_decay": decay * matrix}
        for matrix in (True, False)
    ]  # fmt: skip
    other = torch.optim.Adafactor(groups, lr=1e-2, eps=(None, 1e-3 if relative else 1.0), foreach=foreach)
    moved(optimizer, ours)
    moved(other, theirs)
    close = 2e-6 if dtype is torch.float32 else 2**-7  # torch rounds to it several times a step
    for name, parameter in theirs.items():
        assert (ours[name] - parameter).norm() <= close * parameter.norm(), name
        mine, known = optimizer.state[ours[name]], other.state[parameter]
        assert mine.keys() == known.keys()
        for key, value in known.items():
            assert mine[key].shape == value.shape
            assert mine[key].dtype == value.dtype
            torch.testing.assert_close(mine[key], value, rtol=close, atol=0)


def test_a_run_that_was_begun_with_torchs_goes_on() -> None:
    """Options and state have the same names, so that a checkpoint of an earlier version is one of this."""
    theirs = parameters(torch.float32)
    begun = torch.optim.Adafactor(list(theirs.values()), lr=1e-2, eps=(None, 1.0))
    moved(begun, theirs, steps=3)
    ours = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in theirs.items()}
    resumed = Adafactor(lr=1e-2).build(ours.items(), "cpu")
    assert resumed.param_groups[0].keys() - {"initial_lr"} == begun.param_groups[0].keys()
    resumed.load_state_dict(copy.deepcopy({**begun.state_dict(), "param_groups": resumed.state_dict()["param_groups"]}))
    moved(begun, theirs, steps=2)
    moved(resumed, ours, steps=2)
    for name, parameter in theirs.items():
        assert (ours[name] - parameter).norm() <= 2e-6 * parameter.norm()
        assert int(resumed.state[ours[name]]["step"]) == (4 if name == "tall" else 5)


def test_no_step_waits_for_a_gpu() -> None:
    """On the meta device a tensor has no value that could be asked for: torch's own raises there."""
    for optimizer in (Adafactor(), torch.optim.Adafactor):
        params = {name: torch.nn.Parameter(torch.empty(shape, device="meta")) for name, shape in SHAPES.items()}
        for parameter in params.values():
            parameter.grad = torch.empty_like(parameter)
        if isinstance(optimizer, Adafactor):
            made = optimizer.build(params.items(), "cuda")
            made.step()
            made.step()
        else:
            with pytest.raises(RuntimeError, match="meta"):
                optimizer(list(params.values())).step()
