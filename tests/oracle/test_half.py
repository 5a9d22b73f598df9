"""The whole way in bfloat16 on a CPU: head without logits, LoRA in few passes, attention by tiles, all at once.

bfloat16 has a true answer, too: the same weights in float64. What is asked for is that no way of laying out or splitting
a batch is further from it than another, by more than rounding explains.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.data import prefix_sharing
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import single
from loratune.kernels import cpu_attention, linear_cross_entropy, packed_attention
from loratune.methods import Lora
from loratune.methods.tuned import Setup
from loratune.models import base_model
from loratune.models.policy import Policy
from loratune.models.section import Model, Nf4
from loratune.objectives import Sft
from tests import tiny
from tests.conftest import Fit
from tests.data.test_prefix_sharing import alike
from tests.objectives.test_sft import llama, rows
from tests.oracle.test_split import TRAIN, _two_processes

ROWS = alike(rows([70, 9, 140, 33, 2, 66]), 40)
LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
NEARLY = 1.75  # times another's distance from the truth: what rows share is rounded once, not averaged over them
HALF = {"dtype": "bfloat16"}

Gradients = dict[str, torch.Tensor]


def adapted(net: Any, **changes: Any) -> Any:
    """Return a model in training mode with an adapter that is not zero."""
    torch.manual_seed(1)
    made = Lora(r=4, lora_alpha=8, **changes).apply(net, Setup(1)).net
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return made.train()


def half(**changes: Any) -> Any:
    """Return a base in bfloat16 with a wide head, so that its logits differ."""
    net = llama(**changes)
    with torch.no_grad():
        net.lm_head.weight.mul_(8)
    return net.bfloat16()


def exact(net: Any) -> Any:
    """Return the same model in float64, which none of our own ways fits."""
    return copy.deepcopy(net).double()


def gradients(net: Any, parts: Sequence[Any], layout: Layout, objective: Sft | None = None) -> tuple[float, Gradients]:
    """Return loss and gradients of rows, laid out and split into `parts` as the loop does it."""
    objective = objective or Sft()
    batches = [tiny.batch(part, layout) for part in parts]
    count = sum(objective.count(batch) for batch in batches)
    kind = "sdpa" if layout == "padded" else packed_attention.NAME
    packed_attention.register()
    net.get_base_model().set_attn_implementation(kind)
    net.zero_grad()
    total = 0.0
    for batch in batches:
        loss = tiny.total(objective, net, batch)
        (loss / count).backward()
        total += float(loss.detach())
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.requires_grad}
    assert found
    return total / count, found


def error(mine: Gradients, truth: Gradients) -> float:
    """Return the distance of all gradients from the true ones, relative."""
    one, other = (torch.cat([g[name].double().flatten() for name in truth]) for g in (mine, truth))
    return float((one - other).norm() / other.norm())


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count how often attention goes by tiles and the head without logits."""
    counts = {"tiles": 0, "head": 0}
    attend, summed = cpu_attention.attend, linear_cross_entropy.summed_cross_entropy

    def tiled(*args: Any) -> Any:
        counts["tiles"] += 1
        return attend(*args)

    def fused(*args: Any) -> Any:
        counts["head"] += 1
        return summed(*args)

    monkeypatch.setattr(cpu_attention, "attend", tiled)
    monkeypatch.setattr(linear_cross_entropy, "summed_cross_entropy", fused)
    return counts


@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied"])
def test_packed_or_padded_at_once_or_accumulated_is_equally_near_to_the_truth(
    tied: bool, used: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    net = adapted(half(tie_word_embeddings=tied))
    loss, truth = gradients(exact(net), [ROWS], "padded")
    assert used == {"tiles": 0, "head": 0}, "the truth goes none of our ways"
    parts = [[row for sample in part for row in sample.rows] for part in prefix_sharing.cut(single(ROWS), 120)]
    assert len(parts) > 1
    ways = {
        "padded": ([ROWS], "padded"), "padded, one by one": ([[row] for row in ROWS], "padded"),
        "packed": ([ROWS], "packed"), "packed, in three": ([ROWS[:2], ROWS[2:3], ROWS[3:]], "packed"),
        "shared": ([ROWS], "shared"), "shared, in parts": (parts, "shared"),
    }  # fmt: skip
    found = {name: gradients(net, *way) for name, way in ways.items()}
    assert used == {"tiles": 2 * (1 + 3 + 1 + len(parts)), "head": 1 + 6 + 1 + 3 + 1 + len(parts)}  # 2 layers
    with monkeypatch.context() as patch:
        patch.setattr(linear_cross_entropy, "is_fusible", lambda *_: False)
        patch.setattr("loratune.kernels.lora_linear.fits", lambda _: False)
        plain = gradients(net, [ROWS], "padded")
    errors = {name: error(one, truth) for name, (_, one) in {**found, "PEFT's layers, padded": plain}.items()}
    with capsys.disabled():
        print("\nfrom the truth:", *(f"{name}: gradients {off:.2%}" for name, off in errors.items()), sep="\n  ")
    least = min(errors.values())
    assert least > 1e-3, "in bfloat16"
    assert max(errors.values()) < NEARLY * least
    for one, _ in found.values():
        assert one == pytest.approx(loss, rel=2e-3)
        assert abs(one - loss) < NEARLY * abs(plain[0] - loss) + 2e-4 * loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointed_activations_change_no_bit(dtype: torch.dtype, used: dict[str, int]):
    net = adapted(half().to(dtype))
    loss, plain = gradients(net, [ROWS[:3], ROWS[3:]], "packed")
    net.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, checkpointed = gradients(net, [ROWS[:3], ROWS[3:]], "packed")
    assert used["tiles"] == 2 * 2 * 3, "once more on the way back"
    assert again == loss
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_evaluation_draws_no_gradient_and_gives_the_plain_loss(
    dtype: torch.dtype, used: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    net, objective = adapted(half().to(dtype)).eval(), Sft(label_smoothing=0.2)
    batch = tiny.batch(ROWS)
    with torch.no_grad():
        fused = tiny.total(objective, net, batch)
        scored = Policy(net).losses_and_hits(batch)[0].sum()
        monkeypatch.setattr(linear_cross_entropy, "is_fusible", lambda *_: False)
        plain = tiny.total(objective, net, batch)
    assert used["head"] == 1
    assert not fused.requires_grad
    assert float(fused) == pytest.approx(float(plain), rel=1e-6)
    assert float(fused) == pytest.approx(float(scored), rel=1e-6), "not smoothed"


FEW = tuple(ROWS[0].ids[:2].tolist())
SAVED = {
    "the embedding of a tied model": {"modules_to_save": ("embed_tokens",), "tied": True},
    "the embedding": {"modules_to_save": ("embed_tokens",), "tied": False},
    "the head": {"modules_to_save": ("lm_head",), "tied": False},
    "the head of a tied model": {"modules_to_save": ("lm_head",), "tied": True},
    "some tokens of a tied model": {"trainable_token_indices": FEW, "tied": True},
    "some tokens": {"trainable_token_indices": FEW, "tied": False},
    "norms": {"modules_to_save": ("norm",), "tied": False},
}


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
@pytest.mark.parametrize("name", SAVED)
def test_what_is_trained_beside_the_adapter_gets_its_gradient(name: str):
    """Against logits and PEFT's layers in float64: nothing that is trained is taken for frozen."""
    changes = dict(SAVED[name])
    net = adapted(half(tie_word_embeddings=changes.pop("tied")), **changes).float()
    loss, truth = gradients(exact(net), [ROWS], "padded")
    for layout in LAYOUTS:
        mine, found = gradients(net, [ROWS], layout)
        assert mine == pytest.approx(loss, rel=1e-6)
        assert found.keys() == truth.keys()
        for key, gradient in truth.items():
            assert (found[key] - gradient).abs().max() <= 3e-6 * gradient.abs().max(), key
    assert any("lora" not in key and float(gradient.norm()) > 0 for key, gradient in truth.items())


def test_a_four_bit_base_keeps_a_head_without_logits(base: Path, used: dict[str, int], monkeypatch: pytest.MonkeyPatch):
    section = Model(base=str(base), dtype="bfloat16", quantization=Nf4())
    net = adapted(base_model.load(section, where=torch.device("cpu")).model)
    assert type(net.get_output_embeddings()) is torch.nn.Linear
    found = {layout: gradients(net, [ROWS], layout) for layout in LAYOUTS}
    assert used["head"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(linear_cross_entropy, "is_fusible", lambda *_: False)
        loss, plain = gradients(net, [ROWS], "padded")
    assert found["padded"][0] == pytest.approx(loss, rel=1e-6)
    assert error(found["padded"][1], plain) < 2**-7
    for layout in ("packed", "shared"):
        assert found[layout][0] == pytest.approx(loss, rel=2e-3)
        assert error(found[layout][1], plain) < 2**-5


def test_runs_split_otherwise_are_equally_near_to_the_truth(
    fit: Fit, base: Path, tmp_path: Path, used: dict[str, int], capsys: pytest.CaptureFixture[str]
):
    """Six steps: packed or padded, accumulated or not, by one process or two; beside float32 on the same weights."""
    rounded = tmp_path / "rounded"
    tiny.tokenizer().save_pretrained(rounded)
    tiny.model(tiny.tokenizer()).bfloat16().float().save_pretrained(rounded)
    train = {**TRAIN, "micro_batch_size": 8}
    sections: dict[str, Any] = {"optimizer": {"lr": 3e-3, "eps": 1e-6}, "train": train}
    true = fit("true", on=rounded, data={"packing": "off"}, **sections)
    one = {**sections, "train": {**train, "micro_batch_size": 1}}
    columns = {
        "padded": fit("padded", model=HALF, data={"packing": "off"}, **sections).events(),
        "padded, accumulated": fit("parts", model=HALF, data={"packing": "off"}, **one).events(),
        "packed": fit("packed", model=HALF, data={"packing": "on"}, **sections).events(),
        "packed, accumulated": fit("packs", model=HALF, data={"packing": "on"}, **one).events(),
    }
    assert used["tiles"] > 0
    for word, these in (("whole", sections), ("accumulated", one)):
        (tmp_path / word).mkdir()
        folder = _two_processes(tiny.write_recipe(tmp_path / word, base, model=HALF, data={"packing": "on"}, **these))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        columns[f"two processes, packed, {word}"] = [line for line in lines if line["kind"] == "step"]
    off: dict[str, tuple[float, ...]] = {}
    for name, events in columns.items():
        assert len(events) == len(true.events()) == 6
        for key in ("rows", "tokens", "trained_tokens", "lr"):
            assert [event[key] for event in events] == true.column(key)
        off[name] = tuple(
            max(abs(event[key] / other[key] - 1) for event, other in zip(events, true.events(), strict=True))
            for key in ("loss", "grad_norm")
        )
    with capsys.disabled():
        print("\nfrom float32:", *(f"{name}: loss {a:.1e}, norm {b:.1e}" for name, (a, b) in off.items()), sep="\n  ")
    assert true.column("loss")[-1] < 0.95 * true.column("loss")[0]
    assert max(loss for loss, _ in off.values()) < 3e-4
    assert max(norm for _, norm in off.values()) < 6e-3
