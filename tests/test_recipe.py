"""Sound recipes: what is left out, short forms, settings, paths, and that a recipe survives being written down."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from loratune.config import decode, yaml_nodes
from loratune.errors import RecipeError
from loratune.recipe import Recipe, from_tree, load, schema
from loratune.system.paths import is_inside

MINIMAL = "model: {base: some/model}\ndata: {train: some/rows}\noutput: run\n"


def read(text: str = "", *given: str, folder: Path = Path("/nowhere")) -> Recipe:
    return from_tree(yaml_nodes.parse(MINIMAL + text, "r.yaml"), folder, given)


DEFAULTS: dict[str, Any] = {
    "model": {"base": "some/model", "revision": None, "quantization": {"type": "none"}, "dtype": "auto", "attention": "auto"},
    "method": {
        "type": "lora", "r": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "target_modules": "all-linear", "rslora": False, "dora": False,
        "init": "default", "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None, "modules_to_save": [],
        "trainable_token_indices": [], "router": "frozen", "bias": "none", "continue_from": None,
    },
    "data": {
        "train": [{"path": "some/rows", "subset": None, "split": "train", "revision": None, "max_rows": None, "weight": 1.0}],
        "eval": None, "eval_fraction": None, "format": {"type": "auto"}, "chat_template": None,
        "chat_template_kwargs": {},
        "system": "keep",
        "turns": None,
        "max_length": 2048, "on_long": "error", "packing": "auto", "prefix_sharing": "auto", "on_bad_row": "error", "max_lost": 0.01, "duplicates": "keep",
        "overlap": "error",
    },
    "objective": {"type": "sft", "label_smoothing": 0.0, "neftune": 0.0},
    "optimizer": {"type": "adamw", "lr": 2e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "loraplus_lr_ratio": None},
    "train": {
        "epochs": 1.0, "max_steps": None, "batch_size": 16, "micro_batch_size": "auto", "schedule": {"type": "cosine", "floor": 0.0},
        "warmup": 0.03, "seed": 0, "max_grad_norm": 1.0, "gradient_checkpointing": "auto", "compile": "auto", "offload": "auto", "kernels": "auto",
        "log_every": 10, "eval_every": 1.0,
        "save_every": 1.0, "keep": 2, "best_metric": "loss", "early_stopping": None,
    },
    "output": "/nowhere/run",
}  # fmt: skip
ADAM = {"lr": 2e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "loraplus_lr_ratio": None}


def test_defaults() -> None:
    assert read().model_dump(mode="json") == DEFAULTS


@pytest.mark.parametrize(
    ("path", "word", "section"),
    [
        ("method", "lora", DEFAULTS["method"]),
        ("method", "full", {"type": "full"}),
        ("objective", "sft", DEFAULTS["objective"]),
        ("optimizer", "adamw", {"type": "adamw", **ADAM}),
        ("optimizer", "adamw_8bit", {"type": "adamw_8bit", **ADAM}),
        ("optimizer", "paged_adamw_8bit", {"type": "paged_adamw_8bit", **ADAM}),
        ("optimizer", "paged_adamw_32bit", {"type": "paged_adamw_32bit", **ADAM}),
        (
            "optimizer",
            "adafactor",
            {"type": "adafactor", "lr": 1e-3, "relative": False, "beta2_decay": -0.8, "clip": 1.0, "weight_decay": 0.0},
        ),
        ("train.schedule", "constant", {"type": "constant"}),
        ("train.schedule", "linear", {"type": "linear", "floor": 0.0}),
        ("train.schedule", "cosine", {"type": "cosine", "floor": 0.0}),
        ("train.schedule", "wsd", {"type": "wsd", "decay": 0.2, "floor": 0.0}),
        (
            "data.format",
            "instruction",
            {
                "type": "instruction",
                "instruction": "instruction",
                "input": "input",
                "output": "output",
                "system": "system",
                "history": "history",
            },
        ),
        ("data.format", "completion", {"type": "completion", "prompt": "prompt", "completion": "completion"}),
        ("data.format", "text", {"type": "text", "text": "text"}),
        ("model.quantization", "none", {"type": "none"}),
        ("model.quantization", "nf4", {"type": "nf4", "double_quant": True}),
        ("model.quantization", "fp4", {"type": "fp4", "double_quant": True}),
        ("model.quantization", "int8", {"type": "int8"}),
    ],
)
def test_bare_words(path: str, word: str, section: dict[str, Any]) -> None:
    """A bare word is the type with its defaults, and the same as a mapping with nothing but the type."""
    dumped: Any = read("", f"{path}={word}").model_dump(mode="json")
    for step in path.split("."):
        dumped = dumped[step]
    assert dumped == section
    assert read("", f"{path}={word}") == read("", f"{path}={{type: {word}}}")


def test_one_value_stands_for_a_list_of_one() -> None:
    recipe = read(
        "method: {type: lora, layers_to_transform: 3, modules_to_save: lm_head, trainable_token_indices: [1, 2]}\n"
    )
    assert recipe.method.layers_to_transform == (3,)
    assert recipe.method.modules_to_save == ("lm_head",)
    assert recipe.method.trainable_token_indices == (1, 2)
    with_list = "model: {base: m}\noutput: o\ndata:\n  train:\n    - some/rows\n    - {path: other/rows, weight: 2}\n"
    sources = from_tree(yaml_nodes.parse(with_list, "r.yaml"), Path("/nowhere")).data.train
    assert [(source.path, source.weight) for source in sources] == [("some/rows", 1.0), ("other/rows", 2.0)]


@pytest.mark.parametrize(
    ("setting", "get", "expected"),
    [
        ("optimizer.lr=1e-4", lambda r: r.optimizer.lr, 1e-4),
        ("train.epochs=2", lambda r: r.train.epochs, 2.0),
        ("model.revision='012'", lambda r: r.model.revision, "012"),
        ('model.revision="1e5"', lambda r: r.model.revision, "1e5"),
        ("model.revision=yes", lambda r: r.model.revision, "yes"),
        ("model.revision=a=b", lambda r: r.model.revision, "a=b"),
        ("model.revision=", lambda r: r.model.revision, None),
        ("model.revision=null", lambda r: r.model.revision, None),
        ("model.revision='a: b # c'", lambda r: r.model.revision, "a: b # c"),
        (" model.revision =  main", lambda r: r.model.revision, "main"),
        ("method.target_modules=[q_proj, v_proj]", lambda r: r.method.target_modules, ("q_proj", "v_proj")),
        ("method.dora=true", lambda r: (r.method.dora, r.method.r), (True, 16)),
        ("method.rank_pattern.q_proj=4", lambda r: r.method.rank_pattern, {"q_proj": 4}),
        ("method=full", lambda r: r.method.type, "full"),
        ("method={type: lora, r: 4}", lambda r: r.method.r, 4),
        ("data.train=other/rows", lambda r: [s.path for s in r.data.train], ["other/rows"]),
        ("data.train=[a/a, {path: b/b, weight: 2}]", lambda r: [(s.path, s.weight) for s in r.data.train], [("a/a", 1.0), ("b/b", 2.0)]),
        ("data.train.weight=2", lambda r: [(s.path, s.weight) for s in r.data.train], [("some/rows", 2.0)]),
        ("data.train.0=a/a", lambda r: [s.path for s in r.data.train], ["a/a"]),
        ("data.train.0.weight=2", lambda r: [(s.path, s.weight) for s in r.data.train], [("some/rows", 2.0)]),
        ("objective.label_smoothing=0.1", lambda r: (r.objective.type, r.objective.label_smoothing), ("sft", 0.1)),
        ("train.schedule.floor=0.1", lambda r: (r.train.schedule.type, r.train.schedule.floor), ("cosine", 0.1)),
        ("train.early_stopping={}", lambda r: r.train.early_stopping.patience, 3),
        ("train.early_stopping.patience=5", lambda r: r.train.early_stopping.patience, 5),
    ],
)  # fmt: skip
def test_settings(setting: str, get: Any, expected: Any) -> None:
    assert get(read("", setting, "data.eval_fraction=0.1")) == expected


@pytest.mark.parametrize(
    ("text", "setting", "section"),
    [
        ("objective: sft\n", "objective.label_smoothing=0.1", {"type": "sft", "label_smoothing": 0.1, "neftune": 0.0}),
        ("optimizer: adafactor\n", "optimizer.clip=2.0", {"type": "adafactor", "lr": 1e-3, "relative": False, "beta2_decay": -0.8, "clip": 2.0, "weight_decay": 0.0}),
        ("method: &m lora\nobjective: sft\n", "method.r=4", {**DEFAULTS["method"], "r": 4}),
    ],
)  # fmt: skip
def test_a_bare_word_opens_up(text: str, setting: str, section: dict[str, Any]) -> None:
    dumped = read(text, setting).model_dump(mode="json")
    assert dumped[setting.partition(".")[0]] == section


def test_later_settings_win_and_mend() -> None:
    assert read("", "train.seed=1", "train.seed=2").train.seed == 2
    assert read("train: {seed: many}\n", "train.seed=2").train.seed == 2
    bare = from_tree(
        yaml_nodes.parse("method: lora\n", "r.yaml"), Path("/nowhere"), ["model.base=m/m", "data.train=d/d", "output=o"]
    )
    assert bare.model.base == "m/m"


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start at the recipe's folder, wherever the command is called from; hub ids stay as they are."""
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    (folder / "data").mkdir(parents=True)
    elsewhere.mkdir()
    for name in ("data/a.jsonl", "data/b.jsonl", "model.gguf"):
        (folder / name).write_text("")
    (tmp_path / "home.jsonl").write_text("")
    (folder / "r.yaml").write_text(
        "model: {base: model.gguf}\noutput: ../runs/first\n"
        "data: {train: [data/a.jsonl, data, 'data/*.jsonl', ~/home.jsonl, org/rows, squad], eval: ./data/b.jsonl}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(elsewhere)
    recipe = load(Path("..") / "recipes" / "r.yaml")
    base = folder.resolve()
    assert recipe.model.base == str(base / "model.gguf")
    assert [source.path for source in recipe.data.train] == [
        str(base / "data/a.jsonl"),
        str(base / "data"),
        str(base / "data/*.jsonl"),
        str(tmp_path.resolve() / "home.jsonl"),
        "org/rows",
        "squad",
    ]
    assert recipe.data.eval is not None
    assert recipe.data.eval[0].path == str(base / "data/b.jsonl")
    assert os.path.normpath(recipe.output) == str(tmp_path.resolve() / "runs/first")
    assert read("", f"output={tmp_path}/x").output == f"{tmp_path}/x"


@pytest.mark.parametrize("base", ["gpt2", "Qwen/Qwen3-8B", "org/model_v1.0", "0org/m"])
def test_hub_ids(base: str) -> None:
    assert read("", f"model.base={base}").model.base == base


def test_frozen() -> None:
    recipe = read()
    for section, field in (
        (recipe, "output"),
        (recipe.train, "epochs"),
        (recipe.method, "r"),
        (recipe.data.train[0], "path"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, getattr(section, field))
    assert isinstance(recipe.data.train, tuple)


# ---------------------------------------------------------------- every recipe there is


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
looks_like_more = st.sampled_from(
    ["012", "1e5", "12e4567", "08", "true", "null", "~", "<<", "2024-01-01", "0x1F", "a: b", "#", "- a", "é", "🙂"]
)
texts = words | looks_like_more
part = st.floats(0, 0.999)
positive = st.floats(1e-12, 1e6) | st.integers(1, 1000)


def fields(**those: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=those)


def typed(type_: str, **those: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.just(type_) | fields(**those).map(lambda found: {"type": type_, **found})


cadence = st.integers(1, 10**6) | st.floats(1e-6, 1.0)
floor = st.floats(0, 1)
inside = texts.filter(is_inside)
source = fields(subset=inside, split=inside, revision=inside | st.none(), weight=st.floats(0.01, 1000)).flatmap(
    lambda found: st.sampled_from(["org/rows", "squad"]).map(lambda path: {"path": path, **found})
)
sources = st.just("org/rows") | source | st.lists(st.just("a/b") | source, min_size=1, max_size=3)
adam = {"lr": positive, "beta1": part, "beta2": part, "eps": positive, "weight_decay": floor}
recipes = st.fixed_dictionaries(
    {
        "model": fields(
            revision=inside,
            dtype=st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
            quantization=typed("none") | typed("int8") | typed("nf4", double_quant=st.booleans()),
        ).map(lambda found: {"base": "org/model", **found}),
        "data": fields(
            eval=sources,
            format=typed("chat")
            | typed("text", text=texts)
            | typed("instruction", system=texts, input=texts)
            | typed("completion", prompt=texts),
            max_length=st.integers(2, 10**9),
            on_long=st.sampled_from(["error", "drop", "truncate"]),
        ).flatmap(lambda found: sources.map(lambda train: {"train": train, **found})),
        "output": texts.map(lambda text: "run" + text.replace("/", "").replace("\0", "")),
    },
    optional={
        "method": typed(
            "lora",
            r=st.integers(1, 4096),
            lora_alpha=positive,
            lora_dropout=part,
            target_modules=st.lists(texts, min_size=1, max_size=3),
            rslora=st.booleans(),
            rank_pattern=st.dictionaries(texts, st.integers(1, 64), max_size=2),
            alpha_pattern=st.dictionaries(texts, positive, max_size=2),
            layers_to_transform=st.lists(st.integers(0, 99), max_size=3),
            modules_to_save=texts,
            bias=st.sampled_from(["none", "all", "lora_only"]),
        ),
        "objective": typed("sft", label_smoothing=part, neftune=floor),
        "optimizer": typed("adamw", **adam, loraplus_lr_ratio=positive) | typed("adafactor", clip=positive),
        "train": fields(
            epochs=positive,
            batch_size=st.integers(64, 4096),
            micro_batch_size=st.integers(1, 16) | st.just("auto"),
            schedule=typed("constant")
            | typed("linear", floor=floor)
            | typed("wsd", decay=st.floats(0.01, 1), floor=floor),
            warmup=st.integers(0, 1000) | floor,
            seed=st.integers(0, 2**32 - 1),
            log_every=cadence,
            eval_every=cadence,
            save_every=cadence,
        ),
    },
)


@settings(
    max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(recipes)
def test_a_dumped_recipe_is_the_same_recipe(data: dict[str, Any]) -> None:
    """Whatever is in a recipe, what `dump` writes loads to the same recipe, from any folder."""
    recipe = from_tree(yaml_nodes.parse(yaml_nodes.write(data), "r.yaml"), Path("/nowhere"))
    again = from_tree(yaml_nodes.parse(recipe.dump(), "r.yaml"), Path("/elsewhere"))
    assert again == recipe
    assert again.hash() == recipe.hash()
    assert again.dump() == recipe.dump()


def test_hash_changes_with_every_field() -> None:
    """Each single change of any field, at any depth, gives another hash; the same recipe gives the same."""
    full = read(
        "method: lora\noptimizer: adamw\nobjective: sft\ntrain: {schedule: wsd, early_stopping: {patience: 2}}\n",
        "data.eval=more/rows", "data.format=instruction", "model.quantization=nf4",
    )  # fmt: skip
    plain = full.model_dump(mode="json")
    seen = {full.hash()}
    other: dict[type, Any] = {
        bool: lambda v: not v,
        int: lambda v: v + 1,
        float: lambda v: v / 2 + 0.25,
        type(None): lambda v: "new",
        str: lambda v: v + "x",
    }
    changes = 0

    def walk(node: Any) -> None:
        nonlocal changes
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            if isinstance(node[key], (dict, list)) and node[key]:
                walk(node[key])
                continue
            before = node[key]
            node[key] = {"new": 1} if before == {} else ["new"] if before == [] else other[type(before)](before)
            seen.add(Recipe.model_construct(**plain).hash())
            node[key] = before
            changes += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, as a changed value need not be a sound one
        walk(plain)
        assert Recipe.model_construct(**plain).hash() == full.hash()
    assert changes > 60
    assert len(seen) == changes + 1


# ---------------------------------------------------------------- schema


def test_schema_describes_every_field() -> None:
    found = schema()
    assert found["$schema"].endswith("2020-12/schema")
    assert found["required"] == ["model", "data", "output"]
    sections = [found, *(part for part in found["$defs"].values() if "properties" in part)]
    assert len(sections) >= 20
    for section in sections:
        assert section["additionalProperties"] is False
        assert section["description"]
        for name, field in section["properties"].items():
            assert name == "type" or field.get("description"), (section["title"], name)
    json.dumps(found)


def matches(value: Any, rule: Any, root: dict[str, Any]) -> bool:
    """Judge a value by the part of JSON schema that pydantic writes here; an unknown keyword fails."""
    if "$ref" in rule and not matches(value, root["$defs"][rule["$ref"].rpartition("/")[2]], root):
        return False
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    for word, wanted in rule.items():
        match word:
            case "$ref" | "$defs" | "$schema" | "title" | "description" | "default" | "discriminator":
                fine = True
            case "type":
                fine = isinstance(value, kinds[wanted]) and (wanted == "boolean" or not isinstance(value, bool))
            case "const":
                fine = value == wanted
            case "enum":
                fine = value in wanted
            case "anyOf" | "oneOf":
                hits = sum(matches(value, option, root) for option in wanted)
                fine = hits == 1 if word == "oneOf" else hits > 0
            case "properties":
                fine = not isinstance(value, dict) or all(
                    matches(value[key], wanted[key], root) for key in wanted if key in value
                )
            case "additionalProperties":
                extra = (
                    [value[key] for key in value if key not in rule.get("properties", {})]
                    if isinstance(value, dict)
                    else []
                )
                fine = (
                    not extra
                    if wanted is False
                    else wanted is True or all(matches(item, wanted, root) for item in extra)
                )
            case "required":
                fine = not isinstance(value, dict) or set(wanted) <= set(value)
            case "items":
                fine = not isinstance(value, list) or all(matches(item, wanted, root) for item in value)
            case "minItems" | "minLength":
                fine = not isinstance(value, (list, str)) or len(value) >= wanted
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum":
                number = isinstance(value, (int, float))
                above = {"minimum": number and value >= wanted, "maximum": number and value <= wanted}
                above |= {"exclusiveMinimum": number and value > wanted, "exclusiveMaximum": number and value < wanted}
                fine = not number or above[word]
            case _:
                raise AssertionError(f"the schema uses `{word}`")
        if not fine:
            return False
    return True


SHORT = {"model": {"base": "m"}, "data": {"train": "rows"}, "output": "run"}


@pytest.mark.parametrize(
    "more",
    [
        {}, DEFAULTS, {"method": "full"}, {"method": {"type": "lora", "r": 8, "target_modules": ["q"]}}, {"optimizer": {"type": "adafactor", "clip": 2}},
        {"train": {"micro_batch_size": 4, "warmup": 0, "save_every": 0.5, "schedule": "wsd", "keep": 3}},
        {"data": {"train": [{"path": "a", "weight": 2}, "b"], "eval": "c", "format": {"type": "text", "text": "t"}}},
        {"model": {"base": "m", "quantization": {"type": "nf4", "double_quant": False}, "revision": None}}, {"objective": "sft"},
        {"objective": {"neftune": 5}}, {"objective": "dpo"}, {"objective": {"type": "dpo", "beta": 0.2}}, {"method": {"type": "prompt", "init_text": "Sort."}},
    ],
)  # fmt: skip
def test_schema_takes_sound_recipes(more: dict[str, Any]) -> None:
    recipe = {**SHORT, **more}
    assert matches(recipe, schema(), schema())
    from_tree(yaml_nodes.parse(yaml_nodes.write(recipe), "r.yaml"), Path("/nowhere"))


@pytest.mark.parametrize(
    "more",
    [
        {"modle": {}}, {"model": {}}, {"method": "qlora"}, {"method": {"type": "full", "r": 8}}, {"method": {"type": "lora", "r": 0}}, {"method": {"r": 8}},
        {"optimizer": {"type": "adamw", "lr": "fast"}}, {"train": {"micro_batch_size": "all"}}, {"train": {"save_every": 0}}, {"train": {"epoch": 1}},
        {"train": {"schedule": {"type": "cosine", "decay": 0.1}}}, {"data": {"train": []}}, {"data": {"train": [5]}}, {"data": {"train": {"weight": 1}}},
        {"data": {"train": "a", "on_long": "crop"}}, {"objective": "ppo"}, {"objective": 5}, {"output": ""}, {"output": 5}, {"train": []},
    ],
)  # fmt: skip
def test_schema_refuses_wrong_recipes(more: dict[str, Any]) -> None:
    recipe = {**SHORT, **more}
    assert not matches(recipe, schema(), schema())
    with pytest.raises(decode.RecipeError):
        from_tree(yaml_nodes.parse(yaml_nodes.write(recipe), "r.yaml"), Path("/nowhere"))


@pytest.mark.parametrize("word", ["auto", "on", "off"])
def test_packing_is_a_word(word: str) -> None:
    """YAML 1.1 reads a bare `on` as true, and a program that writes YAML 1.1 puts quotes around the word."""
    data = "model: {base: some/model}\ndata:\n  train: some/rows\n  packing: "
    for typed in (word, f"'{word}'"):
        made = from_tree(yaml_nodes.parse(f"{data}{typed}\noutput: run\n", "r.yaml"), Path("/nowhere"), ())
        assert made.data.packing == word
        assert decode.decode(Recipe, yaml_nodes.parse(made.dump(), "r.yaml")) == made
    assert read("", f"data.packing={word}").data.packing == word


@pytest.mark.parametrize(("truth", "word"), [("true", "on"), ("false", "off"), ("False", "off")])
def test_packing_is_no_truth(truth: str, word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read("", f"data.packing={truth}")
    (problem,) = caught.value.problems
    assert problem.message == f"`data.packing` must be one of `auto`, `on`, `off`, given `{truth}`"
    assert problem.hint == f"write {word}"


# ---------------------------------------------------------------- from a mapping


def test_a_mapping_is_the_recipe_of_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "model: {base: some/model}\ndata: {train: rows.jsonl}\noptimizer: {type: adamw, lr: 2e-4}\noutput: run\n"
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    given = {
        "model": {"base": "some/model"},
        "data": {"train": Path("rows.jsonl")},
        "optimizer": {"type": "adamw", "lr": 2e-4},
        "output": tmp_path / "run",
    }
    assert load(given) == load(tmp_path / "recipe.yaml")
    assert load(given, ["train.seed=3", "optimizer.lr=1e-3"]) == load(
        tmp_path / "recipe.yaml", ["train.seed=3", "optimizer.lr=1e-3"]
    )
    assert load(given).model_dump() == load(load(given).model_dump(mode="json")).model_dump()
    assert given["optimizer"] == {"type": "adamw", "lr": 2e-4}, "what was given is left alone"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"optimizer": {"type": "adamw", "lr": -1}}, "optimizer.lr: `optimizer.lr` must be above 0, given `-1`"),
        ({"train": {"epoch": 1}}, "train.epoch: unknown key `epoch` in `train`\n  did you mean `epochs`?"),
        ({"train": {"epochs": "2"}}, "train.epochs: `train.epochs` must be a number, given `2`\n  write it without quotes"),
        ({"train": {"epochs": float("nan")}}, "train.epochs: `train.epochs` must be a number, given `nan`"),
        ({"method": {"type": "lorra"}}, "method.type: unknown method `lorra`; known: `lora`, `adalora`, `prompt`, `full`, `head`\n  did you mean `lora`?"),
        ({"train": {3: 4}}, "train.3: a key must be a non-empty string"),
        ({"output": "half \udce9"}, "output: a string with a lone surrogate\n  write the character itself"),
        ({"data": {"train": {"some/rows"}}}, "data.train: a value of the type `set`"),
        ({"train": {"max_steps": 3, "epochs": 1}}, "train.max_steps: `train.max_steps` and `train.epochs` both set the length\n  keep one"),
        ({"model": {"base": "./none"}}, "model.base: no model at `./none`\n  looked for "),
        ({"model": None}, "model: `model` must be a mapping, given null"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_in_a_mapping_a_place_is_a_key(change: dict[str, Any], told: str) -> None:
    given = {"model": {"base": "some/model"}, "data": {"train": "some/rows"}, "output": "run", **change}
    with pytest.raises(RecipeError) as caught:
        load(given)
    assert str(caught.value).startswith(told)


def test_a_key_that_is_missing_from_a_mapping() -> None:
    with pytest.raises(RecipeError) as caught:
        load({})
    assert str(caught.value).startswith("recipe: the recipe needs the key `model`\n  the base model\n")


def test_a_mapping_has_the_limits_of_a_text() -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    wide = {"data": {"train": ["some/rows"] * 60_000}}
    for wrong, told in ((endless, "nested deeper than 32 levels"), (wide, "more than 50,000 values"), ({"output": "a" * 2**21}, "too big: 2,097,152 characters")):  # fmt: skip
        with pytest.raises(RecipeError, match=told):
            load(wrong)


def test_a_secret_in_a_mapping_is_not_shown() -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"
    with pytest.raises(RecipeError) as caught:
        load({"model": {"base": "some/model", "token": secret}, "data": {"train": "some/rows"}, "output": "run"})
    assert secret not in str(caught.value)
    assert "model.token: `model.token` looks like a secret" in str(caught.value)
