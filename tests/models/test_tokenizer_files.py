"""Tokenizer files of what is written are the base's, byte for byte, but for the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loratune.commands.merge import merge
from loratune.models import model_folder, tokenizer_files
from tests import tiny
from tests.conftest import Fit

OTHER = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
TEXT = "a blue cat runs"


def older(folder: Path, form: str = "jinja") -> Path:
    """Write a base with the tokenizer files of transformers 4; `form` is where its chat template stands."""
    tiny.save(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("backend", "extra_special_tokens"):
        config.pop(key, None)
    config |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    }
    if form != "jinja":
        template = (folder / "chat_template.jinja").read_text()
        if form == "key":
            config["chat_template"] = template
        (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=3))  # not as any version writes it
    (folder / "special_tokens_map.json").write_text('{"eos_token":  "<|im_end|>"}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "preprocessor_config.json").write_text('{"do_resize":  true}')
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in tokenizer_files._found(folder, tokenizer_files.PATTERNS)
    }


def test_they_are_the_bases_bytes(fit: Fit, tmp_path: Path) -> None:
    base = older(tmp_path / "base")
    run = fit("lora", on=base).folder
    merge(run, tmp_path / "merged")
    full = fit("full", on=base, method={"type": "full"}, optimizer={"lr": 1e-3}).folder
    given = files(base)
    assert given.keys() == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "merges.txt",
        "chat_template.jinja",
    }
    for folder in (run, tmp_path / "merged", full):
        assert files(folder) == given
    for folder in (tmp_path / "merged", full):
        assert (folder / "preprocessor_config.json").read_bytes() == (base / "preprocessor_config.json").read_bytes()


@pytest.mark.parametrize("form", ["jinja", "key", "none"])
def test_only_the_template_changes(form: str, fit: Fit, tmp_path: Path) -> None:
    base = older(tmp_path / "base", form)
    (tmp_path / "other.jinja").write_text(CHATML_PLUS)
    run = fit("lora", on=base, data={"chat_template": str(tmp_path / "other.jinja")}).folder
    merge(run, tmp_path / "merged")
    given = files(base)
    place = "chat_template.jinja" if form == "jinja" else "tokenizer_config.json"
    for folder in (run, tmp_path / "merged"):
        mine = files(folder)
        assert mine.keys() == given.keys()
        assert [name for name in given if mine[name] != given[name]] == [place]
        if form == "jinja":
            assert mine[place].decode() == CHATML_PLUS
        else:
            assert json.loads(mine[place]) == {**json.loads(given[place]), "chat_template": CHATML_PLUS}
        assert AutoTokenizer.from_pretrained(folder).chat_template == CHATML_PLUS


CHATML_PLUS = tiny.CHATML + "{# ours #}"


def test_named_templates_come_along_unless_another_is_trained(tmp_path: Path) -> None:
    base = older(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    tokens = AutoTokenizer.from_pretrained(base)
    assert set(tokens.chat_template) == {"default", "tools"}
    for name in ("same", "other"):
        (tmp_path / name).mkdir()
    tokenizer_files.write(tmp_path / "same", base, tokens, alone=True)
    assert files(tmp_path / "same") == files(base)
    tokens.chat_template = OTHER
    tokenizer_files.write(tmp_path / "other", base, tokens, alone=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "other").chat_template == OTHER


@pytest.mark.parametrize("said", [None, "RobertaTokenizer", "GemmaTokenizer"])
def test_without_a_config_beside_them_they_still_cut_texts_in_the_same_way(said: str | None, tmp_path: Path) -> None:
    """Older models name no class, or one that is right only beside their config.json."""
    base = older(tmp_path / "base")
    tokens = AutoTokenizer.from_pretrained(base)
    config: dict[str, Any] = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    (base / "tokenizer_config.json").write_text(json.dumps({**config, **({"tokenizer_class": said} if said else {})}))
    target = tmp_path / "adapter"
    target.mkdir()
    tokenizer_files.write(target, base, tokens, alone=True)
    found = AutoTokenizer.from_pretrained(target)
    assert found(TEXT).input_ids == tokens(TEXT).input_ids
    assert found.decode(found(TEXT).input_ids) == TEXT
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert written == {**config, "tokenizer_class": "PreTrainedTokenizerFast"}
    assert files(target)["tokenizer.json"] == files(base)["tokenizer.json"]


def test_a_tokenizer_without_files_is_written_for_older_readers(tmp_path: Path) -> None:
    tokens = tiny.tokenizer()
    (tmp_path / "nothing").mkdir()
    tokenizer_files.write(tmp_path, tmp_path / "nothing", tokens, alone=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert not config.keys() & {"extra_special_tokens", "backend"}
    assert AutoTokenizer.from_pretrained(tmp_path)("<|im_start|>a").input_ids == tokens("<|im_start|>a").input_ids


def test_code_comes_along_only_where_it_was_trusted(tmp_path: Path) -> None:
    base = older(tmp_path / "base")
    (base / "modeling_own.py").write_text("x = 1\n")
    tokens = AutoTokenizer.from_pretrained(base)
    for trust in (False, True):
        target = tmp_path / str(trust)
        tiny.save(target)
        model_folder.complete(target, base, tiny.model(tokens).config, "float32", tokens, trust=trust)
        assert (target / "modeling_own.py").is_file() == trust


def test_an_adapter_with_a_tokenizer_of_its_own_keeps_it_in_a_merge(fit: Fit, tmp_path: Path) -> None:
    base = older(tmp_path / "base")
    run = fit("lora", on=base).folder
    backend = json.loads((run / "tokenizer.json").read_text())
    backend["normalizer"] = {"type": "Lowercase"}
    (run / "tokenizer.json").write_text(json.dumps(backend))
    merge(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
