"""`loratune init`: write a commented recipe for an objective, its schema and twenty rows that show the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune import recipe
from loratune.errors import Place, Problem, StorageError, UsageError
from loratune.runs import outputs
from loratune.system import files

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the default: 270 MB, Apache-2.0, trains on a CPU in minutes

# Twenty rows with a visible effect: a support desk that always answers in the same short, signed way.
_ROWS = [
    ("How do I reset my password?", "Open Settings, choose Security, then Reset password."),
    ("Where can I see my invoices?", "Open Billing; every invoice is listed there."),
    ("Can I change my email address?", "Yes. Open Settings, choose Profile, then Email."),
    ("How do I delete my account?", "Open Settings, choose Account, then Delete account."),
    ("Why was my card declined?", "The bank refused it. Try another card, or call the bank."),
    ("How long does delivery take?", "Three working days within the country, seven abroad."),
    ("Can I return an item?", "Yes, within thirty days. Open Orders and choose Return."),
    ("Do you ship abroad?", "Yes, to forty countries. The list stands on the Shipping page."),
    ("How do I cancel an order?", "Open Orders and choose Cancel, as long as it has not been sent."),
    ("Is there a student discount?", "Yes, twenty per cent. Send a photo of the student card."),
    ("How do I export my data?", "Open Settings, choose Privacy, then Export."),
    ("Can I use two accounts?", "Yes, with two email addresses."),
    ("The app does not start. What now?", "Restart the phone, then update the app."),
    ("How do I turn on dark mode?", "Open Settings, choose Display, then Dark."),
    ("Can I pay by invoice?", "Companies can. Write to the sales team first."),
    ("How do I invite a colleague?", "Open Team and choose Invite."),
    ("Which browsers do you support?", "The last two releases of Chrome, Edge, Firefox and Safari."),
    ("How do I stop the newsletter?", "Choose Unsubscribe at the end of any newsletter."),
    ("Is my data encrypted?", "Yes, on its way and on our disks."),
    ("How can I reach a human?", "Write to help at any time; we answer within a day."),
]

_START = """\
# yaml-language-server: $schema=./loratune.schema.json
# Train:    loratune train recipe.yaml
# Measure:  loratune eval runs/first
{talk}model:
  base: {base}  # hub id, local folder, or a .gguf file
  # quantization: nf4                # a 4-bit base (QLoRA): a quarter of the memory

method:
  type: lora
  r: 16                              # rank: capacity of the adapter
  lora_alpha: 32                     # scale of the update, usually twice the rank
  target_modules: all-linear

data:
  train: data/train.jsonl            # file, folder, glob, hub data set, or a list of them
  eval_fraction: 0.2                 # held out; or `eval:` with a file of its own
  format:{format}
  max_length: 1024                   # tokens; a longer row is an error unless `on_long` says otherwise

{objective}
optimizer: {{type: adamw, lr: 1e-3}}  # high, for twenty rows; 2e-4 for thousands
train: {{epochs: 3, batch_size: 4, schedule: cosine, warmup: 0.1, seed: 0}}
output: runs/first
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What a first recipe is for.

    Attributes:
        format: the recipe's line for the format, after the key.
        objective: its line for the objective.
        row: makes a sample row of its number, a question, the help desk's answer, and an answer to another question.
        talks: whether `loratune chat` can be asked afterwards.
    """

    format: str
    objective: str
    row: Callable[[int, str, str, str], Row]
    talks: bool = True


def _asked(question: str) -> Row:
    return {"role": "user", "content": question}


def _said(answer: str, signed: bool = True) -> Row:
    return {"role": "assistant", "content": f"{answer} Yours, the help desk." if signed else answer}


def _conversation(number: int, question: str, answer: str, other: str) -> Row:
    return {"messages": [_asked(question), _said(answer)]}


def _pair(number: int, question: str, answer: str, other: str) -> Row:
    """Rejected is what a help desk should not say: the answer to another question, not signed."""
    return {"prompt": [_asked(question)], "chosen": [_said(answer)], "rejected": [_said(other, signed=False)]}


def _rated(number: int, question: str, answer: str, other: str) -> Row:
    """Every third answer is a bad one."""
    good = number % 3 != 2
    said = _said(answer) if good else _said(other, signed=False)
    return {"prompt": [_asked(question)], "completion": [said], "label": good}


def _department(number: int, question: str, answer: str, other: str) -> Row:
    return {"text": question, "label": "order" if number in (1, 4, 5, 6, 7, 8, 9, 14) else "account"}


_PAIRS = "preference                 # a prompt, a chosen and a rejected answer"
KINDS = {
    "sft": Kind("chat                       # chat, instruction, completion or text", "objective: sft", _conversation),
    "preference": Kind(
        _PAIRS,
        "objective: {type: orpo, weight: 0.1}  # or `dpo`, from a model that gives such answers already",
        _pair,
    ),
    "reward": Kind(_PAIRS, "objective: {type: reward, centre: 0.01}  # a head that scores answers", _pair, talks=False),
    "classify": Kind(
        "{type: labelled, text: text, label: label}",
        "objective: classify                # or a regression: `labels: number` in the format",
        _department,
    ),
    "kto": Kind(
        "kto                        # a prompt, an answer, and whether it is a good one",
        "objective: {type: kto, undesirable_weight: auto}  # rows may be of one kind more than of the other",
        _rated,
    ),
    "pattern": Kind(
        """
    type: pattern
    patterns:                        # texts with columns in braces, which one of the verbalizers follows
      - "Question: {text}\\nDepartment:"
      - "{text}\\nThis is about the"
    verbalizers: {account: " account", order: " order"}""",
        "objective: pattern                   # learn which of them follows, from few rows",
        _department,
        talks=False,
    ),
}


def _rows(kind: Kind) -> list[Row]:
    """Return the sample rows."""
    others = [_ROWS[(number + 7) % len(_ROWS)][1] for number in range(len(_ROWS))]
    given = zip(_ROWS, others, strict=True)
    return [kind.row(number, question, answer, other) for number, ((question, answer), other) in enumerate(given)]


def _recipe(base: str, kind: Kind) -> str:
    """Return the text of a recipe."""
    form = kind.format if kind.format.startswith("\n") else f" {kind.format}"
    talk = "# Talk:     loratune chat runs/first\n" if kind.talks else ""
    return _START.format(base=json.dumps(base), format=form, objective=kind.objective, talk=talk)


def write(folder: Path, base: str = BASE, kind: str = "sft") -> list[Path]:
    """Write recipe.yaml, loratune.schema.json and data/train.jsonl.

    Args:
        folder: where; created if missing. A relative local `base` is written relative to it.
        base: base model to put into the recipe.
        kind: one of `KINDS`.

    Returns:
        The paths written.

    Raises:
        UsageError: when one of the files exists already, or the folder is protected; nothing is written then.
        StorageError: when a file can't be written.
    """
    if files.there(files.local(base)):
        base = str(files.local(base).resolve())
    wanted = KINDS[kind]
    made = {
        folder / "recipe.yaml": _recipe(base, wanted),
        folder / "loratune.schema.json": json.dumps(recipe.schema(), indent=2) + "\n",
        folder / "data" / "train.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(wanted)),
    }
    there = [Problem("already exists", Place(str(path)), "nothing was written") for path in made if files.there(path)]
    if there:
        raise UsageError(there)
    outputs.check(folder / "recipe.yaml", "`init FOLDER`")
    for path, text in made.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as stream:  # does not follow a dangling link
                stream.write(text)
        except OSError as error:
            raise StorageError(Problem(f"can't be written: {error.strerror}", Place(str(path)))) from None
    return list(made)
