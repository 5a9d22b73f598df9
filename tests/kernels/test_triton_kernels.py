"""Our kernels for a GPU without one: right in Triton's interpreter, and compiled for four generations of cards."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loratune.kernels import gpu_self_test
from tests.kernels.test_torch_compile import adapted

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def child(*words: str, **settings: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **settings}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
def test_every_kernel_in_the_interpreter() -> None:
    words = ("-m", "pytest", "-q", "-x", "-n", "0", "-W", "default", "tests/kernels/in_interpreter.py")
    child(*words, TRITON_INTERPRET="1")


COMPILE = r"""
import pathlib
import re
import subprocess
import sys
import triton
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loratune.kernels import triton_kernels as ours
BF, F, I = "*bf16", "*fp32", "i32"
CASES = {
    "_norm": ([BF, BF, BF, F, I, I, I, "fp32", 1, 4096], {"num_warps": 8}),
    "_norm_back": ([BF, BF, F, BF, BF, I, I, I, I, 1, 4096], {"num_warps": 8}),
    "_gate": ([BF, BF, BF, I, I, I, 1024], {}),
    "_gate_back": ([BF, BF, BF, BF, BF, I, I, I, I, 1024], {}),
    "_cross_entropy": ([BF, "*i64", F, I, "fp32", 128256, True, 4096], {"num_warps": 8}),
    "_rotary": ([BF, BF, BF, BF, BF, BF, *[I] * 14, True, 32, 8, 64], {}),
    "_nf4": (["*u8", "*u8", F, F, F, F, BF, I, I, True, 64, 256, 64], {"enable_fp_fusion": False}),
}
jitted = {name for name, made in vars(ours).items() if type(made).__name__ == "JITFunction"} - {"_turn"}
assert jitted == set(CASES), jitted ^ set(CASES)
tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ptxas = max(tools.glob("ptxas*"))  # the newer one, where there are two


def resources(ptx):
    target = re.search(r"\.target (\w+)", ptx)[1]
    words = [ptxas, "-v", f"--gpu-name={target}", "-o", "/dev/null", "/dev/stdin"]
    done = subprocess.run(words, input=ptx, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = done.stderr
    return [int(re.search(rf"(\d+) {what}", told)[1]) for what in ("registers", "bytes spill stores", "bytes spill loads")]


for name, (given, options) in CASES.items():
    kernel = getattr(ours, name)
    kinds = dict(zip(kernel.arg_names, given, strict=True))
    fixed = {(n,): kind for n, kind in enumerate(given) if not isinstance(kind, str)}
    even = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(given) if str(kind)[0] == "*" or kind == "i32"}
    signature = {name: kind if isinstance(kind, str) else "constexpr" for name, kind in kinds.items()}
    for generation in (80, 86, 89, 90):
        source = ASTSource(kernel, signature, constexprs=fixed, attrs=even)
        made = compile(source, target=GPUTarget("cuda", generation, 32), options=options)
        text = made.asm["ptx"]
        registers, stores, loads = resources(text)
        assert stores == loads == 0, (name, generation, "spills")
        assert made.metadata.shared <= 16384, (name, made.metadata.shared)
        assert "v4" in text, (name, "no 16 bytes at once")
        assert name != "_nf4" or "fma" not in text, "rounded once where bitsandbytes rounds twice"
        print(f"{name:16} sm_{generation} {registers:4} registers, 0 spilled, {made.metadata.shared} bytes shared")
"""


@needs_triton
def test_every_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    said = child("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    print(said)
    assert len(said.splitlines()) == 28


def test_on_a_cpu_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_self_test, "find_spec", pytest.fail)
    assert gpu_self_test.install(adapted(), torch.float32) == ([], [])


def test_without_triton_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_self_test, "KIND", "cpu")
    monkeypatch.setattr(gpu_self_test, "find_spec", lambda name: None)
    used, notes = gpu_self_test.install(adapted(), torch.float32)
    assert (used, len(notes)) == ([], 1)
    assert "`triton` is not installed" in notes[0]
