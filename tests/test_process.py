"""A call from Python leaves the process as it found it, also after an error in the middle, and in any thread."""

from __future__ import annotations

import gc
import json
import locale
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
from tqdm import tqdm

import loratune
from loratune.events import Answered, Counted, Event, StepDone, Told
from loratune.system import limits, startup
from tests import tiny
from tests.faults import scene

LIBRARIES = (
    "",
    "transformers",
    "datasets",
    "bitsandbytes",
    "huggingface_hub",
    "accelerate",
    "peft",
    "torch",
    "loratune",
)


def snapshot() -> dict[str, Any]:
    """Return all that a call might change."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    return {
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "path": list(sys.path),
        "temporary": tempfile.tempdir,
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": [(one.level, one.disabled, one.propagate, list(one.handlers)) for one in loggers],
        "loggers": logging.root.manager.disable,
        "transformers": (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()),
        "bars": (are_progress_bars_disabled(), tqdm.monitor_interval),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "dtype": torch.get_default_dtype(),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark),
        "products": (torch.get_float32_matmul_precision(), matmul.allow_tf32, cudnn.allow_tf32),
        "sums": (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction),
        "compiler": torch.compile,
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "garbage": (gc.get_threshold(), gc.isenabled(), gc.get_freeze_count()),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "accelerate": [dict(state._shared_state) for state in (AcceleratorState, GradientState, PartialState)],
    }


def handles() -> list[str]:
    """Return what is open and who runs: threads, processes and files, but for pytest's own."""
    files = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    opened = sorted(os.readlink(name) for name in files if os.path.lexists(name))
    running = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [*(one for one in opened if "/fd" not in one), *(one.name for one in threading.enumerate()), *running]


def left(before: list[str]) -> list[str]:
    """Return what is open beside what was; pyarrow's own threads may still be letting go of a file."""
    until = time.monotonic() + 5
    while (more := Counter(handles()) - Counter(before)) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    return sorted(more)


@pytest.fixture
def unlike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make everything other than what a call would set, as a program of somebody else may."""
    for name in (
        "TOKENIZERS_PARALLELISM",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
        "PYTORCH_ALLOC_CONF",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if tqdm.monitor is not None:  # of an earlier test
        tqdm.monitor.exit()
        tqdm.monitor = None
    matmul = torch.backends.cuda.matmul
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    with startup.computing(), startup.own_accelerate(), warnings.catch_warnings():
        torch.manual_seed(5)
        random.seed(6)
        np.random.seed(7)
        torch.set_num_threads(limits.cores() + 1)
        warnings.filterwarnings("ignore", message="a filter of the caller")
        torch.set_float32_matmul_precision("medium")
        matmul.allow_bf16_reduced_precision_reduction = True
        transformers.logging.set_verbosity_info()
        transformers.logging.enable_progress_bar()
        logging.getLogger("bitsandbytes").setLevel(logging.INFO)
        logging.getLogger("huggingface_hub").setLevel(logging.INFO)
        Accelerator(mixed_precision="bf16", cpu=True)
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    transformers.logging.disable_progress_bar()


class Mine(Exception):
    """An error of the caller's own."""


def raise_at(kind: type[Event]) -> Callable[[Event], None]:
    def hear(event: Event) -> None:
        if isinstance(event, kind):
            raise Mine

    return hear


def unchanged(call: Callable[[], Any], error: type[BaseException] | None = None) -> Any:
    """Carry out a call and check that nothing is other than before; return what it returns."""
    for name in LIBRARIES:
        logging.getLogger(name)
    before, there = snapshot(), handles()
    result = None
    if error is None:
        result = call()
    else:
        with pytest.raises(error):
            call()
    after = snapshot()
    assert {name: (value, after[name]) for name, value in before.items() if value != after[name]} == {}
    assert left(there) == []
    return result


@pytest.mark.usefixtures("unlike")
def test_every_call_leaves_the_process_as_it_was(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny.write_recipe(tmp_path, base, data={"eval": "eval.jsonl"})
    recipe = unchanged(lambda: loratune.load_recipe(path))
    assert unchanged(lambda: loratune.inspect(recipe)).rows == 24
    run = unchanged(lambda: loratune.train(recipe)).folder
    assert unchanged(lambda: loratune.evaluate(run, max_new_tokens=4)).rows == 6
    assert unchanged(lambda: loratune.merge(run, tmp_path / "merged")).agreement == 1.0
    assert unchanged(lambda: loratune.chat(run, "hello", max_new_tokens=4, temperature=1.0)) is not None
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("unlike")
def test_an_error_in_the_middle_leaves_the_process_as_it_was(base: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    wrong = loratune.load_recipe(tiny.write_recipe(bad, base))
    (bad / "train.jsonl").write_text('{"messages": "none"}\n')
    unchanged(lambda: loratune.train(wrong), loratune.DataError)
    unchanged(lambda: loratune.inspect(wrong), loratune.DataError)
    recipe = loratune.load_recipe(tiny.write_recipe(tmp_path, base, data={"eval": "eval.jsonl"}))
    unchanged(lambda: loratune.train(recipe, on_event=raise_at(Told)), Mine)
    unchanged(lambda: loratune.train(recipe, on_event=raise_at(StepDone)), Mine)
    run = unchanged(lambda: loratune.train(recipe, resume=True)).folder
    rows = str(bad / "train.jsonl")
    unchanged(lambda: loratune.evaluate(run, data=rows), loratune.DataError)
    unchanged(lambda: loratune.evaluate(run, max_new_tokens=4, on_event=raise_at(Counted)), Mine)
    unchanged(lambda: loratune.merge(run, tmp_path / "merged", on_event=raise_at(Told)), Mine)
    unchanged(lambda: loratune.merge(run, tmp_path / "merged", tolerance=-1.0), loratune.ModelError)
    unchanged(lambda: loratune.chat(run, "hi", on_event=raise_at(Answered)), Mine)
    unchanged(lambda: loratune.inspect(recipe, on_event=raise_at(Counted)), Mine)


def test_a_second_training_is_the_first_and_so_is_one_in_a_thread(base: Path, tmp_path: Path) -> None:
    path = scene.write(tmp_path, base)
    found: list[Any] = []

    def train(name: str) -> None:
        run = loratune.train(loratune.load_recipe(path, [f"output={tmp_path / name}"])).folder
        found.append(scene.result(run))

    train("first")
    torch.manual_seed(99)
    random.seed(98)
    train("second")
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    thread = threading.Thread(target=train, args=("third",))
    thread.start()
    thread.join()
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
    assert found == [found[0]] * 3
    assert len(found[0]["steps"]) == 12


def test_random_numbers_of_the_caller_do_not_depend_on_a_call(base: Path, tmp_path: Path) -> None:
    recipe = loratune.load_recipe(tiny.write_recipe(tmp_path, base))
    drawn = []
    for call in (lambda: None, lambda: loratune.train(recipe)):
        torch.manual_seed(1), random.seed(2), np.random.seed(3)
        call()
        drawn.append((torch.rand(3).tolist(), random.random(), np.random.rand()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_an_accelerator_of_the_caller_is_as_it_was(precision: str) -> None:
    """Fails where accelerate keeps its state elsewhere: `own_accelerate` reaches into it."""
    with startup.own_accelerate():
        theirs = Accelerator(mixed_precision=precision, cpu=True, gradient_accumulation_steps=3)
        before = [dict(state._shared_state) for state in (AcceleratorState, GradientState, PartialState)]
        assert all(before)
        with startup.own_accelerate():
            assert [state._shared_state == {} for state in (AcceleratorState, GradientState, PartialState)] == [
                True
            ] * 3
            assert Accelerator(mixed_precision="no", cpu=True).mixed_precision == "no"
            assert AcceleratorState().mixed_precision == "no"
        assert [dict(state._shared_state) for state in (AcceleratorState, GradientState, PartialState)] == before
        assert theirs.mixed_precision == AcceleratorState().mixed_precision == precision
        assert theirs.gradient_accumulation_steps == 3


def test_the_caller_may_be_in_the_middle_of_catching_warnings(base: Path, tmp_path: Path) -> None:
    recipe = loratune.load_recipe(tiny.write_recipe(tmp_path, base))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loratune.train(recipe)
        warnings.warn("mine", UserWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["mine"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "complete"
