"""A GPU without numbers: tensors that say they are on one, an error for mixed devices, and counts of what is asked of it.

torch's FakeTensorMode can't run a backward pass for CUDA in a build without CUDA. Here the tensors are on the meta
device, and Python sees another device than torch's C++ code does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
# no kernel: views, and what only reads or sets sizes
_FREE = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split", "split_with_sizes",
    "unsqueeze", "squeeze", "detach", "alias", "as_strided", "empty", "empty_like", "new_empty", "empty_strided",
    "_reshape_alias", "unbind", "unfold", "view_as_real", "diagonal", "new_empty_strided", "lift_fresh", "resize_",
}  # fmt: skip


class OnGpu(torch.Tensor):
    """A meta tensor that says it is on a GPU."""

    hidden = 0  # above 0 while a shape is computed, which must see the meta device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta") if OnGpu.hidden else DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return not OnGpu.hidden

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return bool(OnGpu.hidden)

    def get_device(self) -> int:
        return 0

    def record_stream(self, stream: Any) -> None: ...

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.to("cpu")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def on_gpu(tensor: torch.Tensor) -> OnGpu:
    """Return a tensor of the same shape on the GPU, without its numbers."""
    if isinstance(tensor, OnGpu):
        return tensor
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return torch.Tensor._make_subclass(OnGpu, there)  # type: ignore[return-value]


class Gpu(TorchDispatchMode):
    """Runs operations on shapes alone.

    Attributes:
        launches: kernels by name.
        syncs: what the host had to wait for, in order.
        copies: tensors copied to the GPU.
        copies_out: tensors copied to pinned memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.syncs: list[str] = []
        self.copies = self.copies_out = 0

    def __torch_dispatch__(self, op: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        named, name = dict(named or {}), op.overloadpacket.__name__
        tensors = [one for one in tree_leaves((given, named)) if isinstance(one, torch.Tensor)]
        here = [one for one in tensors if isinstance(one, OnGpu)]
        to = torch.device(named["device"]) if named.get("device") is not None else None
        if name in ("pin_memory", "_pin_memory"):
            return given[0]
        if not here and (to is None or to.type == "cpu"):  # `meta`: out of a C++ function that saw the real device
            return op(*given, **named)
        if name == "copy_" and not isinstance(given[0], OnGpu):
            self.copies_out += 1  # to pinned memory: nobody waits
            return given[0]
        if to is not None and to.type == "cpu":
            self.syncs.append(f"{name} to the host")
            return torch.ones(here[0].shape, dtype=named.get("dtype") or here[0].dtype)
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal"):
            self.syncs.append(name)
            return True if here[0].dtype is torch.bool else 1
        if name in ("nonzero", "masked_select", "unique_dim") or _by_mask(name, given):
            raise AssertionError(f"{name}: a size that depends on numbers")
        if name not in ("_to_copy", "copy_"):
            mixed = [one.shape for one in tensors if not isinstance(one, OnGpu) and one.dim()]
            assert not mixed, f"{op}: tensors of shape {mixed} are on the host, others on the GPU"
        elif len(here) < len(tensors):
            self.copies += 1
        if to is not None:
            named["device"] = torch.device("meta")
        named.pop("pin_memory", None)
        if name not in _FREE:
            self.launches[name] += 1
        given, named = tree_map(_plain, (given, named))
        OnGpu.hidden += 1
        try:
            return tree_map(_marked, op(*given, **named))
        finally:
            OnGpu.hidden -= 1


def _plain(one: Any) -> Any:
    """Return what the meta kernels of torch can take."""
    if isinstance(one, torch.Tensor) and not isinstance(one, OnGpu):
        return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="meta")
    return one


def _marked(one: Any) -> Any:
    if isinstance(one, torch.Tensor) and not isinstance(one, OnGpu):
        return torch.Tensor._make_subclass(OnGpu, one)
    return one


def _by_mask(name: str, given: Any) -> bool:
    places = given[1] if name in ("index", "index_put", "index_put_") else ()
    return any(isinstance(one, torch.Tensor) and one.dtype is torch.bool for one in places)


class _Launches:
    """In the place of a Triton kernel."""

    def __init__(self, name: str, gpu: Gpu):
        self.name, self.gpu = name, gpu

    def __getitem__(self, grid: Any) -> Any:
        def launch(*given: Any, **named: Any) -> None:
            tensors = [one for one in given if isinstance(one, torch.Tensor)]
            assert all(isinstance(one, OnGpu) for one in tensors), f"{self.name}: a tensor on the host"
            self.gpu.launches[f"triton{self.name}"] += 1

        return launch


def move(net: Any, stays: Collection[Any] = ()) -> None:
    """Move a model to the GPU, quantization states too, but for some modules."""
    for module in net.modules():
        if module in stays:
            continue
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                there = on_gpu(tensor.detach())
                held[name] = there if held is module._buffers else _parameter(there, tensor)


def _parameter(there: OnGpu, old: torch.Tensor) -> torch.Tensor:
    there.requires_grad_(old.requires_grad)
    for name in ("quant_state", "quant_type", "blocksize", "compress_statistics", "bnb_quantized"):
        if hasattr(old, name):
            setattr(there, name, getattr(old, name))
    state = getattr(there, "quant_state", None)
    for one in (state, getattr(state, "state2", None)):
        for name in ("absmax", "code", "offset"):
            if isinstance(getattr(one, name, None), torch.Tensor):
                setattr(one, name, on_gpu(getattr(one, name)))
    return there


class _Stream:
    """A stream that has nothing to do."""

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self) -> None: ...


def _unpinned(empty: Any) -> Any:
    """Return `torch.empty` without pinned memory, which needs a GPU."""
    return lambda *shape, pin_memory=False, **named: empty(*shape, **named)


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Give the tests a GPU without numbers; Triton's kernels are counted and not run."""
    from loratune.kernels import triton_kernels

    made = Gpu()
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch, "empty", _unpinned(torch.empty))
    monkeypatch.setattr(torch.nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True)
    for name, kernel in list(vars(triton_kernels).items()):
        if type(kernel).__name__ in ("JITFunction", "InterpretedFunction"):
            monkeypatch.setattr(triton_kernels, name, _Launches(name, made))
    with made:
        yield made
