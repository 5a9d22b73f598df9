"""`loratune eval`: compare base and adapter on the same held-out rows, with confidence intervals."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loratune import console
from loratune.commands import opened_model
from loratune.commands.opened_model import Subject
from loratune.config import decode, yaml_nodes
from loratune.config.section import tag_of
from loratune.data import dataset, model_limits, turn_ends
from loratune.data.batches import AUTO_TOKENS, in_length_order
from loratune.data.collate import collate
from loratune.data.dataset import DAMAGED, Rows
from loratune.data.encode import Encoder, Row
from loratune.data.section import SUFFIXES, Data, Source
from loratune.errors import DataError, RecipeError, UsageError, shorten
from loratune.events import Listener, Report
from loratune.kernels import linear_cross_entropy
from loratune.methods import adapter_files
from loratune.methods.attach import attach
from loratune.models import base_model, fingerprint, generate
from loratune.models.batch import Batch
from loratune.models.policy import Policy
from loratune.objectives import metrics
from loratune.objectives.section import ObjectiveSection
from loratune.recipe import Recipe
from loratune.runs import outputs
from loratune.system import files, regex_match, startup, storage
from loratune.training import memory_use

EXAMPLES = 3  # answers that are printed side by side
CLASSES = 12  # most for which the confusion table is printed
SHOWN = 66  # characters of each that are printed


@dataclass(frozen=True)
class Score:
    """A mean over rows with its 95 % bootstrap interval.

    Losses are in nats per label token, or in the unit of an objective that learns no answers; what counts rows or
    tokens is a part (0-1) of them. NaN where these rows leave it undefined, such as AUROC with rows of one class.
    """

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float | None]:
        """Return the score as JSON data, which has no NaN: null."""
        return {name: None if math.isnan(value) else value for name, value in self.__dict__.items()}


@dataclass(frozen=True)
class Evaluation:
    """What was measured on held-out rows.

    Attributes:
        name: the run, adapter or model as it was given.
        rows: number of rows.
        generated: number of rows answered (0 where nothing was generated).
        scores: system (`base`, `adapter` or `model`) -> metric -> its mean (`value`) with the ends of its 95 % interval
            (`low`, `high`): `loss` in nats per label token, `perplexity`, the others parts (0-1) of tokens or rows;
            or loss and figures of the run's objective, where it learns no answers.
        predictions: file with prompt, reference and answers of each row, or None.
        base_differs: how the base differs from the one it was trained on, where that was allowed.
        trust_remote_code: whether code that comes with the base model was allowed to run.
        examples: reference and answers of the first rows that were answered: `reference` or system -> text.
        objective: whose loss and figures were measured; empty where the loss is that of label tokens.
        unit: of the loss.
        classes: of a classifier, in the order of its outputs.
        confusion: how many rows of each class were taken for each class.
    """

    name: str
    rows: int
    generated: int
    scores: dict[str, dict[str, Score]]
    predictions: Path | None
    base_differs: tuple[str, ...] = ()
    trust_remote_code: bool = False
    examples: tuple[dict[str, str], ...] = ()
    objective: str = ""
    unit: str = ObjectiveSection.unit
    classes: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the evaluation as JSON data."""
        scores = {s: {m: score.as_json() for m, score in by.items()} for s, by in self.scores.items()}
        predictions = str(self.predictions) if self.predictions else None
        return {
            "name": self.name,
            "rows": self.rows,
            "generated": self.generated,
            "scores": scores,
            "predictions": predictions,
            "base_differs": list(self.base_differs),
            "trust_remote_code": self.trust_remote_code,
            "examples": list(self.examples),
            "objective": self.objective,
            "unit": self.unit,
            "classes": list(self.classes),
            "confusion": [list(row) for row in self.confusion],
        }


HINT = "use --batch-size 1 or --no-generate, or close other programs"


@dataclass(frozen=True)
class _Wish:
    """How answers are asked for and compared; see `evaluate`."""

    generate: bool
    max_new_tokens: int
    batch_size: int
    temperature: float
    regex: str | None
    choices: Sequence[str] | None


Questions = dict[int, tuple[list[int], str]]  # number of a row -> the prompt's tokens, the reference


@dataclass
class _Task:
    """What is measured on what.

    Attributes:
        what: base and adapter, or model.
        rows: to evaluate on.
        encoder: with the tokenizer.
        questions: the rows that are answered.
        ends: tokens at which an answer ends.
        wanted: what the pattern finds in each reference, by the number of the row; empty without a pattern.
        objective: whose loss and figures are measured, where it learns no answers; else None.
    """

    what: Subject
    rows: Rows
    encoder: Encoder
    questions: Questions
    ends: Sequence[int]
    wanted: dict[int, str | None]
    objective: ObjectiveSection | None


@dataclass
class _Measured:
    """What came out, by system, and how the base differs.

    By system: sums of each row, answers by the number of the row, and the outputs of a head that scores rows, float32,
    (rows, outputs).
    """

    per_row: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    answered: dict[str, dict[int, str]] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    differs: tuple[str, ...] = ()


def evaluate(
    name: str | Path,
    data: str | None = None,
    format: str | None = None,
    base: str | None = None,
    limit: int | None = None,
    generate: bool = True,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    temperature: float = 0.0,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    out: Path | None = None,
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
    on_event: Listener | None = None,
) -> Evaluation:
    """Measure loss, perplexity and token accuracy, and compare generated answers with the references.

    Of a run whose objective learns no answers, such as `pattern`, loss and figures of that objective are measured.

    Args:
        name: run folder, adapter folder, or model.
        data: rows to evaluate on; None for the run's held-out rows.
        format: how a row is read; None for the run's, else `chat`.
        base: base model to compare with, instead of the recorded one.
        limit: evaluate the first rows only.
        generate: also answer each row's last trained turn and compare.
        max_new_tokens: longest answer in tokens.
        batch_size: answers generated at once.
        temperature: 0 is greedy.
        regex: adds the metric `regex`: the pattern finds the same in answer and reference.
        choices: adds the metric `choice`: the first choice named is the same in answer and reference.
        out: file for the predictions; None for predictions.jsonl in the run folder (predictions-step-000200.jsonl for
            a checkpoint), for anything but a run in the current folder.
        allow_base_mismatch: measure on another base than it was trained on; recorded in the result.
        trust_remote_code: run code that comes with the base model.
        on_event: called with each event; None: lines go to Python's logging. What it raises comes out as it is.

    Returns:
        Scores of the base and of the adapter (or of the model alone, where no base is known).

    Raises:
        LoratuneError: any of its subclasses.
    """
    tell = Report(on_event)
    wish = _Wish(generate, max_new_tokens, batch_size, temperature, regex, choices)
    with startup.quiet(), startup.computing(), tell.unchanged(), base_model.or_out_of_memory(HINT):
        if regex is not None:
            regex_match.check(regex)
        what = opened_model.open_subject(str(name), base, trust_remote_code)
        if (objective := _objective(what, format)) is not None:
            _check_no_answers(objective, wish, out)
            wish = replace(wish, generate=False)
        path = _predictions(what, data, out) if wish.generate else None
        task = _prepared(what, data, format, limit, wish, tell)
        found = _measured(task, wish, allow_base_mismatch, tell)
        return _result(task, found, path)


def _objective(what: Subject, format: str | None) -> ObjectiveSection | None:
    """Return the objective of a run where its loss and figures are measured on rows of a format (None: the run's).

    Raises:
        UsageError: when the model scores rows, and no objective says how it does.
    """
    objective = what.recipe.objective if what.recipe and not what.recipe.objective.generates else None
    if objective is not None and format not in (None, *objective.formats):
        objective = None
    if objective is not None and objective.pooled:
        return objective.of_head(opened_model.head(what))
    if objective is None and what.folder is not None and fingerprint.head(what.folder):
        told = f"`{what.name}` has a head that scores rows: it writes no answers"
        raise UsageError(told, "name the folder of its run, and rows in the format that it was trained on")
    return objective


def _check_no_answers(objective: ObjectiveSection, wish: _Wish, out: Path | None) -> None:
    """Check that nothing is asked of answers where there are none."""
    asked = {"--regex": wish.regex, "--choices": wish.choices, "--out": out}
    for option, value in asked.items():
        if value:
            told = f"`objective: {tag_of(type(objective))}` learns no answers: `{option}` has nothing to compare"
            raise UsageError(told, f"remove `{option}`")


def _predictions(what: Subject, data: str | None, out: Path | None) -> Path:
    """Return the file for the predictions, checked before anything slow."""
    inputs = outputs.inputs_of(what.recipe) if what.recipe else []
    inputs = [("--data", data), *inputs] if data is not None else inputs
    return outputs.predictions(what.name, out, what.base.base, inputs)


def _prepared(
    what: Subject, data: str | None, format: str | None, limit: int | None, wish: _Wish, tell: Report
) -> _Task:  # fmt: skip
    """Read the rows and derive questions from them, before any model is loaded."""
    encoder = Encoder(opened_model.tokenizer(what))
    rows = _rows(what, data, format, encoder, limit, tell)
    for line in _about(rows):
        tell.problem(line)
    questions = _questions(rows, encoder.tokenizer) if wish.generate else {}
    ends = turn_ends.of_folder(what.folder, encoder) if questions else ()
    references = [reference for _, reference in questions.values()]
    # a pattern that takes too long most likely shows on the references
    found = regex_match.found(wish.regex, references) if wish.regex and questions else []
    wanted = dict(zip(questions, found, strict=True)) if found else {}
    return _Task(what, rows, encoder, questions, ends, wanted, _objective(what, format))


def _measured(task: _Task, wish: _Wish, allow_mismatch: bool, tell: Report) -> _Measured:
    """Measure one system after the other; questions that leave no room for an answer are removed from the task."""
    done = _Measured()
    for system, loaded in _systems(task.what, allow_mismatch, alone=bool(task.objective and task.objective.pooled)):
        for line in loaded.notes:
            tell.problem(line)
        done.differs = loaded.base_differs or done.differs
        if not done.per_row:
            task.questions = _with_room(loaded, task.rows, task.questions, wish.max_new_tokens, tell)
        tell.note(f"evaluating {system} on {task.rows.samples:,} rows")
        done.per_row[system], outputs = _losses(loaded, task.rows, task.objective)
        if outputs is not None:
            done.outputs[system] = outputs
        if not task.questions:
            continue
        with tell.counting(f"{system}: generating answers") as progress:
            answers = _answers(
                loaded, task.questions, wish.max_new_tokens, wish.batch_size, wish.temperature, progress, task.ends
            )
        matches = _matches(wish.regex, answers, tell) if wish.regex and task.wanted else {}
        if not matches:  # not of one system alone: systems are compared
            task.wanted = {}
            for row in (row for rows_of in done.per_row.values() for row in rows_of):
                row.pop("regex", None)
        _add_comparisons(done.per_row[system], answers, task.questions, task.wanted, matches, wish.choices)
        done.answered[system] = answers
    return done


def _result(task: _Task, found: _Measured, path: Path | None) -> Evaluation:
    """Return the evaluation, and write the predictions to `path`, if given and there are any."""
    rows, questions = task.rows, task.questions
    scores = {system: _scores(values) for system, values in found.per_row.items()}
    what, by = task.what, task.objective
    about: dict[str, Any] = {"objective": str(tag_of(type(by))), "unit": by.unit} if by else {}
    for system, of_head in found.outputs.items():
        assert by is not None
        scores[system] |= {name: Score(*of) for name, of in by.measured(of_head, rows).items()}
        about |= by.table(of_head, rows)
    path = path if questions else None
    if path is not None:
        _write_predictions(path, rows, task.encoder.tokenizer, questions, found.answered, found.per_row)
    shown = tuple(
        {"reference": questions[index][1], **{system: texts[index] for system, texts in found.answered.items()}}
        for index in list(questions)[:EXAMPLES]
    )
    return Evaluation(what.name, rows.samples, len(questions), scores, path, found.differs, what.trust, shown, **about)


def show(result: Evaluation) -> str:
    """Return an evaluation as a table: one row per metric, one column per system."""
    systems = list(result.scores)
    body = []
    for metric in result.scores[systems[0]]:
        cells = [_cell(result.scores[system][metric]) for system in systems]
        if len(systems) == 2:
            first, second = (result.scores[system][metric] for system in systems)
            cells.append("apart" if first.high < second.low or second.high < first.low else "overlap")
        body.append([metric.replace("_", " "), *cells])
    head = ["", *systems, *(["intervals"] if len(systems) == 2 else [])]
    answered = "" if result.objective else f", {result.generated:,} answered"
    unit = f"; loss in {result.unit}".replace("in per", "per") if result.objective else ""
    lines = [f"{result.name}: {result.rows:,} rows{answered} (mean, 95 % bootstrap interval{unit})", ""]
    lines.append(console.table(head, body))
    if 0 < len(result.classes) <= CLASSES:
        lines += ["", "rows of a class, and what they were taken for"]
        numbers = [[name, *map(str, row)] for name, row in zip(result.classes, result.confusion, strict=True)]
        lines.append(console.table(["", *result.classes], numbers))
    for number, example in enumerate(result.examples, 1):
        lines += ["", f"answer {number} of {result.generated:,}"]
        width = max(map(len, example))
        lines += [f"  {who:{width}}  {shorten(text, SHOWN)}" for who, text in example.items()]
    if result.predictions:
        lines += ["", f"predictions: {result.predictions}"]
    return "\n".join(lines)


def _cell(score: Score) -> str:
    return "undefined" if math.isnan(score.value) else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


def _rows(
    what: Subject, path: str | None, format: str | None, encoder: Encoder, limit: int | None, tell: Report
) -> Rows:  # fmt: skip
    """Return the rows to evaluate on: those given, else the run's held-out rows."""
    known: Recipe | None = what.recipe
    if path is None:
        if known is None:
            raise UsageError("no rows to evaluate on", "name them with --data")
        held_out = dataset.of(known.data, known.train.seed, encoder, pooled=known.objective.pooled)[1]
        if held_out is None:
            raise UsageError("the run has no held-out rows", "name some with --data")
        if known.objective.pooled:  # the head's: files may have more classes by now
            held_out = dataset.with_classes(held_out, opened_model.classes(what))
    else:
        local = files.local(path)
        there, pattern = files.there(local), glob.has_magic(path)
        source = {"path": str(local.resolve()) if there or pattern else path}
        beside = "/" in path and local.parent.is_dir()  # a name in an existing folder is no hub id
        if not (there or pattern) and (path.endswith(SUFFIXES) or path.startswith((".", "/", "~")) or beside):
            raise DataError(f"no data at `{path}`")
        fields: dict[str, Any] = {"train": source, "max_length": known.data.max_length if known else 1 << 20}
        if format is not None and not (known and format == known.data.format.type):  # the run's has columns too
            fields["format"] = format
        elif known is not None:
            fields["format"] = known.data.format.model_dump()
        try:
            section = decode.decode(Data, yaml_nodes.parse(json.dumps(fields), "--data"))
        except RecipeError as error:
            raise UsageError([type(p)(p.message, hint=p.hint) for p in error.problems]) from None
        held_out = dataset.load([Source(path=section.train[0].path)], section, encoder, name="eval")
        if known is not None and known.objective.pooled and section.format.type in known.objective.formats:
            held_out = dataset.with_classes(replace(held_out, pooled=True), opened_model.classes(what))
    held_out = _good(held_out, tell)
    if limit:
        return held_out.take(np.arange(min(limit, held_out.samples) * held_out.per_sample))
    return held_out


def _good(rows: Rows, tell: Report) -> Rows:
    """Return the good ones of rated answers, as bad ones are no references; other rows as they are."""
    if "kto" not in rows.formats:
        return rows
    good = np.flatnonzero(rows.first_labels > 0.5)
    if not len(good):
        raise UsageError(
            "all rows are labelled false: there is no good answer to compare with", "name some with --data"
        )
    if bad := rows.samples - len(good):
        tell.note(f"{bad:,} rows labelled false are left out: only good answers are references")
    return rows.take(good)


def _matches(regex: str, answers: dict[int, str], tell: Report) -> dict[int, str | None]:
    """Return what the pattern finds in each answer; if it takes too long, nothing, with a note: other metrics stay."""
    try:
        return dict(zip(answers, regex_match.found(regex, list(answers.values())), strict=True))
    except UsageError as error:
        tell.problem(f"{error.problems[0].message}: evaluated without it")
        return {}


def _about(rows: Rows) -> Iterator[str]:
    """Yield notes on the rows, as `train` prints them."""
    if rows.damaged:
        yield DAMAGED
    yield from rows.told()


def _systems(what: Subject, allow_mismatch: bool, alone: bool) -> Iterator[tuple[str, base_model.Loaded]]:
    """Yield the systems to compare: the base, then the adapter on it; or the original base, then the full model.

    With `alone` only the last of them, as a base has no head that scores rows.
    """
    if alone:
        loaded = opened_model.load(what, allow_mismatch=allow_mismatch)
        yield "adapter" if what.adapter else "model", loaded
        return
    if what.adapter is not None:
        loaded = opened_model.load_base(what, allow_mismatch=allow_mismatch)
        if adapter_files.changes_biases(what.adapter):  # it overwrites those of the base
            yield "base", loaded
            loaded.model = attach(loaded.model, what.adapter, "default")
        else:
            loaded.model = attach(loaded.model, what.adapter, "default")  # first, as it may not fit
            with loaded.model.disable_adapter():
                yield "base", loaded
        loaded.model.eval()
        yield "adapter", replace(loaded, notes=[], virtual_tokens=generate.virtual_tokens(loaded.model))
        return
    if what.original is not None and what.original.base != what.base.base:
        original = _ready(base_model.load(what.original, trust=what.trust))
        opened_model.check_base(what, original, what.original, allow_mismatch)
        yield "base", original
    yield "model", _ready(base_model.load(what.base, trust=what.trust))


def _ready(loaded: base_model.Loaded) -> base_model.Loaded:
    loaded.model.eval()
    return loaded


def _with_room(loaded: base_model.Loaded, rows: Rows, questions: Questions, most: int, tell: Report) -> Questions:
    """Return the questions that leave a position for an answer; report rows longer than the model's positions.

    Raises:
        DataError: when the model can't process a row.
    """
    before = generate.virtual_tokens(loaded.model)  # of the adapter, though the base is measured first
    if told := model_limits.check(loaded.model, rows, "leave them out, or shorten them", before):
        tell.problem(told)
    limit = generate.room(loaded.model)
    if limit is None:
        return questions
    left = {index: question for index, question in questions.items() if len(question[0]) < limit}
    if len(left) < len(questions):
        tell.problem(f"{len(questions) - len(left):,} of {len(questions):,} prompts leave no room: not answered")
    short = sum(len(prompt) + most > limit for prompt, _ in left.values())
    if short:
        tell.problem(f"{short:,} of {len(left):,} answers may be truncated at {limit:,} positions")
    return left


class _Scoring(Policy):
    """A model with a head that scores rows, whose outputs are kept: of each row of the last batch."""

    kept: torch.Tensor

    def scores(self, batch: Batch) -> torch.Tensor:
        """Return the outputs of the head; see `Policy.scores`."""
        outputs = super().scores(batch)
        self.kept = batch.per_row(outputs)
        return outputs


def _losses(
    loaded: base_model.Loaded, rows: Rows, objective: ObjectiveSection | None
) -> tuple[list[dict[str, float]], np.ndarray | None]:
    """Return sums for each sample, and the outputs of a head for each row, float32, (rows, outputs), or None.

    The sums are those of `_of_answers`, or loss and figures of an objective that learns no answers.
    """
    policy, device = _Scoring(loaded.model, virtual_tokens=loaded.virtual_tokens), loaded.device
    outputs = np.empty((rows.samples, rows.per_sample, objective.outputs), np.float32) if objective else None
    order = np.argsort(-rows.sizes, kind="stable")
    sums: list[dict[str, float]] = [{} for _ in range(rows.samples)]
    longest = int(np.argmax(rows.lengths))
    plain = linear_cross_entropy.is_plain(loaded.model, torch.from_numpy(rows[longest].ids).long()[None].to(device))
    budget = memory_use.scoring_tokens(loaded, int(rows.lengths[longest]), AUTO_TOKENS[device.type], plain)
    done = 0
    with torch.no_grad():
        for part in in_length_order(rows, "auto", budget):
            batch = collate(part, virtual_tokens=loaded.virtual_tokens).to(device)
            for found in _figures(objective, policy, batch) if objective else _of_answers(policy, batch, rows):
                sums[int(order[done])] = found
                done += 1
            if outputs is not None and objective and objective.outputs:
                kept = policy.kept.cpu().numpy().reshape(len(part), rows.per_sample, -1)
                outputs[order[done - len(part) : done]] = kept
    return sums, outputs.reshape(len(rows), -1) if outputs is not None and outputs.size else None


def _figures(objective: ObjectiveSection, policy: Policy, batch: Batch) -> Iterator[dict[str, float]]:
    """Yield loss and figures of each sample, without those that are not of it."""
    names, values = zip(*objective.each(policy, batch).items(), strict=True)
    for sample in torch.stack(values, 1).tolist():
        yield {name: value for name, value in zip(names, sample, strict=True) if not math.isnan(value)}


def _of_answers(policy: Policy, batch: Batch, rows: Rows) -> Iterator[dict[str, float]]:
    """Yield sums of each sample: nats, correct tokens, label tokens; of a pair whether the chosen is likelier."""
    losses, right = policy.losses_and_hits(batch)
    of_rows = batch.per_row(torch.stack([losses, right, torch.ones_like(losses)], 1)).tolist()
    for first in range(0, len(of_rows), rows.per_sample):
        nats, hits, count = of_rows[first]  # of a pair the chosen answer
        sums = {"nats": nats, "right": hits, "trained_tokens": count}
        if rows.sample_word == "pair":
            other, _, length = of_rows[first + 1]  # per token, as one answer may be longer
            sums["chosen preferred"] = float(nats / count < other / length)
        yield sums


def _questions(rows: Rows, tokenizer: Any) -> Questions:
    """Return the questions of all rows that have one, by the row's number; see `_question`."""
    asked = ((index, _question(rows.sample(index).rows[0], tokenizer)) for index in range(rows.samples))
    return {index: question for index, question in asked if question is not None}


def _question(row: Row, tokenizer: Any) -> tuple[list[int], str] | None:
    """Return the tokens before a row's last trained turn and that turn's text, or None if nothing precedes it.

    The prompt is exactly the tokens of the training row, so that no second render can differ.
    """
    trained = np.flatnonzero(row.trained)
    start = end = int(trained[-1])
    while start > 0 and row.trained[start - 1]:
        start -= 1
    if start == 0:
        return None
    reference = tokenizer.decode(row.ids[start : end + 1].tolist(), skip_special_tokens=True).strip()
    return (row.ids[:start].tolist(), reference) if reference else None


def _add_comparisons(
    sums: list[dict[str, float]], answers: dict[int, str], questions: Questions,
    wanted: dict[int, str | None], matches: dict[int, str | None], choices: Sequence[str] | None,
) -> None:  # fmt: skip
    """Add to the sums of each row the metrics of its answer against its reference."""
    for index, answer in answers.items():
        reference = questions[index][1]
        match = metrics.regex_match(matches[index], wanted[index], reference) if wanted else None
        sums[index] |= _compare(answer, reference, match, choices)


def _answers(
    loaded: base_model.Loaded, questions: Questions, max_new_tokens: int, batch_size: int,
    temperature: float, progress: Any, ends: Sequence[int],
) -> dict[int, str]:  # fmt: skip
    torch.manual_seed(0)
    prompts = [prompt for prompt, _ in questions.values()]
    texts = generate.answers(
        loaded.model, loaded.tokenizer, prompts, max_new_tokens, batch_size, temperature, progress, ends
    )
    return dict(zip(questions, texts, strict=True))


def _compare(
    answer: str, reference: str, match: float | None, choices: Sequence[str] | None
) -> dict[str, float]:  # fmt: skip
    values = {
        "exact match": metrics.exact_match(answer, reference),
        "contains": metrics.contains(answer, reference),
        "token F1": metrics.token_f1(answer, reference),
    }
    if match is not None:
        values["regex"] = match
    if choices:
        values["choice"] = metrics.choice(answer, reference, choices)
    return values


def _scores(values: list[dict[str, float]]) -> dict[str, Score]:
    """Return the mean of each metric over rows; of answers' sums the ratios to label tokens."""
    scores = _ratios(values) if "nats" in values[0] else {}
    sums = ("nats", "right", "trained_tokens")
    for key in dict.fromkeys(key for row in values for key in row if key not in sums):
        column = [row[key] for row in values if key in row]
        scores[key] = Score(sum(column) / len(column), *metrics.interval(column))
    return scores


def _ratios(values: list[dict[str, float]]) -> dict[str, Score]:
    counts = [row["trained_tokens"] for row in values]

    def ratio(key: str) -> Score:
        tops = [row[key] for row in values]
        return Score(sum(tops) / max(sum(counts), 1), *metrics.interval(tops, counts))

    loss = ratio("nats")
    return {
        "loss": loss,
        "perplexity": Score(*(math.exp(min(x, 700)) for x in (loss.value, loss.low, loss.high))),
        "token accuracy": ratio("right"),
    }


def _write_predictions(
    path: Path, rows: Rows, tokenizer: Any, questions: Questions,
    answered: dict[str, dict[int, str]], per_row: dict[str, list[dict[str, float]]],
) -> None:  # fmt: skip
    lines = []
    for index, (prompt, reference) in questions.items():
        row = {"place": str(rows.sample(index).place), "prompt": tokenizer.decode(prompt), "reference": reference}
        for system, texts in answered.items():
            row |= {system: texts[index], f"{system} scores": per_row[system][index]}
        lines.append(json.dumps(row, ensure_ascii=False))
    storage.write_text(path, "\n".join(lines) + "\n")
