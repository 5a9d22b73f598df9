"""The loop against transformers' Trainer with PEFT: the same losses and gradient norms, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from loratune.data import batches, dataset
from loratune.data.encode import Encoder
from loratune.kernels import linear_cross_entropy, lora_linear
from loratune.methods import Lora
from loratune.methods.tuned import Adapter, Setup
from loratune.models import base_model, tokenizing
from loratune.objectives import Sft
from tests import tiny
from tests.conftest import Fit, Trained
from tests.objectives.test_sft import llama, rows

CLIP = 0.3


def _columns(trained: Trained, tokenizer: object) -> dict[str, list[list[int]]]:
    """Return the rows in the order in which our loop saw them, as Trainer wants them."""
    rows, _ = dataset.of(trained.recipe.data, trained.recipe.train.seed, Encoder(tokenizer))
    settings = trained.recipe.train
    order = [
        i
        for batch in batches.epoch_order(rows.lengths, rows.weights, settings.batch_size, settings.seed, 0)
        for i in batch
    ]
    seen = [rows[int(i)] for i in order]
    return {
        "input_ids": [row.ids.tolist() for row in seen],
        "attention_mask": [[1] * len(row.ids) for row in seen],
        "labels": [np.where(row.trained, row.ids, -100).tolist() for row in seen],
    }


def _trainer(
    trained: Trained, tokenizer: object, folder: Path
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Train the same with Trainer and PEFT; return its log and its adapter."""
    recipe = trained.recipe
    set_seed(recipe.train.seed)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=recipe.method.r, lora_alpha=recipe.method.lora_alpha, target_modules="all-linear"
    )
    net = get_peft_model(base_model.load(recipe.model).model, lora)
    assert {type(m) for m in net.modules() if isinstance(m, LoraLayer)} == {Linear}, "PEFT's own layers"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.train.micro_batch_size,
        gradient_accumulation_steps=recipe.train.batch_size // recipe.train.micro_batch_size,
        num_train_epochs=1,
        learning_rate=recipe.optimizer.lr,
        weight_decay=recipe.optimizer.weight_decay,
        adam_epsilon=recipe.optimizer.eps,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=recipe.train.seed,
    )
    trainer = Trainer(
        model=net,
        args=arguments,
        train_dataset=Dataset.from_dict(_columns(trained, tokenizer)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line], get_peft_model_state_dict(
        net, save_embedding_layers=False
    )


@pytest.mark.parametrize(("way", "eps"), [("plain", 1e-8), ("defaults", 1e-6)], ids=["plain", "defaults"])
def test_six_steps_are_those_of_transformers_trainer(
    fit: Fit, tmp_path: Path, way: str, eps: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """With logits and PEFT's layers on both sides, padded, and with the defaults: packed, shared, own layers.

    These round otherwise. Where a gradient is no larger than Adam's eps its rounding decides how far a step goes, so
    eps is put above it there; `test_gradients_are_as_near_to_the_truth` says that the rounding is all.
    """
    if way == "plain":
        monkeypatch.setattr(linear_cross_entropy, "is_fusible", lambda *_: False)
        monkeypatch.setattr(lora_linear, "fits", lambda _: False)
    ours = fit(
        rows=48,
        data={"packing": "off" if way == "plain" else "auto"},
        optimizer={"lr": 5e-3, "weight_decay": 0.1, "eps": eps},
        train={
            "batch_size": 8,
            "micro_batch_size": 2,
            "schedule": {"type": "linear"},
            "warmup": 0,
            "max_grad_norm": CLIP,
        },
    )
    tokenizer = tokenizing.load(ours.recipe.model)
    theirs, adapter = _trainer(ours, tokenizer, tmp_path / "trainer")
    assert len(theirs) == len(ours.events()) == 6

    lines, worst = [], 0.0
    for mine, other in zip(ours.events(), theirs, strict=True):
        pairs = {
            name: (mine[name], other[there])
            for name, there in (("loss", "loss"), ("grad_norm", "grad_norm"), ("lr", "learning_rate"))
        }
        lines.append(
            f"step {mine['number']}  " + "  ".join(f"{name} {a:.9g} {b:.9g}" for name, (a, b) in pairs.items())
        )
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs.values()))
    with capsys.disabled():
        print("\nours and transformers.Trainer's:", *lines, f"largest relative difference {worst:.2e}", sep="\n")

    layers = {type(m).__name__ for m in ours.net.modules() if isinstance(m, LoraLayer)}
    assert layers == ({"Linear"} if way == "plain" else {"FewPasses"})
    assert ours.facts()["batching"].get("shared", False) == (way != "plain")
    assert min(ours.column("grad_norm")) > CLIP, "every step must be clipped, or clipping is not compared"
    assert len(set(ours.column("lr"))) == 6, "the rate must move, or the schedule is not compared"
    assert ours.column("loss")[-1] < ours.column("loss")[0]
    assert worst < 1e-6
    mine = Adapter(ours.net).state()
    assert mine.keys() == adapter.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-6)


def test_gradients_are_as_near_to_the_truth(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """One loss and its gradients as they come, and with logits and PEFT's layers, each against float64."""
    batch, found = tiny.batch(rows([40, 60, 33, 80])), {}

    def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        net = Lora(r=4, lora_alpha=8).apply(llama(), Setup(1)).net
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        net.to(dtype).train()
        (tiny.total(Sft(), net, batch) / Sft().count(batch)).backward()
        return {name: p.grad.double() for name, p in net.named_parameters() if p.requires_grad}

    found["defaults"] = gradients(torch.float32)
    monkeypatch.setattr(linear_cross_entropy, "is_fusible", lambda *_: False)
    monkeypatch.setattr(lora_linear, "fits", lambda _: False)
    found["plain"], truth = gradients(torch.float32), gradients(torch.float64)
    worst = {
        way: max(float((one[name] - true).abs().max() / true.abs().max()) for name, true in truth.items())
        for way, one in found.items()
    }
    with capsys.disabled():
        print("\nlargest error of a gradient's element, of the largest:", worst)
    assert 0 < worst["defaults"] < 1.5 * worst["plain"]
    assert worst["defaults"] < 2e-6


def test_a_wrong_mean_would_be_seen(fit: Fit, tmp_path: Path):
    """A mean of the micro-batches' means is another number on these rows, by far more than what is allowed above."""
    whole = fit("whole", rows=48, train={"batch_size": 8, "micro_batch_size": 2, "max_grad_norm": CLIP})
    tokenizer = tokenizing.load(whole.recipe.model)
    columns = _columns(whole, tokenizer)
    counts = [sum(label != -100 for label in labels[1:]) for labels in columns["labels"][:8]]
    micro = [sum(counts[i : i + 2]) for i in range(0, 8, 2)]
    assert len(set(micro)) > 1, micro
    loaded = base_model.load(whole.recipe.model).model.eval()
    sums = []
    for i in range(8):
        with torch.no_grad():
            out = loaded(input_ids=torch.tensor([columns["input_ids"][i]]), labels=torch.tensor([columns["labels"][i]]))
        sums.append(float(out.loss) * counts[i])
    right = sum(sums) / sum(counts)
    wrong = sum(sum(sums[i : i + 2]) / sum(counts[i : i + 2]) for i in range(0, 8, 2)) / 4
    assert whole.column("loss")[0] == pytest.approx(right, rel=1e-6)
    assert abs(wrong / right - 1) > 1e-4
