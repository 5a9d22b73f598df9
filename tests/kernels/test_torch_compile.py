"""What torch compiles is compiled when it is called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from loratune.errors import SetupError
from loratune.kernels import elementwise, torch_compile
from loratune.methods import Lora
from loratune.methods.tuned import Setup
from tests.objectives.test_sft import llama

IMPORT = """
import sys
from loratune.kernels import torch_compile as compiler
with compiler.later():
    import bitsandbytes, peft
sys.exit("torch._inductor.compile_fx" in sys.modules)
"""


COMMANDS = """
import sys
from loratune.commands import chat, evaluate, merge
from loratune.training import run
print([name for name in ("peft", "bitsandbytes") if name in sys.modules])
"""


def test_commands_are_imported_without_them() -> None:
    """They are imported within `later`, and once their loggers are quiet."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMMANDS], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_bitsandbytes_and_peft_come_without_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_function_is_compiled_once_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def compile_now(function: Any, **settings: Any) -> Any:
        asked.append((function, settings))
        return function

    monkeypatch.setattr(torch, "compile", compile_now)
    with torch_compile.later():
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
    with pytest.raises(ValueError), torch_compile.later():
        raise ValueError
    assert torch.compile is before


@pytest.mark.parametrize(
    ("wish", "device", "operations", "begun", "wanted"),
    [
        ("on", "cpu", 0, None, True),
        ("off", "cuda", 1e20, True, False),
        ("auto", "cuda", 1e20, None, True),
        ("auto", "cuda", 1e15, None, False),
        ("auto", "cpu", 1e20, None, False),
        ("auto", "cuda", 1e20, False, False),
        ("auto", "cpu", 0, True, True),
    ],
)
def test_auto_compiles_what_pays_and_keeps_to_what_was_begun(
    wish: str, device: str, operations: float, begun: bool | None, wanted: bool
) -> None:
    assert torch_compile.is_wanted(wish, device, operations, begun) is wanted
    assert torch_compile.is_wanted(wish, device, operations, begun, done=True) is (
        wanted and (wish == "on" or bool(begun))
    )


def adapted() -> Any:
    return Lora(r=2).apply(llama(), Setup(1)).net.train()


def compiles(net: Any) -> bool:
    norm = net.base_model.model.model.norm
    return bool(norm.forward.__func__.keywords.get("way") == "compiled")


WRONG = ["norm_back", OSError("no compiler\nat all"), SyntaxError()]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_cant_be_compiled_stays_as_it_is(wrong: str | Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(kind: str, width: int, dtype: torch.dtype, device: torch.device) -> str:
        if isinstance(wrong, str):
            return wrong
        raise wrong

    monkeypatch.setattr(elementwise, "differs", differs)
    net, told = adapted(), []
    done, note = torch_compile.install(net, torch.float32, "auto", told.append)
    assert (done, compiles(net), len(told)) == (False, False, 1)
    shown = {0: "`norm_back` gives different values", 1: "no compiler", 2: "None"}[WRONG.index(wrong)]
    assert note == f"nothing is compiled: torch can't compile here ({shown})"
    with pytest.raises(SetupError, match=f"`train.compile: on`: torch can't compile here: {shown}"):
        torch_compile.install(net, torch.float32, "on", told.append)


def test_where_nothing_is_known_nothing_is_compiled() -> None:
    done, note = torch_compile.install(llama(), torch.float32, "on", pytest.fail)
    assert not done
    assert note.startswith("nothing is compiled: its norms")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, as it is imported
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_compiled_it_learns_the_same_and_no_length_is_compiled_anew() -> None:
    """In bfloat16 as near to the truth as without; in float32 the same but for the last digits."""
    for kind in ("norm", "gate"):
        assert elementwise.differs(kind, 64, torch.float32, torch.device("cpu")) is None
    truth: list[torch.Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        off = []
        for compiled in (False, True):
            torch.manual_seed(0)
            net = Lora(r=4).apply(llama().to(dtype), Setup(1)).net.train()
            with torch.no_grad():
                for name, parameter in net.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
            if compiled:
                assert torch_compile.install(net, dtype, "on", lambda line: None) == (True, "")
                assert compiles(net)
                losses(net, torch.arange(36).view(3, 12))  # widths are compiled now
            with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
                found = losses(net, torch.arange(60).view(2, 30) % 50)
            truth = truth or found
            off.append(sum(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)))
        assert off[1] < (1e-4 if dtype is torch.float32 else 1.1 * off[0])
        assert off[1] > 0, "nothing was compiled"


def losses(net: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the loss and the gradient of every trained tensor, float32."""
    states = net.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state.float()
    loss = (states * torch.linspace(0, 99, states.numel()).sin().view_as(states)).sum()
    found = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])
    return [part.detach().float() for part in (loss, *found)]
