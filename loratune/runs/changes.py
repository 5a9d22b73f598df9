"""Drift: what has changed since a checkpoint was saved, and whether a resume would still be the same training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from loratune.errors import Place, Problem, RunFolderError, shorten
from loratune.events import Report
from loratune.optim.schedules import rate, warmup_steps
from loratune.recipe import Recipe, Train
from loratune.runs.checkpoint import Found
from loratune.runs.facts import Facts

# Keys without influence on the optimization: where and how often something is written or measured, and how much is
# computed at once. A change of any other key is refused, so that a new key is never forgotten here.
FREE = {
    "output",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep",
    "train.micro_batch_size",
    "train.gradient_checkpointing",
    "train.compile",
    "train.offload",
    "train.kernels",
    "train.best_metric",
    "train.early_stopping",
}
LENGTH = {"train.epochs", "train.max_steps"}
# Keys with locations: these may change, as long as what is found there has the same fingerprint.
FOUND = {"data": ("data", "eval"), "model.base": ("base",), "model.revision": ("base",),
         "objective.reference": ("reference",)}  # fmt: skip
# the rows stay the same, but not the order of sums and the random numbers of dropout
LAYOUT = {"data.packing", "data.prefix_sharing"}
NAMES = {
    "data": "the training rows",
    "eval": "the held-out rows",
    "tokenizer": "the tokenizer or its chat template",
    "reference": "the weights of `objective.reference`",
}


@dataclass
class Drift:
    """Changes, one line each: those in `refused` would make it another training, those in `told` would not."""

    refused: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


def of_recipe(seal: Mapping[str, Any], recipe: Recipe) -> Drift:
    """Return the changes that show in the recipe alone, before anything is loaded.

    Args:
        seal: the manifest of the checkpoint.
        recipe: that the run is to go on with.
    """
    drift = Drift()
    settings = recipe.model_dump(mode="json")
    changed = {key for key, _, _ in _changes(_completed(seal["settings"]), settings)}
    for key, before, now in _changes(seal["settings"], settings):
        if key not in changed and key not in LAYOUT:
            continue  # a key of a later version, at its default
        line = f"{key}: {_shown(before)} -> {_shown(now)}"
        if _is_under(key, FREE) or (key in LAYOUT and before is None):  # the run began before this key existed
            drift.told.append(line)
        elif key in LAYOUT or (not _is_under(key, FOUND) and key not in LENGTH):
            drift.refused.append(line)
    return drift


def of_run(seal: Mapping[str, Any], recipe: Recipe, facts: Facts, finished: bool) -> Drift:
    """Return the changes that show once rows and model are loaded: fingerprints, and the learning rate's schedule.

    Args:
        seal: the manifest of the checkpoint.
        recipe: that the run is to go on with.
        facts: of this run; fingerprints are compared that the checkpoint has, too.
        finished: whether the run was complete: then more epochs are intended.
    """
    drift = Drift()
    known, fingerprints = seal["fingerprints"], facts.prepared.fingerprints
    for name in fingerprints.keys() & known.keys() - {"base"}:  # a different base has its own error
        if fingerprints[name] != known[name]:
            files = _files(seal["sources"], facts.prepared.sources) if name in ("data", "eval") else ""
            drift.refused.append(f"{NAMES.get(name, name)} are not the same{files}")
    for key, before, now in _changes(_completed(seal["settings"]), recipe.model_dump(mode="json")):
        line = f"{key}: {_shown(before)} -> {_shown(now)}"
        if key in LENGTH:
            moved = _moved_rates(recipe.train, seal, facts.prepared.steps)
            drift.refused.append(line + moved) if moved and not finished else drift.told.append(line + moved)
        elif _is_under(key, FOUND) and key not in LAYOUT:
            judges = next(names for prefix, names in FOUND.items() if _is_under(key, {prefix}))
            if all(name in known and name in fingerprints for name in judges):
                drift.told.append(line)  # its fingerprint decides
            else:
                drift.refused.append(line)
    if seal["processes"] != facts.start.processes:
        drift.told.append(
            f"processes: {seal['processes']} -> {facts.start.processes}; sums are rounded in a different order"
        )
    for name, now in facts.start.versions.items():
        if seal["versions"].get(name) != now:
            drift.told.append(f"{name}: {seal['versions'].get(name)} -> {now}; the last digits may differ")
    return drift


def check(folder: Path, found: Found, changed: Drift, allow_drift: bool, facts: Facts, report: Report) -> None:
    """Report what has changed since a checkpoint was saved; refuse what would make it another training.

    Args:
        folder: the run folder.
        found: the checkpoint.
        changed: since it was saved.
        allow_drift: whether to resume nevertheless; this is recorded in `facts`, for run.json.
        facts: of the run.
        report: to print to.

    Raises:
        RunFolderError: with every change that is refused.
    """
    for line in changed.told:
        report.note(f"changed since {found.folder.name}: {line}")
    if not changed.refused:
        return
    if not allow_drift:
        shown = [Problem(f"changed since {found.folder.name}: {line}", Place(str(folder))) for line in changed.refused]
        hint = "resume with what it started with (recipe.yaml there), accept it with --allow-drift, or --overwrite it"
        raise RunFolderError([*shown, Problem("this would no longer be the training that was started", hint=hint)])
    facts.drift = [*(facts.drift or ()), *(f"after step {found.progress.step}: {x}" for x in changed.refused)]
    for line in changed.refused:
        report.problem(f"changed since {found.folder.name}, and allowed: {line}")


def _changes(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, before, now) of every leaf that differs; a choice with another `type` counts as one leaf."""
    if isinstance(before, dict) and isinstance(now, dict) and before.get("type") == now.get("type"):
        for key in dict.fromkeys((*before, *now)):
            yield from _changes(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield path, before, now


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings with defaults for keys that did not exist when it began."""
    try:
        return Recipe.model_validate(settings).model_dump(mode="json")
    except ValidationError:  # a key that no longer exists: it is listed among the changes
        return settings


def _is_under(key: str, prefixes: Any) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "type" in value:
        value = value["type"]
    return "none" if value is None else shorten(str(value))


def _files(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Return which data files differ in size or modification time."""
    olds, news = ({one["path"]: one for one in files} for files in (before, now))
    told = []
    for path in dict.fromkeys((*olds, *news)):
        old, new = olds.get(path), news.get(path)
        if old is None or new is None:
            told.append(f"{path} is {'new' if old is None else 'no longer there'}")
        elif old != new:
            size = "" if old["bytes"] == new["bytes"] else f": {old['bytes']:,} -> {new['bytes']:,} bytes"
            told.append(f"{path} has changed{size}")
    return f" ({'; '.join(told[:3])}{f'; and {len(told) - 3} more' if len(told) > 3 else ''})" if told else ""


def _moved_rates(train: Train, seal: Mapping[str, Any], steps: int) -> str:
    """Return how another number of steps changes the learning rates of steps already done, or nothing."""
    done, before = seal["step"], seal["steps"]

    def curve(length: int) -> list[float]:
        warmup = warmup_steps(train.warmup, length)
        return [rate(train.schedule, number, length, warmup) for number in range(min(done, length))]

    if curve(before)[:steps] == curve(steps)[:before]:
        return ""
    warmup, kind = warmup_steps(train.warmup, steps), train.schedule.type
    after = rate(train.schedule, min(done, steps), steps, warmup)
    last = rate(train.schedule, done, max(before, done), warmup_steps(train.warmup, before))
    return f" ({before} -> {steps} steps: `{kind}` continues at {after:.3g} of the rate, was at {last:.3g})"
