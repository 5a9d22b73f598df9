"""The command line: parse arguments, call, and turn a LoratuneError into a message and an exit code."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loratune import errors
from loratune.system import files, streams
from loratune.training import signals

if TYPE_CHECKING:
    from loratune.console import Terminal

EXIT_CODES = (
    "Exit codes: 0 ok · 1 unexpected · 2 recipe, data or usage · 3 environment (missing extra, no GPU, does not fit) · "
    "4 training failed · 5 storage · 6 run folder in use, finished or of another recipe · 7 refused for safety · "
    "8 wrong base · 130 interrupted (Ctrl-C), 143 by SIGTERM or SIGUSR1, 129 by SIGHUP, "
    "after a valid checkpoint"
)

MOST = 2**31 - 1  # largest value of counts, lengths and seeds

app = typer.Typer(
    name="loratune",
    help="Fine-tune language models with LoRA and QLoRA from a YAML recipe.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file (YAML)", show_default=False)]
Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="change one key of the recipe, such as --set optimizer.lr=1e-4; repeatable",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Subject = Annotated[
    str,
    typer.Argument(
        metavar="RUN|ADAPTER|MODEL",
        help="run folder, adapter folder, or model (folder, hub id or .gguf)",
        show_default=False,
    ),
]
AllowMismatch = Annotated[
    bool,
    typer.Option("--allow-base-mismatch", help="allow a base other than the one it was trained on; this is recorded"),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="run code that comes with the base model: read it first; this is recorded"
    ),
]


def _kind(value: str) -> str:
    from loratune.commands.init import KINDS

    if value not in KINDS:
        raise typer.BadParameter(f"must be one of {errors.listed(list(KINDS))}")
    return value


def _no_nan(value: float | None) -> float | None:
    if value is not None and math.isnan(value):  # NaN passes every range check
        raise typer.BadParameter("nan is not a number")
    return value


def _version(asked: bool) -> None:
    if asked:
        import loratune

        typer.echo(loratune.__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command(epilog=EXIT_CODES)
def train(
    recipe: RecipePath,
    set_: Set = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="resume from the newest valid checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="start over in a folder that holds a run")] = False,
    allow_drift: Annotated[bool, typer.Option("--allow-drift", help="with --resume: continue although recipe or rows have changed")] = False,
    allow_base_mismatch: AllowMismatch = False,
    trust_remote_code: TrustCode = False,
) -> None:  # fmt: skip
    """Run the training of a recipe; the result is saved in its `output` folder."""
    import loratune
    from loratune.commands import next_steps

    if resume and overwrite:
        raise errors.UsageError("--resume and --overwrite can't be combined")
    if allow_drift and not resume:
        raise errors.UsageError("--allow-drift needs --resume")
    loaded = loratune.load_recipe(recipe, set_)
    with signals.at_once():
        start = loratune.train
    with _terminal() as shown:
        run = start(
            loaded, resume=resume, overwrite=overwrite, allow_drift=allow_drift,
            allow_base_mismatch=allow_base_mismatch, trust_remote_code=trust_remote_code, on_event=shown,
        )  # fmt: skip
    if os.environ.get("RANK"):
        from loratune.training import launcher

        launcher.part()
    if int(os.environ.get("RANK", 0)) == 0:
        typer.echo(str(run.folder))
        _tell_next(next_steps.of_run(run.folder, ("eval", "chat", "merge")))


def _terminal() -> Terminal:
    from loratune.console import Terminal

    return Terminal()


def _tell_next(commands: Sequence[str]) -> None:
    for index, command in enumerate(commands):
        typer.echo(f"{'      ' if index else 'next: '}{command}", err=True)


@app.command(epilog=EXIT_CODES)
def check(recipe: RecipePath, set_: Set = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Check a recipe without loading a model: every problem with its place, or a summary."""
    import loratune

    try:
        loaded = loratune.load_recipe(recipe, set_)
    except errors.RecipeError as error:
        if as_json:
            typer.echo(json.dumps({"ok": False, "problems": [_problem(p) for p in error.problems]}, indent=2))
            raise typer.Exit(error.exit_code) from None
        raise
    if as_json:
        typer.echo(json.dumps({"ok": True, "recipe": loaded.model_dump(mode="json")}, indent=2))
        return
    quantization = loaded.model.quantization.type
    typer.echo(f"{recipe}: ok")
    typer.echo(f"  base       {loaded.model.base}{'' if quantization == 'none' else f' in {quantization}'}")
    typer.echo(f"  method     {loaded.method.describe()}")
    typer.echo(f"  rows       {', '.join(source.path for source in loaded.data.train)} as {loaded.data.format.type}")
    typer.echo(
        f"  objective  {loaded.objective.type}, {loaded.optimizer.type} lr {loaded.optimizer.lr:g}, {loaded.train.schedule.type}"
    )
    length = f"{loaded.train.max_steps} steps" if loaded.train.max_steps else f"{loaded.train.epochs:g} epochs"
    rows = f"{loaded.objective.sample}s"
    typer.echo(f"  length     {length}, {loaded.train.batch_size} {rows} per step")
    typer.echo(f"  output     {loaded.output}")


@app.command(epilog=EXIT_CODES)
def inspect(
    recipe: RecipePath,
    set_: Set = [],  # noqa: B006
    row: Annotated[int | None, typer.Option("--row", min=1, max=MOST, help="show this row only, counted from 1", show_default=False)] = None,
    random: Annotated[bool, typer.Option("--random", help="show rows drawn with the recipe's seed, not the first")] = False,
    number: Annotated[int, typer.Option("-n", "--number", min=1, max=MOST, help="how many rows to show")] = 3,
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option("--html", help="write a self-contained HTML page", show_default=False)] = None,
    trust_remote_code: TrustCode = False,
) -> None:  # fmt: skip
    """Show rows as the model will see them: label tokens marked, special tokens visible."""
    import loratune
    from loratune.commands import inspect
    from loratune.runs import outputs
    from loratune.system import storage

    if html is not None:
        outputs.check_page(html)
    loaded = loratune.load_recipe(recipe, set_)
    if html is not None:
        outputs.check_apart(html, "--html", [("the command line", str(recipe)), *outputs.inputs_of(loaded)])
    with _terminal() as tell:
        shown = loratune.inspect(
            loaded, row=row, random=random, number=number, trust_remote_code=trust_remote_code, on_event=tell
        )
    if html is not None:
        storage.write_text(html, inspect.as_html(shown, f"rows of {recipe.name}"))
        typer.echo(str(html))
    elif as_json:
        typer.echo(json.dumps(shown.as_json(), indent=2, ensure_ascii=False))
    else:
        typer.echo(inspect.as_text(shown, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")))


@app.command()
def schema() -> None:
    """Print the JSON schema of a recipe, for editors (yaml-language-server)."""
    from loratune import recipe

    typer.echo(json.dumps(recipe.schema(), indent=2))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="folder to write to; created if missing")] = Path(),
    base: Annotated[
        str | None,
        typer.Option("--base", help="base model to put into the recipe: hub id, folder or .gguf", show_default=False),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="KIND",
            callback=_kind,
            help="what to learn: sft (answers), preference, kto (ratings), reward, classify, or pattern (labels)",
        ),
    ] = "sft",
) -> None:
    """Write a first recipe with its schema and twenty sample rows."""
    from loratune.commands import init, next_steps

    if base is None and sys.stdin.isatty() and sys.stderr.isatty() and not os.environ.get("CI"):
        base = typer.prompt("base model (hub id, folder or .gguf)", default=init.BASE, err=True)
    for path in init.write(folder, base or init.BASE, kind):
        typer.echo(str(path))
    _tell_next([f"loratune train {next_steps.shown(folder / 'recipe.yaml')}"])


@app.command(name="eval", epilog=EXIT_CODES)
def evaluate(
    subject: Subject,
    data: Annotated[str | None, typer.Option("--data", help="rows to evaluate on: file, folder, glob or hub data set; default: the run's held-out rows", show_default=False)] = None,
    format_: Annotated[str | None, typer.Option("--format", help="format of the rows; default: that of the run's recipe, else chat", show_default=False)] = None,
    base: Annotated[str | None, typer.Option("--base", help="base model to compare with; default: the one it was trained on", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, max=MOST, help="evaluate the first N rows only", show_default=False)] = None,
    generate: Annotated[bool, typer.Option("--generate/--no-generate", help="also generate answers and compare them")] = True,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, max=MOST, help="longest generated answer in tokens")] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, max=MOST, help="answers generated at once")] = 16,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, max=1e6, callback=_no_nan, help="0 is greedy")] = 0.0,
    regex: Annotated[str | None, typer.Option("--regex", help="compare the match of this regular expression (its first group) in answer and reference", show_default=False)] = None,
    choices: Annotated[str | None, typer.Option("--choices", help="comma-separated answers; compare which one is named first", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="file for the predictions (JSONL); default: predictions.jsonl in the run folder, for a base or a foreign adapter in the current folder", show_default=False)] = None,
    allow_base_mismatch: AllowMismatch = False,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Evaluate loss and answers on held-out rows, for the base and the adapter, with 95 % intervals."""
    import loratune
    from loratune.commands import next_steps
    from loratune.commands.evaluate import show
    from loratune.models import base_files

    base_files.check_subject(subject)
    with _terminal() as shown:
        result = loratune.evaluate(
            subject, data=data, format=format_, base=base, limit=limit, generate=generate, max_new_tokens=max_new_tokens,
            batch_size=batch_size, temperature=temperature, regex=regex, choices=choices.split(",") if choices else None,
            out=out, allow_base_mismatch=allow_base_mismatch, trust_remote_code=trust_remote_code, on_event=shown,
        )  # fmt: skip
    typer.echo(json.dumps(result.as_json(), indent=2) if as_json else show(result))
    if not as_json:
        _tell_next(next_steps.of_run(files.local(subject), ("chat", "merge")))


@app.command(epilog=EXIT_CODES)
def merge(
    subject: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="run folder or adapter folder", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="folder for the merged model; must not exist or be empty", show_default=False)],
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as the base), bfloat16, float16 or float32")] = "auto",
    base: Annotated[str | None, typer.Option("--base", help="base model; default: the one the adapter was trained on", show_default=False)] = None,
    tolerance: Annotated[float | None, typer.Option("--tolerance", min=0.0, callback=_no_nan, help="largest logit difference, relative to the largest logit; default by dtype", show_default=False)] = None,
    allow_base_mismatch: AllowMismatch = False,
    trust_remote_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Merge an adapter into its base model; the result is compared with base + adapter before it is saved."""
    import loratune
    from loratune.commands import next_steps
    from loratune.models import base_files

    base_files.check_subject(subject, hub=False)
    with _terminal() as shown:
        result = loratune.merge(
            subject, out, dtype=dtype, base=base, tolerance=tolerance,
            allow_base_mismatch=allow_base_mismatch, trust_remote_code=trust_remote_code, on_event=shown,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps({**result.__dict__, "folder": str(result.folder)}, indent=2))
    else:
        typer.echo(str(result.folder))
        _tell_next(next_steps.of_merged(result.folder))


@app.command(epilog=EXIT_CODES)
def chat(
    subject: Subject,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="answer this and exit", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="system prompt", show_default=False)] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="base model of the adapter; default: the one it was trained on", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, max=MOST, help="longest answer in tokens")
    ] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=1e6, callback=_no_nan, help="0 is greedy")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MOST, help="seed of the sampling above temperature 0")] = 0,
    allow_base_mismatch: AllowMismatch = False,
    trust_remote_code: TrustCode = False,
) -> None:
    """Talk to a model; /base and /adapter swap adapters on one loaded base."""
    import loratune
    from loratune.models import base_files

    base_files.check_subject(subject)
    with _terminal() as shown:
        loratune.chat(
            subject, prompt=prompt, system=system, base=base, max_new_tokens=max_new_tokens, temperature=temperature,
            seed=seed, allow_base_mismatch=allow_base_mismatch, trust_remote_code=trust_remote_code, on_event=shown,
        )  # fmt: skip


def _problem(problem: errors.Problem) -> dict[str, Any]:
    place = problem.place
    return {
        "place": str(place) if place else None,
        "line": place.line or None if place else None,
        "column": place.column or None if place else None,
        "message": problem.message,
        "hint": problem.hint,
    }


def _check_words(words: Sequence[str]) -> None:
    """Refuse an argument that is not UTF-8: names and prompts are written into files and tokenized."""
    for word in words:
        if not files.is_utf8(word):
            shown = errors.shorten(files.shown(word), 200)
            raise errors.UsageError(f"not UTF-8: `{shown}`", "rename the file, or give the text as UTF-8")


def _told(error: Exception) -> errors.LoratuneError | None:
    """Return the message for an error that no command handles, or None for a fault of loratune.

    An unusable file, or memory that runs out, can occur anywhere.
    """
    if isinstance(error, errors.LoratuneError):
        return error
    if isinstance(error, MemoryError):
        return errors.SetupError("out of memory", "close other programs, or use less data at once")
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        place = errors.Place(errors.shorten(files.shown(os.fsdecode(error.filename)), 400))
        return errors.StorageError(errors.Problem(f"can't be read or written: {error.strerror}", place))
    return None


def _terminated(number: int, frame: Any) -> None:
    """End on SIGTERM as on Ctrl-C, so that partly written files are cleaned up."""
    print("terminated", file=sys.stderr)
    sys.exit(signals.exit_code(number))


def main() -> None:
    """Run the command line; a user's mistake ends in a message and its exit code, never in a traceback."""
    streams.guard()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        try:
            _check_words(sys.argv[1:])
            app(standalone_mode=True)
        finally:
            streams.close()
    except (errors.LoratuneError, OSError, MemoryError) as error:
        told = _told(error)
        if told is None or os.environ.get("LORATUNE_TRACEBACK"):
            raise
        print(told, file=sys.stderr)
        sys.exit(told.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
