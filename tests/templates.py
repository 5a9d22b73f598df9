"""Chat templates in the style of known model families, a tokenizer for each, and chats to render with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny

CHATML = tiny.CHATML

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set lead = messages[0]['content'] | trim + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ (lead if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

GEMMA_NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA
)

MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set lead = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (lead if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{{ messages[0]['content'] if messages[0]['role'] == 'system' else 'You are a helpful assistant.' }}"
    "{{ '\n\n# Tools\n\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}"
    "{% elif messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% elif message.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}"
    "{% for call in message.tool_calls %}{% set call = call.function %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + call.name + '\", \"arguments\": ' + call.arguments | tojson + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif message.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Drops what an earlier answer thought, as reasoning models do: no longer what the model wrote.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WITHOUT_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _same(text: str) -> str:
    return text


@dataclass(frozen=True)
class Family:
    """A template, how its tokenizer is made, and what it writes for an answer.

    Attributes:
        name: of the family.
        template: its chat template.
        tokenizer: makes the tokenizer.
        answer: what is to be trained for an answer's text, the end token apart.
        end: token that ends an answer.
        bos: token every conversation begins with, or None.
        system: whether there may be a system message.
    """

    name: str
    template: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    end: str
    answer: Callable[[str], str] = _same
    bos: str | None = None
    system: bool = True


def bytelevel(
    template: str, special: Sequence[str], eos: str, bos: str | None = None
) -> Callable[[], PreTrainedTokenizerFast]:
    """Return a maker of a tokenizer with one token per byte."""
    return lambda: tiny.tokenizer(template, special, bos, eos)


_TEXT = [
    "the cat sat on the mat and the dog ran to the house",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "hello there  two  spaces\n\n\nthree lines\n\n  indented",
    "naïve café 日本語 emoji 😀😀 👩‍👩‍👧",
] * 8


def trained_bpe(
    template: str, special: Sequence[str], eos: str, bos: str | None = None, rstrip: bool = False
) -> Callable[[], PreTrainedTokenizerFast]:
    """Return a maker of a byte-level BPE with merges over white space, NFC, and a post-processor that trims offsets.

    Args:
        template: chat template.
        special: its special tokens.
        eos: end-of-text token.
        bos: added by the post-processor in front of every text, as Llama 3's does.
        rstrip: whether special tokens swallow the white space behind them, as Phi-3's do.
    """

    def make() -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator(_TEXT, trainer)
        names = list(dict.fromkeys([*special, eos, *([bos] if bos else [])]))
        backend.add_special_tokens([AddedToken(name, normalized=False, rstrip=rstrip) for name in names])
        trim: Any = processors.ByteLevel(trim_offsets=True)
        if bos:
            begin = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
            trim = processors.Sequence([trim, begin])
        backend.post_processor = trim
        return _fast(backend, template, eos, bos)

    return make


def metaspace(
    template: str, special: Sequence[str], eos: str, bos: str | None = None, scheme: str = "always"
) -> Callable[[], PreTrainedTokenizerFast]:
    """Return a maker of a tokenizer in the manner of sentencepiece: a word begins with `▁`, unknown characters are bytes.

    Args:
        template: chat template.
        special: its special tokens.
        eos: end-of-text token.
        bos: begin-of-text token.
        scheme: where a `▁` is put in front: `always` (as Llama 2) or `never` (as Gemma).
    """

    def make() -> PreTrainedTokenizerFast:
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            show_progress=False,
            initial_alphabet=["▁", "\n"],
            special_tokens=[f"<0x{byte:02X}>" for byte in range(256)],
        )
        backend = Tokenizer(models.BPE(byte_fallback=True))
        line_ends = pre_tokenizers.Split("\n", "isolated")  # one token each, as in Llama's vocabulary
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme=scheme), line_ends])
        backend.train_from_iterator(_TEXT, trainer)
        strip = [decoders.Strip(" ", 1, 0)] if scheme == "always" else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        names = list(dict.fromkeys([*special, eos, *([bos] if bos else [])]))
        backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
        return _fast(backend, template, eos, bos)

    return make


def _fast(backend: Tokenizer, template: str, eos: str, bos: str | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, clean_up_tokenization_spaces=False
    )
    made.chat_template = template
    return made


_IM = ("<|im_start|>", "<|im_end|>")
_L3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA = ("<start_of_turn>", "<end_of_turn>")
_PHI = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_B, _E = "<|begin_of_text|>", "<|end_of_text|>"


def _nfc(text: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", text)


FAMILIES = [
    Family("chatml", CHATML, bytelevel(CHATML, _IM, "<|im_end|>"), "<|im_end|>"),
    Family("chatml-bpe", CHATML, trained_bpe(CHATML, _IM, "<|im_end|>"), "<|im_end|>", _nfc),
    Family("llama3", LLAMA3, bytelevel(LLAMA3, _L3, _E, _B), "<|eot_id|>", str.strip, _B),
    Family("llama3-bpe", LLAMA3, trained_bpe(LLAMA3, _L3, _E, _B), "<|eot_id|>", lambda t: _nfc(t.strip()), _B),
    Family("gemma", GEMMA, bytelevel(GEMMA, _GEMMA, "<eos>", "<bos>"), "<end_of_turn>", str.strip, "<bos>"),
    Family(
        "gemma-metaspace",
        GEMMA_NO_SYSTEM,
        metaspace(GEMMA_NO_SYSTEM, _GEMMA, "<eos>", "<bos>", "never"),
        "<end_of_turn>",
        str.strip,
        "<bos>",
        system=False,
    ),
    Family("mistral", MISTRAL, bytelevel(MISTRAL, (), "</s>", "<s>"), "</s>", lambda t: f" {t}", "<s>"),
    Family("mistral-metaspace", MISTRAL, metaspace(MISTRAL, (), "</s>", "<s>"), "</s>", lambda t: f" {t}", "<s>"),
    Family("qwen", QWEN, bytelevel(QWEN, (*_IM, "<|endoftext|>"), "<|im_end|>"), "<|im_end|>"),
    Family("qwen-bpe", QWEN, trained_bpe(QWEN, (*_IM, "<|endoftext|>"), "<|im_end|>"), "<|im_end|>", _nfc),
    Family("zephyr", ZEPHYR, bytelevel(ZEPHYR, (), "</s>", "<s>"), "</s>"),
    Family("zephyr-metaspace", ZEPHYR, metaspace(ZEPHYR, (), "</s>", "<s>"), "</s>"),
    Family("phi3", PHI3, bytelevel(PHI3, _PHI, "<|endoftext|>"), "<|end|>"),
    # these special tokens swallow the white space behind them, with that at the beginning of an answer
    Family(
        "phi3-rstrip",
        PHI3,
        trained_bpe(PHI3, _PHI, "<|endoftext|>", rstrip=True),
        "<|end|>",
        lambda t: _nfc(t).lstrip(),
    ),
    Family("generation", GENERATION, bytelevel(GENERATION, _IM, "<|im_end|>"), "<|im_end|>"),
    Family("generation-bpe", GENERATION, trained_bpe(GENERATION, _IM, "<|im_end|>"), "<|im_end|>", _nfc),
]

_PIECES = [
    "the cat sat on the mat",
    "hello",
    "x",
    "😀",
    "👩‍👩‍👧 family",
    "cafe\u0301 e\u0301e\u0308 \u0301",
    "日本語のテキスト",
    "naïve café",
    "def add(a, b):\n    return a + b",
    "```python\nfor i in range(3):\n\tprint(i)\n```",
    "a\n\nb\n\n\nc",
    "1,234.5 < 6 && <b>bold</b>",
    "שלום مرحبا",
    "{{ braces }} {% raw %}",
    "[1, 2]",
    "\u200b",
]
_EDGES = ["", "", "", " ", "  ", "\n", "\n\n", "\n\n\n", "\t", " \n ", "\n  "]


def text(rng: random.Random) -> str:
    """Return a message's text: often ordinary, often not."""
    if rng.random() < 0.05:
        return ""
    words = " ".join(rng.choice(_PIECES) for _ in range(rng.randint(1, 3)))
    return rng.choice(_EDGES) + words + rng.choice(_EDGES)


def chats(number: int, seed: int = 0, system: bool = True) -> list[dict[str, Any]]:
    """Return rows of one to four questions and answers, with a system prompt now and then."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        messages = [{"role": "system", "content": text(rng)}] if system and rng.random() < 0.4 else []
        for _ in range(rng.randint(1, 4)):
            messages += [{"role": "user", "content": text(rng)}, {"role": "assistant", "content": text(rng)}]
        rows.append({"messages": messages})
    return rows
