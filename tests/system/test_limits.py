"""Limits of control groups, read from folders as the kernel shows them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.data import workers
from loratune.models import base_model
from loratune.system import limits
from loratune.training import memory_use

OLD = "12:cpu,cpuacct:{0}\n5:memory:{0}\n1:name=systemd:{0}\n"
NEW = "0::{0}\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put this process into a group on a machine of 64 cores; `place(groups, path, {file: text})`."""

    def put(groups: str, path: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(groups.format(path))
        for name, text in files.items():
            file = tmp_path / "fs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    monkeypatch.setattr(limits, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "MOUNT", tmp_path / "fs")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    return put


@pytest.mark.parametrize(
    ("groups", "path", "files", "cores"),
    [
        (NEW, "/", {}, 64),
        (NEW, "/", {"cpu.max": "max 100000"}, 64),
        (NEW, "/", {"cpu.max": "200000 100000"}, 2),
        (NEW, "/", {"cpu.max": "50000 100000"}, 1),
        (NEW, "/job/step", {"job/cpu.max": "350000 100000", "job/step/cpu.max": "max 100000"}, 4),
        (NEW, "/job/step", {"job/cpu.max": "350000 100000", "job/step/cpu.max": "100000 100000"}, 1),
        (NEW, "/of/the/host", {"cpu.max": "300000 100000"}, 3),  # a container that is told its name outside
        (OLD, "/docker/1", {"cpu/cpu.cfs_quota_us": "600000", "cpu/cpu.cfs_period_us": "100000"}, 6),
        (OLD, "/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        (NEW, "/", {"cpu.max": "not a number"}, 64),
        (NEW, "/", {"cpu.max": "9900000 100000"}, 64),
    ],
)
def test_cores(place: Any, groups: str, path: str, files: dict[str, str], cores: int) -> None:
    place(groups, path, files)
    assert limits.cores() == cores
    assert workers.number(workers.SMALL + 1) == cores


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        (NEW, {}, None),
        (NEW, {"job/memory.max": "max", "job/memory.current": "5", "job/memory.stat": "anon 5"}, None),
        (NEW, {"job/memory.max": "100", "job/memory.current": "70", "job/memory.stat": "inactive_file 20"}, 50),
        (NEW, {"job/memory.max": "100", "job/memory.current": "170", "job/memory.stat": "anon 1"}, 0),
        (NEW, {"memory.max": "90", "memory.current": "70", "memory.stat": "anon 70"}, 20),
        (
            OLD,
            {
                "memory/memory.limit_in_bytes": "100", "memory/memory.usage_in_bytes": "10",
                "memory/memory.stat": "inactive_file 2",
            },
            92,
        ),
    ],
)  # fmt: skip
def test_memory(place: Any, groups: str, files: dict[str, str], left: int | None) -> None:
    place(groups, "/job", files)
    assert limits.memory_left() == left
    free = memory_use.free_memory(torch.device("cpu"))
    assert left is None or free == left


def test_without_control_groups_nothing_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "none")
    assert limits.memory_left() is None
    assert limits.cores() >= 1


def test_torch_computes_with_no_more_threads_than_there_is_time_for(
    place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    place(NEW, "/", {"cpu.max": "300000 100000"})
    assert base_model.threads() == 3
    place(NEW, "/", {"cpu.max": "max 100000"})
    assert base_model.threads() == 64
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's word: torch has read it
    place(NEW, "/", {"cpu.max": "300000 100000"})
    assert base_model.threads() == 64
