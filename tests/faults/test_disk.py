"""A disk that is full, fails, can't be written or forgets: what was saved before stays, and the run goes on later."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import loratune
from loratune.errors import StorageError
from loratune.runs import checkpoint
from loratune.system import storage
from tests.conftest import Fit
from tests.faults import scene
from tests.faults.child import Plan, run

KINDS = ["open", "write", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir"]


# 6 steps, saved after the third and the last, of which one is kept
SHORT = {"train": {"epochs": 1, "save_every": 3, "eval_every": 6, "keep": 1}}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Return the run folder of an undisturbed short run and its calls that write."""
    folder = tmp_path_factory.mktemp("short")
    trace = folder / "trace.jsonl"
    done = run(scene.write(folder, base, **SHORT), plan=Plan(str(folder / "run"), trace=str(trace)))
    assert done.code == 0, done.told
    return folder / "run", [tuple(json.loads(line)) for line in trace.read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Return the run folder of the undisturbed run."""
    recipe = scene.write(tmp_path_factory.mktemp("straight"), base)
    done = run(recipe)
    assert done.code == 0, done.told
    return recipe.parent / "run"


# ---------------------------------------------------------------- calls that fail


def _fail(tmp_path: Path, base: Path, short: tuple[Path, list[tuple[str, str]]], numbers: list[int]) -> None:
    reference, calls = short
    codes: dict[int, int] = {}
    for k in numbers:
        recipe = scene.write(tmp_path / f"call{k}", base, **SHORT)
        folder = recipe.parent / "run"
        error = (errno.EIO, errno.ENOSPC)[k % 2]
        done = run(recipe, plan=Plan(str(folder), fail_at=k, error=error, lasting=k % 4 > 1))
        what = f"call {k} {calls[k - 1]}: {done.told}"
        codes[done.code] = codes.get(done.code, 0) + 1
        assert done.code in (0, 5), what  # a file that could not be deleted does not end a run
        assert "Traceback" not in done.told, what
        scene.check_saved(folder)
        # what was saved before the failing call is there, or has been replaced by something newer
        before = [p.split("staging-step-")[1][:6] for n, p in calls[: k - 1] if n == "rename" and "staging-step-" in p]
        assert not before or scene.newest_step(folder) >= int(before[-1]), what
        again = run(recipe, "--resume")
        assert again.code == 0, f"{what}\n{again.told}"
        assert scene.result(folder) == scene.result(reference), what
        assert scene.leftovers(folder) == [], what
        shutil.rmtree(recipe.parent)
    print(f"{len(numbers)} of {len(calls)} calls failed: exit codes {codes}, every one went on to the same adapter")


def test_a_few_calls_fail(tmp_path: Path, base: Path, short: tuple[Path, list[tuple[str, str]]]):
    _, calls = short
    assert {name for name, _ in calls} == set(KINDS), "every kind of call is seen"
    first = [next(k for k, (name, path) in enumerate(calls, 1) if name == kind and "step-" in path) for kind in ("fsync", "rename")]  # fmt: skip
    _fail(tmp_path, base, short, first)


@pytest.mark.faults
def test_every_call_fails_once(tmp_path: Path, base: Path, short: tuple[Path, list[tuple[str, str]]]):
    _fail(tmp_path, base, short, list(range(1, len(short[1]) + 1)))


# ---------------------------------------------------------------- a disk that is full


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Any]:
    """Return a function that mounts a small disk (size in kB), or makes it larger; skips where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int, *options: str) -> Path:
        remount = "remount," if os.path.ismount(place) else ""
        how = ",".join([f"{remount}size={size}k", *options])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(place)], capture_output=True, check=False)  # fmt: skip
        assert not (done.returncode and remount), done.stderr
        if done.returncode:
            pytest.skip("mounts are not allowed here")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=False)


def _full(tmp_path: Path, base: Path, straight: Path, disk: Any, sizes: list[int]) -> None:  # fmt: skip
    whole = 0
    for size in sizes:
        shutil.rmtree(tmp_path / "disk" / "run", ignore_errors=True)  # else it can't be made smaller
        output = disk(size) / "run"
        recipe = scene.write(tmp_path / f"full{size}", base)
        recipe.write_text(recipe.read_text().replace("output: run", f"output: {output}"))
        done = run(recipe, plan=Plan(str(output), hook="blind_to_space"))
        assert done.code == 5, f"{size} kB: {done.told}"
        assert "No space left on device" in done.told
        assert str(output) in done.told
        assert "Traceback" not in done.told
        kept = scene.saved(output)
        scene.check_saved(output)
        whole += bool(kept)
        told = run(recipe, "--resume").told  # now it looks first
        assert "MB are needed for" in told
        assert scene.saved(output) == kept
        disk(20_000)
        again = run(recipe, "--resume")
        assert again.code == 0, again.told
        assert ("resuming after step" in again.told) == bool(kept)
        assert scene.result(output) == scene.result(straight)
    print(f"{len(sizes)} sizes: exit code 5 each; {whole} had a checkpoint by then, and all verify")
    assert whole == len(sizes)


def test_a_full_disk(tmp_path: Path, base: Path, straight: Path, disk: Any):
    _full(tmp_path, base, straight, disk, [280])


@pytest.mark.faults
def test_disks_of_eight_sizes(tmp_path: Path, base: Path, straight: Path, disk: Any):
    _full(tmp_path, base, straight, disk, [200, 220, 240, 260, 280, 300, 320, 340])


def test_too_little_space_is_told_before_the_first_step(tmp_path: Path, base: Path, disk: Any):
    place = disk(300)
    recipe = scene.write(tmp_path / "a", base)
    recipe.write_text(recipe.read_text().replace("output: run", f"output: {place / 'run'}"))
    done = run(recipe)
    assert done.code == 5
    assert (
        "MB are needed for 3 checkpoints, one more while it is written, and the adapter, 0.3 MB are free" in done.told
    )
    assert "lower train.keep" in done.told
    assert "step 1" not in done.told
    assert not (place / "run").exists()


def test_a_read_only_folder(tmp_path: Path, base: Path, disk: Any):
    place = disk(20_000)
    disk(20_000, "ro")
    recipe = scene.write(tmp_path / "a", base)
    recipe.write_text(recipe.read_text().replace("output: run", f"output: {place / 'run'}"))
    done = run(recipe)
    assert done.code == 5, done.told
    assert "Read-only file system" in done.told
    disk(20_000, "rw")
    assert run(recipe).code == 0


def test_a_file_that_may_not_grow(tmp_path: Path, base: Path, straight: Path):
    recipe = scene.write(tmp_path / "a", base)
    folder = recipe.parent / "run"
    done = run(recipe, plan=Plan(str(folder), hook="small_files"))
    assert done.code == 5, done.told
    assert "can't be written: File too large" in done.told
    assert "Traceback" not in done.told
    assert scene.saved(folder) == []
    assert run(recipe).code == 0, "nothing was saved, so it begins anew"
    assert scene.result(folder) == scene.result(straight)


# ---------------------------------------------------------------- a disk that forgets


def _damage(file: Path, rng: random.Random) -> str:
    """Flip a byte of a file, cut it, or empty it; return what was done."""
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "cut", "empty"]) if content else "longer"
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "empty":
        content.clear()
    else:
        content.append(0)
    file.write_bytes(content)
    return kind


def _mutate(fit: Fit, tmp_path: Path, number: int) -> None:
    fit("a", **scene.SECTIONS)
    folder = tmp_path / "a" / "run"
    kept = tmp_path / "kept"
    shutil.copytree(folder / "checkpoints", kept)
    newest, before = scene.saved(folder)[-1], scene.saved(folder)[-2]
    files = sorted(path.name for path in newest.iterdir())
    assert len(files) >= 6
    rng = random.Random(2)
    for turn in range(number):
        name = files[turn % len(files)]
        kind = _damage(newest / name, rng)
        found = checkpoint.newest(folder)
        assert found is not None
        assert found.folder == before, f"{kind} of {name} was not seen"
        (line,) = found.bad
        assert newest.name in line
        assert name in line
        assert "moved to checkpoints/.quarantine/" in line
        assert not newest.exists()
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(kept, folder / "checkpoints")
    found = checkpoint.newest(folder)
    assert found is not None
    assert found.folder == newest, "undamaged it is taken"
    print(f"{number} of {number} damaged files noticed and named, in {len(files)} kinds of file")


def test_a_few_damaged_files(fit: Fit, tmp_path: Path):
    _mutate(fit, tmp_path, 14)


@pytest.mark.faults
def test_a_hundred_damaged_files(fit: Fit, tmp_path: Path):
    _mutate(fit, tmp_path, 100)


def test_a_file_too_many_is_damage_as_well(fit: Fit, tmp_path: Path):
    fit("a", **scene.SECTIONS)
    newest = scene.saved(tmp_path / "a" / "run")[-1]
    (newest / "model-2.safetensors").write_bytes(b"")
    assert storage.verify(newest) is None
    assert storage.verify(newest, alone=True) == "`model-2.safetensors` was not written with it"


# ---------------------------------------------------------------- commit


def test_what_is_replaced_comes_back_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(text: str) -> Any:
        return lambda folder: (folder / "file").write_text(text)

    target = tmp_path / "step-000001"
    storage.commit(target, write("old"), {})
    true = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if ".staging-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return true(self, to)

    with monkeypatch.context() as disk:
        disk.setattr(Path, "rename", rename)
        with pytest.raises(StorageError, match="Input/output error"):
            storage.commit(target, write("new"), {})
    assert (target / "file").read_text() == "old"
    assert storage.verify(target, alone=True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    storage.commit(target, write("new"), {})
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    target.rename(tmp_path / ".replaced-step-000001")  # killed between the two renames
    (tmp_path / ".staging-step-000001-0123abcd").mkdir()
    storage.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_rotation_never_takes_the_last_or_the_best(tmp_path: Path):
    rng = random.Random(4)
    for turn in range(200):
        run_folder, best, kept = tmp_path / f"run{turn}", None, []
        step = rng.choice([0, 999_990])  # names grow by a digit there
        for _ in range(12):
            step += rng.randint(1, 5)
            checkpoint.path_of(run_folder, step).mkdir(parents=True)
            best = step if rng.random() < 0.3 else best
            keep = rng.randint(1, 3)
            checkpoint.rotate(run_folder, keep, checkpoint.Progress(step, best_step=best))
            kept = sorted(int(path.name[5:]) for path in (run_folder / "checkpoints").iterdir())
            assert kept[-1] == step
            assert best is None or best in kept
            assert len(kept) <= keep + 1
        (run_folder / "checkpoints" / "step-9999999").mkdir()  # of another run
        checkpoint.rotate(run_folder, 1, checkpoint.Progress(step))
        assert checkpoint.path_of(run_folder, step).exists()


# ---------------------------------------------------------------- merges


def test_a_merge_on_a_full_disk_leaves_nothing(fit: Fit, disk: Any, monkeypatch: pytest.MonkeyPatch):
    done = fit("a", **scene.SECTIONS)
    place = disk(200)
    with pytest.raises(StorageError, match=r"0\.4 MB are needed for the merged model, 0\.2 MB are free"):
        loratune.merge(done.folder, place / "merged")
    with monkeypatch.context() as blind:
        blind.setattr(storage, "check_space", lambda *_: None)
        with pytest.raises(StorageError, match="can't be written: No space left on device"):
            loratune.merge(done.folder, place / "merged")
    assert list(place.iterdir()) == []
    disk(20_000)
    (place / "merged").mkdir()
    merged = loratune.merge(done.folder, place / "merged")
    assert storage.verify(merged.folder, alone=True) is None
    assert [path.name for path in place.iterdir()] == ["merged"]
