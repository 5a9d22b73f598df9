"""Talk to a model: one answer, or a conversation with adapters swapped on one loaded base."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from loratune import bases, fingerprint, generate, model, report, stops, subject
from loratune.encode import Encoder
from loratune.errors import LoratuneError, UsageError
from loratune.formats import RowError
from loratune.recipe import Model

HELP = "/base: without adapter · /adapter [NAME|FOLDER]: with one · /reset: forget the conversation · /quit"


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
) -> str:
    """Answer a prompt, or hold a conversation on the terminal; answers are streamed to stdout.

    Args:
        name: run folder, adapter folder, or model.
        prompt: answer this and return; None for a conversation (read from stdin).
        system: system prompt.
        base: base model to use instead of the one that is written down.
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy.
        seed: of the random choices above temperature 0.
        allow_base_mismatch: use another base than the adapter was trained on.
        trust_remote_code: run code that comes with the base model.

    Returns:
        The last answer.

    Raises:
        LoratuneError: any of its kinds.
    """
    bases.quiet()
    torch.manual_seed(seed)
    what = subject.open_subject(str(name), base, trust_remote_code)
    loaded = subject.load(what, allow_mismatch=allow_base_mismatch)
    tell = report.Report()
    for note in loaded.notes:
        tell.problem(note)
    talk = Conversation(loaded, system, max_new_tokens, temperature, what.base, allow_base_mismatch)
    talk.ends = stops.of_folder(what.folder, talk.encoder)
    if what.adapter is not None:
        talk.adapters = {Path(str(name)).name or "default": "default"}
        talk.active = "default"
    if prompt is not None:
        return talk.say(prompt)
    if sys.stdin.isatty():
        tell.note(HELP)
    answer = ""
    while (line := _read()) is not None:
        if line.startswith("/"):
            if line == "/quit":
                break
            try:
                tell.note(talk.command(line))
            except LoratuneError as error:
                tell.problem(str(error))
        elif line:
            answer = talk.say(line)
    return answer


class Conversation:
    """Messages so far, the model they go to, and the adapters loaded on it."""

    def __init__(
        self, loaded: model.Loaded, system: str | None, max_new_tokens: int, temperature: float, base: Model,
        allow_base_mismatch: bool = False,
    ):  # fmt: skip
        self.base, self.allow_base_mismatch = base, allow_base_mismatch
        self.loaded, self.max_new_tokens, self.temperature = loaded, max_new_tokens, temperature
        self.encoder = Encoder(loaded.tokenizer)
        self.ends: tuple[int, ...] = ()
        self.system: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.system)
        self.adapters: dict[str, str] = {}  # name shown -> PEFT's name
        self.active: str | None = None

    def say(self, text: str) -> str:
        """Answer a message, streaming to stdout, and remember both.

        Raises:
            UsageError: when the chat template refuses the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            prompt = self.encoder.turns.prompt(messages) if self.encoder.turns.template else text
        except RowError as error:
            raise UsageError(str(error)) from None
        net = self.loaded.model
        arguments = (net, self.loaded.tokenizer, prompt, self.max_new_tokens, self.temperature, _write, self.ends)
        if self.active is None and self.adapters:
            with net.disable_adapter():
                answer = generate.stream(*arguments)
        else:
            answer = generate.stream(*arguments)
        _write("\n")
        self.messages = [*messages, {"role": "assistant", "content": answer.strip()}]
        return answer.strip()

    def command(self, line: str) -> str:
        """Carry out a line that begins with `/` and return what to tell."""
        word, _, argument = line.partition(" ")
        argument = argument.strip()
        if word == "/base":
            self.active = None
            return "now: the base model"
        if word == "/adapter":
            return self._adapter(argument)
        if word == "/reset":
            self.messages = list(self.system)
            return "the conversation is forgotten"
        return HELP

    def _adapter(self, argument: str) -> str:
        if not argument and self.adapters:
            argument = next(iter(self.adapters))
        if not argument:
            return "name an adapter: /adapter FOLDER"
        notes: tuple[str, ...] = ()
        if argument not in self.adapters:
            _, folder = subject.open_adapter(argument)
            found = fingerprint.compare(folder, self.base, self.allow_base_mismatch)
            notes = found.notes
            peft_name = f"adapter{len(self.adapters)}" if self.adapters else "default"
            self.loaded.model = subject.attach(self.loaded.model, folder, peft_name)
            self.loaded.model.eval()
            argument = folder.name
            self.adapters[argument] = peft_name
        self.active = self.adapters[argument]
        self.loaded.model.set_adapter(self.active, inference_mode=True)
        return "\n".join([*notes, f"now: {argument} (loaded: {', '.join(self.adapters)})"])


def _read() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
