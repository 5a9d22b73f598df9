"""The sections of a recipe, how one is loaded, what must hold between its sections, and its JSON schema."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from loratune.config import decode, yaml_nodes
from loratune.config.foreign_keys import FOREIGN
from loratune.config.section import BareWord, Cadence, Inside, Section, Share, as_tuple
from loratune.config.yaml_nodes import Tree
from loratune.data.formats import Auto, Format
from loratune.errors import Place, Problem, RecipeError, listed, shorten
from loratune.methods import Lora, Method
from loratune.models.chat_templates import TEMPLATES
from loratune.objectives import Objective, Sft
from loratune.optim import AdamW, Optimizer
from loratune.optim.schedules import Cosine, Schedule
from loratune.system import files, run_files

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class NoQuantization(Section):
    """The base model's weights as they are."""

    type: Literal["none"] = "none"


class Nf4(Section):
    """4-bit NormalFloat weights, bf16 compute. Source: QLoRA, arXiv:2305.14314, sec. 3."""

    type: Literal["nf4"] = "nf4"
    double_quant: bool = Field(True, description="quantize the scales as well: 0.4 bit per weight less")


class Fp4(Section):
    """4-bit float weights, bf16 compute."""

    type: Literal["fp4"] = "fp4"
    double_quant: bool = Field(True, description="quantize the scales as well: 0.4 bit per weight less")


class Int8(Section):
    """8-bit weights with outlier columns in 16 bit. Source: LLM.int8(), arXiv:2208.07339."""

    type: Literal["int8"] = "int8"


Quantization = Annotated[
    NoQuantization | Nf4 | Fp4 | Int8,
    Field(discriminator="type"),
    BareWord({"4bit": "write `nf4`", "int4": "write `nf4`", "8bit": "write `int8`", "qlora": "write `nf4`"}),
]


class Model(Section):
    """The base model and how it is loaded."""

    base: str = Field(min_length=1, description="hub id, local folder, or a .gguf file")
    revision: Inside | None = Field(None, description="branch, tag or commit of a hub model")
    quantization: Quantization = Field(
        NoQuantization(), description="how the frozen weights are kept; nf4 with lora is QLoRA"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="precision of the weights; auto: bfloat16 where the device computes in it, else float32"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="attention kernel; auto: sdpa where the model has it"
    )


class Source(Section):
    """Where rows come from."""

    path: str = Field(min_length=1, description="file, folder, glob, or hub data set")
    subset: Inside | None = Field(None, description="configuration of a hub data set")
    split: Inside = Field("train", description="split of a hub data set")
    revision: Inside | None = Field(None, description="branch, tag or commit of a hub data set")
    max_rows: int | None = Field(None, ge=1, description="read the first rows only")
    weight: float = Field(
        1.0, gt=0, le=1000, description="how often its rows are seen per epoch: 2 is twice, 0.5 every other row"
    )


def _source(value: Any) -> Any:
    if isinstance(value, (str, dict, Source)):
        return {"path": value} if isinstance(value, str) else value
    raise PydanticCustomError("expected", "must be a path, or a mapping with a `path`")


Sources = Annotated[
    tuple[Annotated[Source, BeforeValidator(_source, json_schema_input_type=str | Source)], ...],
    BeforeValidator(as_tuple, json_schema_input_type=str | Source | list[str | Source]),
    Field(min_length=1),
]


class TurnMarks(Section):
    """What stands around the assistant's turns, for a chat template that does not tell."""

    assistant: str = Field(min_length=1, description="text the template writes before each answer")
    end: str = Field(
        min_length=1,
        description="text that ends an answer, such as the next role's marker; it is trained and ends with a special "
        "token",
    )


class Data(Section):
    """The rows, how they are read and how long they may be."""

    train: Sources = Field(
        description="rows to train on: file, folder, glob, hub data set, or a list of them with weights"
    )
    eval: Sources | None = Field(None, description="held-out rows, as `train`")
    eval_fraction: float | None = Field(
        None, gt=0, lt=1, description="part (0-1) of the training rows held out, instead of `eval`"
    )
    format: Format = Field(Auto(), description="how a row is read; auto: recognised from its columns, and told")
    chat_template: str | None = Field(
        None,
        description="template of a base model that has none: a file, or one of chatml, alpaca; saved with the adapter",
    )
    chat_template_kwargs: dict[str, bool | int | float | str] = Field(
        {},
        description="values of variables the chat template asks for, such as enable_thinking: false; written into the "
        "template that is saved with the adapter",
    )
    system: Literal["keep", "fold"] = Field(
        "keep",
        description="where a system text goes; fold: in front of the first user message, for a template without a "
        "system role; written into the template that is saved with the adapter",
    )
    turns: TurnMarks | None = Field(
        None,
        description="what stands around the assistant's turns (`assistant` and `end`), where they can't be read off "
        "the chat template; every row is checked against it",
    )
    max_length: int = Field(2048, ge=2, description="longest row in tokens")
    on_long: Literal["error", "drop", "truncate", "split"] = Field(
        "error",
        description="what happens to a longer row: error, drop, truncate (cut at the end), split (plain text only)",
    )
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="rows of a step behind one another in packs of at most max_length tokens, none cut and none seeing "
        "another, instead of padded; auto: where that is exact; never changes what is optimized",
    )
    prefix_sharing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="what rows of a micro-batch begin with alike (a system prompt, a question) is computed once for "
        "all of them, and nothing behind the last trained token of a row; auto: where rows are packed, nothing is "
        "drawn at random (dropout, neftune), and it saves 2 % of the tokens; never changes what is optimized",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        "error", description="what happens to a row that can't be read or has nothing to train"
    )
    max_lost: float = Field(
        0.01, ge=0, le=1, description="part (0-1) of the rows that may be dropped or skipped before that is an error"
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="what happens to a row that says exactly what an earlier one said; they are counted"
    )
    overlap: Literal["error", "allow"] = Field(
        "error", description="whether a row may stand in both the training and the eval rows"
    )


def _rows_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("expected", "must be a whole number of rows from 1, or `auto`")


def _layers(value: Any) -> Any:
    if value in ("auto", "none", "all") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("expected", "must be a whole number of layers from 1, or one of `auto`, `none`, `all`")


class EarlyStopping(Section):
    """Stop when the eval loss no longer falls."""

    patience: int = Field(3, ge=1, description="evaluations without a better loss before the run ends")
    min_delta: float = Field(0.0, ge=0, description="how much lower, in nats per token, counts as better")


class Train(Section):
    """How long, in what batches, and what is kept on the way."""

    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="number of steps, instead of `epochs`")
    batch_size: int = Field(16, ge=1, description="rows per step, over all devices and micro-batches")
    micro_batch_size: Annotated[
        int | Literal["auto"],
        PlainValidator(_rows_or_auto),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
    ] = Field(
        "auto",
        description="rows (where packed: packs) in memory at once per device; auto: so many tokens as are fast and fit "
        "the free memory; never changes what is optimized",
    )
    schedule: Schedule = Field(Cosine(), description="how the learning rate moves")
    warmup: Share = Field(0.03, description="steps, or part (0-1) of all steps, over which the rate rises")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="of the order of rows, of dropout and of new weights")
    max_grad_norm: float = Field(1.0, gt=0, description="longest gradient of one step; a longer one is scaled down")
    gradient_checkpointing: Annotated[
        int | Literal["auto", "none", "all"],
        PlainValidator(_layers),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["auto", "none", "all"]}]}),
    ] = Field(
        "auto",
        description="layers whose activations are computed twice to save memory: a number (the first ones), all or "
        "none; auto: no more than the free memory asks for; never changes what is optimized",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether torch's compiler joins the small operations between matrix products (norms, SwiGLU); "
        "auto: on a GPU, where the run is long enough to pay for it; changes the last digits only",
    )
    log_every: Cadence = Field(10, description="steps, or (with a decimal point) epochs, between two printed lines")
    eval_every: Cadence = Field(1.0, description="steps, or (with a decimal point) epochs, between two evaluations")
    save_every: Cadence = Field(1.0, description="steps, or (with a decimal point) epochs, between two checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept: the newest, and always the best")
    early_stopping: EarlyStopping | None = Field(None, description="stop when the eval loss no longer falls")


class Recipe(Section):
    """One training: everything that decides its result."""

    model: Model = Field(description="the base model")
    method: Method = Field(Lora(), description="what is trained")
    data: Data = Field(description="the rows")
    objective: Objective = Field(Sft(), description="what is minimised")
    optimizer: Optimizer = Field(AdamW(), description="how parameters move")
    train: Train = Field(Train(), description="how long and in what batches")
    output: str = Field(min_length=1, description="run folder, made when missing")

    def dump(self) -> str:
        """Return the recipe as YAML that loads to the same recipe again, from any folder."""
        return yaml_nodes.write(self.model_dump(mode="json"))

    def hash(self) -> str:
        """Return a sha256 (hex) over everything in the recipe."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def load(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: the YAML file; relative paths in it start at its folder.
        settings: `a.b=value` assignments made before the recipe is checked.

    Returns:
        The recipe, frozen, with local paths absolute.

    Raises:
        RecipeError: with every problem in it, each with its place.
    """
    path = Path(path)
    tree = yaml_nodes.parse(yaml_nodes.read_text(path), str(path))
    folder = path.resolve().parent
    if not files.is_utf8(folder):  # paths become absolute, and recipe.yaml in the run folder holds them
        raise RecipeError(Problem("its folder's name is not UTF-8", Place(files.shown(folder)), "rename the folder"))
    return from_tree(tree, folder, settings)


def from_tree(tree: Tree, folder: Path, settings: Sequence[str] = ()) -> Recipe:
    """Check a parsed recipe whose relative paths start at `folder`; see `load`."""
    for setting in settings:
        decode.assign(tree, setting, Recipe)
    recipe = decode.decode(Recipe, tree, FOREIGN)
    problems = [*_between_sections(recipe, tree)]
    recipe = _absolute(recipe, folder, tree, problems)
    if problems:
        raise RecipeError(decode.in_order(problems))
    return recipe


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with descriptions, for editors."""
    found = Recipe.model_json_schema(mode="validation")
    for name in sorted(_with_tag(found)):  # the tag has a default, but among several types it must be named
        section = found["$defs"][name]
        section["required"] = ["type", *section.get("required", [])]
    return {**found, "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "loratune recipe"}


def _with_tag(node: Any) -> set[str]:
    """Return the names of the sections that a JSON schema tells apart by their `type`."""
    if isinstance(node, list):
        return {name for item in node for name in _with_tag(item)}
    if not isinstance(node, dict):
        return set()
    mapping = node.get("discriminator", {}).get("mapping", {})
    return {ref.rpartition("/")[2] for ref in mapping.values()}.union(*map(_with_tag, node.values()))


def _between_sections(recipe: Recipe, tree: Tree) -> Iterator[Problem]:
    """Yield what fits in each section but not together."""
    method, train, data, model = recipe.method, recipe.train, recipe.data, recipe.model
    root = tree.root.plain()

    def given(*path: str) -> bool:
        node: Any = root
        for step in path:
            if not isinstance(node, dict) or step not in node:
                return False
            node = node[step]
        return True

    def problem(message: str, *path: str, hint: str | None = None) -> Problem:
        node = tree.root.find(path)
        return Problem(message, node.key or node.place, hint)

    if train.max_steps is not None and given("train", "epochs"):
        yield problem("`train.max_steps` and `train.epochs` both say how long", "train", "max_steps", hint="keep one")
    if data.eval is not None and data.eval_fraction is not None:
        yield problem(
            "`data.eval` and `data.eval_fraction` both say what is held out", "data", "eval_fraction", hint="keep one"
        )
    if isinstance(train.micro_batch_size, int) and train.micro_batch_size > train.batch_size:
        yield problem(
            f"`train.micro_batch_size` {train.micro_batch_size} is larger than `train.batch_size` {train.batch_size}",
            "train",
            "micro_batch_size",
        )
    held_out = data.eval is not None or data.eval_fraction is not None
    if train.early_stopping and not held_out:
        yield problem(
            "`train.early_stopping` looks at the eval loss, and nothing is held out",
            "train",
            "early_stopping",
            hint="give `data.eval` or `data.eval_fraction`",
        )
    if data.on_long == "split" and data.format.type != "text":
        yield problem(
            f"`data.on_long: split` would tear a `{data.format.type}` row apart",
            "data",
            "on_long",
            hint="use drop or truncate, or a larger `data.max_length`",
        )
    if method.type == "full" and model.dtype == "float16":
        yield problem(
            "`method: full` can't train float16 weights: small updates would round to nothing",
            "model",
            "dtype",
            hint="use bfloat16, or leave it out: float32 weights, with products in bfloat16 on a GPU that has it",
        )
    without = "leave `model.quantization` out"
    for message, path, hint in refused_over(method, model.quantization.type, without):
        yield problem(message, *path, hint=hint)
    if method.type == "full":
        if given("optimizer", "loraplus_lr_ratio"):
            yield problem(
                "`optimizer.loraplus_lr_ratio` is for LoRA's B matrices; `method: full` has none",
                "optimizer",
                "loraplus_lr_ratio",
            )
        return
    if method.changes_base:
        if method.dora:
            yield problem(f"`method.init: {method.init}` and `method.dora` don't combine", "method", "dora")
        if method.rslora and (method.rank_pattern or method.alpha_pattern):
            yield problem(
                f"`method.init: {method.init}` with `rslora` takes no patterns",
                "method",
                "rank_pattern" if method.rank_pattern else "alpha_pattern",
            )


def refused_over(method: Method, quantization: str, without: str) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yield what a method can't do over weights in a quantization: the message, the key's path, and the remedy.

    Args:
        method: what is trained.
        quantization: of the base's linear layers: none, nf4, fp4, int8, or the name of another way.
        without: how to have a base that is not quantized.
    """
    quantized = quantization != "none"
    if method.type == "full":
        if quantized:
            yield (
                f"`method: full` trains every weight, and {quantization} weights can't be trained",
                ("method",),
                f"use `method: lora`, or {without}",
            )
        return
    init = ("method", "init")
    if method.init == "loftq" and quantization not in ("nf4", "fp4"):
        hint = "set `model.quantization: nf4`"
        yield "`method.init: loftq` makes up for 4-bit rounding, and the base is not 4-bit", init, hint
    if method.changes_base and quantized:
        yield (
            f"`method.init: {method.init}` changes the base, which {quantization} weights don't allow",
            init,
            f"use `init: loftq`, or {without}",
        )
    if method.init == "eva" and quantization == "int8":
        yield "`method.init: eva` is not known to work on an int8 base", init, "use `nf4`"


def _absolute(recipe: Recipe, folder: Path, tree: Tree, problems: list[Problem]) -> Recipe:
    """Return the recipe with local paths absolute; append a problem for each that leads nowhere."""
    base = _base(recipe.model.base, folder, tree.place("model", "base"), problems)
    data: dict[str, Any] = {}
    for key in ("train", "eval"):
        sources: tuple[Source, ...] | None = recipe.data.train if key == "train" else recipe.data.eval
        if sources is None:
            continue
        places = [tree.place("data", key, index, "path") for index in range(len(sources))]
        data[key] = tuple(
            source.model_copy(update={"path": _data_path(source.path, folder, place, problems)})
            for source, place in zip(sources, places, strict=True)
        )
    if recipe.data.chat_template not in (None, *TEMPLATES):
        data["chat_template"] = _template(str(recipe.data.chat_template), folder, tree, problems)
    output, there = _find(recipe.output, folder)
    if (there and not output.is_dir()) or "\0" in recipe.output:
        problems.append(
            Problem(f"`{shorten(recipe.output)}` can't be the run folder", tree.place("output"), "name a new folder")
        )
    whole = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"base": base}),
            "data": recipe.data.model_copy(update=data),
            "output": os.path.normpath(output),
        }
    )
    if "\0" not in recipe.output:
        problems += _overlaps(whole, tree.place("output"))
    return whole


def _overlaps(recipe: Recipe, place: Place) -> Iterator[Problem]:
    """Yield what the run folder has in common with an input of the recipe, whose paths are absolute.

    A run would write into a base, delete it under --overwrite, or read its own files as rows the next time.
    """
    output = Path(recipe.output)
    hint = "name another folder for the run"
    shown = shorten(str(output), 400)
    if os.path.isabs(recipe.model.base) and (how := run_files.meets(Path(recipe.model.base), output)):
        told = {"is": "is the run folder", "holds": "holds the run folder", "lies in": "lies in the run folder"}[how]
        why = "nothing is written into a base" if how != "lies in" else "a base stays apart from what a run writes"
        yield Problem(f"`model.base` {shorten(recipe.model.base, 400)} {told} {shown}: {why}", place, hint)
    else:
        real = Path(os.path.realpath(output))
        kinds = ((above, run_files.protected(above)) for above in (real, *real.parents))
        if found := next(((above, kind) for above, kind in kinds if kind), None):
            told = f"{'is' if found[0] == real else 'lies in'} {found[1]}, into which nothing is written"
            yield Problem(f"the run folder {shown} {told}: {shorten(str(found[0]), 400)}", place, hint)
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval or ())):
        for source in sources:
            if os.path.isabs(source.path) and run_files.is_read(Path(source.path), output):
                told = f"`data.{key}` {shorten(source.path, 400)} stands for files that a run writes into {shown}"
                yield Problem(told, place, f"{hint}, or the rows alone under `data.{key}`")
    template = recipe.data.chat_template or ""
    if os.path.isabs(template) and run_files.is_read(Path(template), output):
        told = f"`data.chat_template` {shorten(template, 400)} is a file that a run writes into {shown}"
        yield Problem(told, place, f"{hint}, or keep the template in a file of its own")


def _find(value: str, folder: Path) -> tuple[Path, bool]:
    """Return the path that `value` names from `folder`, and whether something is there."""
    path = folder / files.local(value)
    try:
        return path, path.exists()
    except OSError:  # a name too long, a folder that may not be entered
        return path, False


def _base(base: str, folder: Path, place: Place, problems: list[Problem]) -> str:
    path, there = _find(base, folder)
    if there:
        if (kind := files.odd(path)) is not None:
            problems.append(Problem(f"`{shorten(base)}` is {kind}, no model", place, "name the model's folder"))
        elif path.is_file() and path.suffix != ".gguf":
            problems.append(Problem(f"`{shorten(base)}` is a file, and no .gguf", place, "name the model's folder"))
        return str(path.resolve())
    looks_local = base.startswith((".", "/", "~")) or base.endswith(".gguf") or base.count("/") > 1
    if looks_local or not _HUB_ID.fullmatch(base):
        problems.append(Problem(f"no model at `{shorten(base)}`", place, _looked_for(path)))
    return base


def _template(value: str, folder: Path, tree: Tree, problems: list[Problem]) -> str:
    path, there = _find(value, folder)
    if not there or not path.is_file():
        hint = f"{_looked_for(path)}; named ones: {listed(list(TEMPLATES))}"
        problems.append(Problem(f"no chat template at `{shorten(value)}`", tree.place("data", "chat_template"), hint))
    return os.path.normpath(path)


def _data_path(value: str, folder: Path, place: Place, problems: list[Problem]) -> str:
    path, there = _find(value, folder)
    if (kind := files.odd(path)) is not None:
        hint = "rows are read more than once: write them to a file first"
        problems.append(Problem(f"`{shorten(value)}` is {kind}, not a file", place, hint))
    if there:
        return str(path.resolve())
    if glob.has_magic(value):
        if not _matches(path):
            problems.append(Problem(f"no file matches `{shorten(value)}`", place, _looked_for(path)))
        return str(path)
    suffix = Path(value.removesuffix(".gz")).suffix
    beside = (
        suffix[1:].isalpha() if path.parent == folder else os.path.isdir(path.parent)
    )  # `rows.tsv`, `data/rows.tsv`
    looks_local = value.startswith((".", "/", "~")) or suffix in SUFFIXES or value.endswith("/") or beside
    if looks_local or not _HUB_ID.fullmatch(value):
        hint = _looked_for(path)
        if suffix and suffix not in SUFFIXES:
            hint += f"; files end in {listed(SUFFIXES)} (also .gz)"
        problems.append(Problem(f"no data at `{shorten(value)}`", place, hint))
    return value


def _matches(pattern: Path) -> bool:
    try:
        return bool(files.matching(str(pattern)))
    except OSError:
        return True  # told with its place when the rows are read


def _looked_for(path: Path) -> str:
    return f"looked for {shorten(str(path), 400)}"
