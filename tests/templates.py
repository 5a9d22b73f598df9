"""Chat templates in the style of known model families, a tokenizer for each, and chats to render with them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loratune.data.chat_template import with_template
from loratune.models.chat_templates import ALPACA
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

# As Qwen 3 publishes it: thoughts stay with the answers to the last question only, `enable_thinking: false` puts an
# empty thought into the prompt.
QWEN3 = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}"
    "{{- '# Tools\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}"
    "{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}"
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}"
    "{%- for message in messages[::-1] %}{%- set index = (messages | length - 1) - loop.index0 %}"
    "{%- if ns.multi_step_tool and message.role == 'user' and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}"
    "{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}"
    "{%- else %}{%- set reasoning = '' %}{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{%- for call in message.tool_calls or [] %}{%- if (loop.first and content) or not loop.first %}{{- '\n' }}{%- endif %}"
    "{{- '<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
QWEN3_NO_THINKING = "{%- set enable_thinking = false %}" + QWEN3

# In the style of DeepSeek R1: an answer that others follow is written without what stands before `</think>`.
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{% set content = message['content'] %}"
    "{% if not loop.last and '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# As R1's distilled models publish it: no answer keeps its thoughts, though the prompt opens one.
DEEPSEEK_R1 = DEEPSEEK.replace("not loop.last and ", "").replace(
    "{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}"
)

COMMAND_R = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0]['content'] + '<|END_OF_TURN_TOKEN|>' }}"
    "{% else %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if message['role'] == 'user' else '<|CHATBOT_TOKEN|>') }}"
    "{{ message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)

# In the style of gpt-oss: channels, `<|return|>` behind the last answer and `<|end|>` behind those before, thoughts of
# earlier answers left out, one call a message.
HARMONY = (
    "{{- '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n\n"
    "# Valid channels: analysis, commentary, final.<|end|>' }}"
    "{%- if messages[0].role in ('system', 'developer') %}{%- set rules = messages[0].content %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set rules = '' %}{%- set turns = messages %}{%- endif %}"
    "{%- if rules or tools %}{{- '<|start|>developer<|message|>' }}"
    "{%- if rules %}{{- '# Instructions\n\n' + rules + '\n\n' }}{%- endif %}"
    "{%- if tools %}{{- '# Tools\n\n## functions\n\nnamespace functions {\n' }}"
    "{%- for tool in tools %}{{- 'type ' + tool.function.name + ' = () => any;\n' }}{%- endfor %}{{- '}' }}{%- endif %}"
    "{{- '<|end|>' }}{%- endif %}"
    "{%- set called = namespace(name=none) %}"
    "{%- for message in turns %}"
    "{%- if message.role == 'assistant' and message.tool_calls %}"
    "{%- set later = namespace(final=false) %}{%- for next in turns[loop.index:] %}"
    "{%- if next.role == 'assistant' and not next.tool_calls %}{%- set later.final = true %}{%- endif %}{%- endfor %}"
    "{%- set thought = message.thinking or message.content %}"
    "{%- if thought and not later.final %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}{%- set called.name = call.name %}"
    "{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}{{- call.arguments | tojson }}{{- '<|call|>' }}"
    "{%- elif message.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "{%- if message.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|start|>functions.' + called.name + ' to=assistant<|channel|>commentary<|message|>' + message.content | tojson + '<|end|>' }}"
    "{%- else %}{{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
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
        turn: what is to be trained for a message, end token and all, where its text alone doesn't tell.
        chats: makes its chats, where they are of a special kind.
        by_turn: whether the template renders an answer differently once others follow.
        refused: whether a chat can't be masked with certainty.
    """

    name: str
    template: str
    tokenizer: Callable[[], PreTrainedTokenizerFast]
    end: str
    answer: Callable[[str], str] = _same
    bos: str | None = None
    system: bool = True
    turn: Callable[[dict[str, Any]], str] | None = None
    chats: Callable[[int, int], list[dict[str, Any]]] | None = None
    by_turn: bool = False
    refused: Callable[[dict[str, Any]], bool] = lambda row: False

    def trained(self, message: dict[str, Any]) -> str:
        """Return what is to be trained for a message of the assistant."""
        return self.turn(message) if self.turn else self.answer(message["content"]) + self.end

    def rows(self, number: int, seed: int) -> list[dict[str, Any]]:
        """Return chats as this family has them."""
        return self.chats(number, seed) if self.chats else chats(number, seed, self.system)


def bytelevel(
    template: str | None, special: Sequence[str], eos: str, bos: str | None = None
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
    template: str | None, special: Sequence[str], eos: str, bos: str | None = None, rstrip: bool = False
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
    template: str | None, special: Sequence[str], eos: str, bos: str | None = None, scheme: str = "always"
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


def _fast(backend: Tokenizer, template: str | None, eos: str, bos: str | None) -> PreTrainedTokenizerFast:
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


def _calls(message: dict[str, Any]) -> list[tuple[str, str]]:
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return [(function["name"], json.dumps(function["arguments"], ensure_ascii=False)) for function in functions]


def _qwen3(message: dict[str, Any], thinking: bool = True) -> str:
    content, thought = message["content"] or "", message.get("reasoning_content")
    if thought is None:
        head, found, tail = content.rpartition("</think>")
        thought, content = (head.split("<think>")[-1].strip("\n"), tail.lstrip("\n")) if found else ("", content)
    calls = "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {given}}}\n</tool_call>' for name, given in _calls(message)
    )
    said = content.lstrip("\n") + ("\n" if content and calls else "") + calls + "<|im_end|>"
    return "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + said if thinking else said


def _harmony(message: dict[str, Any]) -> str:
    thought = message.get("thinking") or (message["content"] if message.get("tool_calls") else "")
    said = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    for name, given in _calls(message):
        return f"{said} to=functions.{name}<|channel|>commentary json<|message|>{given}<|call|>"
    return f"{said}<|channel|>final<|message|>{message['content']}<|return|>"


def _thinks_before_a_call(row: dict[str, Any]) -> bool:
    """Whether gpt-oss takes a thought out of the prompt once the answer is there: it can't be masked behind that."""
    return any(message.get("tool_calls") and message.get("thinking") for message in row["messages"])


def thoughtful(key: str | None = None, tools: bool = True, calls: int = 2) -> Callable[..., list[dict[str, Any]]]:
    """Return a maker of chats of one to four questions, with thoughts and calls of tools before the answers.

    Args:
        key: where a thought stands in a message; None: in its text, between `<think>` and `</think>`.
        tools: whether tools are called.
        calls: most calls in a message.
    """

    def make(number: int, seed: int) -> list[dict[str, Any]]:
        rng = random.Random(seed)

        def say(words: str, **more: Any) -> dict[str, Any]:
            message = {"role": "assistant", "content": words, **more}
            if rng.random() < 0.6:
                thought = text(rng)
                if key:
                    message[key] = thought
                else:
                    message["content"] = f"<think>\n{thought}\n</think>\n\n{words}"
            return message

        def call() -> dict[str, Any]:
            given = {"city": text(rng), "days": rng.randint(1, 9)} if rng.random() < 0.8 else {}
            return {"type": "function", "function": {"name": rng.choice(["weather", "clock"]), "arguments": given}}

        rows = []
        for _ in range(number):
            row: dict[str, Any] = {"messages": []}
            messages = row["messages"]
            if rng.random() < 0.4:
                messages.append({"role": "system", "content": text(rng)})
            equipped = tools and rng.random() < 0.6
            if equipped:
                row["tools"] = [{"type": "function", "function": {"name": n}} for n in ("weather", "clock")]
            for _ in range(rng.randint(1, 4)):
                messages.append({"role": "user", "content": text(rng)})
                for _ in range(rng.randint(0, 2) if equipped else 0):
                    wanted = [call() for _ in range(rng.randint(1, calls))]
                    messages.append(say("" if key or rng.random() < 0.6 else text(rng), tool_calls=wanted))
                    messages += [{"role": "tool", "content": text(rng)} for _ in wanted]
                messages.append(say(text(rng)))
            rows.append(row)
        return rows

    return make


def unthinking(number: int, seed: int) -> list[dict[str, Any]]:
    """Return chats with calls of tools and without thoughts."""
    rows = thoughtful("thought")(number, seed)
    for row in rows:
        for message in row["messages"]:
            message.pop("thought", None)
    return rows


def based(make: Callable[[], PreTrainedTokenizerFast], choice: str) -> Callable[[], PreTrainedTokenizerFast]:
    """Return a maker of a tokenizer without a template, given one by name."""
    return lambda: with_template(make(), tiny.data(chat_template=choice))


_THINK = (*_IM, "<|endoftext|>")
_SEEK = ("<｜User｜>", "<｜Assistant｜>")
_SEEK_B, _SEEK_E = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_COMMAND = tuple(f"<|{name}_TOKEN|>" for name in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT"))
_HARMONY = tuple(f"<|{name}|>" for name in ("start", "end", "message", "channel", "call", "return"))
_TURN_END = "<|END_OF_TURN_TOKEN|>"

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
    Family(
        "qwen3",
        QWEN3,
        bytelevel(QWEN3, _THINK, "<|im_end|>"),
        "<|im_end|>",
        turn=_qwen3,
        chats=thoughtful(),
        by_turn=True,
    ),
    Family(
        "qwen3-bpe",
        QWEN3,
        trained_bpe(QWEN3, _THINK, "<|im_end|>"),
        "<|im_end|>",
        turn=lambda m: _nfc(_qwen3(m)),
        chats=thoughtful("reasoning_content"),
        by_turn=True,
    ),
    Family(
        "deepseek",
        DEEPSEEK,
        bytelevel(DEEPSEEK, _SEEK, _SEEK_E, _SEEK_B),
        _SEEK_E,
        bos=_SEEK_B,
        chats=thoughtful(tools=False),
        by_turn=True,
    ),
    Family(
        "deepseek-bpe",
        DEEPSEEK,
        trained_bpe(DEEPSEEK, _SEEK, _SEEK_E, _SEEK_B),
        _SEEK_E,
        _nfc,
        bos=_SEEK_B,
        chats=thoughtful(tools=False),
        by_turn=True,
    ),
    Family("command-r", COMMAND_R, bytelevel(COMMAND_R, _COMMAND, _TURN_END, "<B>"), _TURN_END, str.strip, "<B>"),
    Family(
        "command-r-bpe",
        COMMAND_R,
        trained_bpe(COMMAND_R, _COMMAND, _TURN_END, "<B>"),
        _TURN_END,
        lambda t: _nfc(t.strip()),
        "<B>",
    ),
    Family(
        "gpt-oss",
        HARMONY,
        bytelevel(HARMONY, _HARMONY, "<|return|>", "<|startoftext|>"),
        "<|return|>",
        turn=_harmony,
        chats=thoughtful("thinking", calls=1),
        by_turn=True,
        refused=_thinks_before_a_call,
    ),
    Family(
        "gpt-oss-bpe",
        HARMONY,
        trained_bpe(HARMONY, _HARMONY, "<|return|>"),
        "<|return|>",
        turn=lambda m: _nfc(_harmony(m)),
        chats=thoughtful("thinking", calls=1),
        by_turn=True,
        refused=_thinks_before_a_call,
    ),
    Family("base-chatml", CHATML, based(bytelevel(None, _IM, "</s>", "<s>"), "chatml"), "<|im_end|>"),
    Family("base-chatml-bpe", CHATML, based(trained_bpe(None, _IM, _E, _B), "chatml"), "<|im_end|>", _nfc, bos=_B),
    Family("base-alpaca", ALPACA, based(bytelevel(None, (), "</s>"), "alpaca"), "</s>"),
    Family("base-alpaca-bpe", ALPACA, based(trained_bpe(None, (), _E, _B), "alpaca"), _E, _nfc, bos=_B),
    Family("base-alpaca-metaspace", ALPACA, based(metaspace(None, (), "</s>", "<s>"), "alpaca"), "</s>"),
]
# the prompt holds an empty thought, so an answer that thinks can't stand behind it
NO_THINKING = Family(
    "qwen3, thinking off",
    QWEN3_NO_THINKING,
    bytelevel(QWEN3_NO_THINKING, _THINK, "<|im_end|>"),
    "<|im_end|>",
    turn=lambda m: _qwen3(m, thinking=False),
    chats=unthinking,
    by_turn=True,
)

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
