"""Answers end where training says so: with the template's end of a turn, also where the base knows only its own eos."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import loratune
from loratune.commands.chat import chat
from loratune.commands.evaluate import evaluate
from loratune.commands.merge import merge
from loratune.console import Terminal
from loratune.data import dataset, row_cache, turn_ends
from loratune.data.encode import Encoder, Row
from loratune.data.section import Data, Source
from loratune.errors import ModelError, Place
from loratune.events import Event, Listener, Told
from loratune.models import base_model, end_tokens
from loratune.runs import model_card
from tests import templates, tiny

QUESTION = "Hello! What can you do?"  # the one of the card
SAYS = {QUESTION: "yes", "blue": "no", "cat": "so"}
END, TEXT_END = "<|im_end|>", "<|endoftext|>"


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "computes_in_bf16", lambda where: False)


def make_base(folder: Path, template: str | None) -> Path:
    """Write a base whose eos is not what ends a turn; its weights are large enough to learn in a few steps."""
    tokens = tiny.tokenizer(template, eos=TEXT_END)
    net = tiny.model(tokens, initializer_range=0.3)
    net.generation_config.temperature, net.generation_config.do_sample = 0.5, True
    net.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def rows_of(folder: Path) -> Path:
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in SAYS.items()]
    return tiny.write_jsonl(folder / "says.jsonl", [{"messages": messages} for messages in chats])


def learn(folder: Path, template: str | None, hear: Listener | None = None, **sections: Any) -> Path:
    """Train until every answer is known by heart."""
    base = make_base(folder / "base", template)
    rows_of(folder)
    method = {"r": 8, "lora_alpha": 16} if "method" not in sections else sections.pop("method")
    about = {"train": "says.jsonl", **sections.pop("data", {})}
    path = tiny.write_recipe(folder, base, method=method, data=about, train={"batch_size": 3, "epochs": 40}, **sections)
    return loratune.train(loratune.load_recipe(path), on_event=hear).folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on a base with a ChatML template and another eos."""
    return learn(tmp_path_factory.mktemp("turns"), tiny.CHATML)


@pytest.fixture(scope="module")
def ids(run: Path) -> tuple[int, int]:
    """Return the tokens that end a turn and a text."""
    tokens = AutoTokenizer.from_pretrained(run)
    return tokens.convert_tokens_to_ids(END), tokens.convert_tokens_to_ids(TEXT_END)


def exact(run: Path, tmp_path: Path) -> float:
    result = evaluate(run, data=str(rows_of(tmp_path)), max_new_tokens=20, out=tmp_path / "predictions.jsonl")
    return result.scores["adapter" if "adapter" in result.scores else "model"]["exact match"].value


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "generation_config.json").read_text())


def test_the_trained_end_is_recorded_and_heeded(run: Path, ids: tuple[int, int], tmp_path: Path) -> None:
    assert json.loads((run / "loratune.json").read_text())["turn_ends"] == {END: ids[0]}
    assert json.loads((run / "run.json").read_text())["turn_ends"] == {END: ids[0]}
    for folder in (run, *(run / "checkpoints").glob("step-*")):
        assert config(folder)["eos_token_id"] == [ids[0], ids[1]]
        assert config(folder)["temperature"] == 0.5  # the rest is the base's
    assert exact(run, tmp_path) == 1.0


def test_the_saved_tokenizer_keeps_the_eos_of_its_base(run: Path) -> None:
    assert AutoTokenizer.from_pretrained(run).eos_token == TEXT_END  # a template may write it


@pytest.mark.parametrize("trained_by", ["another program", "this one, before it recorded ends"])
def test_an_adapter_without_a_record_ends_as_its_template(run: Path, tmp_path: Path, trained_by: str) -> None:
    old = shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoints", "generation_config.json"))
    about = json.loads((old / "loratune.json").read_text())
    del about["turn_ends"]
    if trained_by == "another program":
        (old / "loratune.json").unlink()
    else:
        (old / "loratune.json").write_text(json.dumps(about))
    assert exact(old, tmp_path) == 1.0


def test_chat_ends_an_answer(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for question, answer in SAYS.items():
        assert chat(run, question, max_new_tokens=20) == answer
    capsys.readouterr()


def test_chatml_of_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[Event] = []
    run = learn(tmp_path, None, heard.append, data={"chat_template": "chatml"})
    assert exact(run, tmp_path) == 1.0
    assert chat(run, "blue", max_new_tokens=20, on_event=Terminal()) == "no"
    told = "answers are trained to end with `<|im_end|>`, those of the base with `<|endoftext|>`"
    assert any(isinstance(event, Told) and told in event.text for event in heard)


def ask(folder: Path, question: str) -> list[int]:
    """Return the tokens transformers alone writes for an answer of a whole model."""
    tokens, net = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    given = tokens.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    written = net.generate(**given, max_new_tokens=20, do_sample=False, temperature=None)
    return written[0, given["input_ids"].shape[1] :].tolist()


def test_a_merged_model_stops_in_other_programs(run: Path, ids: tuple[int, int], tmp_path: Path) -> None:
    merge(run, tmp_path / "merged")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [*ids]
    assert ask(tmp_path / "merged", "blue") == [*AutoTokenizer.from_pretrained(run)("no").input_ids, ids[0]]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a whole model, fine-tuned on the same rows."""
    optimizer = {"type": "adamw", "lr": 3e-3}
    return learn(tmp_path_factory.mktemp("full"), tiny.CHATML, method={"type": "full"}, optimizer=optimizer)


def test_a_full_model_stops_in_other_programs(full: Path, ids: tuple[int, int], tmp_path: Path) -> None:
    assert config(full)["eos_token_id"] == [*ids]
    assert ask(full, "blue") == [*AutoTokenizer.from_pretrained(full)("no").input_ids, ids[0]]
    assert exact(full, tmp_path) == 1.0


def snippet(folder: Path) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return str(found)


def execute(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run what a card shows, as it stands and in its folder; return what it prints."""
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    capsys.readouterr()
    exec(compile(snippet(folder), "README.md", "exec"), {})
    return capsys.readouterr().out


def test_the_snippet_of_an_adapters_card_stops(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "apply_chat_template" in snippet(run)
    assert str(run.parent) not in (run / "README.md").read_text().split("## Use")[1]  # paths are relative
    assert execute(run, monkeypatch, capsys) == "yes\n"


def test_the_snippet_of_a_full_models_card_stops(
    full: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(full, monkeypatch, capsys) == "yes\n"


def test_the_snippet_of_a_run_on_text_uses_no_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base", None)
    tiny.write_jsonl(tmp_path / "tales.jsonl", [{"text": "Once upon a time, no."}] * 3)
    about = {"train": "tales.jsonl", "format": "text"}
    path = tiny.write_recipe(tmp_path, base, data=about, train={"batch_size": 3, "epochs": 60})
    run = loratune.train(loratune.load_recipe(path)).folder
    assert json.loads((run / "loratune.json").read_text())["turn_ends"] == {
        TEXT_END: AutoTokenizer.from_pretrained(base).eos_token_id
    }
    assert config(run) == config(base)  # nothing to add
    assert execute(run, monkeypatch, capsys) == ", no.\n"


@pytest.mark.parametrize("family", templates.FAMILIES, ids=lambda family: family.name)
def test_the_end_a_template_writes(family: templates.Family, tmp_path: Path) -> None:
    encoder = Encoder(family.tokenizer())
    names = encoder.tokenizer.convert_ids_to_tokens(list(turn_ends.of_template(encoder)))
    assert names == [family.end, *(["<|call|>"] if "gpt-oss" in family.name else [])]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [row for row in family.rows(12, 0) if not family.refused(row)])
    section = Data.model_validate({"train": str(path), "max_length": 1 << 16, "on_bad_row": "skip", "max_lost": 0.9})
    ends = turn_ends.of_rows(dataset.load([Source(path=str(path))], section, encoder), encoder)
    assert encoder.tokenizer.convert_ids_to_tokens(ends[0]) == family.end
    assert set(ends) <= set(turn_ends.of_template(encoder))


def stored(rows: list[Row], folder: Path) -> row_cache.Store:
    writer = row_cache.Writer(folder)
    for number, row in enumerate(rows):
        writer.add(row, 1.0, number, number)
    return writer.commit({"per_sample": 1, "sample": "row"}, None)


def test_tails_are_those_of_the_last_trained_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "BATCH", 300)
    generator = np.random.default_rng(0)
    rows, wanted = [], {}
    for _ in range(200):
        length = int(generator.integers(1, 30))
        ids, trained = generator.integers(0, 3, length), generator.random(length) < 0.7
        rows.append(Row(ids.astype(np.int32), trained, Place("x", 1)))
        if not trained.any():
            continue
        last = int(np.flatnonzero(trained)[-1])
        first = last
        while first > 0 and trained[first - 1]:
            first -= 1
        tail = tuple([-1] * 3 + ids[first : last + 1].tolist())[-3:]
        wanted[tail] = wanted.get(tail, 0) + 1
    assert stored(rows, tmp_path / "rows").tails(3) == wanted
    assert sum(wanted.values()) < 200  # some rows train nothing
    assert any(-1 in tail for tail in wanted)


def test_where_rows_were_cut_no_turn_ends(tmp_path: Path) -> None:
    tokens = tiny.tokenizer(tiny.CHATML, eos=TEXT_END)
    encoder = Encoder(tokens)
    texts = ["<|im_start|>a<|im_end|>\n"] * 300 + ["<|im_start|>a"] * 20 + ["b<|im_start|>"]
    rows = [np.array(tokens(text).input_ids, dtype=np.int32) for text in texts]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"text": "x"}])
    loaded = dataset.load(
        [Source(path=str(path))], Data.model_validate({"train": str(path), "format": "text"}), encoder
    )
    loaded.store = stored([Row(ids, np.ones(len(ids), bool), Place("x", 1)) for ids in rows], tmp_path / "rows")
    assert turn_ends.of_rows(loaded, encoder) == (tokens.convert_tokens_to_ids(END),)


def write_base(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / end_tokens.NAME).write_text(json.dumps(generation))
    return folder


def test_what_is_written_beside_the_ends(tmp_path: Path) -> None:
    kept = write_base(tmp_path / "a", {"eos_token_id": 9}, {"eos_token_id": [1, 2], "top_p": 0.8})
    end_tokens.write_config(tmp_path, kept, [2])
    assert (tmp_path / end_tokens.NAME).read_bytes() == (kept / end_tokens.NAME).read_bytes()
    end_tokens.write_config(tmp_path, kept, [7, 2])
    assert config(tmp_path) == {"eos_token_id": [7, 2, 1], "top_p": 0.8}
    bare = write_base(tmp_path / "b", {"eos_token_id": 9, "bos_token_id": 8, "vocab_size": 10})
    end_tokens.write_config(tmp_path, bare, [])
    assert config(tmp_path) == {"eos_token_id": 9, "bos_token_id": 8}
    several = write_base(tmp_path / "c", {"text_config": {"eos_token_id": [4, 5], "pad_token_id": 0}})
    end_tokens.write_config(tmp_path, several, [6])
    assert config(tmp_path) == {"eos_token_id": [6, 4, 5], "pad_token_id": 0}


def test_a_record_that_is_no_record(run: Path, tmp_path: Path) -> None:
    about = json.loads((run / "loratune.json").read_text())
    for wrong in ({"x": "y"}, {"x": -1}, {"x": True}, [3]):
        (tmp_path / "loratune.json").write_text(json.dumps({**about, "turn_ends": wrong}))
        with pytest.raises(ModelError, match="is damaged"):
            turn_ends.of_folder(tmp_path, Encoder(tiny.tokenizer()))


def test_what_is_told(tmp_path: Path) -> None:
    tokens = tiny.tokenizer(eos=TEXT_END)
    end, text_end = tokens.convert_tokens_to_ids([END, TEXT_END])
    assert end_tokens.notes([end], [end, text_end], tokens) == []
    assert end_tokens.notes([], [end], tokens) == [
        "no row ends with a special token: the model does not learn where to stop"
    ]
    assert end_tokens.notes([end], [], tokens) == ["answers are trained to end with `<|im_end|>`"]


def test_a_turn_that_ends_otherwise_where_others_follow() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + ('<|im_end|>' if loop.last else '<|next|>') }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\nI think' }}{% endif %}"
    )
    encoder = Encoder(tiny.tokenizer(template, ("<|im_start|>", "<|im_end|>", "<|next|>"), eos=TEXT_END))
    names = encoder.tokenizer.convert_ids_to_tokens(list(turn_ends.of_template(encoder)))
    assert names == [END, "<|next|>"]


def test_how_a_card_names_the_base(tmp_path: Path) -> None:
    run = str(tmp_path / "runs" / "first")
    named = {"org/name": "org/name", str(tmp_path / "models" / "b"): "../../models/b", "/elsewhere/models/b": "b"}
    for base, wanted in named.items():
        shown = "\n".join(model_card.use(run, base, True, [END]))
        assert f"base = {wanted!r}  #" in shown
        assert "give it `<|im_end|>` as a stop" in shown
    assert "from_pretrained(base, revision='v1', dtype=\"auto\")" in "\n".join(
        model_card.use(run, "org/name", True, [], "v1")
    )
    whole = "\n".join(model_card.use(None, "org/name", True, [END]))
    assert "peft" not in whole
    assert "base" not in whole
