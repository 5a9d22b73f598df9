"""A merged model is base + adapter, as plain transformers loads it from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraModel, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loratune.commands import merge as merging
from loratune.commands.merge import merge
from loratune.errors import ModelError, StorageError, UsageError
from tests import tiny
from tests.conftest import Fit, Trained, logits

TRAIN = {"batch_size": 24, "epochs": 3, "schedule": "constant", "warmup": 0}
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"dora": True},
    "rslora": {"rslora": True},
    "dora and rslora": {"dora": True, "rslora": True},
    "pissa": {"init": "pissa"},
    "head in full": {"modules_to_save": ["lm_head"]},
    "new tokens": {"trainable_token_indices": [256, 257]},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 2.5}},
}


def _trained(fit: Fit, name: str = "a", method: dict[str, Any] | None = None, **sections: Any) -> Trained:
    return fit(name, method={"type": "lora", "r": 4, "lora_alpha": 8, **(method or {})}, train=TRAIN, **sections)


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference relative to the largest logit."""
    return float((one - other).abs().max() / one.abs().max())


def _with_adapter(done: Trained, base: Path, prompts: list[torch.Tensor]) -> torch.Tensor:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(plain, done.folder), prompts)


@pytest.fixture(scope="module")
def random_prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 258, (1, length), generator=generator) for length in (1, 9, 33, 120)]


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_is_base_plus_adapter(
    fit: Fit,
    base: Path,
    tmp_path: Path,
    random_prompts: list[torch.Tensor],
    method: str,
    capsys: pytest.CaptureFixture[str],
):
    done = _trained(fit, method=METHODS[method])
    result = merge(done.folder, tmp_path / "merged")
    assert (result.folder, result.dtype) == (tmp_path / "merged", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    expected = _with_adapter(done, base, random_prompts)
    after = logits(merged, random_prompts)
    with capsys.disabled():
        print(f"\nmerged {method}: {_apart(expected, after):.1e} of the largest logit apart")
    assert _apart(expected, after) < 1e-4
    untrained = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), random_prompts)
    assert _apart(untrained, after) > 1e-2, "an adapter that does nothing would pass"
    assert result.relative < 1e-4
    assert result.agreement == 1.0


def test_an_adapter_of_an_nf4_base_is_merged_into_the_full_one(
    fit: Fit, base: Path, tmp_path: Path, random_prompts: list[torch.Tensor]
):
    done = _trained(fit, model={"quantization": "nf4"})
    merge(done.folder, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    after = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto"), random_prompts)
    assert _apart(_with_adapter(done, base, random_prompts), after) < 1e-4
    assert _apart(logits(done.net, random_prompts), after) > 1e-3, "that would be the quantized base"


def test_tied_embeddings_stay_tied(fit: Fit, tmp_path: Path, random_prompts: list[torch.Tensor]):
    on = tiny.save(tmp_path / "tied", tie_word_embeddings=True)
    done = _trained(fit, on=on)
    merge(done.folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.config.tie_word_embeddings is True
    assert merged.lm_head.weight.data_ptr() == merged.model.embed_tokens.weight.data_ptr()
    assert _apart(_with_adapter(done, on, random_prompts), logits(merged, random_prompts)) < 1e-4


def test_what_was_tied_and_trained_apart_is_apart_when_merged(
    fit: Fit, tmp_path: Path, random_prompts: list[torch.Tensor]
):
    """Only the head is trained in full: the embedding must not follow it when the merged model is loaded."""
    on = tiny.save(tmp_path / "tied", tie_word_embeddings=True)
    done = _trained(fit, on=on, method={"modules_to_save": ["lm_head"]})
    expected = _with_adapter(done, on, random_prompts)
    assert torch.equal(expected, logits(done.net, random_prompts))
    merge(done.folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert _apart(expected, logits(merged, random_prompts)) < 1e-4


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 5e-2), ("float16", 1e-2)])
def test_other_precisions_are_rounded_once(
    fit: Fit, base: Path, tmp_path: Path, random_prompts: list[torch.Tensor], dtype: str, limit: float
):
    done = _trained(fit)
    result = merge(done.folder, tmp_path / "merged", dtype=dtype)
    assert result.dtype == dtype
    assert 0 < result.relative < limit
    kind = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {parameter.dtype for parameter in merged.parameters()} == {kind}
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), done.folder
    ).merge_and_unload()
    for name, parameter in exact.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter.to(kind)), name


def test_tokenizer_and_chat_template_go_with_it(fit: Fit, tmp_path: Path):
    done = _trained(fit)
    merge(done.folder, tmp_path / "merged")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "a blue cat"}, {"role": "assistant", "content": "sees it"}]
    theirs, ours = (
        t.apply_chat_template(messages, tokenize=True, return_dict=False) for t in (tokens, tiny.tokenizer())
    )
    assert theirs == ours
    assert "<|im_start|>" in tokens.get_chat_template()
    assert tokens.eos_token == "<|im_end|>"


# ---------------------------------------------------------------- refused


def test_a_folder_that_is_not_empty_is_left_alone(fit: Fit, tmp_path: Path):
    done = _trained(fit)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not an empty folder"):
        merge(done.folder, tmp_path / "merged")
    assert [f.name for f in (tmp_path / "merged").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not an empty folder"):
        merge(done.folder, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert merge(done.folder, tmp_path / "empty").folder == tmp_path / "empty"
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_merge_beyond_the_tolerance_leaves_nothing_behind(fit: Fit, tmp_path: Path):
    done = _trained(fit)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"is not base \+ adapter: largest logit difference"):
        merge(done.folder, tmp_path / "merged", dtype="bfloat16", tolerance=0.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [float("nan"), 1e3])
def test_a_merge_that_went_wrong_is_noticed(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float):
    done = _trained(fit)
    fold = LoraModel.merge_and_unload

    def spoil(net: Any, **asked: Any) -> Any:
        merged: Any = fold(net, **asked)
        with torch.no_grad():
            merged.model.layers[1].mlp.down_proj.weight[3, 5] = value
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", spoil)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ModelError, match=r"is not base \+ adapter"):
        merge(done.folder, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing_behind(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = _trained(fit)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merging.model_folder, "complete", full)
    with pytest.raises(StorageError, match="No space left on device"):
        merge(done.folder, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_whole_model_has_nothing_to_merge(base: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="is a full model, not an adapter"):
        merge(base, tmp_path / "merged")


@pytest.mark.parametrize("name", ["nowhere", "runs/nowhere"])
def test_a_folder_that_is_not_there_is_no_model_of_the_hub(name: str, tmp_path: Path):
    with pytest.raises(ModelError, match=f"{name}: no such folder"):
        merge(name, tmp_path / "merged")


def test_an_adapter_of_another_base_is_refused(fit: Fit, tmp_path: Path):
    done = _trained(fit)
    other = tiny.save(tmp_path / "other", hidden_size=128)
    with pytest.raises(ModelError, match="the adapter does not fit this base"):
        merge(done.folder, tmp_path / "merged", base=str(other), allow_base_mismatch=True)
    assert not (tmp_path / "merged").exists()
