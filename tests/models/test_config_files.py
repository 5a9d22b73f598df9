"""config.json of what is written: every key of the base's, under the names of transformers 4 and 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from loratune.commands.merge import merge
from loratune.models import config_files, fingerprint
from tests import tiny
from tests.conftest import Fit

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
OWN = {"dtype", "torch_dtype"}


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base with the config.json that transformers 4 wrote."""
    folder = tmp_path_factory.mktemp("older")
    tiny.save(folder, rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    config = read(folder)
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "float32", "use_cache": True,
               "transformers_version": "4.44.0", "_name_or_path": "/home/someone/llama", "of_its_own": [1]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def written(kind: str, fit: Fit, base: Path, tmp_path: Path) -> Path:
    """Return the folder of a whole model made of a base."""
    if kind == "full":
        return fit(on=base, method={"type": "full"}, optimizer={"lr": 1e-3}).folder
    run = fit(on=base)
    merge(run.folder, tmp_path / "merged", dtype="bfloat16", tolerance=1.0)
    return tmp_path / "merged"


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_every_key_of_the_base_stays(kind: str, fit: Fit, older: Path, tmp_path: Path) -> None:
    folder, dtype = written(kind, fit, older, tmp_path), {"full": "float32", "merged": "bfloat16"}[kind]
    mine, given = read(folder), read(older)
    assert "_name_or_path" not in mine
    assert {key: mine[key] for key in given.keys() - OWN - {"_name_or_path"}} == {
        key: given[key] for key in given.keys() - OWN - {"_name_or_path"}
    }
    assert mine["dtype"] == mine["torch_dtype"] == dtype
    assert mine["rope_parameters"] == {**LLAMA3, "rope_theta": 500000.0}
    assert AutoConfig.from_pretrained(folder).rope_parameters == AutoConfig.from_pretrained(older).rope_parameters
    if kind == "full":
        for step in (folder / "checkpoints").glob("step-*"):
            assert read(step)["rope_theta"] == 500000.0


def test_the_old_names_are_there_for_a_base_that_has_only_the_new(fit: Fit, tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base", rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    assert "rope_theta" not in read(base)
    mine = read(written("full", fit, base, tmp_path))
    assert (mine["rope_theta"], mine["rope_scaling"], mine["use_cache"]) == (500000.0, LLAMA3, True)
    assert mine["rope_parameters"] == read(base)["rope_parameters"]


GEMMA = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
OLD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "a plain theta": ("LlamaConfig", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}},
                      {"rope_theta": 3e5, "rope_scaling": None}),
    "Gemma 3": ("Gemma3TextConfig", {"rope_parameters": GEMMA},
                {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "Phi": ("PhiConfig", {"partial_rotary_factor": 0.25, "rope_theta": 5e4},
            {"partial_rotary_factor": 0.25, "rope_theta": 5e4, "rope_scaling": None}),
    "GPT-NeoX": ("GPTNeoXConfig", {"rotary_pct": 0.5, "rotary_emb_base": 5e4},
                 {"rotary_pct": 0.5, "rotary_emb_base": 5e4, "rope_theta": 5e4, "partial_rotary_factor": 0.5,
                  "rope_scaling": None}),
    "no rotary positions": ("GPT2Config", {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_old_names_mean_the_same(name: str, tmp_path: Path) -> None:
    kind, settings, old = OLD[name]
    config = getattr(transformers, kind)(**settings)
    config.save_pretrained(tmp_path)
    before = read(tmp_path)
    config_files.write_config(tmp_path, None, config, "float32")
    after = read(tmp_path)
    assert {key: after[key] for key in after.keys() - before.keys() - OWN} == {
        k: v for k, v in old.items() if k not in before
    }
    again = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert again.get("rope_parameters") == config.to_dict().get("rope_parameters")


def test_what_was_trained_goes_before_what_the_base_says(tmp_path: Path) -> None:
    """A key that transformers reads as something else than the model computed with is written as the model has it."""
    config = transformers.Qwen2Config(use_sliding_window=False, sliding_window=None, rms_norm_eps=1e-5)
    for place, about in (("base", {"rms_norm_eps": 1e-3, "sliding_window": 4096}), ("made", {})):
        (tmp_path / place).mkdir()
        config.save_pretrained(tmp_path / place)
        told = {**read(tmp_path / place), **about}
        (tmp_path / place / "config.json").write_text(json.dumps(told))
    config_files.write_config(tmp_path / "made", tmp_path / "base", config, "float32")
    assert read(tmp_path / "made")["rms_norm_eps"] == 1e-5
    assert read(tmp_path / "made")["sliding_window"] == 4096  # means the same: it is switched off


def test_a_text_model_out_of_a_larger_one(tmp_path: Path) -> None:
    inner = transformers.Gemma3TextConfig(rope_parameters=GEMMA)
    (tmp_path / "base").mkdir()
    told = {"model_type": "gemma3", "text_config": {**inner.to_dict(), "of_its_own": 1}, "vision_config": {"a": 1}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(told))
    inner.save_pretrained(tmp_path)
    config_files.write_config(tmp_path, tmp_path / "base", inner, "float32")
    assert read(tmp_path)["of_its_own"] == 1
    assert "vision_config" not in read(tmp_path)


def test_nested_configs_have_both_names(tmp_path: Path) -> None:
    both = config_files._with_old_names(
        {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}}
    )
    assert both["text_config"]["rope_theta"] == 7.0


def test_a_copy_with_old_names_is_the_same_base(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "a", rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    before = fingerprint.of_folder(base)
    config_files.write_config(base, None, AutoModelForCausalLM.from_pretrained(base).config, "float32")
    assert read(base)["rope_theta"] == 500000.0
    assert fingerprint.of_folder(base) == before
    told = {**read(base), "rope_theta": 1.0}  # says something else
    (base / "config.json").write_text(json.dumps(told))
    assert fingerprint.of_folder(base) != before


@pytest.mark.parametrize("said", [None, "bfloat16"])
def test_auto_merges_in_the_precision_of_the_tensors(said: str | None, fit: Fit, base: Path, tmp_path: Path) -> None:
    """Whatever config.json says of float32 weights, or if it says nothing."""
    config = read(base)
    folder = tmp_path / "base"
    tiny.save(folder)
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in OWN} | ({"torch_dtype": said} if said else {}))
    )
    done = merge(fit(on=folder).folder, tmp_path / "merged")
    assert done.dtype == "float32"
    assert done.relative < 1e-5
    assert read(tmp_path / "merged")["torch_dtype"] == "float32"
