from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratune
from loratune import console
from loratune.commands import opened_model
from loratune.commands.chat import chat
from loratune.commands.conversation import HELP, Conversation
from loratune.errors import ModelError, UsageError
from loratune.models import base_model
from tests import templates, tiny

LONGEST = 10


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32 on every machine, so that answers can be compared."""
    monkeypatch.setattr(base_model, "computes_in_bf16", lambda where: False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[Path]:
    """Return two runs of two large steps on other rows."""
    made = []
    for name, lr in (("first", 0.3), ("second", 0.1)):
        folder = tmp_path_factory.mktemp(name)
        path = tiny.write_recipe(folder, base, rows=16, optimizer={"type": "adamw", "lr": lr}, output=f"run-{name}")
        made.append(loratune.train(loratune.load_recipe(path)).folder)
    return made


class Reference:
    """Greedy answers with transformers and PEFT alone."""

    def __init__(self, base: Path, adapter: Path | None = None):
        self.tokens = AutoTokenizer.from_pretrained(base)
        self.net: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            self.net = PeftModel.from_pretrained(self.net, adapter)
        self.net.eval()

    def answer(self, *turns: str, system: str | None = None) -> str:
        """Return the answer to the last of alternating turns of user and assistant."""
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        text = self.tokens.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([self.tokens(text).input_ids])
        written = self.net.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=LONGEST,
            do_sample=False,
            pad_token_id=self.tokens.eos_token_id,
        )
        return str(self.tokens.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: Path, *lines: str
) -> tuple[str, str]:
    """Hold a conversation; return what went to stdout and to stderr."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    capsys.readouterr()
    chat(name, max_new_tokens=LONGEST)
    out, err = capsys.readouterr()
    return out, err


def test_one_answer(runs: list[Path], base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, reference in ((runs[0], Reference(base, runs[0])), (base, Reference(base))):
        wanted = reference.answer("a blue cat")
        assert chat(name, "a blue cat", max_new_tokens=LONGEST) == wanted.strip()
        assert capsys.readouterr() == ("", ""), "from Python nothing is printed"
        assert chat(name, "a blue cat", max_new_tokens=LONGEST, on_event=console.Terminal()) == wanted.strip()
        assert capsys.readouterr().out == f"{wanted}\n"
    assert Reference(base).answer("a blue cat") != Reference(base, runs[0]).answer("a blue cat")


def test_a_system_prompt(base: Path) -> None:
    wanted = Reference(base).answer("hi", system="be brief")
    assert chat(base, "hi", system="be brief", max_new_tokens=LONGEST) == wanted.strip()
    assert wanted != Reference(base).answer("hi")


def test_a_conversation_remembers(
    runs: list[Path], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = Reference(base, runs[0])
    first = reference.answer("one")
    second = reference.answer("one", first.strip(), "two")
    out, err = talk(monkeypatch, capsys, runs[0], "one", "", "two", "/reset", "one", "/quit", "never said")
    assert out == f"{first}\n{second}\n{first}\n"
    assert err.splitlines() == ["the conversation is forgotten"]


def test_adapters_are_switched_on_one_base(
    runs: list[Path], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (Reference(base, run).answer("one two") for run in runs)
    plain = Reference(base).answer("one two")
    assert len({plain, first, second}) == 3
    lines = ["/base", "/adapter", f"/adapter {runs[1]}", "/base", "/adapter run-first", "/adapter run-second"]
    said = [part for line in lines for part in (line, "/reset", "one two")]
    out, err = talk(monkeypatch, capsys, runs[0], "one two", *said)
    assert out == "".join(f"{answer}\n" for answer in (first, plain, first, second, plain, first, second))
    told = [line for line in err.splitlines() if line.startswith("now")]
    assert told == [
        "now: the base model",
        "now: run-first (loaded: run-first)",
        "now: run-second (loaded: run-first, run-second)",
        "now: the base model",
        "now: run-first (loaded: run-first, run-second)",
        "now: run-second (loaded: run-first, run-second)",
    ]


def test_an_adapter_on_a_plain_model(
    runs: list[Path], base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = talk(
        monkeypatch, capsys, base, "/adapter", "one", f"/adapter {runs[0]}", "/reset", "one", "/base", "/reset", "one"
    )
    plain, adapted = Reference(base).answer("one"), Reference(base, runs[0]).answer("one")
    assert out == f"{plain}\n{adapted}\n{plain}\n"
    assert err.splitlines()[0] == "name an adapter: /adapter FOLDER"


def test_a_wrong_command_ends_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = talk(monkeypatch, capsys, base, "/what", f"/adapter {base}", "/adapter nowhere", "one")
    assert out == f"{Reference(base).answer('one')}\n"
    hint = "  name a run or an adapter folder"
    known = (
        "  known: `/adapter`, `/base`, `/system`, `/reset`, `/help`, `/exit`. A space before it sends it as a message"
    )
    assert err.splitlines() == [
        "unknown command `/what`", known,
        f"{base}: is a full model, not an adapter", hint, "nowhere: no such folder", hint,
    ]  # fmt: skip


def test_commands(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "/help",
        "/adaptor x",
        "/reset all",
        " /base",
        "/system be brief",
        "/reset",
        "hi",
        "/system",
        "/exit",
        "hi",
    ]
    out, err = talk(monkeypatch, capsys, base, *lines)
    reference = Reference(base)
    assert out == f"{reference.answer('/base')}\n{reference.answer('hi', system='be brief')}\n"
    assert err.splitlines() == [
        *HELP.splitlines(),
        "unknown command `/adaptor`", "  did you mean `/adapter`? A space before it sends it as a message",
        "`/reset` takes no argument", "  a space before it sends the line as a message",
        "the system prompt is set; the conversation continues, /reset forgets it",
        "the conversation is forgotten", "system prompt: be brief",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[Path]:
    """Return runs of other ranks whose folders have one name; the third also trains a module whole."""
    made = []
    for method in ({"r": 4}, {"r": 8}, {"r": 2, "modules_to_save": ["lm_head"]}):
        folder = tmp_path_factory.mktemp("alike")
        adamw = {"type": "adamw", "lr": 0.3}
        path = tiny.write_recipe(folder, base, rows=16, optimizer=adamw, method={"lora_alpha": 8, **method})
        made.append(loratune.train(loratune.load_recipe(path)).folder)
    return made


def test_adapters_of_one_name_have_a_name_each(
    alike: list[Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = alike
    (tmp_path / "link").symlink_to(second)
    monkeypatch.chdir(second.parent)
    names = [f"{run.parent.name}/run" for run in alike]
    lines = ["one two", f"/adapter {second}", "/adapter run", f"/adapter {third}", f"/adapter {tmp_path}/link",
             "/adapter ./run", f"/adapter {names[1]}", f"/adapter {first}/", "/base"]  # fmt: skip
    out, err = talk(monkeypatch, capsys, first, *[p for line in lines for p in (line, "/reset", "one two")][2:])
    a, b, c, plain = (Reference(base, run).answer("one two") for run in (*alike, None))
    assert len({a, b, c, plain}) == 4
    assert out == "".join(f"{answer}\n" for answer in (a, b, a, c, b, b, b, a, plain))
    three = f"loaded: run, {names[1]}, {names[2]}"
    assert [line for line in err.splitlines() if line.startswith("now")] == [
        f"now: {names[1]} (loaded: run, {names[1]})", f"now: run (loaded: run, {names[1]})", f"now: {names[2]} ({three})",
        *[f"now: {names[1]} ({three})"] * 3, f"now: run ({three})", "now: the base model",
    ]  # fmt: skip


def broken(run: Path, folder: Path) -> Path:
    """Return a copy of an adapter that lacks half of its tensors."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("first", [True, False])
def test_an_adapter_that_fails_leaves_the_model_as_it_was(
    alike: list[Path], base: Path, tmp_path: Path, first: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for run, name in zip(alike, "abc", strict=True):
        broken(run, tmp_path / name)
    opened = base if first else alike[0]
    tries = [part for name in "abc" for part in (f"/adapter {tmp_path / name}", "/reset", "one two")]
    out, err = talk(monkeypatch, capsys, opened, *tries, f"/adapter {alike[1]}", "/reset", "one two")
    before = Reference(base, None if first else alike[0]).answer("one two")
    assert out == f"{before}\n" * 3 + Reference(base, alike[1]).answer("one two") + "\n"
    assert err.count("lacks tensors that this base and its config require") == 2
    assert err.count("the adapter does not fit this base") == 1  # without its head, PEFT itself fails


def test_biases_of_an_adapter_are_lent_to_nobody(
    runs: list[Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((runs[1] / "adapter_config.json").read_text())
    biased = shutil.copytree(runs[1], tmp_path / "biased", ignore=shutil.ignore_patterns("checkpoints"))
    (biased / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    out, err = talk(monkeypatch, capsys, runs[0], f"/adapter {biased}", "one two")
    assert out == f"{Reference(base, runs[0]).answer('one two')}\n"
    assert err == f"{biased}: has bias vectors, which would change the others\n  open it in a separate chat\n"
    out, err = talk(monkeypatch, capsys, biased, "/base", f"/adapter {runs[0]}", "one two")
    assert out == f"{Reference(base, runs[1]).answer('one two')}\n"
    assert err.count("biased: has changed the bias vectors of the base: ") == 2


def test_an_adapter_is_asked_by_its_own_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tiny.tokenizer(None, eos="<|endoftext|>")
    tiny.model(tokens).save_pretrained(tmp_path / "base")
    tokens.save_pretrained(tmp_path / "base")
    about = {"train": "train.jsonl", "chat_template": "chatml"}
    adamw = {"type": "adamw", "lr": 0.3}
    path = tiny.write_recipe(tmp_path, tmp_path / "base", rows=16, data=about, optimizer=adamw)
    run = loratune.train(loratune.load_recipe(path)).folder
    out, err = talk(monkeypatch, capsys, tmp_path / "base", "/system x", f"/adapter {run}", "/system x", "one")
    reference = Reference(tmp_path / "base", run)
    reference.tokens = AutoTokenizer.from_pretrained(run)
    end = reference.tokens.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    reference.net.generation_config.eos_token_id = end
    assert out == f"{reference.answer('one', system='x')}\n"
    assert err.splitlines()[:2] == [
        "no chat template: each message is continued as plain text, without the earlier ones",
        "no chat template: the model would not see a system prompt",
    ]


def conversation(name: Path, write: Any) -> Conversation:
    what = opened_model.open_subject(str(name))
    return Conversation(opened_model.load(what), what, None, 60, 0.0, False, write)


@pytest.mark.parametrize("tokens", [0, LONGEST])
def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(base: Path, tokens: int) -> None:
    written: list[str] = []
    talk = conversation(base, written.append)
    passes = 0

    def stop(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > tokens:
            raise KeyboardInterrupt

    hook = talk.loaded.model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        talk.say("one two")
    hook.remove()
    said = Reference(base).answer("one two") if tokens else ""
    assert "".join(written) == f"{said}\n"
    assert [turn["content"] for turn in talk.turns] == (["one two", said.strip()] if tokens else [])


def test_what_cant_be_asked(base: Path) -> None:
    with pytest.raises(UsageError, match="not UTF-8"):
        chat(base, "half \udce9")
    with pytest.raises(UsageError, match="refuses this row"):
        conversation(base, lambda piece: None)._ids([{"role": "user"}], "")


class Terminal:
    """A chat in a process of its own, on a terminal."""

    def __init__(self, *arguments: str):
        self.left = ""
        self.screen, there = pty.openpty()
        command = [sys.executable, "-m", "loratune", "chat", *arguments]
        self.process = subprocess.Popen(
            command, stdin=there, stdout=there, stderr=there, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        os.close(there)

    def shows(self, words: str | int) -> None:
        """Wait until some words are shown, or that many characters; what comes behind the words is kept."""
        while words not in self.left if isinstance(words, str) else len(self.left) < words:
            assert select.select([self.screen], [], [], 60)[0], f"{words!r} does not come: {self.left!r}"
            self.left += os.read(self.screen, 1 << 16).decode(errors="replace")
        self.left = self.left.partition(words)[2] if isinstance(words, str) else ""

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def interrupt(self, words: str) -> None:
        """Do what a terminal does at Ctrl-C, and wait for some words; the key would throw away what is not read yet.

        A signal that comes between readline's prompt and its waiting for keys is heard with the next one only, as one.
        """
        for _ in range(12):
            self.process.send_signal(signal.SIGINT)
            if self._comes(words, 5):
                return
        raise AssertionError(f"{words!r} does not come: {self.left!r}")

    def _comes(self, words: str, seconds: float) -> bool:
        while words not in self.left:
            if not select.select([self.screen], [], [], seconds)[0]:
                return False
            try:
                self.left += os.read(self.screen, 1 << 16).decode(errors="replace")
            except OSError:  # the program has left
                return words in self.left
        self.left = self.left.partition(words)[2]
        return True


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """Return a chat with a model that writes white space without end, and says what it is asked when it is `LINES`."""
    template = (
        "{% for message in messages %}{% if 'LINES' in message['content'] %}"
        "{{ raise_exception(message['content'].split('\\n') | join(' | ')) }}{% endif %}"
        "{{ message['role'] + message['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tokens = tiny.tokenizer(template, eos="<|endoftext|>")
    net = tiny.model(tokens, max_position_embeddings=1 << 18)
    space, line_end = tokens(" ").input_ids[0], tokens("\n").input_ids[0]
    head = net.lm_head.weight.data
    head[line_end] = -head[space]  # one of the two is above the others, which are 0
    head[[index for index in range(len(head)) if index not in (space, line_end)]] = 0
    net.save_pretrained(tmp_path / "base")
    tokens.save_pretrained(tmp_path / "base")
    made = Terminal(str(tmp_path / "base"), "--max-new-tokens", "200000")
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        os.close(made.screen)


def test_a_conversation_on_a_terminal(terminal: Terminal) -> None:
    """Pasted lines are one message, Ctrl-C ends an answer, takes back a line, and leaves where it comes twice."""
    terminal.shows("> ")
    terminal.type("\x1b[200~LINES\rtwo\rthree\x1b[201~")  # as a terminal that knows of pasting sends it
    terminal.shows("three")
    terminal.type("\r")
    terminal.shows("LINES | two | three")
    terminal.shows("> ")
    terminal.type("LINES\rfour\r")  # and one that does not
    terminal.shows("LINES | four")
    terminal.shows("> ")
    terminal.type("go\r")
    terminal.shows(500)
    terminal.interrupt("stopped")
    terminal.shows("> ")
    for typed in ("", "half a line", ""):
        terminal.type(typed)
        if typed:
            terminal.shows(typed)
        terminal.interrupt("> " if typed else "Ctrl-C again, or /exit, leaves")
        if not typed:
            terminal.shows("> ")
    assert terminal.process.poll() is None
    for _ in range(12):
        terminal.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert terminal.process.wait(5) == 0
            break
    else:
        raise AssertionError("it does not leave")


def test_errors(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        chat("./nowhere", "hi")
    strict = tmp_path / "strict"
    tiny.save(strict)
    tokens = tiny.tokenizer(templates.GEMMA_NO_SYSTEM.replace("{{ bos_token }}", ""))
    tokens.save_pretrained(strict)
    with pytest.raises(UsageError) as caught:
        chat(strict, "hi", system="s")
    assert str(caught.value) == "the chat template refuses this row: System role not supported"
