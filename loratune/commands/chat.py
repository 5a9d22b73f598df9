"""`loratune chat`: one answer, or a conversation in which adapters are swapped on one loaded base."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from loratune import console
from loratune.commands import chat_input, opened_model
from loratune.commands.conversation import LEAVE, Conversation
from loratune.commands.labeller import Labeller
from loratune.errors import LoratuneError, UsageError
from loratune.events import Answered, Listener, Report
from loratune.models import base_model, score_head
from loratune.system import startup

HELLO = "/help shows the commands, /exit leaves; Ctrl-C ends an answer"
LABELS = "each line is a text to label; /exit leaves"
AGAIN = "Ctrl-C again, or /exit, leaves"


HINT = "close other programs, or use a smaller base model"


def chat(
    name: str | Path,
    prompt: str | None = None,
    system: str | None = None,
    base: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    allow_base_mismatch: bool = False,
    trust_remote_code: bool = False,
    on_event: Listener | None = None,
) -> str:
    """Answer a prompt, or hold a conversation on the terminal.

    Args:
        name: run folder, adapter folder, or model.
        prompt: to answer; None for a conversation, which reads from stdin.
        system: system prompt.
        base: base model to use instead of the recorded one.
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy.
        seed: of sampling above temperature 0.
        allow_base_mismatch: use another base than the adapter was trained on.
        trust_remote_code: run code that comes with the base model.
        on_event: called with each event, and with each piece of an answer; None: for a prompt lines go to Python's
            logging, a conversation is printed. An exception it raises is passed through.

    Returns:
        The last answer.

    Raises:
        LoratuneError: any of its subclasses.
    """
    shown = console.Terminal() if prompt is None and on_event is None else nullcontext(on_event)
    with shown as hear:
        tell = Report(hear)
        with startup.quiet(), startup.computing(), tell.unchanged(), base_model.or_out_of_memory(HINT):
            torch.manual_seed(seed)
            what = opened_model.open_subject(str(name), base, trust_remote_code)
            loaded = opened_model.load(what, allow_mismatch=allow_base_mismatch)
            for note in loaded.notes:
                tell.problem(note)
            talk: Conversation | Labeller
            if score_head.of(loaded.model) is not None:
                talk = Labeller(loaded, lambda text: tell.tell(Answered(text)))
            else:
                talk = Conversation(
                    loaded, what, system, max_new_tokens, temperature, allow_base_mismatch,
                    lambda text: tell.tell(Answered(text)),
                )  # fmt: skip
            if isinstance(talk, Conversation) and not talk.active.encoder.turns.template:
                tell.note("no chat template: each message is continued as plain text, without the earlier ones")
            if prompt is not None:
                return _answer(talk, prompt, tell)
            return _on_terminal(talk, tell) if chat_input.interactive() else _in_a_row(talk, tell)


def _in_a_row(talk: Conversation | Labeller, tell: Report) -> str:
    """Answer the lines of a file or a pipe; Ctrl-C and an error in an answer end it."""
    answer = ""
    while (line := chat_input.read()) is not None and line.strip() not in LEAVE:
        if line.startswith("/"):
            _carry_out(talk, line, tell)
        elif line.strip():
            answer = _answer(talk, line.strip(), tell)
    return answer


def _on_terminal(talk: Conversation | Labeller, tell: Report) -> str:
    """Hold a conversation; it ends with the end of input, or with Ctrl-C twice on an empty line."""
    chat_input.edit_lines()
    tell.note(HELLO if isinstance(talk, Conversation) else LABELS)
    answer, warned = "", False
    while True:
        try:
            message = chat_input.read()
        except KeyboardInterrupt:
            if warned:
                return answer
            tell.note(AGAIN)
            warned = True
            continue
        except UsageError as error:
            tell.problem(str(error))
            continue
        warned = False
        if message is None:
            sys.stderr.write("\n")
            return answer
        if message.strip() in LEAVE:
            return answer
        try:
            if message.startswith("/") and "\n" not in message.strip():
                _carry_out(talk, message.strip(), tell)
            elif message.strip():
                answer = _answer(talk, message.strip(), tell)
        except LoratuneError as error:
            tell.problem(str(error))
        except KeyboardInterrupt:
            tell.hear_again()
            tell.note("stopped")


def _answer(talk: Conversation | Labeller, text: str, tell: Report) -> str:
    answer = talk.say(text)
    if talk.room is not None:
        tell.note(f"answers end after {talk.room:,} tokens here: the model has no more positions")
    return answer


def _carry_out(talk: Conversation | Labeller, line: str, tell: Report) -> None:
    try:
        tell.note(talk.command(line.strip()))
    except LoratuneError as error:
        tell.problem(str(error))
