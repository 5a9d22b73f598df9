"""Self-test of our GPU kernels before a training uses them; one that gives other numbers is left out, with a note."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from loratune.kernels import elementwise, gpu_kernels, norm_swiglu, packed_attention, rotary
from loratune.kernels.layer_kinds import is_of_bitsandbytes

KIND = "cuda"  # type of devices that have kernels
HOPPER = (9, 0)  # compute capability from which cuDNN's attention is faster than flash attention


@dataclass(frozen=True)
class _Trial:
    """The self-test of a kernel on a device.

    Attributes:
        name: of the kernel.
        run: returns why it can't be used, or None; may raise whatever Triton's compiler and the driver raise.
        use: turns it on.
    """

    name: str
    run: Callable[[], str | None]
    use: Callable[[], None]


def install(net: Any, dtype: torch.dtype, begun: Collection[str] | None = None) -> tuple[list[str], list[str]]:
    """Turn on the kernels that pass their self-test on a model's devices.

    Args:
        net: the model, with its adapter, before it is wrapped.
        dtype: of its states.
        begun: names of the kernels that a resumed run began with: no others are used, as the last digits would differ.

    Returns:
        Names of the kernels in use, sorted, and notes on those that are not.
    """
    gpu_kernels.stop()
    devices = sorted({p.device for p in net.parameters() if p.device.type == KIND}, key=str)
    if not devices or begun == []:
        return [], []
    if find_spec("triton") is None:
        return [], ["the package `triton` is not installed: norms and activations are not fused"]
    right: set[str] = set()
    wrong: dict[str, str] = {}
    for trial in _trials(net, dtype, devices):
        if begun is not None and trial.name not in begun:
            continue
        if why := _why_not(trial):
            wrong[trial.name] = why
        else:
            trial.use()
            right.add(trial.name)
    return sorted(right), [f"the GPU kernel `{name}` is not used: {why}" for name, why in sorted(wrong.items())]


def _why_not(trial: _Trial) -> str | None:
    """Return why a kernel can't be used, in one line, or None."""
    try:
        with torch.no_grad():
            return trial.run()
    except Exception as error:
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _trials(net: Any, dtype: torch.dtype, devices: list[torch.device]) -> Iterator[_Trial]:
    for kind, width, device in sorted(norm_swiglu.found(net), key=str):
        run = partial(_elementwise, kind, width, dtype, device)
        yield _Trial(kind, run, partial(norm_swiglu.switch, net, "triton", {(kind, width, device)}))
    for device in devices:
        layers = [m for m in net.modules() if is_of_bitsandbytes(m, "Linear4bit") and m.weight.device == device]
        if layers:
            yield _Trial("nf4", partial(_nf4, layers), partial(gpu_kernels.use, "nf4", device))
        for home in rotary.homes(net):
            yield _Trial("rotary", partial(_rotary, home, net, dtype, device), partial(rotary.use, home, device))
        if dtype is not torch.float32 and torch.cuda.get_device_capability(device) >= HOPPER:
            yield _Trial("even_rows", partial(_even, net, device), partial(gpu_kernels.use, "even_rows", device))
    head = net.get_output_embeddings()
    if isinstance(head, torch.nn.Linear) and head.weight.device in devices:
        where = head.weight.device
        run = partial(_cross_entropy, head.out_features, dtype, where)
        yield _Trial("cross_entropy", run, partial(gpu_kernels.use, "cross_entropy", where))


def _elementwise(kind: str, width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    from loratune.kernels import triton_kernels

    if kind == "norm" and width > triton_kernels.WIDEST:
        return f"rows of {width:,} values are too long"
    other = elementwise.differs(kind, width, dtype, device, "triton")
    return f"`{other}` gives different values" if other else None


def _nf4(layers: list[Any]) -> str | None:
    """Try one layer of each kind of quantization in use: the weight must equal bitsandbytes' bit for bit."""
    from bitsandbytes.functional import dequantize_4bit

    from loratune.kernels import lora_linear

    tried = set()
    for layer in layers:
        packed, state = layer.weight.data, layer.weight.quant_state
        kind = (state.quant_type, state.nested, state.blocksize, state.dtype)
        if kind in tried or not lora_linear.is_nf4(packed, state):
            continue
        tried.add(kind)
        if not torch.equal(lora_linear.in_one_launch(packed, state), dequantize_4bit(packed, state)):
            return "weights differ from those of bitsandbytes"
    return None if tried else "no weights are in nf4"


def _cross_entropy(words: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Try a few rows against float64, in the precision of the hidden states and in that of autocast."""
    from loratune.kernels import triton_kernels

    random = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randn(5, words, generator=random).to(device) * 3
    targets = torch.tensor([0, 1, words // 2, words - 2, words - 1], device=device).clamp_(0, words - 1)
    for kind in {dtype, torch.bfloat16}:
        for smoothing in (0.0, 0.1):
            logits = drawn.to(kind)
            with torch.enable_grad():
                exact = logits.double().requires_grad_()
                wanted = cross_entropy(exact, targets, reduction="none", label_smoothing=smoothing)
                (gradient,) = torch.autograd.grad(wanted.sum(), exact)
            for keep in (False, True):
                losses = triton_kernels.cross_entropy(logits, targets, smoothing, gradient=keep)
                if not (losses.double() - wanted).norm() <= 1e-5 * wanted.norm():
                    return "losses differ"
            if not (logits.double() - gradient).norm() <= elementwise.CLOSE[str(kind)] * gradient.norm():
                return "gradients differ"
    return None


def _heads(net: Any) -> tuple[int, int, int]:
    """Return the numbers of query and key heads of a model, and their width."""
    config = net.config.get_text_config().to_dict()
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return heads, config.get("num_key_value_heads") or heads, width


def _rotary(home: ModuleType, net: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Try the kernel against the model's own function, forward and backward, in the memory layout of a product."""
    heads, of_keys, width = _heads(net)
    random = torch.Generator(device="cpu").manual_seed(0)
    shapes = [(2, 9, heads, width), (2, 9, of_keys, width)]
    q, k = (torch.randn(s, generator=random).to(device, dtype).transpose(1, 2) for s in shapes)
    outer = [torch.randn(part.shape, generator=random).to(device, dtype) for part in (q, k)]
    angles = torch.randn(1, 9, width, generator=random)
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    found = []
    for way in (rotary.own(home), rotary.Rotary.apply):
        with torch.enable_grad():
            given = [part.detach().requires_grad_() for part in (q, k)]
            outs = way(*given, cos, sin)
            found.append([*outs, *torch.autograd.grad(outs, given, outer)])
    for wanted, got in zip(*found, strict=True):
        if not elementwise.is_near(got, wanted):
            return "its values differ from those of the model's own"
    return None


def _even(net: Any, device: torch.device) -> str | None:
    """Try attention of rows of one length against that of rows of any length, with the model's numbers of heads."""
    heads, of_keys, width = _heads(net)
    for rows, length in ((1, 256), (2, 255), (3, 1023), (1, 4095)):
        random = torch.Generator(device=device).manual_seed(0)
        shapes = [(1, rows * length, number, width) for number in (heads, of_keys, of_keys)]
        q, k, v, outer = (
            torch.randn(shape, generator=random, device=device, dtype=torch.bfloat16) for shape in (*shapes, shapes[0])
        )
        drawn = [part.transpose(1, 2) for part in (q, k, v)]
        starts = torch.arange(rows + 1, device=device, dtype=torch.int32) * length
        found = []
        for one in (False, True):
            with torch.enable_grad():
                q, k, v = (part.detach().requires_grad_() for part in drawn)
                if one:
                    out = packed_attention.even(q, k, v, None, length)
                else:
                    out = packed_attention.varlen(q, k, v, None, None, (starts, starts), (length, length), None)
                found.append([out, *torch.autograd.grad(out, (q, k, v), outer)])
        for wanted, got in zip(*found, strict=True):
            if not elementwise.is_near(got, wanted):
                return "its values differ from those of variable-length attention"
    return None
