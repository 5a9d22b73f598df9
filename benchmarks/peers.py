"""The others, as their documentation has them: TRL's SFTTrainer, Trainer with PEFT (and axolotl's kernels), unsloth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import machine
import training

PLAIN = {"bf16": False, "gradient_checkpointing": False, "max_length": None}
SETTINGS: dict[str, dict[str, Any]] = {  # of SFTConfig that differ from its defaults
    "trl-plain": PLAIN,
    "trl-padding-free": PLAIN | {"padding_free": True},
    "trl-liger": PLAIN | {"use_liger_kernel": True},
}


def run(name: str, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL, transformers' Trainer or unsloth."""
    if name == "unsloth":
        import unsloth  # noqa: F401 - before the others, which it patches
    import torch
    from transformers import set_seed

    config = training.model_config(case)
    rates: list[float] = []

    def look() -> None:
        if not torch.cuda.is_available():
            rates.append(machine.matrix_rate(config, case["dtype"]))

    timer, begins, ends = clock(look)
    set_seed(0)
    trainer = (of_transformers if name.startswith("trainer") else of_trl)(name, folder, case)
    trainer.add_callback(timer)
    trainer.train()
    return {
        "started": begins[0],
        "seconds": [end - begin for begin, end in zip(begins, ends, strict=True)],
        "rates": rates,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }


def clock(after: Callable[[], None] = lambda: None) -> tuple[Any, list[float], list[float]]:
    """Return a callback for a Trainer, and lists to hold begin and end of each step; `after` follows each end."""
    import torch
    from transformers import TrainerCallback

    begins: list[float] = []
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            begins.append(time.time())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.time())
            after()

    return Clock(), begins, ends


def of_transformers(name: str, folder: Path, case: dict[str, Any]) -> Any:
    """Return transformers' Trainer over PEFT's layers, or axolotl's; on a GPU, where models are large, checkpointed."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    dtype = getattr(torch, case["dtype"])
    net = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype, **quantized(case))
    net = get_peft_model(net, lora())
    if name == "trainer-axolotl":
        axolotl_kernels(net)
    told = settings(name, folder, case) | {"bf16": False, "gradient_checkpointing": torch.cuda.is_available()}
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(case["model"]), label_pad_token_id=-100)
    return Trainer(net, TrainingArguments(**told), collator, rows(folder))


def of_trl(name: str, folder: Path, case: dict[str, Any]) -> Any:
    """Return TRL's SFTTrainer, over unsloth's model where that is meant."""
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    told, data = settings(name, folder, case) | SETTINGS.get(name, {}), rows(folder)
    if name == "unsloth":
        from unsloth import FastLanguageModel

        net, words = FastLanguageModel.from_pretrained(
            case["model"], max_seq_length=max(len(row) for row in data["input_ids"]),
            load_in_4bit=bool(quantized(case)), dtype=getattr(torch, case["dtype"]),
        )  # fmt: skip
        net = FastLanguageModel.get_peft_model(
            net, **training.LORA, use_gradient_checkpointing="unsloth",
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        )  # fmt: skip
        return SFTTrainer(net, args=SFTConfig(**told), train_dataset=data, processing_class=words)
    chosen = {} if name == "trl" else {"dtype": case["dtype"]}
    told["model_init_kwargs"] = {**chosen, **quantized(case)} or None
    words = AutoTokenizer.from_pretrained(case["model"])
    return SFTTrainer(
        case["model"], args=SFTConfig(**told), train_dataset=data, processing_class=words, peft_config=lora()
    )


def settings(name: str, folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Return what TrainingArguments is told in every arm."""
    import torch

    each = min(case.get("rows_at_once", 8), case["batch_size"])  # 8: a device's rows at once, by default
    return {
        "output_dir": str(folder / name), "max_steps": case["steps"], "learning_rate": training.RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "sequential", "seed": 0, "per_device_train_batch_size": each,
        "gradient_accumulation_steps": case["batch_size"] // each,
    }  # fmt: skip


def rows(folder: Path) -> Any:
    """Return the tokens of every step, as loratune sees them."""
    from datasets import Dataset

    return Dataset.from_list(json.loads((folder / "tokens.json").read_text(encoding="utf-8")))


def lora() -> Any:
    """Return the adapter's configuration, loratune's own."""
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **training.LORA)


def quantized(case: dict[str, Any]) -> dict[str, Any]:
    """Return what `from_pretrained` is told of the base's precision, where that is 4 bits."""
    import torch
    from transformers import BitsAndBytesConfig

    if case["sections"].get("model", {}).get("quantization") != "nf4":
        return {}
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, case["dtype"]),
    )  # fmt: skip
    return {"quantization_config": config}


def axolotl_kernels(net: Any) -> None:
    """Put axolotl's functions for LoRA into a Llama with PEFT's layers, where its own trainer would put them."""
    from axolotl.kernels.lora import apply_lora_mlp_swiglu, apply_lora_o, apply_lora_qkv

    def attend_by(attention: Any) -> None:
        made: dict[str, Any] = {}

        def query(x: Any) -> Any:
            found, made["key"], made["value"] = apply_lora_qkv(attention, x)
            return found

        attention.q_proj.forward = query
        attention.k_proj.forward = lambda x: made.pop("key")
        attention.v_proj.forward = lambda x: made.pop("value")
        attention.o_proj.forward = partial(apply_lora_o, attention)

    for layer in net.get_base_model().model.layers:
        attend_by(layer.self_attn)
        layer.mlp.forward = partial(apply_lora_mlp_swiglu, layer.mlp)
