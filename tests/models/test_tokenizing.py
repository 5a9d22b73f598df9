"""A tokenizer loaded by a process without torch is the one that transformers loads here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from loratune.errors import ModelError
from loratune.models import tokenizing
from loratune.models.section import Model
from tests import tiny


def test_it_is_the_same(base: Path, tmp_path: Path) -> None:
    here, there = AutoTokenizer.from_pretrained(base), tokenizing._by_child(str(base), None)
    assert type(here) is type(there)
    assert here.backend_tokenizer.to_str() == there.backend_tokenizer.to_str()
    assert here.special_tokens_map == there.special_tokens_map
    assert here.chat_template == there.chat_template
    for name, one in (("here", here), ("there", there)):
        one.save_pretrained(tmp_path / name)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_the_child_is_asked_before_torch_is_there(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tokenizing, "_by_child", lambda *given: asked.append(given))  # finds nothing
    tokenizing.load(Model(base=str(base)))
    assert asked == []
    monkeypatch.setattr(tokenizing, "sys", SimpleNamespace(modules={}))
    assert tokenizing.load(Model(base=str(base))).chat_template  # here, then
    assert asked == [(str(base), None)]


def test_what_is_wrong_is_told_as_ever(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny.model(tiny.tokenizer()).config.save_pretrained(tmp_path)
    assert tokenizing._by_child(str(tmp_path), None) is None
    with pytest.raises(ModelError, match="the tokenizer can't be loaded"):
        tokenizing.load(Model(base=str(tmp_path)))
    assert capfd.readouterr() == ("", "")
