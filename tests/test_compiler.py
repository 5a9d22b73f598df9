"""What torch compiles is compiled when it is called."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from loratune import compiler

IMPORT = """
import sys
from loratune import compiler
with compiler.later():
    import bitsandbytes, peft
sys.exit("torch._inductor.compile_fx" in sys.modules)
"""


def test_bitsandbytes_and_peft_come_without_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_function_is_compiled_once_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compile_now(function: Any, **settings: Any) -> Any:
        asked.append((function, settings))
        return function

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiler.later():
        plain = torch.compile(lambda x: x + 1)
        dynamic = torch.compile(dynamic=True)(lambda x: x + 2)
        module = torch.compile(torch.nn.Identity())
    assert torch.compile is compile_now
    assert [type(what) for what, _ in asked] == [torch.nn.Identity]
    assert module(1) == 1
    assert [plain(1), plain(2), dynamic(1)] == [2, 3, 3]
    assert [settings for _, settings in asked] == [{}, {}, {"dynamic": True}]


def test_it_is_put_back_after_an_error() -> None:
    before = torch.compile
    with pytest.raises(ValueError), compiler.later():
        raise ValueError
    assert torch.compile is before
