"""What a benchmark's figures were measured on, and what that can do."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

A_LOOK = 0.1  # seconds in which the matrix rate is looked at, after each step


def processor() -> str:
    """Return the processor's name, as far as it is told, and how many cores there are."""
    name, file = platform.machine(), Path("/proc/cpuinfo")
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} cores"


def matrix_rate(config: dict[str, Any], precision: str, seconds: float = A_LOOK) -> float:
    """Return what a product of the model's shapes and precision reaches at best in so many seconds, in FLOP/s."""
    import torch

    dtype, on_gpu = getattr(torch, precision), torch.cuda.is_available()
    tokens, width, inner = 8192 if on_gpu else 1024, config["hidden_size"], config["intermediate_size"]
    shapes, where = ((tokens, width), (inner, width)), "cuda" if on_gpu else "cpu"
    x, w = (torch.full(shape, 0.5, dtype=dtype, device=where) for shape in shapes)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * tokens * width * inner / best


def peak_memory() -> int:
    """Return the highest memory of this process in bytes: what torch took of the GPU, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
