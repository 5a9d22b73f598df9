from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import loratune
from loratune import model
from loratune.chatting import HELP, chat
from loratune.errors import ModelError, UsageError
from tests import templates, tiny

LONGEST = 10


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32 on every machine, so that answers can be compared."""
    monkeypatch.setattr(model, "computes_in_bf16", lambda where: False)


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
    assert err.splitlines() == [HELP, f"{base}: is a whole model, no adapter", hint, "nowhere: no such folder", hint]


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
