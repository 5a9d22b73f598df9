"""What our kernels for a GPU take, beside torch's plain operations and its compiler: lines that begin with `= `.

    python benchmarks/gpu_kernels.py

At the shapes of a step of Llama-3.1-8B on 8,192 tokens in bfloat16. Each line has the microseconds of each way, what
the kernel reads and writes in a second as a share of what a copy does on the same card, and how far each way is from
float64: the norm of the difference over that of what is right, of the first 256 rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

TOKENS, WIDTH, INNER, WORDS, CHUNK = 8192, 4096, 14336, 128256, 1024
LOOKED_AT = 256  # rows that are held against float64


@dataclass(frozen=True)
class Case:
    """One kernel.

    Attributes:
        moved: bytes that it reads and writes; 0 where that is not what limits it.
        ways: what it is done by, each a function of nothing that returns tensors.
        right: what they should return for the first rows, or None where all must be equal to the first way's.
    """

    name: str
    moved: int
    ways: dict[str, Callable[[], tuple[torch.Tensor, ...]]]
    right: Callable[[], tuple[torch.Tensor, ...]] | None


def microseconds(work: Callable[[], Any], times: int = 20) -> float:
    """Return what a call takes on the card, the middle of so many."""
    for _ in range(3):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda._sleep(20_000_000)  # cycles: the calls are queued meanwhile, so that the card waits for none of them
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    taken = sorted(a.elapsed_time(b) * 1e3 for a, b in pairwise(marks))
    return taken[times // 2]


def drawn(rows: int, width: int, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(rows, width, device="cuda") * size).to(torch.bfloat16)


def some(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(one[:LOOKED_AT].double() for one in tensors)


def norms(by: dict[str, Any]) -> Iterator[Case]:
    x, g = drawn(TOKENS, WIDTH, 3), drawn(TOKENS, WIDTH)
    weight = (torch.rand(WIDTH, device="cuda") + 0.5).to(torch.bfloat16)
    scale = by["plain"].norm(x, weight, 1e-5)[1]

    def right() -> tuple[torch.Tensor, ...]:
        given, outer = some(x, g)
        with torch.enable_grad():
            given.requires_grad_()
            out = torch.nn.functional.rms_norm(given, (WIDTH,), weight.double(), 1e-5)
            return out.detach(), torch.autograd.grad(out, given, outer)[0]

    n = TOKENS * WIDTH * 2
    ways = {way: (lambda one=one: (one.norm(x, weight, 1e-5)[0],)) for way, one in by.items()}
    yield Case("norm", 2 * n, ways, lambda: right()[:1])
    ways = {way: (lambda one=one: (one.norm_back(g, x, scale, weight),)) for way, one in by.items()}
    yield Case("norm, back", 3 * n, ways, lambda: right()[1:])


def gates(by: dict[str, Any]) -> Iterator[Case]:
    gate, up, g = drawn(TOKENS, INNER, 3), drawn(TOKENS, INNER), drawn(TOKENS, INNER)

    def right() -> tuple[torch.Tensor, ...]:
        a, b, outer = some(gate, up, g)
        with torch.enable_grad():
            out = torch.nn.functional.silu(a.requires_grad_()) * b.requires_grad_()
            return out.detach(), *torch.autograd.grad(out, (a, b), outer)

    n = TOKENS * INNER * 2
    ways = {way: (lambda one=one: (one.gate(gate, up),)) for way, one in by.items()}
    yield Case("SwiGLU", 3 * n, ways, lambda: right()[:1])
    ways = {way: (lambda one=one: one.gate_back(g, gate, up)) for way, one in by.items()}
    yield Case("SwiGLU, back", 5 * n, ways, lambda: right()[1:])


def heads(triton_kernels: Any) -> Iterator[Case]:
    from loratune.kernels import linear_cross_entropy

    logits, targets = drawn(CHUNK, WORDS, 3), torch.randint(WORDS, (CHUNK,), device="cuda")
    work = logits.clone()

    def plain() -> tuple[torch.Tensor, ...]:
        linear_cross_entropy._Softmax(work, 0.0, True, None)(work.copy_(logits), targets[:, None])
        return (work,)

    def ours() -> tuple[torch.Tensor, ...]:
        triton_kernels.cross_entropy(work.copy_(logits), targets)
        return (work,)

    def right() -> tuple[torch.Tensor, ...]:
        gradient = some(logits)[0].softmax(dim=-1)
        gradient[torch.arange(LOOKED_AT, device="cuda"), targets[:LOOKED_AT]] -= 1
        return (gradient,)

    # the copy that brings fresh logits is counted in both
    yield Case("cross entropy, 1,024 tokens", 5 * CHUNK * WORDS * 2, {"plain": plain, "triton": ours}, right)


def weights() -> Iterator[Case]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from loratune.kernels import lora_linear

    weight = drawn(INNER, WIDTH, 0.02)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ways = {
        "plain": lambda: (dequantize_4bit(packed, state),),
        "triton": lambda: (lora_linear.in_one_launch(packed, state),),
    }
    yield Case("nf4 (beside bitsandbytes)", int(weight.numel() * 2.52), ways, None)


def attention() -> Iterator[Case]:
    """Rows of one length, forward and backward; the last token of a row is only foretold."""
    for rows, length in ((2, 4095), (1, 8191), (8, 1023)):
        shapes = [(1, rows * length, heads, 128) for heads in (32, 8, 8)]
        parts = [torch.randn(shape, device="cuda").bfloat16().transpose(1, 2).requires_grad_() for shape in shapes]
        outer = torch.randn(1, rows * length, 32, 128, device="cuda").bfloat16()
        ways = {way: partial(attended, way, parts, outer, length) for way in ("varlen", "cuDNN")}
        yield Case(f"attention, {rows} x {length}", 0, ways, None)


def attended(way: str, parts: list[torch.Tensor], outer: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
    from loratune.kernels import packed_attention

    q, k, v = parts
    with torch.enable_grad():
        if way == "cuDNN":
            out = packed_attention.even(q, k, v, None, length)
        else:
            starts = torch.arange(0, q.shape[2] + 1, length, device="cuda", dtype=torch.int32)
            out = packed_attention.varlen(q, k, v, None, None, (starts, starts), (length, length), None)
        return out[0].detach(), *(g[0].transpose(0, 1) for g in torch.autograd.grad(out, parts, outer))


def rotations() -> Iterator[Case]:
    from transformers.models.llama import modeling_llama

    from loratune.kernels import rotary

    q, k = (torch.randn(1, TOKENS, heads, 128, device="cuda").bfloat16().transpose(1, 2) for heads in (32, 8))
    g = torch.randn_like(q), torch.randn_like(k)
    angles = torch.rand(1, TOKENS, 128, device="cuda") * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def both(way: Any) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            parts = [part.detach().requires_grad_() for part in (q, k)]
            outs = way(*parts, cos, sin)
            return tuple(one[0].transpose(0, 1) for one in (*outs, *torch.autograd.grad(outs, parts, g)))

    ways = {
        "plain": partial(both, rotary.own(modeling_llama)),
        "triton": partial(both, rotary.Rotary.apply),
    }
    yield Case("rotary, forward and back", 4 * 2 * TOKENS * 40 * 128, ways, None)


def products() -> Iterator[Case]:
    """A layer with its adapter, the large product first or the small one."""
    from loratune.kernels import lora_linear

    x, weight, inner, up = drawn(TOKENS, WIDTH), drawn(INNER, WIDTH, 0.02), drawn(TOKENS, 16), drawn(INNER, 16)
    ways = {
        "large first": lambda: (torch.nn.functional.linear(x, weight).addmm_(inner, up.t()),),
        "small first": lambda: (lora_linear._product(x, weight, None, inner, up),),
    }
    yield Case("x W^T + i B^T", 0, ways, None)


def copy_rate() -> float:
    """Return the bytes a second that a copy of 512 MB reads and writes."""
    one = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(one)
    return 2 * 2**29 / (microseconds(lambda: other.copy_(one)) * 1e-6)


def tell(case: Case, rate: float) -> None:
    """Print a line on a kernel; a way that fails says so."""
    right = case.right() if case.right else None
    told, first = [], None
    for way, work in case.ways.items():
        try:
            got = work()
            first = got if first is None else first
            wanted = right or some(*first)
            off = max(float((a - b).norm() / b.norm()) for a, b in zip(some(*got), wanted, strict=True))
            equal = "" if right or case.name[:3] != "nf4" else f", equal: {all(map(torch.equal, got, first))}"
            taken = microseconds(work)
            share = f"{case.moved / (taken * 1e-6) / rate:.0%} of a copy, " if case.moved else ""
            told.append(f"{way} {taken:.0f} us ({share}{off:.1e} off{equal})")
        except Exception as error:
            told.append(
                f"{way} failed ({str(error).strip().splitlines()[-1][:100] if str(error).strip() else error!r})"
            )
    print(f"= {case.name}: {'; '.join(told)}", flush=True)


def main() -> None:
    """Try the kernels one after the other; what torch compiles is left out once half the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=36, help="seconds for everything")
    limit = parser.parse_args().limit
    if not torch.cuda.is_available():
        print("= no GPU is in reach: nothing is measured")
        return
    began = time.monotonic()
    from loratune.kernels import elementwise

    torch.manual_seed(0)
    rate = copy_rate()
    print(f"= {torch.cuda.get_device_name()}: a copy moves {rate / 1e12:.2f} TB/s", flush=True)
    try:
        from loratune.kernels import triton_kernels

        ours = {"triton": elementwise.in_triton()}
    except ImportError as error:
        sys.exit(f"= no kernels: {error}")
    plain = {"plain": elementwise.PLAIN}
    with torch.no_grad():
        everything = (
            weights(),
            heads(triton_kernels),
            gates(plain | ours),
            norms(plain | ours),
            rotations(),
            attention(),
            products(),
        )
        for cases in everything:
            for case in cases:
                tell(case, rate)
                torch.cuda.empty_cache()
        for cases in (
            norms({**plain, "compiled": elementwise.compiled()}),
            gates({"compiled": elementwise.compiled()}),
        ):
            for case in cases:
                if time.monotonic() - began < limit - 12:  # what a compilation takes at most
                    tell(case, rate)
    print(f"= {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
