"""What is made odd in a fuzzed case: bytes, values, rows, names, folders, options; each from a random generator."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from loratune.config import section
from loratune.recipe import Recipe
from tests import tiny
from tests.faults.fuzz import Case
from tests.faults.odd_samples import odd_samples

LONG = "x" * 300
TEXTS = [
    "", " ", "\n", "a b", "ä😀", "\u202e", "\x1b[31m", "'", '"', "{{", "%s", "../..", "/", "/dev/null", "/dev/zero", "~",
    "~nobody-here", "-x", "--", "null", "NaN", "a\\b", "$HOME", "*", "**", "[", "a" * 5000, LONG, "x/" * 2500, "C:\\x",
    "\ud800", "http://a:b@c", "<|im_end|>", "\u0000",
]  # fmt: skip
NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 0.5, -0.0, 1e300, -1e300, 1e-300, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 1.5, 1e15,
    float("nan"), float("inf"), -float("inf"),
]  # fmt: skip
NAMES = [
    "a b", "new\nline", "it's", 'quo"te', "ä😀", "-leading", "--help", "per%cent", "#hash", "a:b", "[x]", "*", "{a}", "$x",
    "&amp;", "tab\t", ".hidden", "x" * 200, "x" * 255, "a\\b", "\u202etxt", "\x1b[2J", os.fsdecode(b"\xff"),
    os.fsdecode(b"\xe4\xf6"),
]  # fmt: skip
WORDS = {
    "regex": [
        "(",
        "(a+)+$",
        ".*",
        r"(\d)?",
        "",
        "(?i)x",
        "[",
        "\ud800",
        "(?P<n>a)(?P<n>b)",
        "a{99999999}",
        "(x+x+)+y",
        "\\",
    ],
    "choices": ["a,b", "", ",", "(", "a" * 5000, "ä,😀"],
    "temperature": ["0", "1", "1e-9", "1e300", "nan", "inf", "-1", "x"],
    "max-new-tokens": ["1", "2", "0", "-1", "1000000000", "99999999999999999999", "x"],
    "batch-size": ["1", "1000000", "0", "99999999999999999999"],
    "limit": ["1", "0", "99999999999999999999"],
    "tolerance": ["0", "nan", "1e300", "-1"],
    "dtype": ["float32", "float16", "bfloat16", "int8", ""],
    "format": ["chat", "text", "completion", "instruction", "auto", "x", "", "{type: chat}"],
    "seed": ["0", "99999999999999999999", "-1"],
}


def value(random: Random, depth: int = 0) -> Any:
    """Return an odd value."""
    kind = random.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return random.choice(TEXTS)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind == 4:
        return random.choice([None, True, False])
    if kind < 7:
        return [value(random, depth + 1) for _ in range(random.randrange(4))]
    return {
        random.choice(["a", "type", "role", "content", "", *TEXTS[:9]]): value(random, depth + 1)
        for _ in range(random.randrange(4))
    }


def nested(random: Random) -> Any:
    """Return something nested deeper than anybody does."""
    found: Any = 1
    for _ in range(random.choice([20, 90, 120, 400, 900])):
        found = [found] if random.random() < 0.5 else {"a": found}
    return found


def mutate(tree: Any, random: Random) -> Any:
    """Change one thing in a tree of mappings, lists and values."""
    places: list[tuple[Any, Any]] = []
    left = [tree]
    while left:
        one = left.pop()
        for key, inner in one.items() if isinstance(one, dict) else enumerate(one):
            places.append((one, key))
            if isinstance(inner, (dict, list)) and inner:
                left.append(inner)
    if not places:
        return value(random)
    parent, key = random.choice(places)
    what = random.randrange(7)
    if what < 3:
        parent[key] = value(random)
    elif what == 3:
        del parent[key]
    elif what == 4:
        parent[key] = nested(random) if random.random() < 0.3 else [parent[key]] * random.randrange(3)
    elif isinstance(parent, dict):
        other = random.choice([*TEXTS, str(key) + "s", str(key).upper(), *(str(k) for k in parent)])
        parent[other] = parent.pop(key) if what == 5 else parent[key]
    else:
        parent.insert(key, value(random))
    return tree


def damage(raw: bytes, random: Random) -> bytes:
    """Change some bytes."""
    data = bytearray(raw)
    for _ in range(random.choice([1, 1, 2, 5, 30])):
        place = random.randrange(len(data) + 1)
        what = random.randrange(6)
        if what == 0 and data:
            data[place % len(data)] ^= 1 << random.randrange(8)
        elif what == 1:
            data[place:place] = bytes([random.randrange(256)])
        elif what == 2:
            del data[place : place + random.choice([1, 3, 40])]
        elif what == 3:
            data[place:place] = data[place : place + random.choice([5, 50])]
        elif what == 4:
            data[place:place] = random.choice(
                [
                    b"\0",
                    b"\xff\xfe",
                    b"\xef\xbb\xbf",
                    b"\n",
                    b"\t",
                    b'"',
                    b"{",
                    b"[",
                    b":",
                    b"&a *a",
                    b"!!",
                    b"\r",
                    b"  ",
                ]
            )
        else:
            data = data[:place] if random.random() < 0.2 else data
    return bytes(data)


def spoil(path: Path, random: Random) -> None:
    """Make a file something else: damaged, cut, empty, a folder, a pipe, a link; or take it away."""
    raw = path.read_bytes()
    what = random.randrange(14)
    if what >= 9 and path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):  # it may be odd already
            path.write_text(json.dumps(mutate(json.loads(raw), random)))
            return
    if what >= 7:
        path.write_bytes(damage(raw, random))
        return
    path.unlink()
    if what == 1:
        path.mkdir()
    elif what == 2:
        os.mkfifo(path)
    elif what == 3:
        path.symlink_to(random.choice([path.name, "nowhere", "/dev/zero", "/dev/null", ".."]))
    elif what == 4:
        path.write_bytes(b"")
    elif what == 5:
        path.write_bytes(raw[: random.randrange(len(raw) + 1)])
    elif what == 6:
        path.write_bytes(bytes(random.randrange(256) for _ in range(200)))


def recipe_of(scene: Path) -> dict[str, Any]:
    """Return a sound recipe of one step."""
    return {
        "model": {"base": str(scene / "base"), "dtype": "float32"},
        "method": {"type": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.3, "max_length": 256},
        "optimizer": {"type": "adamw", "lr": 0.01},
        "train": {"batch_size": 4, "max_steps": 1},
        "output": "out",
    }


def write(home: Path, recipe: Any, rows: bytes | None = None) -> Path:
    """Write a recipe and its rows."""
    try:
        raw = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=False)
    except RecursionError:
        raw = json.dumps(recipe)  # YAML, too
    (home / "recipe.yaml").write_text(raw, encoding="utf-8", errors="surrogatepass")
    (home / "rows.jsonl").write_bytes(sound_rows() if rows is None else rows)
    return home / "recipe.yaml"


def sound_rows() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in tiny.chats(6)).encode()


def bounded(recipe: Any, random: Random) -> tuple[str, ...]:
    """Return a command for a recipe: a training only where it has few steps, as a long one is no fault."""
    train = recipe.get("train") if isinstance(recipe, dict) else None
    steps = train.get("max_steps") if isinstance(train, dict) else None
    short = isinstance(steps, int) and steps <= 3
    rate = random.random()
    if rate < 0.35:
        return ("check", "recipe.yaml", *(["--json"] if random.random() < 0.3 else []))
    if rate < 0.6 or not short:
        return (
            "inspect",
            "recipe.yaml",
            *random.choice([[], ["--json"], ["--random"], ["--html", "page.html"], ["--row", "3"]]),
        )
    return ("train", "recipe.yaml")


def odd_recipe_bytes(random: Random, scene: Path, home: Path) -> Case:
    path = write(home, recipe_of(scene))
    path.write_bytes(damage(path.read_bytes(), random))
    return Case("recipe, bytes", (random.choice(["check", "check", "inspect"]), "recipe.yaml"))


def odd_recipe(random: Random, scene: Path, home: Path) -> Case:
    recipe = recipe_of(scene)
    for _ in range(random.choice([1, 1, 2])):
        recipe = mutate(recipe, random)
        if not isinstance(recipe, dict | list):
            break
    write(home, recipe)
    return Case("recipe, values", bounded(recipe, random))


KEYS = sorted({f"{prefix}.{key}" for prefix, _, key in section.all_keys(Recipe)})


def odd_setting(random: Random, scene: Path, home: Path) -> Case:
    recipe = recipe_of(scene)
    write(home, recipe)
    words = list(bounded(recipe, random))
    for _ in range(random.choice([1, 1, 2])):
        key = random.choice(KEYS)
        if key in ("train.max_steps", "train.epochs"):
            words[0] = "check"
            words[2:] = []
        odd = value(random)
        text = random.choice([str(odd), json.dumps(odd), ""]).replace("\0", "")
        words += ["--set", f"{key}={text}"]
    return Case("--set", tuple(words))


def odd_rows(random: Random, scene: Path, home: Path) -> Case:
    recipe = recipe_of(scene)
    recipe["data"]["format"] = random.choice(["auto", "auto", "chat", "text", "completion", "instruction"])
    if random.random() < 0.4:
        recipe["data"] |= {"on_bad_row": "skip", "max_lost": 1, "on_long": random.choice(["drop", "truncate"])}
    rows = _rows(random)
    kind = random.choice(["jsonl"] * 5 + ["json", "csv", "txt", "parquet", "jsonl.gz"])
    if kind == "jsonl" and random.random() < 0.7:
        raw = b"\n".join(json.dumps(row).encode() for row in rows)
        raw = damage(raw, random) if random.random() < 0.3 else raw
    elif kind == "json":
        raw = json.dumps(rows if random.random() < 0.8 else value(random)).encode()
    else:
        raw = damage(_packed(kind, random), random) if random.random() < 0.8 else _packed(kind, random)
    name = f"rows.{kind}"
    recipe["data"]["train"] = name
    write(home, recipe)
    (home / name).write_bytes(raw)
    if random.random() < 0.15:
        return Case("rows", ("eval", str(scene / "run"), "--data", name, "--max-new-tokens", "2", "--out", "out.jsonl"))
    return Case("rows", ("train", "recipe.yaml") if random.random() < 0.35 else ("inspect", "recipe.yaml"))


def _packed(kind: str, random: Random) -> bytes:
    """Return sound rows as a file of a kind."""
    pairs = [{"prompt": f"say {number}", "completion": random.choice(TEXTS[:6]) or "a"} for number in range(6)]
    stream = io.BytesIO()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(random.choice([pairs, tiny.chats(6)])), stream)
        return stream.getvalue()
    if kind == "csv":
        lines = ["prompt,completion", *(f'"{one["prompt"]}","{one["completion"]}"' for one in pairs)]
        return "\n".join(lines).encode()
    return gzip.compress(sound_rows()) if kind.endswith(".gz") else sound_rows()


def _rows(random: Random) -> list[Any]:
    rows: list[Any] = tiny.chats(5, seed=random.randrange(100))
    rows += random.sample([
        {"prompt": "a", "completion": "b"}, {"text": "some text"}, {"instruction": "a", "input": "", "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "b"}], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
    ], random.randrange(3))  # fmt: skip
    for _ in range(random.choice([1, 1, 3])):
        place = random.randrange(len(rows))
        rows[place] = mutate(rows[place], random) if isinstance(rows[place], dict | list) else value(random)
    return rows


def odd_names(random: Random, scene: Path, home: Path) -> Case:
    name = random.choice(NAMES)
    recipe = recipe_of(scene)
    write(home, recipe)
    command = random.choice(["check", "inspect", "train", "init", "eval", "merge", "chat", "folder", "data", "output"])
    if command == "init":
        return Case("names", ("init", name, *(["--base", random.choice(NAMES)] if random.random() < 0.5 else [])))
    if command in ("check", "inspect", "train"):
        (home / "recipe.yaml").rename(home / name)
        return Case("names", (command, *(["--"] if random.random() < 0.5 else []), name))
    if command == "folder":
        (home / name).mkdir()
        for file in ("recipe.yaml", "rows.jsonl"):
            (home / file).rename(home / name / file)
        return Case("names", (random.choice(["check", "inspect", "train"]), f"./{name}/recipe.yaml"))
    if command == "data":
        (home / "data").mkdir()
        (home / "rows.jsonl").rename(home / "data" / (name[:200] + ".jsonl"))
        return Case(
            "names",
            (
                random.choice(["inspect", "train"]),
                "recipe.yaml",
                "--set",
                "data.train=" + random.choice(["data", "data/*", "data/**/*.jsonl"]),
            ),
        )
    if command == "output":
        return Case("names", ("train", "recipe.yaml", "--set", f"output={json.dumps(name)}"))
    if command == "eval":
        return Case("names", ("eval", random.choice([name, str(scene / "run")]), "--data", name, "--no-generate"))
    if command == "merge":
        return Case("names", ("merge", random.choice([name, str(scene / "run")]), "--out", name))
    return Case(
        "names",
        (
            "chat",
            random.choice([name, str(scene / "merged")]),
            "-p",
            random.choice([*TEXTS[:-1], name]),
            "--max-new-tokens",
            "2",
        ),
    )


def odd_model(random: Random, scene: Path, home: Path) -> Case:
    shutil.copytree(scene / random.choice(["base", "base", "merged"]), home / "model")
    for _ in range(random.choice([1, 1, 2])):
        found = sorted(f for f in (home / "model").rglob("*") if f.is_file() and not f.is_symlink())
        if found:
            spoil(random.choice(found), random)
    if random.random() < 0.4:
        recipe = recipe_of(scene)
        recipe["model"]["base"] = "model"
        write(home, recipe)
        return Case("model folder", (random.choice(["inspect", "train", "train"]), "recipe.yaml"))
    base = ["--base", "model", *(["--allow-base-mismatch"] if random.random() < 0.5 else [])]
    return Case("model folder", random.choice([
        ("chat", "model", "-p", "a", "--max-new-tokens", "2"),
        ("eval", "model", "--data", str(scene / "eval.jsonl"), "--max-new-tokens", "2", "--limit", "2"),
        ("eval", str(scene / "run"), "--data", str(scene / "eval.jsonl"), "--no-generate", "--limit", "2", *base),
        ("merge", str(scene / "run"), "--out", "out", *base),
    ]))  # fmt: skip


def odd_run(random: Random, scene: Path, home: Path) -> Case:
    shutil.copytree(scene / "run", home / "run")
    for _ in range(random.choice([1, 1, 2])):
        found = sorted(f for f in (home / "run").rglob("*") if f.is_file() and not f.is_symlink())
        if found:
            spoil(random.choice(found), random)
    if random.random() < 0.3:
        recipe = yaml.safe_load((scene / "recipe.yaml").read_text())
        recipe["data"] |= {"train": str(scene / "train.jsonl"), "eval": str(scene / "eval.jsonl")}
        recipe["train"]["epochs"] = 2
        write(home, recipe)
        return Case("run folder", ("train", "recipe.yaml", random.choice(["--resume", "--resume", "--overwrite"]), *(["--allow-drift"] if random.random() < 0.5 else [])))  # fmt: skip
    return Case("run folder", random.choice([
        ("chat", "run", "-p", "a", "--max-new-tokens", "2"),
        ("eval", "run", "--max-new-tokens", "2", "--limit", "2"),
        ("merge", "run", "--out", "out"),
    ]))  # fmt: skip


def odd_options(random: Random, scene: Path, home: Path) -> Case:
    def options(*names: str) -> list[str]:
        chosen = random.sample(names, random.randrange(1, 3))
        return [word for name in chosen for word in (f"--{name}", random.choice(WORDS[name]))]

    command = random.choice(["eval", "eval", "merge", "chat", "chat", "inspect", "schema"])
    if command == "eval":
        words = options("regex", "choices", "temperature", "max-new-tokens", "batch-size", "limit", "format")
        if random.random() < 0.3:
            words += ["--data", random.choice([str(scene / "eval.jsonl"), *TEXTS[:-1]])]
        if random.random() < 0.3:
            words += ["--out", random.choice(["out.jsonl", "/dev/null", "no/such/folder/x", ".", LONG])]
        return Case(
            "options",
            ("eval", str(scene / random.choice(["run", "merged"])), "--limit", "2", "--max-new-tokens", "3", *words),
        )
    if command == "merge":
        return Case(
            "options",
            (
                "merge",
                str(scene / "run"),
                "--out",
                random.choice(["out", "a/b/c", LONG, "/dev/null", "."]),
                *options("dtype", "tolerance"),
            ),
        )
    if command == "chat":
        talk = "\n".join(
            random.choice(
                [
                    "hi",
                    "/base",
                    "/adapter",
                    f"/adapter {scene / 'run'}",
                    "/adapter nowhere",
                    "/reset",
                    "/x",
                    *TEXTS[:-4],
                ]
            )
            for _ in range(4)
        )
        raw = damage(talk.encode("utf-8", "surrogatepass"), random)
        words = ["--max-new-tokens", "2", *options("temperature", "seed")]
        if random.random() < 0.4:
            words += ["-p", random.choice(TEXTS[:-1])]
        if random.random() < 0.3:
            words += ["--system", random.choice(TEXTS[:-1])]
        return Case("options", ("chat", str(scene / random.choice(["run", "merged"])), *words), raw)
    if command == "inspect":
        write(home, recipe_of(scene))
        return Case(
            "options",
            (
                "inspect",
                "recipe.yaml",
                *random.choice(
                    [
                        ["--row", "0"],
                        ["--row", "99999999999999999999"],
                        ["-n", "99999999999999999999"],
                        ["--html", "/dev/null"],
                        ["--html", "."],
                        ["--html", LONG],
                        ["--random", "-n", "2"],
                    ]
                ),
            ),
        )
    return Case("options", ("schema", *random.choice([[], ["x"], ["--x"]])))


def odd_template(random: Random, scene: Path, home: Path) -> Case:
    template = damage(tiny.CHATML.encode(), random) if random.random() < 0.6 else random.choice([
        "{{ messages }}", "{% for m in messages %}{{ m }}{% endfor %}", "{{ messages[0].content }}", "{{ 1/0 }}", "{{ x.y.z }}",
        "{% for m in messages %}{{ m.content|tojson }}<|im_end|>{% endfor %}", "", "{{ raise_exception(messages) }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "{{ bos_token * 3 }}",
    ]).encode()  # fmt: skip
    recipe = recipe_of(scene)
    recipe["data"]["chat_template"] = "t.jinja"
    write(home, recipe)
    (home / "t.jinja").write_bytes(template)
    return Case("template", (random.choice(["inspect", "inspect", "train"]), "recipe.yaml"))


def odd_cache(random: Random, scene: Path, home: Path) -> Case:
    found = sorted(f for f in (scene / "cache").rglob("*") if f.is_file() and not f.is_symlink())
    write(home, recipe_of(scene))
    if found:
        spoil(random.choice(found), random)
    return Case("cache", (random.choice(["inspect", "train"]), "recipe.yaml"))


def odd_table(random: Random, scene: Path, home: Path) -> Case:
    """Return a case with a Parquet file of odd columns, written in an odd way, perhaps damaged."""
    far = pa.array([1 << 62, None, 0, 1], pa.timestamp(random.choice(["ms", "us"])))
    texts = pa.array([random.choice(TEXTS[:6]) or "a" for _ in range(4)])
    columns = [
        texts, texts.dictionary_encode(), pa.nulls(4), far, pa.array([1, 2, 3, 4], pa.duration("ns")),
        pa.array([b"\xff", None, b"a", b""]), pa.array([b"\xff"] * 4).view(pa.string()), pa.array([Decimal("1.5")] * 4),
        pa.StructArray.from_arrays([far, texts], names=["far", random.choice(["far", "b"])]),
        pa.ListArray.from_arrays([0, 1, 1, 2, 4], far), pa.array([[("k", 1)]] * 4, pa.map_(pa.string(), pa.int8())),
        pa.array([[7] * 3_000_000, [], None, [1]]), pa.array([1, 2, 3, 4], pa.timestamp("us", tz="No/Where")),
        pa.array([one["messages"] for one in tiny.chats(4)]), pa.array(["a " * random.choice([9, 600_000])] * 4),
    ]  # fmt: skip
    names = random.sample(
        ["prompt", "completion", "text", "messages", "tools", "label", "", "ä"], random.randrange(1, 5)
    )
    table = pa.Table.from_arrays([random.choice(columns) for _ in names], names=names)
    stream = io.BytesIO()
    pq.write_table(
        table, stream, compression=random.choice(["zstd", "snappy", "none"]), use_dictionary=random.random() < 0.5,
        row_group_size=random.choice([1, 3, 100]), data_page_version=random.choice(["1.0", "2.0"]),
    )  # fmt: skip
    raw = stream.getvalue()
    recipe = recipe_of(scene)
    recipe["data"] |= {"train": "rows.parquet", "on_long": random.choice(["drop", "split", "truncate"]), "max_lost": 1}
    recipe["data"]["format"] = random.choice(["auto", "chat", "text", "completion"])
    write(home, recipe)
    (home / "rows.parquet").write_bytes(damage(raw, random) if random.random() < 0.4 and len(raw) < 1 << 18 else raw)
    return Case("table", (random.choice(["inspect", "inspect", "train"]), "recipe.yaml"))


def odd_places(random: Random, scene: Path, home: Path) -> Case:
    """Return a case whose output is, holds, or lies in something that is there, by links and ways round."""
    for name in ("base", "run"):
        shutil.copytree(scene / name, home / name)
    recipe = recipe_of(scene) | {"output": "out"}
    recipe["model"]["base"] = "base"
    write(home, recipe)
    (home / "deep").mkdir()
    (home / "empty").touch()
    (home / "link").symlink_to(random.choice(["base", "run", ".", "rows.jsonl", "recipe.yaml", "nowhere", "link", "/"]))
    (home / "hard").hardlink_to(home / random.choice(["rows.jsonl", "recipe.yaml", "empty", "run/run.json"]))
    ways = [
        "rows.jsonl", "recipe.yaml", "base", "base/config.json", "base/x", "run", "run/x", "run/checkpoints", "link",
        "run/checkpoints/x", "link/x", "hard", "hard/x", "deep/../rows.jsonl", "deep", ".", "..", "empty", "new",
        "new.jsonl", "run/predictions.jsonl", "run/.lock", *(str(one) for one in (home / "run").glob("checkpoints/*")),
    ]  # fmt: skip
    if random.random() < 0.2:
        (home / "out").mkdir()
        (home / "out" / random.choice([".lock", "checkpoints", "metrics.jsonl", "run.json"])).symlink_to(
            random.choice(["../rows.jsonl", "../nowhere", "../base", ".lock", "/dev/null"])
        )
    one, other = random.choice(ways), random.choice(ways)
    few = ("--max-new-tokens", "2", "--limit", "2")
    return Case("places", random.choice([
        ("train", "recipe.yaml"), ("train", "recipe.yaml", "--set", f"output={one}", *random.choice([(), ("--overwrite",)])),
        ("train", "recipe.yaml", "--set", f"data.train={one}"), ("train", "recipe.yaml", "--set", f"model.base={one}"),
        ("inspect", "recipe.yaml", "--html", one), ("inspect", "recipe.yaml", "--html", one, "--set", f"data.train={other}"),
        ("eval", "run", "--data", one, "--out", other, *few), ("eval", one, "--data", "rows.jsonl", "--out", other, *few),
        ("merge", "run", "--out", one), ("merge", one, "--out", other), ("init", one), ("chat", one, "-p", "a", *few[:2]),
    ]))  # fmt: skip


KINDS = [
    *[odd_recipe_bytes] * 3, *[odd_recipe] * 4, *[odd_setting] * 4, *[odd_rows] * 5, *[odd_names] * 4, *[odd_model] * 4,
    *[odd_run] * 3, *[odd_options] * 3, odd_template, odd_cache,
    *[odd_table] * 2, *[odd_places] * 3,
]  # fmt: skip


def case(random: Random, scene: Path, home: Path, kind: str = "all") -> Case:
    """Return a case, of any kind unless told; what it needs is written into `home`."""
    chosen = odd_samples if kind == "samples" else random.choice(KINDS)
    return chosen(random, scene, home)
