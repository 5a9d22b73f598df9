"""Odd recipes, rows, names, folders and options through every command, by the thousand, from one seed.

`python -m tests.faults.fuzz --seed 0 --cases 2000` prints what went wrong and how long and large the worst case was.
Nothing may end in a traceback or exit code 1, take over 60 s or over 2 GB. A case is the whole command line in a fork of
this process, which has imported everything: a case costs what it does, not what starting Python does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

LONGEST = 60.0  # seconds of a case
LARGEST = 2 << 30  # bytes of memory of a case
ALLOWED = (0, 2, 3, 4, 5, 6, 7, 8)  # exit codes: 1 is what nobody expected


@dataclass(frozen=True)
class Case:
    """A command line, run in a folder.

    Attributes:
        kind: what was made odd.
        words: of the command line.
        stdin: what is read from there.
        named: what an error must mention, as nothing else is wrong.
    """

    kind: str
    words: tuple[str, ...]
    stdin: bytes = b""
    named: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a case ended: exit code (minus the signal), seconds, bytes of memory, and what was written."""

    code: int
    seconds: float
    memory: int
    text: str

    def wrong(self, named: str = "") -> str:
        """Return what is wrong with it, or an empty text; an error must mention `named`."""
        if self.seconds > LONGEST:
            return f"{self.seconds:.0f} s"
        if self.code not in ALLOWED:
            return f"exit code {self.code}"
        if "Traceback (most recent call last)" in self.text:
            return "a traceback"
        if self.code and named not in self.text:
            return f"an error that does not name {named}"
        return f"{self.memory / 1e9:.1f} GB" if self.memory > LARGEST else ""


def run(case: Case, folder: Path) -> Outcome:
    """Run a case in a folder, in a child that is ended when it takes too long."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as asked:
        asked.write(case.stdin)
        asked.seek(0)
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            _child(case, folder, asked.fileno(), said.fileno())
        status, used, late = None, None, False
        while status is None:
            found, code, usage = os.wait4(child, os.WNOHANG)
            if found:
                status, used = code, usage
            elif time.perf_counter() - began > LONGEST + 1:
                late = True
                os.killpg(child, signal.SIGKILL)
                _, status, used = os.wait4(child, 0)
            else:
                time.sleep(0.005)
        seconds = time.perf_counter() - began
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)  # what it left running
        said.seek(0)
        text = said.read(1 << 20).decode("utf-8", "replace")
        assert used is not None
        return Outcome(os.waitstatus_to_exitcode(status), LONGEST + 1 if late else seconds, used.ru_maxrss * 1024, text)


def _child(case: Case, folder: Path, stdin: int, said: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        for end, stream in enumerate((stdin, said, said)):
            os.dup2(stream, end)
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + 2 * LARGEST,) * 2)  # saves the machine, decides nothing
        os.chdir(folder)
        sys.argv = ["loratune", *case.words]
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(end, mode) for end, mode in ((0, "r"), (1, "w"), (2, "w")))
        kept = sys.stdout, sys.stderr  # `cli.main` puts streams of its own around what is in these
        from loratune import cli

        cli.main()
        assert all(kept)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _prepare(folder: Path) -> None:
    """Import what commands import, and make a base, a run and a merged model."""
    os.environ.update(
        OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CI="1", NO_COLOR="1",
        LORATUNE_CACHE=str(folder / "cache"), HOME=str(folder / "home"),
    )  # fmt: skip
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    from loratune.training import run  # noqa: F401
    from tests import tiny

    torch.set_num_threads(1)
    (folder / "home").mkdir()  # `~` is a folder of rows, too
    tiny.save(folder / "base")
    tiny.write_recipe(folder, folder / "base", rows=12, data={"eval": "eval.jsonl"}, train={"batch_size": 4})
    for words in (
        ("train", "recipe.yaml", "--set", "train.epochs=1"),
        ("merge", "run", "--out", "merged"),
    ):
        done = globals()["run"](Case("first", words), folder)
        assert done.code == 0, done


def main() -> int:
    """Run the cases that a seed gives; return 1 where one went wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--kind", choices=("all", "samples"), default="all", help="samples: rows of pairs and the like")
    parser.add_argument("--show", action="store_true", help="print each case and what it said")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # looked at as it is imported
    from tests.faults import oddities

    began, wrong = time.perf_counter(), 0
    codes: Counter[tuple[str, int]] = Counter()
    slowest = largest = (0.0, -1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        scene = Path(name)
        _prepare(scene)
        for number in range(asked.first, asked.first + asked.cases):
            with tempfile.TemporaryDirectory(dir=scene, prefix="case-") as home:
                case = oddities.case(Random(f"{asked.seed} {number}"), scene, Path(home), asked.kind)
                done = run(case, Path(home))
            codes[case.words[0], done.code] += 1
            slowest, largest = max(slowest, (done.seconds, number)), max(largest, (done.memory / 1e9, number))
            if (number + 1) % 100 == 0:
                print(f"{number + 1} in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            if (fault := done.wrong(case.named)) or asked.show:
                wrong += bool(fault)
                print(f"--- case {number} ({case.kind}): {fault or done.code}\n{case.words!a}", flush=True)
                print(done.text[-6000 if asked.show else -1800 :], flush=True)
    for command in sorted({command for command, _ in codes}):
        ends = ", ".join(f"{code}: {codes[one, code]}" for one, code in sorted(codes) if one == command)
        print(f"{command:8} {sum(n for (one, _), n in codes.items() if one == command):5} cases; exit codes {ends}")
    print(
        f"seed {asked.seed}: {asked.cases} cases in {time.perf_counter() - began:.0f} s, {wrong} wrong; slowest "
        f"{slowest[0]:.1f} s (case {slowest[1]}), largest {largest[0]:.2f} GB (case {largest[1]})"
    )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
