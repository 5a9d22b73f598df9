"""One run per folder, also under a crowd; a lock is never left behind to annoy."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from loratune.errors import RunFolderError, StorageError
from loratune.runs import lock
from tests.faults import scene
from tests.faults.child import Child, Plan, run


def _race(tmp_path: Path, base: Path, starts: int) -> None:
    recipe = scene.write(tmp_path, base, train={"epochs": 4})
    run(scene.write(tmp_path / "warm", base))  # the server has imported everything then
    children = [Child(recipe, plan=Plan(str(tmp_path / "run"), hook="slow_steps")) for _ in range(starts)]
    done = [child.wait() for child in children]
    assert sorted(one.code for one in done) == [0] + [6] * (starts - 1)
    winner = next(n for n, one in enumerate(done) if one.code == 0)
    holder = children[winner].process.pid
    for one in done:
        if one.code == 6:
            assert f"in use by process {holder} on {socket.gethostname()}, since 20" in one.told
    slowest = max(float(one.told.split("refused in ")[1].split()[0]) for one in done if one.code == 6)
    print(f"{starts} starts: 1 ran, {starts - 1} left with 6; the slowest took {slowest:.2f} s after its imports")
    assert slowest < 2
    assert not (tmp_path / "run" / lock.NAME).exists()


def test_of_a_few_racing_starts_one_runs(tmp_path: Path, base: Path):
    _race(tmp_path, base, 4)


@pytest.mark.faults
def test_of_twenty_racing_starts_one_runs(tmp_path: Path, base: Path):
    _race(tmp_path, base, 20)


def test_a_lock_is_held_released_and_leaves_nothing(tmp_path: Path):
    folder = tmp_path / "run"
    with lock.held(folder) as before:
        assert before is None
        holder = lock.holder(folder)
        assert holder is not None
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on ") as caught, lock.held(folder):
            pass
        assert caught.value.exit_code == 6
        assert lock.holder(folder) is not None, "who was refused took nothing away"
    assert not folder.exists()
    folder.mkdir()
    with lock.held(folder):
        (folder / "kept").write_text("")
    assert [path.name for path in folder.iterdir()] == ["kept"]


def test_a_file_left_behind_holds_nothing(tmp_path: Path):
    left = {"pid": os.getpid(), "host": "elsewhere", "boot": "other", "started": "2026-01-01T00:00:00Z"}
    (tmp_path / lock.NAME).write_text(json.dumps(left))
    assert lock.holder(tmp_path) is None
    with lock.held(tmp_path) as before:
        assert before is not None
        assert f"(process {os.getpid()} on elsewhere, since 2026-01-01T00:00:00Z)" in before


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught, lock.held(tmp_path / "file" / "run"):
        pass
    assert caught.value.exit_code == 5


# ---------------------------------------------------------------- a file system without flock


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)


@pytest.mark.usefixtures("without_flock")
def test_without_flock_the_file_is_the_lock(tmp_path: Path):
    with lock.held(tmp_path):
        assert lock.holder(tmp_path) is not None
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"), lock.held(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []
    with lock.held(tmp_path):
        pass


DEAD = 2**22 + 1  # above the largest pid


@pytest.mark.usefixtures("without_flock")
@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({"pid": DEAD}, True),
        ({"boot": "another start of this machine"}, True),
        ({}, False),
        ({"host": "elsewhere", "pid": DEAD}, False),
    ],
    ids=["killed", "rebooted", "alive", "another machine"],
)
def test_without_flock_only_a_dead_holder_is_followed(tmp_path: Path, change: dict[str, Any], free: bool):
    with lock.held(tmp_path):
        mine = json.loads((tmp_path / lock.NAME).read_text())
    (tmp_path / lock.NAME).write_text(json.dumps({**mine, **change}))
    if free:
        with lock.held(tmp_path) as before:
            assert before is not None
        assert list(tmp_path.iterdir()) == []
    else:
        with pytest.raises(RunFolderError, match="in use by process") as caught, lock.held(tmp_path):
            pass
        assert ("delete" in str(caught.value)) == ("host" in change)
        assert (tmp_path / lock.NAME).exists()
