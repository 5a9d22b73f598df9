"""What runs on a GPU only, held without one: the kernel's call, precision, random states, paging, the allocator."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from loratune import recipe
from loratune.data.encode import Row
from loratune.errors import Place
from loratune.kernels import gpu_kernels, packed_attention
from loratune.models import base_model
from loratune.optim import adamw
from loratune.runs import training_state
from loratune.system import startup
from loratune.training import launcher, layout_test
from tests import tiny
from tests.objectives.test_sft import llama


def _parts(heads: int = 4, of_keys: int = 2, width: int = 64, narrower: int = 0) -> list[torch.Tensor]:
    """Return query, key and value of a pack of 20 tokens that hold no numbers, each (1, heads, 20, width)."""
    shapes = [(heads, width), (of_keys, width), (of_keys, width - narrower)]
    return [torch.empty(1, h, 20, w, device="meta", dtype=torch.bfloat16, requires_grad=True) for h, w in shapes]


STARTS = torch.empty(3, device="meta", dtype=torch.int32)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("narrower", [0, 16])
def test_the_kernel_takes_what_it_is_given(window: int | None, narrower: int) -> None:
    """The operator's own schema and shape function: what torch 2.10 to 2.13 have in common."""
    query, key, value = _parts(narrower=narrower)
    out = packed_attention.varlen(query, key, value, 0.125, window, (STARTS, STARTS), (10, 10), None)
    assert out.shape == (1, 20, 4, 64 - narrower)
    names = [argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments]
    assert names[:10] == [
        "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal",
        "return_debug_mask",
    ]  # fmt: skip
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)


def _given(monkeypatch: pytest.MonkeyPatch, window: int | None) -> dict[str, Any]:
    given: dict[str, Any] = {}

    def kernel(*arguments: Any, **named: Any) -> tuple[torch.Tensor]:
        given.update(named, is_causal=arguments[8], longest=arguments[5:7])
        return (arguments[0],)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    packed_attention.varlen(*_parts(), 0.5, window, (STARTS, STARTS), (7, 9), None)  # type: ignore[call-arg]
    return given


def test_what_the_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"scale": 0.5, "is_causal": True, "longest": (7, 9), "window_size_left": -1, "window_size_right": 0}
    assert _given(monkeypatch, None) == whole
    assert _given(monkeypatch, 8) == {**whole, "is_causal": False, "window_size_left": 7}


def _packed(rows: int, length: int, *, wider: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value of a pack, as a model lays them: (1, heads, tokens, width), the heads of a token together."""
    shapes = ((4, 16), (2, 16), (2, 16 + wider))
    q, k, v = (torch.randn(1, rows * length, heads, width).transpose(1, 2).requires_grad_() for heads, width in shapes)
    return q, k, v


@pytest.mark.parametrize(("rows", "length"), [(1, 256), (3, 40), (2, 255)])
def test_rows_of_one_length_at_once_are_rows_one_by_one(rows: int, length: int) -> None:
    parts = _packed(rows, length)
    outer = torch.randn(1, rows * length, 4, 16)
    out = packed_attention.even(*parts, 0.3, length)
    alone = [
        torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True, scale=0.3, enable_gqa=True)
        for row in zip(*(part.split(length, dim=2) for part in parts), strict=True)
    ]
    wanted = torch.cat(alone, dim=2).transpose(1, 2)
    assert out.shape == wanted.shape
    torch.testing.assert_close(out, wanted)
    for mine, other in zip(
        torch.autograd.grad(out, parts, outer), torch.autograd.grad(wanted, parts, outer), strict=True
    ):
        torch.testing.assert_close(mine, other)


def _way(monkeypatch: pytest.MonkeyPatch, rows: int, length: int, places: int = 0, **given: Any) -> tuple[str, bool]:
    """Return by which kernel a pack attends, and whether its keys are gathered; `places` more than it has tokens."""
    found: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        packed_attention, "varlen", lambda *all_of_it: found.append(("varlen", all_of_it[-1] is not None))
    )
    monkeypatch.setattr(packed_attention, "even", lambda *all_of_it: found.append(("even", False)))
    parts = _packed(rows, length, wider=given.pop("wider", 0))
    starts, where = torch.arange(given.pop("said", rows) + 1), torch.arange(rows * length + places)
    packed_attention.on_gpu(parts, None, given.get("window"), (starts, starts), (length, length + places), where)
    return found[0]


def test_which_kernel_rows_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert _way(monkeypatch, 2, 256) == ("varlen", False), "not tried on this device"
    gpu_kernels.use("even_rows", device)
    try:
        for length, way in ((256, "even"), (255, "even"), (511, "even"), (254, "varlen"), (300, "varlen")):
            assert _way(monkeypatch, 2, length) == (way, False)
        assert _way(monkeypatch, 2, 256, places=3) == ("varlen", True), "rows have something in common"
        assert _way(monkeypatch, 2, 256, said=3) == ("varlen", False), "another number of rows: some are shorter"
        assert _way(monkeypatch, 2, 256, window=200) == ("varlen", False)
        assert _way(monkeypatch, 2, 256, window=256) == ("even", False)
        assert _way(monkeypatch, 2, 256, wider=8) == ("varlen", False)
    finally:
        gpu_kernels.stop()


def test_a_length_that_cudnn_has_no_plan_for_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[RuntimeError] = [torch.OutOfMemoryError("none left"), RuntimeError("no plan\nfor this")]

    def even(*given: Any) -> torch.Tensor:
        raise errors[0]

    monkeypatch.setattr(packed_attention, "even", even)
    monkeypatch.setattr(packed_attention, "varlen", lambda *given: given[0])
    starts, parts = torch.arange(3), _packed(2, 256)
    given = (parts, None, None, (starts, starts), (256, 256), None)
    with gpu_kernels.for_now():
        gpu_kernels.use("even_rows", torch.device("cpu"))
        with pytest.raises(torch.OutOfMemoryError):
            packed_attention.on_gpu(*given)
        del errors[0]
        with pytest.warns(UserWarning, match="cuDNN's attention is no longer used: no plan$"):
            assert packed_attention.on_gpu(*given) is parts[0]
        assert packed_attention.on_gpu(*given) is parts[0], "and no second warning"


def _tried(monkeypatch: pytest.MonkeyPatch, broken: Any) -> str:
    net = llama()
    place = Place("rows.jsonl", 1)
    rows = tuple(Row(np.arange(n, dtype=np.int32), np.ones(n, bool), place) for n in (9, 9, 12))
    alone, _ = layout_test._logits(net, [rows[-1]], torch.enable_grad, "padded")
    packed_attention.register()
    net.set_attn_implementation(packed_attention.NAME)
    monkeypatch.setattr(packed_attention.cpu_attention, "attend", broken)
    return layout_test.why_not(net, rows, alone, torch.enable_grad, "float32")


def test_a_wrong_call_of_ours_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        return len(*arguments)

    with pytest.raises(TypeError, match="len"):
        _tried(monkeypatch, wrong)


def test_what_a_kernel_refuses_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any) -> Any:
        raise RuntimeError("no kernel for this width")

    assert _tried(monkeypatch, refuses) == "no kernel for this width"


def test_a_kernel_without_a_backward_pass_is_found_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, outer: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("head width 200 has no backward kernel")

    net = llama()
    rows = tuple(Row(np.arange(n, dtype=np.int32), np.ones(n, bool), Place("rows.jsonl", 1)) for n in (9, 9, 12))
    packed_attention.register()
    net.set_attn_implementation(packed_attention.NAME)
    tried = (net, rows, contextlib.nullcontext, "packed")
    assert layout_test.why_no_gradient(*tried) == ""
    assert all(parameter.grad is None for parameter in net.parameters())
    whole = packed_attention.cpu_attention.attend
    monkeypatch.setattr(packed_attention.cpu_attention, "attend", lambda *given: ForwardOnly.apply(whole(*given)))
    assert layout_test.why_no_gradient(*tried) == "head width 200 has no backward kernel"


@pytest.mark.parametrize(
    ("asked", "dtype", "bf16", "full", "told"),
    [
        ("auto", torch.float32, False, False, ["so `auto` is float32; `model.dtype: float16` halves the memory"]),
        ("auto", torch.float32, False, True, []),
        ("auto", torch.bfloat16, True, False, []),
        ("auto", torch.float32, True, False, ["as when the run started"]),
        ("bfloat16", torch.bfloat16, False, False, ["bfloat16 is slow on this device"]),
        ("float16", torch.float16, False, False, []),
    ],
)
def test_what_is_said_of_a_precision(
    monkeypatch: pytest.MonkeyPatch, asked: str, dtype: torch.dtype, bf16: bool, full: bool, told: list[str]
) -> None:
    monkeypatch.setattr(base_model, "computes_in_bf16", lambda where: bf16)
    found = base_model.precision_notes(asked, dtype, torch.device("cuda"), full)
    assert len(found) == len(told)
    assert all(words in line for words, line in zip(told, found, strict=True))


def test_a_second_training_may_have_another_precision(tmp_path: Path, base: Path) -> None:
    path = tiny.write_recipe(tmp_path, base)
    AcceleratorState._reset_state(reset_partial_state=True)
    Accelerator(mixed_precision="bf16", cpu=True)
    with startup.own_accelerate():
        assert launcher.accelerator(recipe.load(path)).mixed_precision == "no"
    assert Accelerator(cpu=True).mixed_precision == "bf16", "the caller's is as it was"


class _Cuda:
    """The random generators of some devices."""

    def __init__(self, devices: int, current: int):
        self.states = [torch.full((16,), number, dtype=torch.uint8) for number in range(devices)]
        self.current = current

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: self.states[self.current])
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: self.states.__setitem__(self.current, state))


def test_each_process_keeps_the_state_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    _Cuda(4, current=2).put_in(monkeypatch)
    saved = training_state.randomness().as_json()
    assert saved["cuda"] == ["02" * 16]
    one = _Cuda(1, current=0)
    one.put_in(monkeypatch)
    training_state.set_random_state(saved)
    assert one.states[0].tolist() == [2] * 16


def test_states_of_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of an earlier version holds those of all devices of its machine."""
    saved = {**training_state.randomness().as_json(), "cuda": ["00" * 16, "01" * 16, "02" * 16]}
    two = _Cuda(2, current=1)
    two.put_in(monkeypatch)
    training_state.set_random_state(saved)
    assert [state.tolist()[0] for state in two.states] == [0, 1]


def test_the_state_of_a_paged_optimizer_is_paged_again() -> None:
    @dataclass(frozen=True)
    class Weight:
        is_cuda: bool

    class Paged:
        """What is asked of bitsandbytes' optimizers."""

        is_paged = True

        def __init__(self) -> None:
            self.state = {
                Weight(is_cuda=True): {"step": 3, "state1": torch.ones(4), "state2": torch.full((4,), 2.0)},
                Weight(is_cuda=False): {"step": 3, "state1": torch.ones(4)},
            }
            self.paged: list[torch.Tensor] = []

        def get_state_buffer(self, parameter: Any, dtype: torch.dtype) -> torch.Tensor:
            self.paged.append(torch.zeros(4, dtype=dtype))
            return self.paged[-1]

    Paged.__module__ = "bitsandbytes.optim.adamw"
    optimizer = Paged()
    assert adamw.is_paged(optimizer)
    adamw.page(optimizer)
    on_gpu, on_cpu = optimizer.state.values()
    assert [on_gpu["state1"] is optimizer.paged[0], on_gpu["state2"] is optimizer.paged[1]] == [True, True]
    assert [tensor.tolist() for tensor in optimizer.paged] == [[1.0] * 4, [2.0] * 4]
    assert on_cpu["state1"].tolist() == [1.0] * 4
    assert not adamw.is_paged(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_segments_grow_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], wanted: dict[str, str]
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    startup.expand_segments()
    assert {name: value for name, value in os.environ.items() if "ALLOC_CONF" in name} == wanted


@pytest.mark.parametrize("where", ["windows", "rocm"])
def test_segments_do_not_grow_where_torch_can_not(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if where == "windows":
        monkeypatch.setattr(startup.sys, "platform", "win32")
    else:
        monkeypatch.setattr(torch.version, "hip", "7.0")
    startup.expand_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
