"""Odd rows for the objectives that are more than a text to imitate: pairs, rated answers, and labelled texts.

`python -m tests.faults.fuzz --kind samples --seed 0 --cases 1000` runs them: rows, or an error that names the file.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.fuzz import Case

Row = dict[str, Any]


def _user(text: str) -> Row:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def _pair(asked: str, good: str, bad: str) -> list[Row]:
    """Return one pair in each of the ways that data sets write it."""
    before, chosen, rejected = _user(asked), _assistant(good), _assistant(bad)
    human, gpt = {"from": "human", "value": asked}, [{"from": "gpt", "value": text} for text in (good, bad)]
    return [
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"prompt": [before], "chosen": [chosen], "rejected": [rejected]},
        {"prompt": [before], "chosen": good, "rejected": bad},
        {"chosen": [before, chosen], "rejected": [before, rejected]},
        {"prompt": asked, "chosen": [before, chosen], "rejected": [before, rejected], "score_chosen": 3.0},
        {"messages": [before, chosen], "rejected_response": bad},
        {"messages": [before, chosen], "rejected_messages": [before, rejected]},
        {"conversations": [human], "chosen": gpt[0], "rejected": gpt[1], "system": "be short"},
        {"instruction": asked, "input": "this", "chosen": good, "rejected": bad},
        {"question": asked, "chosen_response": good, "rejected_response": bad},
        {
            "prompt": [before, chosen, _user("and?")],
            "chosen": [chosen, before, rejected],
            "rejected": [rejected, before, chosen],
        },
    ]


def _pairs(random: Random) -> list[Row]:
    words = ["yes", "no", "maybe", "a b c", "ä😀"]
    return [random.choice(_pair(f"is it {number}?", *random.sample(words, 2))) for number in range(5)]


def _rated(random: Random) -> list[Row]:
    """Return rated answers, of both kinds, in each of the ways that data sets write them."""
    made = []
    for number in range(6):
        asked, said = _user(f"is it {number}?"), random.choice(["yes", "no", "a b c", "ä😀"])
        label = random.choice([bool(number % 2), number % 2, str(bool(number % 2))])
        marked = {random.choice(["label", "kto_tag"]): label}
        texts, answer = {"prompt": asked["content"], "completion": said}, _assistant(said)
        human, gpt = {"from": "human", "value": asked["content"]}, {"from": "gpt", "value": said}
        ways: list[Row] = [
            texts, {"prompt": [asked], "completion": [answer]}, {"messages": [asked, answer]},
            {"conversations": [human, gpt], "system": "be short"}, {**texts, "messages": [asked, answer]},
        ]  # fmt: skip
        made.append({**random.choice(ways), **marked})
    return made


def _labelled(label: Callable[[Random, int], Any]) -> Callable[[Random], list[Row]]:
    """Return a function that returns texts with what `label` gives for the number of the row."""

    def rows(random: Random) -> list[Row]:
        said = [f"{random.choice(['yes', 'no', 'a b c', 'ä😀'])} {number}" for number in range(6)]
        return [{"text": text, "label": label(random, number)} for number, text in enumerate(said)]

    return rows


def _one(random: Random, number: int) -> Any:
    return random.choice([("good", "bad"), (0, 1), (0.0, 1.0), ("0", "1")])[number % 2]


def _several(random: Random, number: int) -> Any:
    return [["sport"], ["sport", "art"], [], ["art"], '["art"]', [1, True]][number]


def _number(random: Random, number: int) -> Any:
    return random.choice([number, -1.5 * number, 1e15])


def _of_patterns(random: Random, number: int) -> Any:
    return [("neg", "pos")[number % 2], "neg", "pos", number % 2, bool(number % 2), "pos"][number]


PATTERNS = {
    "type": "pattern", "patterns": ["{text} It was", "{{Rated:}} {text}"],
    "verbalizers": {"neg": " bad", "pos": " good", "0": " poor", "1": " fair", "true": " right", "false": " wrong"},
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Rows that an objective can learn from.

    Attributes:
        objective: which one.
        rows: returns some of them.
        format: how they are read, or None for the objective's own.
        method: what is trained.
    """

    objective: str
    rows: Callable[[Random], list[Row]]
    format: Any = None
    method: str = "lora"


SOUND: dict[str, Kind] = {
    "dpo": Kind("dpo", _pairs),
    "kto": Kind("kto", _rated),
    "orpo": Kind("orpo", _pairs, {"type": "preference", "texts": "messages"}),
    "reward": Kind("reward", _pairs),
    "reward, head alone": Kind("reward", _pairs, method="head"),
    "a class": Kind("classify", _labelled(_one)),
    "a class, head alone": Kind("classify", _labelled(_one), method="head"),
    "several classes": Kind("classify", _labelled(_several), {"type": "labelled", "labels": "several"}),
    "a number": Kind("classify", _labelled(_number), {"type": "labelled", "labels": "number"}, "head"),
    "patterns": Kind("pattern", _labelled(_of_patterns), PATTERNS),
}
ODD_LABELS: list[Any] = [
    "", " ", " good", "good ", "GOOD", "\n", "\u0000", "\u200b", "\ud800", "[", '["art"', "[[1]]", '{"a": 1}', "nan", "1",
    "x" * 5000, True, False, None, 0, -1, 1.0, -0.0, 0.5, 1e39, 1e300, 10**30, 10**400, float("nan"), float("inf"), [], [[]],
    ["art", "art", " art "], ["art", None], ["art", ["sport"]], ["art", 0.5, float("nan")], [""], {}, {"a": 1},
]  # fmt: skip


def _twist(row: Row, random: Random) -> Row:
    """Return a row with a mistake that people make."""
    names = list(row)
    if not names:
        return row
    one, other = random.choice(names), random.choice(names)
    what = random.randrange(9)
    if "text" in row and random.random() < 0.6:
        return {**row, "label": random.choice(ODD_LABELS)}
    if what == 0:
        return {**row, one: row[other]}  # equal answers, an answer as prompt
    if what == 1:
        return {**row, one: row[other], other: row[one]}
    if what == 2:
        return {**row, one: random.choice(["", " ", [], {}, None, "\ud800", "[{'role': 'user', 'content': 'a'}]"])}
    if what == 3:
        return {name: value for name, value in row.items() if name != one}
    if what == 4:
        return {**row, one: json.dumps(row[one])}
    if what == 5:
        return {**row, one: row[one][::-1] if isinstance(row[one], str | list) else [row[one]]}
    if what == 6:
        return {**row, one: [*row[one], *row[one]] if isinstance(row[one], list) else [row[one]]}
    if what == 7:
        return {**row, one: row[one] * 400 if isinstance(row[one], str | list) else 0}
    return {**row, random.choice(["prompt", "messages", "system", "tools", "label", "margin", "text"]): row[one]}


def _file(rows: list[Any], random: Random) -> tuple[str, bytes]:
    """Return the name and the bytes of a file with rows."""
    kind = random.choice(["jsonl"] * 6 + ["json", "csv", "parquet"])
    table = [row for row in rows if isinstance(row, dict)]
    try:
        if kind == "parquet":
            stream = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(table), stream)
            return "rows.parquet", stream.getvalue()
        if kind == "csv":
            names = list(dict.fromkeys(name for row in table for name in row))
            text = io.StringIO()
            writer = csv.DictWriter(text, names)
            writer.writeheader()
            writer.writerows(
                {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
                for row in table
            )
            return "rows.csv", text.getvalue().encode()
    except (pa.ArrowException, UnicodeError, ValueError, TypeError, OverflowError, csv.Error):
        pass  # values that such a file can't hold
    if kind == "json":
        return "rows.json", json.dumps(rows).encode()
    return "rows.jsonl", b"\n".join(json.dumps(row).encode() for row in rows)


def odd_samples(random: Random, scene: Path, home: Path) -> Case:
    """Return a case with damaged rows for one of the kinds in `SOUND`."""
    from tests.faults import oddities

    kind = SOUND[random.choice(sorted(SOUND))]
    rows: list[Any] = kind.rows(random)
    for _ in range(random.choice([0, 1, 1, 2, 4])):
        place = random.randrange(len(rows))
        if isinstance(rows[place], dict) and random.random() < 0.7:
            rows[place] = _twist(rows[place], random)
        elif isinstance(rows[place], dict | list):
            rows[place] = oddities.mutate(json.loads(json.dumps(rows[place])), random)
    recipe = oddities.recipe_of(scene) | {"objective": kind.objective}
    if kind.method != "lora":
        recipe["method"] = kind.method
    name, raw = _file(rows, random)
    recipe["data"] = {"train": name, "max_length": random.choice([24, 64, 256])}
    if kind.format is not None:
        recipe["data"]["format"] = kind.format
    if random.random() < 0.5:
        recipe["data"] |= {"on_bad_row": "skip", "max_lost": 1, "on_long": "drop"}
    oddities.write(home, recipe)
    (home / name).write_bytes(oddities.damage(raw, random) if random.random() < 0.25 else raw)
    return Case("samples", ("train" if random.random() < 0.2 else "inspect", "recipe.yaml"), named="rows.")
