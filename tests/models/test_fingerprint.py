"""The base is the base: what counts as the same one, and what happens on another."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import loratune
from loratune import cli, recipe
from loratune.commands import chat, opened_model
from loratune.console import Terminal
from loratune.errors import BaseMismatchError, ModelError
from loratune.models import base_files, fingerprint
from loratune.models.section import Model
from loratune.system import storage
from loratune.training import run
from tests import tiny
from tests.conftest import Fit

WEIGHTS, CONFIG = "model.safetensors", "config.json"
Change = Callable[[Path], None]


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    """Return a change of a model folder's tensors."""

    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def config(**changes: Any) -> Change:
    """Return a change of a model folder's config."""

    def apply(folder: Path) -> None:
        known = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**known, **changes}))

    return apply


def one_byte(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1000] ^= 1  # the lowest bit of a mantissa
    (folder / WEIGHTS).write_bytes(data)


def resized(folder: Path) -> None:
    net = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    net.resize_token_embeddings(net.config.vocab_size + 8)
    net.save_pretrained(folder)


def rename(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.mlp.up.weight"] = state.pop("model.layers.1.mlp.up_proj.weight")


def cast(state: dict[str, torch.Tensor]) -> None:
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.bfloat16)


def tuned(state: dict[str, torch.Tensor]) -> None:
    for name in state:
        if "self_attn" in name:
            state[name] = state[name] * 1.001


NEAR: dict[str, tuple[Change, str]] = {
    "one byte": (one_byte, "the tensors of"),
    "another seed": (lambda folder: tiny.model(tiny.tokenizer(), seed=1).save_pretrained(folder), "model.layers.1"),
    "a norm": (weights(lambda state: state["model.norm.weight"].mul_(1.01)), "`model.norm`"),
    "another rope": (config(rope_parameters={"rope_theta": 20000.0, "rope_type": "default"}), "config `rope_parameters`"),
    "a fine-tuned sibling": (weights(tuned), "`model.layers.0`, `model.layers.1` differ"),
    "a tensor renamed": (weights(rename), "`model.layers.1` differ"),
    "another precision": (weights(cast), "`lm_head` differ"),
    "a resized vocabulary": (resized, "config `vocab_size` is"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Return a run on the tiny base."""
    folder = tmp_path_factory.mktemp("trained")
    return run.train(recipe.load(tiny.write_recipe(folder, base, rows=8))).folder


def near(base: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(base, folder)
    change(folder)
    return folder


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_refused(trained: Path, base: Path, tmp_path: Path, name: str) -> None:
    change, said = NEAR[name]
    other = near(base, tmp_path / "other", change)
    with pytest.raises(BaseMismatchError) as caught:
        opened_model.load(opened_model.open_subject(str(trained), str(other)))
    assert caught.value.exit_code == 8
    assert said in str(caught.value)
    assert str(base) in str(caught.value)
    assert "--allow-base-mismatch" in str(caught.value)


def test_every_command_refuses_another_base(trained: Path, base: Path, tmp_path: Path) -> None:
    other = str(near(base, tmp_path / "other", one_byte))
    calls: list[Callable[[], object]] = [
        lambda: loratune.evaluate(trained, data=str(trained.parent / "eval.jsonl"), base=other),
        lambda: loratune.merge(trained, tmp_path / "merged", base=other),
        lambda: chat.chat(trained, prompt="a", base=other),
    ]
    for call in calls:
        with pytest.raises(BaseMismatchError):
            call()
    assert not (tmp_path / "merged").exists()


def test_what_is_allowed_is_told_and_recorded(
    trained: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(near(base, tmp_path / "other", one_byte))
    rows = str(trained.parent / "eval.jsonl")
    out = tmp_path / "predictions.jsonl"
    allowed = {"base": other, "allow_base_mismatch": True, "on_event": Terminal()}
    measured = loratune.evaluate(trained, data=rows, generate=False, out=out, **allowed)
    assert "not the base it was trained on, as allowed: the tensors of" in capsys.readouterr().err
    (told,) = measured.as_json()["base_differs"]
    assert "differ" in told
    merged = loratune.merge(trained, tmp_path / "merged", base=other, allow_base_mismatch=True)
    assert merged.base_differs == (told,)
    assert storage.read_json(tmp_path / "merged" / "MANIFEST.json")["base_differs"] == [told]
    chat.chat(trained, prompt="a", max_new_tokens=1, **allowed)
    assert "as allowed" in capsys.readouterr().err


def test_a_resume_on_another_base(fit: Fit, base: Path, tmp_path: Path) -> None:
    place = tmp_path / "base"
    shutil.copytree(base, place)
    first = fit(on=place, rows=8)
    before = first.facts()
    one_byte(place)
    longer = {"train": {"batch_size": 8, "epochs": 2}}
    with pytest.raises(BaseMismatchError):
        fit(on=place, rows=8, resume=True, **longer)
    assert "base_differs" not in before
    path = tiny.write_recipe(tmp_path / "a", place, rows=8, **longer)
    run.train(recipe.load(path), resume=True, allow_base_mismatch=True)
    facts = json.loads((first.folder / "run.json").read_text())
    assert len(facts["base_differs"]) == 1
    assert facts["status"] == "complete"
    assert facts["fingerprints"]["base"] == fingerprint.of_folder(place).sha256 != before["fingerprints"]["base"]


def test_a_run_remembers_its_base(trained: Path, base: Path) -> None:
    about = json.loads((trained / "loratune.json").read_text())
    facts = json.loads((trained / "run.json").read_text())
    assert facts["fingerprints"].keys() == {"base", "tokenizer", "data", "eval"}
    for name in ("base", "tokenizer"):
        assert facts["fingerprints"][name] == about[name]["sha256"]
    assert about["base"]["sha256"] == fingerprint.of_folder(base).sha256
    assert about["base"]["name"] == str(base)
    assert storage.verify(trained) is None
    assert "loratune.json" in storage.read_json(trained / "MANIFEST.json")["files"]
    (point,) = (trained / "checkpoints").glob("step-*")
    assert (point / "loratune.json").read_text() == (trained / "loratune.json").read_text()


def test_the_same_base_elsewhere(trained: Path, base: Path, tmp_path: Path) -> None:
    """A copy, other shards, other notes of programs in the config, another precision in memory."""
    copy = tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(base, dtype="auto").save_pretrained(copy, max_shard_size="100KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    shutil.copy(base / CONFIG, copy / CONFIG)
    config(transformers_version="9.9", _name_or_path="elsewhere", use_cache=False, sliding_window=None)(copy)
    for file in base.glob("token*"):
        shutil.copy(file, copy)
    (copy / "chat_template.jinja").write_text((base / "chat_template.jinja").read_text())
    what = opened_model.open_subject(str(trained), str(copy))
    loaded = opened_model.load(what)
    assert loaded.base_differs == ()
    assert loaded.notes == []


def test_an_adapter_without_a_fingerprint_is_told(trained: Path, base: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained / name, plain / name)
    loaded = opened_model.load(opened_model.open_subject(str(plain), str(base)))
    assert loaded.notes == ["plain has no loratune.json: its base can't be checked"]


def test_another_tokenizer_is_told(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoints"))
    (copy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    loaded = opened_model.load(opened_model.open_subject(str(copy)))
    assert loaded.notes == ["the chat template differs from the one copy was trained with"]


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"schema": 1}', '{"schema": 1, "base": {"config": {}, "parts": {}}}']
)
def test_a_damaged_fingerprint_is_an_error(trained: Path, tmp_path: Path, text: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoints"))
    (copy / "loratune.json").write_text(text)
    with pytest.raises(ModelError, match="is damaged"):
        opened_model.load(opened_model.open_subject(str(copy)))


def test_full_fine_tuning_remembers_its_base_too(fit: Fit, base: Path, tmp_path: Path) -> None:
    done = fit(rows=8, method={"type": "full"}, optimizer={"lr": 1e-3})
    other = near(base, tmp_path / "other", one_byte)
    what = opened_model.open_subject(str(done.folder))
    assert what.original is not None
    section = what.original.model_copy(update={"base": str(other)})
    with pytest.raises(BaseMismatchError):
        opened_model.check_base(what, opened_model.load(what), section, allow_mismatch=False)


def _bytes_read() -> int:
    """Return how many bytes this process has read from files, and from pages of files that were in memory."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


def test_a_large_model_is_sampled(tmp_path: Path) -> None:
    """200 MB in one file: few of them are read, and a change of a sampled byte or of a header is seen."""
    (tmp_path / CONFIG).write_text("{}")
    state = {f"model.layers.{n}.w.weight": torch.zeros(5 << 20) for n in range(10)}
    save_file(state, tmp_path / WEIGHTS)
    before = _bytes_read()
    first = fingerprint.of_folder(tmp_path)
    assert _bytes_read() - before < 20 << 20
    assert len(first.parts) == 10
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1] ^= 1  # in the last bytes of one tensor
    (tmp_path / WEIGHTS).write_bytes(data)
    (told,) = fingerprint.of_folder(tmp_path).differences(first)
    assert told.count("model.layers.") == 1


def test_the_flag_is_on_the_command_line(trained: Path, base: Path, tmp_path: Path) -> None:
    import typer.testing

    other = near(base, tmp_path / "other", one_byte)
    words = ["chat", str(trained), "-p", "a", "--base", str(other), "--max-new-tokens", "1"]
    refused = typer.testing.CliRunner().invoke(cli.app, words)
    assert isinstance(refused.exception, BaseMismatchError)
    assert typer.testing.CliRunner().invoke(cli.app, [*words, "--allow-base-mismatch"]).exit_code == 0


def test_a_gguf_file_is_hashed_again_only_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    for content in (b"one", b"other"):
        file.write_bytes(content)
        for _ in range(2):
            with file.open("rb") as stream:
                assert base_files._digest(file, stream) == hashlib.sha256(content).hexdigest()
                left = stream.read()
        assert left == content  # the second time nothing was read


def test_a_gguf_base_has_the_fingerprint_of_its_folder(tmp_path: Path, base: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("loratune.models.base_files.from_gguf", lambda path: base)
    section = Model(base=str(tmp_path / "model.gguf"))
    assert fingerprint.of_base(section) == fingerprint.of_folder(base)
