"""Write recipe.md from the recipe's own schema, cli.md from the `--help` of each command, modules.md from the code.

Run: python docs/generate.py            writes them
     python docs/generate.py --check    writes nothing; exit code 1 when one of them differs
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

import loratune
from loratune import cli, recipe

FOLDER = Path(__file__).parent
WIDTH = 100  # characters of a help page
NOTE = "<!-- Written by docs/generate.py. Don't edit: change the descriptions in the code, then run `make docs`. -->\n"

PACKAGES = (
    "system", "kernels", "config", "models", "data", "data/formats", "methods", "objectives", "optim", "runs",
    "training", "commands",
)  # fmt: skip
# Choices get a table each: the key they stand under, and what each of them is.
TITLES = {
    "quantization": "Quantizations",
    "method": "Methods",
    "format": "Formats",
    "objective": "Objectives",
    "optimizer": "Optimizers",
    "schedule": "Schedules",
}
FIELDS = {"lora": "The names are PEFT's, so that its documentation applies."}

OPENING = """\
# The recipe

A recipe is one YAML file: everything that decides the result of a training. `loratune check recipe.yaml` finds every
mistake in it without loading a model; `loratune schema` prints its JSON schema for editors.

```yaml
# yaml-language-server: $schema=./loratune.schema.json
model:
  base: Qwen/Qwen3-8B                # hub id, local folder, or a .gguf file
  quantization: nf4                  # nf4 and lora together are QLoRA
method:
  type: lora
  r: 16
  lora_alpha: 32
  target_modules: all-linear
data:
  train:
    - data/support.jsonl             # relative to this file
    - {path: data/general.jsonl, weight: 0.25}
  eval: data/eval.jsonl
  format: chat
  max_length: 2048
  on_long: error
objective: sft                       # a bare word: the type with its defaults
optimizer: {type: paged_adamw_8bit, lr: 2e-4, weight_decay: 0.01}
train:
  epochs: 1
  batch_size: 16                     # rows per step: what is optimised
  micro_batch_size: auto             # rows in memory at once: never changes the result
  schedule: {type: cosine, floor: 0.1}
  warmup: 0.03                       # a fraction is that part of all steps, an integer is steps
  eval_every: 0.25                   # a quarter of an epoch
  early_stopping: {patience: 3}
  seed: 0
output: runs/support
```

Only `model`, `data` and `output` are needed. [recipes/](../recipes) holds recipes to start from.

## How it is written

**Bare words.** Where a key names a choice, the word alone is the choice with its defaults: `format: chat` is
`format: {type: chat}`. With fields of its own it is a mapping: `format: {type: completion, prompt: question}`.
A mapping always names its `type`.

**Paths.** Local paths in `model.base`, `data` and `output` start at the folder of the recipe, wherever the command is
called from; `~` is the home folder. A name that is no local path is taken for a hub id. Data files end in .jsonl,
.json, .csv, .parquet or .txt, also with .gz; a folder stands for all data files below it, a glob (`data/*.jsonl`) for
what it matches. Of a folder whose files or folders are named for splits (train, validation, test and the like, as words
of their own), training reads what is not named for another split, `data.eval` the validation files, else the test
files; omitted files are printed. Hidden files are no rows, nor are README, LICENSE and requirements text files next to
rows.

**`--set`.** `--set optimizer.lr=1e-4` changes one key before the recipe is checked; it can be given many times. Dots
lead into sections, numbers into lists (`data.train.1.weight=0.5`). The value is YAML: `--set model.quantization=nf4`,
`--set "optimizer={type: adamw_8bit, lr: 1e-4}"`. A bare word opens up: after `objective: sft`,
`--set objective.neftune=5` gives `{type: sft, neftune: 5}`. Paths start at the recipe's folder here as well.

**YAML.** The part of YAML that people and programs agree on: mappings, lists, strings, numbers, `true`, `false` and
`null`. `2e-4` is a number. `yes`, `no`, `on` and `off` are strings; where true or false is wanted, the error says so. A
number with a leading zero (`012`), a key given twice, a tag (`!!python/...`), a merge key (`<<`) and a second document
are errors. A string with `: ` in it needs quotes. No value is converted silently: `r: "16"` is a string, and an error.

**Integers and fractions.** Of `warmup`, `log_every`, `eval_every` and `save_every` an integer is steps; a
fraction is a part (0-1) of all steps (`warmup`) or of an epoch. So `1` is one step and `1.0` one epoch.

**Secrets.** There is no place for them, and nothing in a recipe can run code.
"""


def recipe_page() -> str:
    """Return docs/recipe.md."""
    schema = recipe.schema()
    definitions = schema["$defs"]
    lines = [NOTE + OPENING, "## Keys", "", "At the top of the file:", "", *_table(schema), ""]
    for key, field in schema["properties"].items():
        if key in TITLES or "$ref" not in _only(field):
            continue
        section = definitions[_name(_only(field))]
        lines += [f"## `{key}`", "", _sentence(section["description"]), "", *_table(section), ""]
        for name in _nested(section):
            nested = definitions[name]
            lines += [f"### {name}", "", _sentence(nested["description"]), "", *_table(nested), ""]
        for inner, child in section["properties"].items():
            if inner in TITLES:
                lines += _choices(f"{key}.{inner}", TITLES[inner], child, definitions)
    for key, field in schema["properties"].items():
        if key in TITLES:
            lines += _choices(key, TITLES[key], field, definitions)
    return "\n".join(lines).rstrip() + "\n"


def cli_page() -> str:
    """Return docs/cli.md: the help of each command as it is printed in a terminal of 100 columns."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    lines = [
        NOTE + "# The command line",
        "",
        "Results go to stdout, messages and progress to stderr. The exit code says what kind of thing went wrong.",
        "",
    ]
    for words in ([], *([name] for name in commands)):
        lines += [f"## `{' '.join(['loratune', *words])}`", "", "```text", _help(words), "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def _help(words: list[str]) -> str:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "VIRTUAL_ENV") if name in os.environ}
    plain = {"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH), "TERM": "dumb", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "loratune", *words, "--help"],
        env={**kept, **plain}, capture_output=True, text=True, encoding="utf-8", check=True,
    )  # fmt: skip
    lines = [line.rstrip() for line in done.stdout.replace("python -m loratune", "loratune").splitlines()]
    return "\n".join(lines).strip("\n")


# ---------------------------------------------------------------- from JSON schema to tables


def _choices(key: str, title: str, field: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    members = [definitions[name] for name in _refs(field)]
    yield from (f"## {title}", "", f"`{key}` is one of:", "", "| type | what it is |", "|---|---|")
    for member in members:
        yield f"| `{_tag(member)}` | {_cell(_sentence(member['description']))} |"
    yield ""
    tables: dict[tuple[str, ...], list[str]] = {}  # choices with the same keys share one table
    for member in members:
        tables.setdefault(tuple(_table(member)), []).append(_tag(member))
    for table, tags in tables.items():
        if len(table) > 2:
            yield from (f"### {', '.join(f'`{tag}`' for tag in tags)}", "", *table, "")
        else:
            yield from (f"{', '.join(f'`{tag}`' for tag in tags)}: no further keys.", "")
        yield from (line for tag in tags if tag in FIELDS for line in (FIELDS[tag], ""))


def _table(section: dict[str, Any]) -> Iterator[str]:
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for name, field in section["properties"].items():
        if name != "type":
            kind = f"one of {_words(field)}" if name in TITLES else _kind(field)
            default = _default(field) if name not in section.get("required", ()) else "needed"
            yield f"| `{name}` | {_cell(kind)} | {default} | {_cell(field.get('description', ''))} |"


def _kind(field: dict[str, Any]) -> str:
    """Name what a field may hold, limits included."""
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{word}`" for word in field["enum"])
    if "anyOf" in field:
        parts = [part for part in field["anyOf"] if part.get("type") != "null"]
        if len(parts) > 2 and parts[-1].get("items") == {"anyOf": parts[:-1]}:
            return f"{', '.join(_kind(part) for part in parts[:-1])}, or a list of them"
        return " or ".join(_kind(part) for part in parts)
    if "$ref" in field:
        return f"mapping ({_name(field)})"
    kind = field.get("type")
    if kind == "array":
        return f"list of {_kind(field['items'])}s"
    if kind == "object":
        return f"mapping of strings to {_kind(field['additionalProperties'])}"
    names = {"integer": "integer", "number": "number", "string": "string", "boolean": "`true` or `false`"}
    limits = [
        f"{word} {field[limit]:g}" if abs(field[limit]) < 1e6 else f"{word} {field[limit]}"
        for limit, word in (
            ("minimum", "at least"), ("exclusiveMinimum", "above"),
            ("maximum", "at most"), ("exclusiveMaximum", "below"),
        )
        if limit in field
    ]  # fmt: skip
    return ", ".join([names[str(kind)], *limits])


def _words(field: dict[str, Any]) -> str:
    return ", ".join(f"`{word}`" for part in field["anyOf"] for word in part.get("enum", ()))


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if isinstance(value, dict):
        return f"`{value['type']}`" if "type" in value else "see below" if value else "none"
    if value is None or value == []:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _only(field: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a field that is a section, where there is just one."""
    parts = [part for part in field.get("anyOf", [field]) if "$ref" in part]
    return parts[0] if len(parts) == 1 and "anyOf" not in field else field


def _refs(field: dict[str, Any]) -> list[str]:
    """Return the names of all sections a field may hold, in order."""
    if "$ref" in field:
        return [_name(field)]
    parts = [*field.get("anyOf", ()), *field.get("oneOf", ()), *([field["items"]] if "items" in field else ())]
    return list(dict.fromkeys(name for part in parts for name in _refs(part)))


def _nested(section: dict[str, Any]) -> list[str]:
    found = (name for key, field in section["properties"].items() if key not in TITLES for name in _refs(field))
    return list(dict.fromkeys(found))


def _name(field: dict[str, Any]) -> str:
    return str(field["$ref"]).rpartition("/")[2]


def _tag(member: dict[str, Any]) -> str:
    return str(member["properties"]["type"]["const"])


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith(".") else f"{text}."


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def modules_page() -> str:
    """Return docs/modules.md: each package and module with the first line of its docstring."""
    root = Path(loratune.__file__).parent

    def first(path: Path) -> str:
        return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]

    def table(folder: Path) -> Iterator[str]:
        files = sorted(path for path in folder.glob("*.py") if path.name not in ("__init__.py", "__main__.py"))
        yield from (
            "| module | what it is |",
            "|---|---|",
            *(f"| `{path.name}` | {_cell(first(path))} |" for path in files),
        )

    lines = [
        NOTE,
        "# The modules",
        "",
        "From the bottom up: a module imports from its own package and those above it here.",
        "",
    ]
    lines += ["## `loratune/`", "", *table(root), ""]
    for package in PACKAGES:
        folder = root / package
        lines += [f"## `{package}/`", "", first(folder / "__init__.py"), "", *table(folder), ""]
    return "\n".join(lines)


PAGES = {"recipe.md": recipe_page, "cli.md": cli_page, "modules.md": modules_page}


def main() -> int:
    """Write the pages, or with --check say which differ; return the exit code."""
    differ = []
    for name, page in PAGES.items():
        path, text = FOLDER / name, page()
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                differ.append(name)
        else:
            path.write_text(text, encoding="utf-8")
    for name in differ:
        print(f"docs/{name} is not up to date: run `make docs`", file=sys.stderr)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
