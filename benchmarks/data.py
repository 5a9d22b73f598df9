"""Rows to packed tokens: loratune beside `datasets.map` + TRL's `pack_dataset`, on the same chats.

    python benchmarks/data.py --rows 100000 --peer-python ../peers/bin/python
    python benchmarks/data.py --rows 1000000 --turns 8 --arms loratune

Each arm runs in a process of its own, one after the other, with empty caches. Counted are wall time from the first byte
read to the last pack planned (imports and the tokenizer's loading left out) and the highest sum over the arm's
processes of resident memory (RSS) and of proportional memory (PSS: shared pages counted once). The peers
tokenize without a mask; ours finds the trained tokens of every row as well.

The chats are those of `chitchat-dataset` with at least one answer, repeated as often as needed; each copy begins with
its number, so that no row is said twice. The tokenizer is that of the demo's model (`make demo` fetches it).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
BASE = HERE.parent / "demo" / "data" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 16_384  # tokens of a pack; the few longer chats are cut, as the peer cuts them


def write_rows(path: Path, number: int, turns: int | None = None) -> None:
    """Write so many chats as JSONL, of at most so many turns."""
    import chitchat_dataset

    chats = []
    for chat in chitchat_dataset.Dataset().values():
        said = [" ".join(part["text"] for part in turn) for turn in chat["messages"]]
        if len(said) > 1:
            roles = ("user", "assistant")
            chats.append([{"role": roles[i % 2], "content": text} for i, text in enumerate(said)])
    with path.open("w", encoding="utf-8") as stream:
        for row in range(number):
            first, *others = chats[row % len(chats)][:turns]
            first = {**first, "content": f"{row}. {first['content']}"}
            stream.write(json.dumps({"messages": [first, *others]}) + "\n")


def loratune(rows: Path, tokenizer: Path) -> dict[str, Any]:
    """Read, tokenize, mask and pack with loratune, then once more from its cache."""
    import logging

    from loratune.data import dataset
    from loratune.data.bin_packing import pack
    from loratune.data.encode import Encoder
    from loratune.data.section import Data, Source
    from loratune.models import tokenizing
    from loratune.models.section import Model
    from loratune.system import startup

    logging.disable()
    with startup.quiet():
        source = Source(path=str(rows))
        section = Data(train=(source,), max_length=LENGTH, on_long="truncate")
        encoder = Encoder(tokenizing.load(Model(base=str(tokenizer))))
        began = time.perf_counter()
        found = dataset.load([source], section, encoder)
        packs = pack(found.lengths, LENGTH)
        seconds = time.perf_counter() - began
        again = time.perf_counter()
        assert dataset.load([source], section, encoder).cached
        return {
            "seconds": seconds,
            "tokens": found.counts.tokens,
            "trained_tokens": found.counts.trained_tokens,
            "packs": len(packs),
            "second_start_seconds": time.perf_counter() - again,
        }


def trl(rows: Path, tokenizer: Path, processes: int | None) -> dict[str, Any]:
    """Read and tokenize with `datasets.map`, pack with TRL."""
    import datasets
    from transformers import AutoTokenizer
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    words = AutoTokenizer.from_pretrained(tokenizer)

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": words.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]}

    began = time.perf_counter()
    found = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=os.environ["HF_HOME"])
    found = found.map(tokenize, remove_columns=found.column_names, num_proc=processes)
    packed = pack_dataset(found, LENGTH, "bfd")
    return {"seconds": time.perf_counter() - began, "packs": len(packed)}


def arm(name: str, rows: Path, tokenizer: Path) -> dict[str, Any]:
    """Run one arm in this process."""
    if name == "loratune":
        return loratune(rows, tokenizer)
    return trl(rows, tokenizer, None if name == "trl" else int(name.removeprefix("trl-")))


def measured(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run an arm as a process and return what it says, with its highest memory in bytes."""
    import psutil

    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    peak = {"rss": 0, "pss": 0}
    while process.poll() is None:
        now = {"rss": 0, "pss": 0}
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for one in tree:
            try:
                memory = one.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            now["rss"], now["pss"] = now["rss"] + memory.rss, now["pss"] + memory.pss
        peak = {kind: max(peak[kind], now[kind]) for kind in peak}
        time.sleep(0.2)
    assert process.stdout is not None
    said = process.stdout.read()
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return {**json.loads(said.splitlines()[-1]), "peak_rss": peak["rss"], "peak_pss": peak["pss"]}


def main() -> None:
    """Measure the arms and print a table; `--out` keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--turns", type=int, default=None, help="longest chat; whole ones by default")
    parser.add_argument("--arms", nargs="+", default=["loratune", "trl", f"trl-{os.cpu_count()}"])
    parser.add_argument("--peer-python", default=sys.executable, help="Python of the environment that holds TRL")
    parser.add_argument("--tokenizer", type=Path, default=None, help="folder of a tokenizer; the demo's by default")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(arm(given.arm, given.file, given.tokenizer)))
        return
    if given.tokenizer is None:
        from loratune.models import base_files

        if not BASE.exists():
            sys.exit(f"{BASE} is not there: run `make demo` first, or name a folder with --tokenizer")
        given.tokenizer = base_files.from_gguf(BASE)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, given.rows, given.turns)
        size = file.stat().st_size
        for name in given.arms:
            environment = {**os.environ, "LORATUNE_CACHE": f"{folder}/ours", "HF_HOME": f"{folder}/{name}"}
            python = sys.executable if name == "loratune" else given.peer_python
            command = [python, __file__, "--arm", name, "--file", str(file), "--tokenizer", str(given.tokenizer)]
            results[name] = measured(command, {**environment, "HF_HUB_OFFLINE": "1"})
    print(f"{given.rows:,} rows, {size / 1e6:,.0f} MB, {machine.processor()}")
    print(f"{'':12} {'seconds':>9} {'rows/s':>9} {'MB/s':>7} {'RSS MB':>8} {'PSS MB':>8} {'packs':>7}")
    for name, found in results.items():
        found |= {"rows_per_second": given.rows / found["seconds"], "mb_per_second": size / 1e6 / found["seconds"]}
        print(
            f"{name:12} {found['seconds']:9.1f} {found['rows_per_second']:9.0f} {found['mb_per_second']:7.2f} "
            f"{found['peak_rss'] / 1e6:8.0f} {found['peak_pss'] / 1e6:8.0f} {found['packs']:7}"
        )
    if "loratune" in results:
        print(f"loratune's second start: {results['loratune']['second_start_seconds']:.2f} s")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "rows": given.rows, "turns": given.turns, "bytes": size, "machine": machine.processor(), "arms": results,
        }  # fmt: skip
        given.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
