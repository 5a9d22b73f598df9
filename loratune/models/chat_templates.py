"""Chat templates for base models that have none, chosen in a recipe with `data.chat_template`."""

from __future__ import annotations

# https://github.com/openai/openai-python/blob/v0.28.1/chatml.md
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# https://github.com/tatsu-lab/stanford_alpaca#data-release, with the end of text as the end of a turn
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
    "{% elif message['role'] == 'system' and loop.first %}{{ message['content'] + '\n\n' }}"
    "{% else %}{{ raise_exception('alpaca knows no role `' + message['role'] + '` here') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)

TEMPLATES = {"chatml": CHATML, "alpaca": ALPACA}
"""A tokenizer that begins every text with BOS gets it before these as well."""
