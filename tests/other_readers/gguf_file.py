"""A Llama folder as a .gguf file, written with the package `gguf` alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(folder: Path, file: Path) -> Path:
    """Write a Llama of transformers 4 in float32 to a .gguf file and return it."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    out = gguf.GGUFWriter(file, "llama")
    out.add_block_count(config["num_hidden_layers"])
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_rope_dimension_count(config["head_dim"])
    out.add_vocab_size(config["vocab_size"])
    _tokens(out, folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensor = tensor.astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            tensor = _interleaved(tensor, heads if "q_proj" in name else kv_heads)
        out.add_tensor(_name(name), tensor)
    if config.get("rope_scaling"):
        out.add_rope_scaling_orig_ctx_len(config["rope_scaling"]["original_max_position_embeddings"])
        out.add_tensor("rope_freqs.weight", _factors(config))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def _tokens(out: Any, folder: Path) -> None:
    backend = json.loads((folder / "tokenizer.json").read_text())
    words = {**backend["model"]["vocab"], **{one["content"]: one["id"] for one in backend["added_tokens"]}}
    special = {one["content"] for one in backend["added_tokens"]}
    ordered = sorted(words, key=lambda word: words[word])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(ordered)
    out.add_token_types([gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in ordered])
    out.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    out.add_bos_token_id(words["<|endoftext|>"])  # transformers 5.17 can read no file without one
    out.add_eos_token_id(words["<|endoftext|>"])
    out.add_chat_template((folder / "chat_template.jinja").read_text())


def _name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{_PARTS[part.removesuffix('.weight')]}.weight"


def _interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Put the two halves of each head's rows beside each other, as llama.cpp turns them; shape (out, in)."""
    rows, columns = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _factors(config: dict[str, Any]) -> np.ndarray:
    """Return what llama3 scaling divides each frequency by, shape (head_dim / 2,). Source: Llama 3.1's own code."""
    scaling, dim = config["rope_scaling"], config["head_dim"]
    factors = []
    for i in range(0, dim, 2):
        wave = 2 * np.pi * config["rope_theta"] ** (i / dim)
        low, high = (
            scaling["original_max_position_embeddings"] / scaling[f"{end}_freq_factor"] for end in ("low", "high")
        )
        if wave < high:
            factors.append(1.0)
        elif wave > low:
            factors.append(scaling["factor"])
        else:
            smooth = (scaling["original_max_position_embeddings"] / wave - scaling["low_freq_factor"]) / (
                scaling["high_freq_factor"] - scaling["low_freq_factor"]
            )
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def metadata(file: Path, scaling: dict[str, Any]) -> None:
    """Write a .gguf file that says something about scaled positions, and holds one tensor."""
    out = gguf.GGUFWriter(file, "llama")
    for key, value in scaling.items():
        name = f"llama.rope.scaling.{key}"
        if isinstance(value, str):
            out.add_string(name, value)
        elif isinstance(value, int):
            out.add_uint32(name, value)
        else:
            out.add_float32(name, value)
    out.add_tensor("output_norm.weight", np.ones(8, dtype=np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
