"""The recipe: its sections, loading, checks between sections, and its JSON schema."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from loratune.config import decode, yaml_nodes
from loratune.config.foreign_keys import FOREIGN
from loratune.config.section import BareWord, Cadence, Complaint, Section, Share, members_of
from loratune.config.yaml_nodes import Tree
from loratune.data.formats import made
from loratune.data.section import SUFFIXES, Data, Source
from loratune.errors import LoratuneError, Place, Problem, RecipeError, listed, shorten
from loratune.methods import Lora, Method
from loratune.methods.adapter_files import CONFIG
from loratune.methods.section import MethodSection
from loratune.models.chat_templates import TEMPLATES
from loratune.models.section import Model
from loratune.objectives import Objective, Sft
from loratune.objectives.compared import LIVE, START, Compared
from loratune.optim import AdamW, Optimizer
from loratune.optim.schedules import Cosine, Schedule
from loratune.system import files, run_files, storage

_HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def _rows_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("expected", "must be an integer number of rows from 1, or `auto`")


def _layers(value: Any) -> Any:
    if value in ("auto", "none", "all") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise PydanticCustomError("expected", "must be an integer number of layers from 1, or one of `auto`, `none`, `all`")


class EarlyStopping(Section):
    """Stop when evaluations no longer get better."""

    patience: int = Field(3, ge=1, description="evaluations without a better one before the run ends")
    min_delta: float = Field(
        0.0, ge=0, description="smallest change of `best_metric`, in its unit, that counts as better"
    )


class Train(Section):
    """Length of the training, batches, evaluation and checkpoints."""

    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="number of steps, instead of `epochs`")
    batch_size: int = Field(16, ge=1, description="rows per step, over all devices and micro-batches")
    micro_batch_size: Annotated[
        int | Literal["auto"],
        PlainValidator(_rows_or_auto),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
    ] = Field(
        "auto",
        description="rows (where packed: packs) in memory at once per device; auto: as many tokens as are fast and fit "
        "the free memory; never changes what is optimized",
    )
    schedule: Schedule = Field(Cosine(), description="learning rate schedule")
    warmup: Share = Field(0.03, description="steps, or fraction (0-1) of all steps, over which the rate rises")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of the row order, of dropout and of new weights")
    max_grad_norm: float = Field(1.0, gt=0, description="largest gradient norm; larger gradients are scaled down")
    gradient_checkpointing: Annotated[
        int | Literal["auto", "none", "all"],
        PlainValidator(_layers),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["auto", "none", "all"]}]}),
    ] = Field(
        "auto",
        description="layers whose activations are recomputed in the backward pass to save memory: a number (the first "
        "ones), all or none; auto: no more than the free memory requires; never changes what is optimized",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether torch's compiler fuses the small operations between matrix products (norms, SwiGLU); "
        "auto: on a GPU, where the run is long enough to pay for it and `kernels` does not do it; changes the last "
        "digits only",
    )
    offload: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether embedding, head and the inputs of checkpointed layers stay in main memory and are copied "
        "to the GPU when they are used; auto: where the GPU has too little memory otherwise; changes the last digits "
        "only",
    )
    kernels: Literal["auto", "off"] = Field(
        "auto",
        description="whether a GPU uses loratune's kernels between matrix products, for nf4 and cross entropy, and "
        "cuDNN's for attention; auto: those that give correct values on it, tested before the first step; changes "
        "the last digits only",
    )
    log_every: Cadence = Field(10, description="steps, or (with a decimal point) epochs, between two printed lines")
    eval_every: Cadence = Field(1.0, description="steps, or (with a decimal point) epochs, between two evaluations")
    save_every: Cadence = Field(1.0, description="steps, or (with a decimal point) epochs, between two checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept: the newest, and always the best")
    best_metric: str = Field(
        "loss",
        min_length=1,
        description="what the best evaluation is the best by, for the saved weights, `keep` and `early_stopping`: "
        "loss, or a figure of the objective, such as `accuracy`",
    )
    early_stopping: EarlyStopping | None = Field(None, description="stop when evaluations no longer get better")


class Recipe(Section):
    """One training: everything that its result depends on."""

    model: Model = Field(description="the base model")
    method: Method = Field(Lora(), description="what is trained")
    data: Data = Field(description="the rows")
    objective: Objective = Field(Sft(), description="what is minimised")
    optimizer: Optimizer = Field(AdamW(), description="how parameters are updated")
    train: Train = Field(Train(), description="how long and in what batches")
    output: str = Field(min_length=1, description="run folder, created if missing")

    def dump(self) -> str:
        """Return the recipe as YAML that loads to the same recipe again, from any folder."""
        return yaml_nodes.write(self.model_dump(mode="json"))

    def hash(self) -> str:
        """Return a sha256 (hex) over everything in the recipe."""
        return storage.json_sha256(self.model_dump(mode="json"))


def load(source: str | os.PathLike[str] | Mapping[str, Any], settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe, from a YAML file or from a mapping of the same keys and values.

    Args:
        source: the file; relative paths in it start at its folder. Or a mapping; relative paths start at the current
            folder, and messages name a key instead of line and column.
        settings: `a.b=value` assignments made before the recipe is checked.

    Returns:
        The recipe, frozen, with local paths absolute.

    Raises:
        RecipeError: with every problem in it, each with its place.
    """
    if isinstance(source, Mapping):
        tree, folder = yaml_nodes.taken(source), Path.cwd()
    else:
        path = Path(source)
        tree = yaml_nodes.parse(yaml_nodes.read_text(path), str(path))
        folder = path.resolve().parent
    if not files.is_utf8(folder):  # paths become absolute, and are written into the run folder's recipe.yaml
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
    for name in sorted(
        _with_tag(found) - _defaults()
    ):  # `type` has a default, but must be given where there are several types
        section = found["$defs"][name]
        section["required"] = ["type", *section.get("required", [])]
    return {**found, "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "loratune recipe"}


def _defaults() -> set[str]:
    """Return the names of the sections that stand for a mapping without a `type`."""
    return {
        section.__name__
        for info in Recipe.model_fields.values()
        for word in info.metadata
        if isinstance(word, BareWord)
        for tag, section in members_of(info.annotation)
        if tag == word.default
    }


def _with_tag(node: Any) -> set[str]:
    """Return the names of the sections that a JSON schema distinguishes by `type`."""
    if isinstance(node, list):
        return {name for item in node for name in _with_tag(item)}
    if not isinstance(node, dict):
        return set()
    mapping = node.get("discriminator", {}).get("mapping", {})
    return {ref.rpartition("/")[2] for ref in mapping.values()}.union(*map(_with_tag, node.values()))


def _between_sections(recipe: Recipe, tree: Tree) -> Iterator[Problem]:
    """Yield problems between sections that are valid each."""
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
        yield problem("`train.max_steps` and `train.epochs` both set the length", "train", "max_steps", hint="keep one")
    if data.eval is not None and data.eval_fraction is not None:
        yield problem(
            "`data.eval` and `data.eval_fraction` both set the held-out rows", "data", "eval_fraction", hint="keep one"
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
            "`train.early_stopping` needs the eval loss, but no rows are held out",
            "train",
            "early_stopping",
            hint="give `data.eval` or `data.eval_fraction`",
        )
    measures = recipe.objective.measures
    if train.best_metric not in measures:
        yield problem(
            f"`train.best_metric: {shorten(train.best_metric)}` is none of `objective: {recipe.objective.type}`",
            "train",
            "best_metric",
            hint=f"use {listed(list(measures))}",
        )
    elif train.best_metric != "loss" and not held_out:
        yield problem(
            "`train.best_metric` compares evaluations, but no rows are held out",
            "train",
            "best_metric",
            hint="give `data.eval` or `data.eval_fraction`",
        )
    if data.on_long == "split" and data.format.type != "text":
        yield problem(
            f"`data.on_long: split` can't split a `{data.format.type}` row",
            "data",
            "on_long",
            hint=f"use drop{'' if data.format.whole else ' or truncate'}, or a larger `data.max_length`",
        )
    if method.dropout and recipe.objective.values:
        yield problem(
            f"`objective: {recipe.objective.type}` compares with the model before step 1, and dropout makes the model "
            "differ from that at random",
            "method",
            "lora_dropout",
            hint="remove `lora_dropout`",
        )
    objective = recipe.objective
    if isinstance(objective, Compared) and objective.is_live and method.forgets_by:
        yield problem(
            f"`objective.reference: live` turns the adapter off at each step, and with {_forgetful(method)} that is "
            "not the model before step 1",
            "objective",
            "reference",
            hint="use `reference: start`: its values are computed once, before step 1",
        )
    yield from (problem(told, *path, hint=hint) for told, path, hint in _probing(recipe))
    if recipe.objective.pooled and not method.scores_rows:
        told = f"`objective: {recipe.objective.type}` trains a head that scores rows, `method: {method.type}` does not"
        yield problem(told, "method", hint="use lora, full or head")
    if method.frozen and not recipe.objective.pooled:
        told = (
            f"`method: {method.type}` trains a head that scores rows, which `objective: {recipe.objective.type}` lacks"
        )
        yield problem(told, "method", hint="use `objective: classify` or `reward`, or `method: lora`")
    for complaint in (*method.complaints(model, recipe.optimizer), *recipe.objective.complaints(data)):
        yield problem(complaint.message, *complaint.path, hint=complaint.hint)


_REMEDIES = {  # against a method that loses the model before step 1, by its key
    "type": "use `method: lora`, or another objective",
    "continue_from": "merge that adapter first (`loratune merge`), and train on the merged model",
}


def _forgetful(method: MethodSection) -> str:
    """Return the key of a method by which the model before step 1 is lost, with its value."""
    key = method.forgets_by
    return f"`method{'' if key == 'type' else f'.{key}'}: {shorten(str(dict(method)[key]))}`"


def _probing(recipe: Recipe) -> Iterator[Complaint]:
    """Yield what prevents an objective from asking the model in every step, and the model before step 1 with it."""
    if not recipe.objective.probed:
        return
    asks, key = f"`objective: {recipe.objective.type}`", recipe.method.forgets_by
    if key:
        told = (
            f"{asks} turns the adapter off in every step, and with {_forgetful(recipe.method)} that is not the model "
        )
        where = ("method",) if key == "type" else ("method", key)
        yield Complaint(f"{told}before step 1", where, _REMEDIES.get(key, f"remove `{key}`"))
    if recipe.train.batch_size == 1:
        told = f"{asks} compares the rows of a step, and `train.batch_size: 1` leaves nothing to compare with"
        yield Complaint(told, ("train", "batch_size"), "use 8 or more; `train.micro_batch_size` limits the memory")


def _absolute(recipe: Recipe, folder: Path, tree: Tree, problems: list[Problem]) -> Recipe:
    """Return the recipe with local paths absolute; append a problem for each that does not exist."""
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
    if recipe.data.format.type == "auto" and "auto" not in recipe.objective.formats:
        data["format"] = made(recipe.objective.formats[0]) or recipe.data.format
    method = recipe.method
    if isinstance(method, Lora) and method.continue_from is not None:
        method = _continued(method, method.continue_from, folder, tree, problems)
    objective = recipe.objective
    if isinstance(objective, Compared) and objective.named is not None:
        named = _reference(objective.named, folder, tree.place("objective", "reference"), problems)
        objective = objective.model_copy(update={"reference": named})
    whole = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"base": base}),
            "method": method,
            "objective": objective,
            "data": recipe.data.model_copy(update=data),
            "output": os.path.normpath(output),
        }
    )
    if "\0" not in recipe.output:
        problems += _overlaps(whole, tree.place("output"))
    return whole


_MODELS = (CONFIG, "config.json")  # one of these tells an adapter or a model
_MEETS = {"is": "is the run folder", "holds": "holds the run folder", "lies in": "is in the run folder"}


def _overlaps(recipe: Recipe, place: Place) -> Iterator[Problem]:
    """Yield a problem for each input of the recipe that overlaps with the run folder; paths are absolute.

    A run would write into a base, delete it under --overwrite, or read its own files as rows the next time.
    """
    output = Path(recipe.output)
    hint = "name another folder for the run"
    shown = shorten(str(output), 400)
    if os.path.isabs(recipe.model.base) and (how := run_files.meets(Path(recipe.model.base), output)):
        why = "nothing is written into a base" if how != "lies in" else "a base must be outside the run folder"
        yield Problem(f"`model.base` {shorten(recipe.model.base, 400)} {_MEETS[how]} {shown}: {why}", place, hint)
    else:
        real = Path(os.path.realpath(output))
        kinds = ((above, run_files.protected(above)) for above in (real, *real.parents))
        if found := next(((above, kind) for above, kind in kinds if kind), None):
            told = f"{'is' if found[0] == real else 'is in'} {found[1]}, which is never written to"
            yield Problem(f"the run folder {shown} {told}: {shorten(str(found[0]), 400)}", place, hint)
    for key, sources in (("train", recipe.data.train), ("eval", recipe.data.eval or ())):
        for source in sources:
            if os.path.isabs(source.path) and run_files.is_read(Path(source.path), output):
                told = f"`data.{key}` {shorten(source.path, 400)} includes files that a run writes into {shown}"
                yield Problem(told, place, f"{hint}, or the rows alone under `data.{key}`")
    start = recipe.method.continue_from if isinstance(recipe.method, Lora) else None
    other = recipe.objective.named if isinstance(recipe.objective, Compared) else None
    for key, path in (("method.continue_from", start), ("objective.reference", other)):
        if path is not None and os.path.isabs(path) and (how := run_files.meets(Path(path), output)):
            yield Problem(f"`{key}` {shorten(path, 400)} {_MEETS[how]} {shown}", place, hint)
    template = recipe.data.chat_template or ""
    if os.path.isabs(template) and run_files.is_read(Path(template), output):
        told = f"`data.chat_template` {shorten(template, 400)} is a file that a run writes into {shown}"
        yield Problem(told, place, f"{hint}, or keep the template in a separate file")


def _find(value: str, folder: Path) -> tuple[Path, bool]:
    """Return the path that `value` names from `folder`, and whether something is there."""
    path = folder / files.local(value)
    try:
        return path, path.exists()
    except OSError:  # a name too long, a folder without permission
        return path, False


def _base(base: str, folder: Path, place: Place, problems: list[Problem]) -> str:
    path, there = _find(base, folder)
    if there:
        if (kind := files.odd(path)) is not None:
            problems.append(Problem(f"`{shorten(base)}` is {kind}, not a model", place, "name the model's folder"))
        elif path.is_file() and path.suffix != ".gguf":
            problems.append(Problem(f"`{shorten(base)}` is a file, but not a .gguf", place, "name the model's folder"))
        return str(path.resolve())
    looks_local = base.startswith((".", "/", "~")) or base.endswith(".gguf") or base.count("/") > 1
    if looks_local or not _HUB_ID.fullmatch(base):
        problems.append(Problem(f"no model at `{shorten(base)}`", place, _looked_for(path)))
    return base


def _reference(value: str, folder: Path, place: Place, problems: list[Problem]) -> str:
    path, there = _find(value, folder)
    if not there and (close := difflib.get_close_matches(value, (START, LIVE), 1)):
        problems.append(Problem(f"no adapter or model at `{shorten(value)}`", place, f"did you mean `{close[0]}`?"))
        return value
    known = len(problems)
    found = _base(value, folder, place, problems)
    if there and len(problems) == known and path.is_dir() and not any((path / name).is_file() for name in _MODELS):
        what = "this run has no adapter yet" if run_files.is_run(path) else f"no {' and no '.join(_MODELS)} there"
        hint = "name a run, an adapter folder, or a model's folder or hub id"
        problems.append(Problem(f"`{shorten(value)}` can't be the reference: {what}", place, hint))
    return found


def _continued(method: Lora, value: str, folder: Path, tree: Tree, problems: list[Problem]) -> Lora:
    path, there = _find(value, folder)
    place = tree.place("method", "continue_from")
    if not there or not (path / CONFIG).is_file():
        problems.append(Problem(f"no adapter at `{shorten(value)}`", place, "name a run or an adapter folder"))
        return method
    try:
        return method.continued(path.resolve())
    except LoratuneError as error:
        problems += error.problems
        return method


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
        return True  # reported when the rows are read


def _looked_for(path: Path) -> str:
    return f"looked for {shorten(str(path), 400)}"
