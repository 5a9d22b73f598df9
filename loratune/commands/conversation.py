"""A conversation with one loaded base: its messages, the adapter that answers, and the chat commands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.commands import opened_model
from loratune.data import turn_ends
from loratune.data.encode import Encoder
from loratune.data.formats import RowError
from loratune.errors import ModelError, Place, Problem, UsageError, did_you_mean, listed, shorten
from loratune.methods import adapter_files
from loratune.methods.attach import attach
from loratune.models import base_model, fingerprint, generate

COMMANDS = {
    "/adapter": ("[NAME|FOLDER]", "answer with an adapter: a loaded one by its name, another by its folder"),
    "/base": ("", "answer with the base model alone"),
    "/system": ("[TEXT]", "set the system prompt; without text: show it"),
    "/reset": ("", "forget the conversation; the system prompt stays"),
    "/help": ("", "show this"),
    "/exit": ("", "leave (also /quit, Ctrl-D, or Ctrl-C twice); Ctrl-C once ends an answer"),
}
ALONE = "open it in a separate chat"
LEAVE = ("/exit", "/quit")
HELP = "\n".join(f"{f'{name} {argument}':24}{what}" for name, (argument, what) in COMMANDS.items())


@dataclass(frozen=True)
class Speaker:
    """A loaded adapter (or the model as it was opened), with its tokenizer and end tokens.

    Attributes:
        folder: of the adapter, resolved; None for a model without one.
        peft: its name in PEFT; None for a model without adapter.
        encoder: with its tokenizer and chat template.
        ends: end tokens of its answers.
    """

    folder: Path | None
    peft: str | None
    encoder: Encoder
    ends: tuple[int, ...]

    @classmethod
    def of(cls, folder: Path | None, peft: str | None, tokenizer: Any) -> Speaker:
        """Return a speaker for a tokenizer; `folder` is where a run recorded end tokens, if any did."""
        encoder = Encoder(tokenizer)
        return cls(folder, peft, encoder, turn_ends.of_folder(folder, encoder))


class Conversation:
    """The messages so far, the model, and the adapters loaded on it.

    Args:
        loaded: the opened model, with its adapter.
        what: the subject it was opened from.
        system: system prompt, or None.
        max_new_tokens: longest answer in tokens.
        temperature: 0 is greedy.
        allow_base_mismatch: accept adapters that were trained on another base.
        write: called with each piece of an answer.

    Raises:
        UsageError: when the chat template refuses the system prompt, or there is no template.
    """

    def __init__(
        self, loaded: base_model.Loaded, what: opened_model.Subject, system: str | None, max_new_tokens: int,
        temperature: float, allow_base_mismatch: bool, write: Callable[[str], None],
    ):  # fmt: skip
        self.loaded, self.base, self.allow_base_mismatch = loaded, what.base, allow_base_mismatch
        self.max_new_tokens, self.temperature, self.write = max_new_tokens, temperature, write
        self.adapters: dict[str, Speaker] = {}  # by the name shown
        opened = Speaker.of(what.folder, "default" if what.adapter else None, loaded.tokenizer)
        if what.adapter is not None:
            self.adapters[what.adapter.name] = opened
        self.opened = self.active = opened
        self.alone = what.adapter is None  # whether the base answers without an adapter
        self._loads = len(self.adapters)
        self.turns: list[dict[str, Any]] = []
        self.room: int | None = None  # tokens the last answer was limited to by the model's positions
        self.system: str | None = None
        if system:
            self._set_system(system)

    @base_model.or_out_of_memory("use /reset, or shorter answers with --max-new-tokens")
    def say(self, text: str) -> str:
        """Answer a message, passing on each piece of the answer, and keep both.

        Of an interrupted answer the part generated so far is kept; if there is none, the message is dropped, too.

        Raises:
            UsageError: when the chat template refuses the conversation.
            KeyboardInterrupt: at Ctrl-C.
        """
        asked = {"role": "user", "content": text}
        ids = self._ids([*self._head(self.system), *self.turns, asked], text)
        net, pieces = self.loaded.model, []
        limit = generate.room(net)
        if limit is not None and len(ids) >= limit:
            told = f"{len(ids):,} tokens leave no room: the model has {generate.positions(net):,} positions"
            if before := generate.virtual_tokens(net):
                told += f", and virtual tokens take {before:,} of them"
            raise UsageError(told, "/reset forgets the conversation, or shorten the message")
        most = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - len(ids))
        self.room = most if most < self.max_new_tokens else None

        def pass_on(piece: str) -> None:
            pieces.append(piece)
            self.write(piece)

        arguments = (net, self.active.encoder.tokenizer, ids, most, self.temperature, pass_on,
                     self.active.ends)  # fmt: skip
        try:
            if self.alone and self.adapters:
                with net.disable_adapter():
                    generate.stream(*arguments)
            else:
                generate.stream(*arguments)
        finally:
            answer = "".join(pieces).strip()
            self.write("\n")
            if answer:
                self.turns += [asked, {"role": "assistant", "content": answer}]
        return answer

    @base_model.or_out_of_memory("fewer adapters at once, or close other programs")
    def command(self, line: str) -> str:
        """Run a command, a line that begins with `/`; return the text to print.

        Raises:
            LoratuneError: when there is no such command, or it fails; the conversation is unchanged then.
        """
        word, _, argument = line.partition(" ")
        argument = argument.strip()
        if word == "/adapter":
            return self._adapter(argument)
        if word == "/system":
            return self._system(argument)
        if argument and word in COMMANDS:
            raise UsageError(f"`{word}` takes no argument", "a space before it sends the line as a message")
        if word == "/base":
            self._check_biases("the base")
            self.alone, self.active = True, self.opened
            return "now: the base model"
        if word == "/reset":
            self.turns = []
            return "the conversation is forgotten"
        if word == "/help":
            return HELP
        near = did_you_mean(word, [*COMMANDS, *LEAVE])
        hint = f"did you mean `{near}`?" if near else f"known: {listed([*COMMANDS])}."
        raise UsageError(f"unknown command `{shorten(word)}`", f"{hint} A space before it sends it as a message")

    def _ids(self, messages: list[dict[str, Any]], text: str) -> list[int]:
        """Return the model's input tokens: as in training, with the generation prompt."""
        encoder = self.active.encoder
        if not encoder.turns.template:  # without a template the text is continued
            ids: list[int] = encoder.tokenizer(_whole(text), add_special_tokens=False).input_ids
            return [encoder.tokenizer.bos_token_id, *ids] if encoder.adds_bos else ids
        try:
            prompt = encoder.turns.prompt(messages)
        except RowError as error:
            raise UsageError(str(error)) from None
        found: list[int] = encoder.tokenizer(_whole(prompt), add_special_tokens=False).input_ids
        return found

    def _system(self, text: str) -> str:
        if not text:
            return f"system prompt: {self.system}" if self.system else "no system prompt: /system TEXT sets one"
        self._set_system(text)
        return "the system prompt is set" + ("; the conversation continues, /reset forgets it" if self.turns else "")

    def _set_system(self, text: str) -> None:
        if not self.active.encoder.turns.template:
            raise UsageError("no chat template: the model would not see a system prompt")
        self._ids([*self._head(text), {"role": "user", "content": "?"}], "?")
        self.system = text

    @staticmethod
    def _head(system: str | None) -> list[dict[str, Any]]:
        return [{"role": "system", "content": system}] if system else []

    def _adapter(self, argument: str) -> str:
        if not argument and self.adapters:
            argument = next(iter(self.adapters))
        if not argument:
            return "name an adapter: /adapter FOLDER"
        name, notes = argument, list[str]()
        if argument not in self.adapters:
            what, folder = opened_model.open_adapter(argument, self.base.base)
            known = [name for name, one in self.adapters.items() if one.folder == folder]
            name = known[0] if known else self._load(what, folder, notes)
        speaker = self.adapters[name]
        try:
            self.loaded.model.set_adapter(speaker.peft, inference_mode=True)
        except (ValueError, KeyError, RuntimeError) as error:  # it does not combine with those that are loaded
            raise ModelError(Problem(f"PEFT can't use it: {shorten(str(error), 300)}", Place(name))) from None
        self.active, self.alone = speaker, False
        return "\n".join([*notes, f"now: {name} (loaded: {', '.join(self.adapters)})"])

    def _load(self, what: opened_model.Subject, folder: Path, notes: list[str]) -> str:
        """Load an adapter on the base; return its name, and add lines to print to `notes`."""
        self._check_biases("another adapter")
        if self.adapters and adapter_files.changes_biases(folder):
            raise UsageError(Problem("has bias vectors, which would change the others", Place(str(folder)), ALONE))
        tokenizer = opened_model.tokenizer(what)
        found = fingerprint.compare(folder, self.base, self.allow_base_mismatch, tokenizer)
        peft = f"adapter{self._loads}" if self._loads else "default"
        speaker = Speaker.of(folder, peft, tokenizer)
        self.loaded.model = attach(self.loaded.model, folder, peft)
        self._loads += 1
        self.loaded.model.eval()
        name = self._unused(folder)
        self.adapters[name] = speaker
        notes += found.notes
        return name

    def _check_biases(self, other: str) -> None:
        """Refuse to change the adapter if a loaded one has overwritten the base's bias vectors."""
        for name, one in self.adapters.items():
            if one.folder is not None and adapter_files.changes_biases(one.folder):
                raise UsageError(
                    Problem(f"has changed the bias vectors of the base: {other} would use them", Place(name), ALONE)
                )

    def _unused(self, folder: Path) -> str:
        """Return the shortest end of a folder's path that is not the name of another adapter."""
        parts = folder.parts
        return next(
            (name for depth in range(1, len(parts)) if (name := "/".join(parts[-depth:])) not in self.adapters),
            str(folder),
        )


def _whole(text: str) -> str:
    """Return a text, checked that it can be tokenized.

    Raises:
        UsageError: when it is empty, or has half a character, from bytes that are not UTF-8.
    """
    if not text:
        raise UsageError("the message is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError("the message is not UTF-8: it has a lone surrogate (half a character)") from None
    return text
