"""Which programs can't load an adapter is told in one line when it is trained."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loratune.methods import other_programs
from tests.conftest import Fit

MERGED = ": give them the output of `loratune merge`"
FEW = "vLLM and llama.cpp can't load this adapter "


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, None),
        ({"r": 16, "use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}}, None),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, FEW + "(DoRA, modules trained in full)"),
        ({"trainable_token_indices": [1], "bias": "all"}, FEW + "(trained rows of the embedding, trained biases)"),
        ({"use_rslora": True}, "llama.cpp would scale it wrongly (rsLoRA)"),
        ({"r": 1024, "alpha_pattern": {"q": 1}, "rank_pattern": {"q": 1}},
         "vLLM can't load this adapter (a rank above 512); vLLM and llama.cpp would scale it wrongly (`alpha_pattern`); "
         "vLLM would scale it wrongly (`rank_pattern`)"),
        ({"target_parameters": ["experts.down_proj"]},
         "llama.cpp and transformers 4 can't load this adapter (matrices on fused experts)"),
    ],
)  # fmt: skip
def test_one_line(config: dict[str, Any], told: str | None) -> None:
    assert other_programs.notes(config) == ([told + MERGED] if told else [])


@pytest.mark.parametrize("method", [{"dora": True}, {"trainable_token_indices": [1]}, {"modules_to_save": ["lm_head"]}])
def test_it_is_told_at_the_end_of_a_training(
    method: dict[str, Any], fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    done = fit(method=method)
    told = [line for line in capsys.readouterr().err.splitlines() if MERGED in line]
    assert told == [
        f"note     {other_programs.notes(json.loads((done.folder / 'adapter_config.json').read_text()))[0]}"
    ] or (len(told) == 1 and FEW in told[0])


def test_nothing_is_told_of_a_plain_adapter_or_a_whole_model(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    fit("lora")
    fit("full", method={"type": "full"}, optimizer={"lr": 1e-3})
    assert MERGED not in capsys.readouterr().err
