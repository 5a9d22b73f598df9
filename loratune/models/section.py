"""The section `model` of a recipe: the base model and how it is loaded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from loratune.config.section import BareWord, Inside, Section


class NoQuantization(Section):
    """The base model's weights, unchanged."""

    type: Literal["none"] = "none"


class Nf4(Section):
    """4-bit NormalFloat weights, bf16 compute. Source: QLoRA, arXiv:2305.14314, sec. 3."""

    type: Literal["nf4"] = "nf4"
    double_quant: bool = Field(True, description="quantize the scales as well: 0.4 bit per weight less")


class Fp4(Section):
    """4-bit float weights, bf16 compute."""

    type: Literal["fp4"] = "fp4"
    double_quant: bool = Field(True, description="quantize the scales as well: 0.4 bit per weight less")


class Int8(Section):
    """8-bit weights with outlier columns in 16 bit. Source: LLM.int8(), arXiv:2208.07339."""

    type: Literal["int8"] = "int8"


Quantization = Annotated[
    NoQuantization | Nf4 | Fp4 | Int8,
    Field(discriminator="type"),
    BareWord({"4bit": "write `nf4`", "int4": "write `nf4`", "8bit": "write `int8`", "qlora": "write `nf4`"}),
]


class Model(Section):
    """The base model and how it is loaded."""

    base: str = Field(min_length=1, description="hub id, local folder, or a .gguf file")
    revision: Inside | None = Field(None, description="branch, tag or commit of a hub model")
    quantization: Quantization = Field(
        NoQuantization(), description="quantization of the frozen weights; nf4 with lora is QLoRA"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="precision of the weights; auto: bfloat16 where the device supports it, else float32"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="attention kernel; auto: sdpa where the model has it"
    )
