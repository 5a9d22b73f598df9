"""The scaling of positions in a .gguf file: read back as the numbers it was made of, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loratune.errors import ModelError
from loratune.models import base_files, rope_scaling
from tests import tiny
from tests.other_readers import gguf_file, older

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(("factor", "context"), [(8.0, 8192), (32.0, 8192), (8.0, 64)])
def test_the_table_is_that_of_transformers(factor: float, context: int) -> None:
    rope = {**LLAMA3, "factor": factor, "original_max_position_embeddings": context}
    config = LlamaConfig(head_dim=64, rope_parameters={**rope, "rope_theta": 500000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    table = rope_scaling.factors(rope, 500000.0, 32)
    assert torch.allclose(plain / scaled, torch.tensor(table), rtol=1e-5)
    said = {"original_context_length": context} if context != 8192 else {}
    assert rope_scaling.llama3(table, 500000.0, said) == rope
    assert rope_scaling.llama3([*table[:-1], 3.0], 500000.0, said) is None


def base_of(folder: Path, **changes: object) -> Path:
    """Write a base as transformers 4 does, with weights that bfloat16 holds."""
    tokens = older.tokenizer("PreTrainedTokenizerFast")
    net = tiny.model(tokens, initializer_range=0.3, **changes).bfloat16().float()
    net.save_pretrained(folder)
    tokens.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if rope["rope_type"] != "default" else None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_gguf_of_a_scaled_llama_is_the_same_model(tmp_path: Path, prompts: list[torch.Tensor]) -> None:
    base = base_of(tmp_path / "base", rope_parameters={**LLAMA3, "rope_theta": 500000.0})
    made = base_files.from_gguf(gguf_file.write(base, tmp_path / "llama.gguf"))
    config = json.loads((made / "config.json").read_text())
    assert config["rope_parameters"] == {**LLAMA3, "rope_theta": 500000.0}
    assert (config["rope_theta"], config["rope_scaling"]) == (500000.0, LLAMA3)
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    about = json.loads((made / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] != "TokenizersBackend"
    assert not isinstance(about.get("extra_special_tokens"), list)
    nets = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (base, made)]
    ids = torch.arange(3, 200)[None]
    with torch.no_grad():
        first, second = (net(input_ids=ids).logits for net in nets)
    assert torch.allclose(first, second, atol=1e-5 * float(first.abs().max()))
    tokens = [AutoTokenizer.from_pretrained(folder) for folder in (base, made)]
    assert tokens[0]("<|im_start|>a cat").input_ids == tokens[1]("<|im_start|>a cat").input_ids


@pytest.mark.parametrize(
    ("said", "rope"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 128},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
        ({"type": "none"}, {"rope_type": "default"}),
        ({"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.1}, None),
        ({"type": "longrope"}, None),
    ],
)  # fmt: skip
def test_scaling_in_the_metadata(said: dict[str, object], rope: dict[str, object] | None, tmp_path: Path) -> None:
    file = tmp_path / "some.gguf"
    gguf_file.metadata(file, said)
    config = LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    if rope is None:
        with pytest.raises(ModelError, match="its RoPE scaling"):
            rope_scaling.complete(config, file)
        return
    rope_scaling.complete(config, file)
    assert config.rope_parameters == {**rope, "rope_theta": 1e4}
