"""The side of transformers 4: makes small random bases as it writes them, and reads what was made of them.

Run by its own Python, which knows nothing of loratune: `older.py make FOLDER`, later `older.py compare FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ("a blue cat runs over the red house", "<|im_start|>user\nHi there<|im_end|>\n", "1, 2, 3 and then some more")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
LONG = {"type": "longrope", "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
# name -> class of its config, what is set in it, class of its tokenizer
BASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaConfig", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}, "PreTrainedTokenizerFast"),
    "qwen2": ("Qwen2Config", {"rope_theta": 1e6}, "Qwen2TokenizerFast"),
    "qwen3": ("Qwen3Config", {"rope_theta": 1e6, "head_dim": 16}, "Qwen2TokenizerFast"),
    "mistral": ("MistralConfig", {"rope_theta": 1e6, "sliding_window": 16}, "PreTrainedTokenizerFast"),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 16}, "PreTrainedTokenizerFast"),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 16, "rope_local_base_freq": 5e3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        "PreTrainedTokenizerFast",
    ),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "GPT2TokenizerFast"),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.25, "rope_theta": 5e4}, "PreTrainedTokenizerFast"),
    "phi3": (
        "Phi3Config", {"rope_scaling": LONG, "original_max_position_embeddings": 32, "pad_token_id": None},
        "PreTrainedTokenizerFast",
    ),
    "gpt_neox": ("GPTNeoXConfig", {"rotary_pct": 0.5, "rotary_emb_base": 5e4}, "PreTrainedTokenizerFast"),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "rope_theta": 1e6}, "PreTrainedTokenizerFast"),
}  # fmt: skip


def tokenizer(kind: str) -> Any:
    """Return a byte-level tokenizer of a class, with a few merges, so that it has every file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("r", "e"), ("u", "n"), ("Ġ", "t"), ("Ġ", "a")]
    words = [*alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    ends = {"eos_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    made = getattr(transformers, kind)(tokenizer_object=backend, **ends)
    made.chat_template = CHATML
    return made


def make(folder: Path) -> None:
    """Write the bases."""
    for name, (config_class, settings, tokenizer_class) in BASES.items():
        torch.manual_seed(0)
        tokens = tokenizer(tokenizer_class)
        common = {
            "vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "eos_token_id": tokens.eos_token_id, "bos_token_id": None, "initializer_range": 0.2,
        }  # fmt: skip
        shape = {
            key: value for key, value in common.items() if name != "gpt2" or "size" not in key or key == "vocab_size"
        }
        net = AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**{**shape, **settings}))
        for tensor in net.state_dict().values():  # numbers that bfloat16 holds, for the .gguf
            tensor.copy_(tensor.bfloat16())
        net.save_pretrained(folder / name / "base")
        tokens.save_pretrained(folder / name / "base")


def logits(net: Any, tokens: Any) -> torch.Tensor:
    """Return the logits of all texts, float32, shape (tokens of all, vocabulary)."""
    net.eval()
    with torch.no_grad():
        asked = [tokens(text * 3, return_tensors="pt").input_ids for text in TEXTS]
        return torch.cat([net(input_ids=ids, use_cache=False).logits[0].float() for ids in asked])


def compare(folder: Path) -> int:
    """Read everything that was made of the bases; print how far the logits are from those of the other side."""
    wrong = 0
    print(f"transformers {transformers.__version__}: largest logit difference over the largest logit")
    for place in sorted(file.parent for file in folder.glob("*/*/expected.safetensors")):
        expected = load_file(place / "expected.safetensors")["logits"]
        told = json.loads((place / "expected.json").read_text())
        model = place / "model"
        tokens = AutoTokenizer.from_pretrained(model)
        # eager: its sdpa leaves out the cap of Gemma 2's attention
        if told["base"]:
            net = AutoModelForCausalLM.from_pretrained(told["base"], dtype=torch.float32, attn_implementation="eager")
            net = PeftModel.from_pretrained(net, str(model))
        else:
            net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        found = logits(net, tokens)
        far = float((found - expected).abs().max() / expected.abs().max()) if found.shape == expected.shape else 9.0
        same_ids = [tokens(text).input_ids for text in TEXTS] == told["ids"]
        same_chat = tokens.apply_chat_template(told["chat"], tokenize=False) == told["shown"]
        fine = far < 1e-5 and same_ids and same_chat
        wrong += not fine
        notes = [word for word, same in (("other token ids", same_ids), ("another template", same_chat)) if not same]
        print(f"  {place.parent.name:10} {place.name:8} {far:.1e} {'ok' if fine else 'WRONG'} {', '.join(notes)}")
    return wrong


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        sys.exit(1 if compare(Path(sys.argv[2])) else 0)
