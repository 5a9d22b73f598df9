"""Methods: which parameters are trained. A new one is one file here and one word in this union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from loratune.config.section import BareWord
from loratune.methods.adalora import AdaLora
from loratune.methods.full import Full
from loratune.methods.head import Head
from loratune.methods.lora import Lora
from loratune.methods.prompt import Prompt

Method = Annotated[
    Lora | AdaLora | Prompt | Full | Head,
    Field(discriminator="type"),
    BareWord(
        {
            "qlora": "QLoRA is `type: lora` with `model.quantization: nf4`",
            "dora": "DoRA is {type: lora, dora: true}",
            "rslora": "rsLoRA is {type: lora, rslora: true}",
            "loraplus": "LoRA+ is `optimizer.loraplus_lr_ratio`",
            "pissa": "PiSSA is {type: lora, init: pissa}",
            "full_finetune": "write `full`",
            "prompt_tuning": "write `prompt`",
            "soft_prompt": "write `prompt`",
            "none": "full fine-tuning is `type: full`",
        }
    ),
]

__all__ = ["AdaLora", "Full", "Head", "Lora", "Method", "Prompt"]
