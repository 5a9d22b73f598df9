"""Limits of this process's control group (a container, a CI job): memory and cores.

For both versions of Linux's cgroups; on other systems there are no limits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def memory_left() -> int | None:
    """Return the bytes left of the memory limit, or None without one."""
    found = []
    for folder, old in _groups("memory"):
        limit, usage = ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        try:
            most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
            cached = dict(part.split() for part in (folder / "memory.stat").read_text().splitlines())
            if most != "max":
                found.append(max(int(most) - used + int(cached.get("inactive_file", 0)), 0))
        except (OSError, ValueError):
            continue
    return min(found, default=None)


def cores() -> int:
    """Return how many cores this process may use: those it may run on, or its CPU quota rounded up, if less."""
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for folder, old in _groups("cpu"):
        try:
            if old:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if quota.strip() not in ("max", "-1"):
                found.append(max(1, math.ceil(int(quota) / int(period))))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return min(found)


def _groups(kind: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders that may have limits of a kind, and whether they are of cgroup version 1.

    A limit applies to all nested groups; in a container the outermost folder is its own group, whatever its name.
    """
    for line in GROUPS.read_text().splitlines() if GROUPS.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and kind not in kinds.split(","):
            continue
        root = MOUNT / kind if kinds else MOUNT
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            yield folder, bool(kinds)
            if folder == root:
                break
