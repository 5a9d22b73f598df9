"""Settings of this process and of other libraries during a call, each with its reason; restored afterwards.

A caller of the Python API has their own warnings, logging and random numbers, which must not change.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PRODUCTS = 64  # primitives of matrix products that oneDNN caches: more than one pass over a layer needs
_TOLD = ("transformers", "bitsandbytes", "huggingface_hub")  # a missing optional kernel, retries while offline
_VARIABLES = (
    "TOKENIZERS_PARALLELISM",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "LRU_CACHE_CAPACITY",
    "PYTORCH_ALLOC_CONF",
)


@contextmanager
def training() -> Iterator[None]:
    """Apply all settings that a training needs."""
    with quiet(), computing(), own_accelerate():
        keep_few_products()
        expand_segments()
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from printing; we report what matters."""
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]
    from tqdm import tqdm  # type: ignore[import-untyped]

    told = transformers.utils.logging
    levels = {name: logging.getLogger(name).level for name in _TOLD}
    bars, hub_bars = told.is_progress_bar_enabled(), not are_progress_bars_disabled()
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    interval = tqdm.monitor_interval
    try:
        with warnings.catch_warnings():
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns; we never fork
            told.disable_progress_bar()
            tqdm.monitor_interval = 0  # else a bar leaves a thread behind, even a hidden one
            for name in _TOLD:
                logging.getLogger(name).setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|accelerate)\b.*")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            told.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
        tqdm.monitor_interval = interval
        _set(variables)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def computing() -> Iterator[None]:
    """Restore torch's threads, precision of products and random numbers, and Python's and NumPy's, after a call.

    A GPU first used during the call has its generator reset to the caller's last `torch.manual_seed`.
    """
    import random

    import numpy as np
    import torch

    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    products = torch.backends.cuda.matmul
    bf16, fp16 = products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if _is_used(torch.cuda) else None
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        products.allow_bf16_reduced_precision_reduction = bf16
        products.allow_fp16_reduced_precision_reduction = fp16
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
        elif _is_used(torch.cuda):
            torch.cuda.manual_seed_all(torch.initial_seed())


def _is_used(cuda: Any) -> bool:
    return bool(cuda.is_initialized())


@contextmanager
def own_accelerate() -> Iterator[None]:
    """Give a training a fresh state of accelerate, and restore the caller's afterwards.

    accelerate has one global state: without this a second training would be bound to the precision of the first, and
    the caller's own Accelerator to ours. Connections between processes are kept.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def states() -> list[dict[str, object]]:
        met = torch.distributed.is_available() and torch.distributed.is_initialized()
        kinds = (AcceleratorState, GradientState) if met else (AcceleratorState, GradientState, PartialState)
        return [kind._shared_state for kind in kinds]

    before = [(state, dict(state)) for state in states()]
    for state, _ in before:
        state.clear()
    try:
        yield
    finally:
        kept = states()
        for state, content in before:
            if any(state is one for one in kept):
                state.clear()
                state.update(content)


def keep_few_products() -> None:
    """Limit oneDNN's cache of matrix products; must be called before the first product.

    Each entry is for one number of tokens and takes 0.6 MB. Nearly every step has a new number, and by default oneDNN
    keeps a thousand entries, twice. They are allocated between activations, whose memory they fragment.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_PRODUCTS))


def expand_segments() -> None:
    """Use expandable segments in torch's CUDA allocator; must be called before a GPU is first used.

    Nearly every step has a new number of tokens, so activations have new sizes. With fixed segments, up to half a
    gigabyte of an 8B model's training would be lost to fragmentation. Not on Windows and with ROCm, where torch
    supports it partly or not at all, and warns.
    """
    import torch

    able = sys.platform != "win32" and torch.version.hip is None
    if able and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
