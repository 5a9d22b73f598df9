"""A training from recipe to run folder, on a tiny random base."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

from loratune import recipe
from loratune.data import batches, dataset
from loratune.data.encode import Encoder, Row
from loratune.data.sample import single
from loratune.errors import DataError, ModelError, Place, RunFolderError, TrainingError
from loratune.events import Event, StepDone
from loratune.methods.tuned import Setup, Tuned
from loratune.models import tokenizing
from loratune.models.batch import Batch
from loratune.models.policy import Policy
from loratune.objectives.section import ObjectiveSection
from loratune.optim import Adafactor, AdamW, AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from loratune.runs import checkpoint, lock
from loratune.system import storage
from loratune.training import layout_test, loop, run
from tests import tiny
from tests.conftest import Fit, logits

HELD_OUT: dict[str, Any] = {"data": {"eval": "eval.jsonl"}}
EVEN = {"batch_size": 24, "epochs": 4, "schedule": "constant", "warmup": 0}  # each step sees all rows


# ---------------------------------------------------------------- the run folder


def test_a_run_folder_has_everything_in_it(fit: Fit, base: Path):
    done = fit(train={"epochs": 2, "save_every": 2}, **HELD_OUT)
    names = {path.name for path in done.folder.iterdir()}
    assert names == {
        "MANIFEST.json", "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "checkpoints",
        "generation_config.json", "ledger.jsonl", "loratune.json",
        "loss.svg", "metrics.jsonl", "recipe.yaml", "run.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sorted(path.name for path in (done.folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert storage.verify(done.folder) is None, "the manifest covers what lies beside it"
    facts = done.facts()
    assert facts["status"] == "complete"
    assert facts["steps"] == facts["step"] == done.run.steps == 6
    assert facts["seed"] == 0
    assert facts["processes"] == 1
    assert facts["base"] == str(base)
    assert facts["recipe_sha256"] == done.recipe.hash()
    assert facts["train_loss"] == done.run.train_loss == done.column("loss")[-1]
    assert facts["best_eval_loss"] == done.run.eval_loss == min(e["loss"] for e in done.events("eval"))
    assert {"loratune", "python", "torch", "transformers", "peft", "safetensors"} <= facts["versions"].keys()
    counts = facts["data"]["train"]
    assert (counts["read"], counts["kept"], counts["dropped"], counts["rows"]) == (24, 24, 0, 24)
    assert facts["data"]["eval"]["read"] == 6
    assert recipe.load(done.folder / "recipe.yaml") == done.recipe
    assert (done.folder / "loss.svg").read_text().startswith("<svg")
    front = yaml.safe_load((done.folder / "README.md").read_text().split("---")[1])
    assert "base_model" not in front, "its folder is on this machine alone"
    assert front["library_name"] == "peft"


def test_metrics_have_every_step(fit: Fit):
    done = fit(rows=20, train={"epochs": 2}, **HELD_OUT)
    assert [event["number"] for event in done.events()] == [1, 2, 3, 4, 5, 6]
    assert sorted(event["rows"] for event in done.events()) == [4, 4, 8, 8, 8, 8]
    counts = done.facts()["data"]["train"]
    assert sum(done.column("tokens")) == 2 * counts["tokens"]
    assert sum(done.column("trained_tokens")) == 2 * counts["trained_tokens"]
    assert done.column("epoch")[2::3] == [1.0, 2.0]
    assert [event["number"] for event in done.events("eval")] == [3, 6]
    assert all(
        event["trained_tokens"] == done.facts()["data"]["eval"]["trained_tokens"] for event in done.events("eval")
    )


def test_the_tokenizer_of_a_run_is_that_of_its_base(fit: Fit):
    done = fit(rows=8)
    tokens = AutoTokenizer.from_pretrained(done.folder)
    assert tokens.get_chat_template() == tiny.tokenizer().get_chat_template()
    assert tokens("a <|im_end|>").input_ids == tiny.tokenizer()("a <|im_end|>").input_ids


def test_the_final_weights_are_those_of_the_best_evaluation(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    losses = iter([2.0, 1.0, 3.0])
    monkeypatch.setattr("loratune.training.loop.measure", lambda *_: (next(losses), 10, {}))
    done = fit(train={"eval_every": 1, "save_every": 1, "keep": 9}, **HELD_OUT)
    final = load_file(done.folder / "adapter_model.safetensors")
    of_step = {n: load_file(checkpoint.path_of(done.folder, n) / "adapter_model.safetensors") for n in (1, 2, 3)}
    assert [n for n, state in of_step.items() if all(torch.equal(state[name], final[name]) for name in final)] == [2]
    assert (done.run.eval_loss, done.facts()["saved_step"], done.run.steps) == (1.0, 2, 3)


def test_the_eval_loss_is_that_of_transformers(fit: Fit):
    done = fit(**HELD_OUT)
    _, rows = dataset.of(done.recipe.data, done.recipe.train.seed, Encoder(tokenizing.load(done.recipe.model)))
    assert rows is not None
    nats = count = 0.0
    done.net.eval()
    for index in range(len(rows)):
        ids = torch.from_numpy(rows[index].ids).long()[None]
        labels = torch.where(torch.from_numpy(rows[index].trained), ids[0], -100)[None]
        with torch.no_grad():
            nats += float(done.net(input_ids=ids, labels=labels).loss) * rows[index].count()
        count += rows[index].count()
    assert done.run.eval_loss == pytest.approx(nats / count, rel=1e-6)


def test_two_runs_of_one_recipe_are_one(fit: Fit):
    sections = {"method": {"type": "lora", "r": 4, "lora_dropout": 0.1}, "objective": {"type": "sft", "neftune": 5}}
    one, other = fit("one", **sections), fit("other", **sections)
    assert (one.folder / "adapter_model.safetensors").read_bytes() == (
        other.folder / "adapter_model.safetensors"
    ).read_bytes()
    assert one.column("loss") == other.column("loss")
    seeded = fit("seeded", train={"seed": 1}, **sections)
    assert seeded.column("loss") != one.column("loss")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, ":3"),
        ({"text": "no chat"}, ":3"),
        ({"messages": "none"}, ":3"),
    ],
    ids=["no answer", "no messages", "no list"],
)
def test_errors_in_the_rows_leave_no_run_folder(tmp_path: Path, base: Path, row: dict[str, Any], said: str):
    path = tiny.write_recipe(tmp_path, base, data={"format": "chat"})
    tiny.write_jsonl(tmp_path / "train.jsonl", [*tiny.chats(2), row])
    with pytest.raises(DataError) as caught:
        run.train(recipe.load(path))
    assert f"train.jsonl{said}" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_base_that_cannot_be_loaded_leaves_no_run_folder(tmp_path: Path):
    base = tiny.save(tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ModelError, match="the model can't be loaded"):
        run.train(recipe.load(tiny.write_recipe(tmp_path, base)))
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- precision and full fine-tuning


def test_full_fine_tuning_gives_a_model_that_plain_transformers_loads(
    fit: Fit, base: Path, prompts: list[torch.Tensor]
):
    done = fit(method={"type": "full"}, optimizer={"lr": 1e-3}, train=EVEN)
    losses = done.column("loss")
    assert losses[0] > losses[1] > losses[2] > losses[3]
    again = AutoModelForCausalLM.from_pretrained(done.folder, dtype="auto")
    assert torch.equal(logits(again, prompts), logits(done.net, prompts))
    untrained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    moved = [
        name
        for name, parameter in again.named_parameters()
        if not torch.equal(parameter, untrained.get_parameter(name))
    ]
    assert len(moved) == len(list(untrained.parameters())), "every weight is trained"
    facts = done.facts()
    assert facts["adapter_bytes_predicted"] == pytest.approx(facts["adapter_bytes"], rel=0.01)
    assert not (done.folder / "adapter_config.json").exists()


def test_full_fine_tuning_keeps_tied_embeddings_tied(fit: Fit, tmp_path: Path, prompts: list[torch.Tensor]):
    done = fit(
        on=tiny.save(tmp_path / "tied", tie_word_embeddings=True), method={"type": "full"}, optimizer={"lr": 1e-3}
    )
    again = AutoModelForCausalLM.from_pretrained(done.folder, dtype="auto")
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(again, prompts), logits(done.net, prompts))


def test_adapters_are_float32_on_a_bfloat16_base_and_saved_in_its_precision(fit: Fit):
    done = fit(model={"dtype": "bfloat16"}, train=EVEN)
    kinds = {name: parameter.dtype for name, parameter in done.net.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".lora_" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".lora_" not in name} == {torch.bfloat16}
    assert done.column("loss")[-1] < done.column("loss")[0]
    final = load_file(done.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in final.values()} == {torch.bfloat16}
    kept = load_file(checkpoint.path_of(done.folder, 4) / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}, "a checkpoint loses nothing"
    for name, tensor in final.items():
        assert torch.equal(tensor, kept[name].to(torch.bfloat16))
    facts = done.facts()
    assert facts["dtype"] == "bfloat16"
    assert facts["adapter_bytes_predicted"] == pytest.approx(facts["adapter_bytes"], rel=0.01)


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "bfloat16"), (False, "float32")])
def test_bfloat16_without_instructions_for_it_is_told(
    fit: Fit, fast: bool, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("loratune.models.base_model.computes_in_bf16", lambda where: fast)
    fit(rows=8, model={"dtype": dtype})
    assert ("bfloat16 is slow on this device" in capsys.readouterr().err) == (dtype == "bfloat16" and not fast)


def test_products_are_as_exact_as_their_dtype_whatever_was_set_before(fit: Fit):
    flags = torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("medium")
    flags.allow_bf16_reduced_precision_reduction = True
    seen: list[tuple[str, bool, bool]] = []

    def look(event: Event) -> None:
        if isinstance(event, StepDone):
            seen.append(products())

    def products() -> tuple[str, bool, bool]:
        bf16, fp16 = flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction
        return torch.get_float32_matmul_precision(), bf16, fp16

    before = products()
    fit(train=EVEN, on_event=look)
    assert set(seen) == {("highest", False, False)}
    assert products() == before
    torch.set_float32_matmul_precision("highest")
    flags.allow_bf16_reduced_precision_reduction = False


@pytest.mark.parametrize("method", [{"type": "lora", "r": 4}, {"type": "full"}], ids=lambda m: m["type"])
def test_checkpointed_activations_change_nothing(fit: Fit, method: dict[str, Any]):
    none, all_ = (
        fit(choice, method=method, optimizer={"lr": 1e-3}, train={**EVEN, "gradient_checkpointing": choice})
        for choice in ("none", "all")
    )
    assert all_.net.is_gradient_checkpointing
    assert not none.net.is_gradient_checkpointing
    for name in ("loss", "grad_norm"):
        assert all_.column(name) == pytest.approx(none.column(name), rel=1e-6)
    assert all_.column("loss")[-1] < all_.column("loss")[0]


# ---------------------------------------------------------------- objective


@pytest.mark.parametrize("objective", [{"label_smoothing": 0.2}, {"neftune": 20.0}], ids=lambda o: next(iter(o)))
def test_smoothing_and_noise_are_for_training_only(fit: Fit, objective: dict[str, float]):
    # a rate this small leaves the model where it is, so that evaluations can be compared
    sections = {**HELD_OUT, "optimizer": {"lr": 1e-12}}
    plain = fit("plain", **sections)
    changed = fit("changed", objective={"type": "sft", **objective}, **sections)
    assert abs(changed.column("loss")[0] - plain.column("loss")[0]) > 1e-4
    assert changed.run.eval_loss == pytest.approx(plain.run.eval_loss, rel=1e-7)


# ---------------------------------------------------------------- what is not finite


def test_a_loss_that_is_not_finite_stops_before_the_optimizer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = tiny.save(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][ord("z") - ord("!")] = float("nan")  # one letter is poison
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    path = tiny.write_recipe(tmp_path, base, train={"batch_size": 2, "max_grad_norm": 1.0})
    rows = tiny.chats(8)
    rows[5]["messages"][0]["content"] = "zzz"
    tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    loaded = recipe.load(path)
    steps: list[Any] = []
    with pytest.raises(TrainingError) as caught:
        run.train(loaded, on_event=lambda event: steps.append(event) if isinstance(event, StepDone) else None)
    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert f"step {len(steps) + 1}: the loss is nan; stopped before the optimizer stepped" in text
    assert "train.jsonl:6" in text
    assert len([word for word in text.split() if "train.jsonl:" in word]) == 2, "the two rows of the step, no others"
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "failed"
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


class Exploding(ObjectiveSection):
    """An objective whose loss is finite and whose gradient is not."""

    def count(self, batch: Batch) -> int:
        return 1

    def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return (policy.net.weight * 0).sqrt().sum(), {}  # the root's slope at 0 is infinite, times 0


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_steps():
    from accelerate import Accelerator

    net = torch.nn.Linear(2, 1, bias=False)
    before = net.weight.detach().clone()
    optimizer = AdamW(lr=0.1).build(net.named_parameters(), "cpu")
    rows = [Row(np.zeros(2, dtype=np.int32), np.ones(2, dtype=bool), Place("rows.jsonl", n)) for n in range(1, 12)]
    batch = batches.Batch([single(rows)], 1.0, 11)
    with pytest.raises(TrainingError) as caught:
        list(
            loop.steps(
                Policy(net), Exploding(), Tuned(net), [batch], optimizer, lambda n: 1.0, Accelerator(cpu=True), 1.0, 41
            )
        )
    assert "step 42: the gradient is not finite; stopped before the optimizer stepped" in str(caught.value)
    assert "rows.jsonl:8 and 3 more" in str(caught.value)
    assert torch.equal(net.weight, before)


class Watched(Exploding):
    """An objective that sees to it that nothing holds on to its last graph."""

    def total(self, policy: Policy, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert not GRAPHS or GRAPHS[-1]() is None
        loss: torch.Tensor = policy.net(torch.ones(1, 2)).sum()
        GRAPHS.append(weakref.ref(loss))
        return loss, {}


GRAPHS: list[Any] = []


def test_a_graph_is_let_go_before_the_next_is_made():
    """What is left of it lies between the places of activations, which larger ones then do not fit into."""
    from accelerate import Accelerator

    net = torch.nn.Linear(2, 1)
    optimizer = AdamW(lr=0.1).build(net.named_parameters(), "cpu")
    row = Row(np.zeros(1, dtype=np.int32), np.ones(1, dtype=bool), Place("rows.jsonl", 1))
    batch = batches.Batch([single([row]), single([row])], 1.0, 2)
    list(
        loop.steps(
            Policy(net), Watched(), Tuned(net), [batch] * 2, optimizer, lambda n: 1.0, Accelerator(cpu=True), 1.0
        )
    )
    assert len(GRAPHS) == 4


def test_an_absurd_rate_ends_in_an_error_not_in_a_broken_adapter(fit: Fit, tmp_path: Path):
    with pytest.raises(TrainingError, match="stopped before the optimizer stepped"):
        fit(optimizer={"lr": 1e30}, train={"epochs": 3})
    assert json.loads((tmp_path / "a" / "run" / "run.json").read_text())["status"] == "failed"


# ---------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adafactor"])
def test_every_optimizer_learns(fit: Fit, name: str):
    done = fit(optimizer={"type": name, "lr": 1e-2}, method={"type": "lora", "r": 64}, train=EVEN)
    losses = done.column("loss")
    assert losses[0] > losses[1] > losses[2] > losses[3]
    assert all(0 < value < 100 for value in done.column("grad_norm"))


ALL = [AdamW, AdamW8bit, PagedAdamW32bit, PagedAdamW8bit, Adafactor]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_norms_biases_and_vectors_do_not_decay(kind: Any):
    net = tiny.model(tiny.tokenizer(), attention_bias=True)
    named = list(net.named_parameters())
    optimizer = kind(lr=1e-3, weight_decay=0.1).build(named, "cpu")
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(named), "each parameter once"
    for name, parameter in named:
        assert decay[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name
    assert {0.0, 0.1} == set(decay.values())


@pytest.mark.parametrize("kind", ALL[:4], ids=lambda kind: kind.__name__)
def test_loraplus_lets_b_learn_faster(kind: Any):
    from loratune.methods import Lora

    net = Lora(r=4, modules_to_save=("lm_head",)).apply(tiny.model(tiny.tokenizer()), Setup(1)).net
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    optimizer = kind(lr=1e-3, weight_decay=0.1, loraplus_lr_ratio=16).build(named, "cpu")
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in named:
        assert rates[id(parameter)] == pytest.approx(1.6e-2 if ".lora_B." in name else 1e-3), name
    assert all(group["lr"] == group["initial_lr"] for group in optimizer.param_groups)


def test_loraplus_reaches_the_training(fit: Fit):
    plain = fit("plain", train=EVEN, optimizer={"lr": 1e-3})
    fast = fit("fast", train=EVEN, optimizer={"lr": 1e-3, "loraplus_lr_ratio": 16})
    assert fast.column("loss")[0] == plain.column("loss")[0]
    assert fast.column("loss")[-1] < plain.column("loss")[-1]
    assert fast.column("lr") == plain.column("lr"), "the rate that is told is that of A"


def test_decay_makes_the_adapter_shorter(fit: Fit):
    plain = fit("plain", train=EVEN)
    decayed = fit("decayed", train=EVEN, optimizer={"weight_decay": 1.0})
    one, other = (load_file(done.folder / "adapter_model.safetensors") for done in (plain, decayed))
    for name in one:
        if "lora_A" in name:
            assert other[name].norm() < one[name].norm(), name


# ---------------------------------------------------------------- packing


@pytest.fixture(scope="session")
def stateful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base whose short convolutions carry state from token to token, whatever row they are of."""
    folder = tmp_path_factory.mktemp("stateful")
    tokens = tiny.tokenizer()
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, pad_token_id=None,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def test_a_model_that_mixes_packed_rows_is_refused(fit: Fit, stateful: Path, tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        fit(on=stateful, data={"packing": "on"})
    (problem,) = caught.value.problems
    assert problem.message.startswith("`data.packing: on`, but this model does not keep packed rows apart: a row's")
    assert "with the row before it" in problem.message
    assert str(problem.place) == str(stateful)
    assert problem.hint == "set data.packing: auto or off"
    assert not (tmp_path / "a" / "run").exists(), "nothing was begun"


def test_a_model_that_mixes_packed_rows_is_padded_and_that_is_told(
    fit: Fit, stateful: Path, capsys: pytest.CaptureFixture[str]
):
    done = fit(on=stateful, data={"packing": "auto"})
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("batches"))
    assert told.startswith("batches  padded (a row's logits change by ")
    batching = done.facts()["batching"]
    assert batching["packed"] is False
    assert f"({batching['why_not']})" in told
    assert done.net.get_base_model().config._attn_implementation == "sdpa", "left as it was"
    off = fit("off", on=stateful, data={"packing": "off"})
    assert done.column("loss") == off.column("loss")


def test_packs_are_told(fit: Fit, capsys: pytest.CaptureFixture[str]):
    done = fit(data={"prefix_sharing": "off"})
    batching = done.facts()["batching"]
    each, filled = batching["rows_per_pack"], batching["filled"]
    told = f"batches  packed: {each:.1f} rows per pack of at most 256 tokens, {100 * filled:.0f} % filled"
    assert told in capsys.readouterr().err.splitlines()
    assert (batching["shared"], batching["why_not_shared"]) == (False, "data.prefix_sharing: off")
    fit("off", data={"packing": "off"})
    assert "batches  padded (data.packing: off)" in capsys.readouterr().err.splitlines()


def test_what_rows_share_is_told_and_counted(fit: Fit, capsys: pytest.CaptureFixture[str]):
    done = fit(train={"epochs": 2})
    saved = done.facts()["batching"]["saved"]
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("batches")]
    assert told.endswith(f"{100 * saved:.0f} % fewer tokens to compute")
    assert sum(done.column("computed")) == pytest.approx((1 - saved) * sum(done.column("tokens")), rel=0.01)
    assert sum(done.column("tokens")) == 2 * done.facts()["data"]["train"]["tokens"]
    off = fit("off", train={"epochs": 2}, data={"prefix_sharing": "off"})
    assert off.column("computed") == off.column("tokens") == done.column("tokens")
    assert off.column("trained_tokens") == done.column("trained_tokens")


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"data": {"prefix_sharing": "off"}}, "data.prefix_sharing: off"),
        ({"data": {"packing": "off"}}, "data.packing: off"),
        (
            {"method": {"lora_dropout": 0.1}},
            "it draws random numbers (dropout) for each row separately",
        ),
        ({"objective": {"type": "sft", "neftune": 5.0}}, "neftune draws noise for each row separately"),
        ({"model": {"attention": "eager"}}, "`eager` attention costs more for packs than for rows"),
    ],
)
def test_why_rows_do_not_share(fit: Fit, capsys: pytest.CaptureFixture[str], sections: dict[str, Any], told: str):
    batching = fit(**sections).facts()["batching"]
    assert batching.get("why_not_shared", batching.get("why_not")) == told
    missed = [line for line in capsys.readouterr().err.splitlines() if "fewer tokens would be computed" in line]
    if "draws" in told:  # who asked for it learns what it costs
        assert missed == [
            f"         {100 * batching['missed']:.0f} % fewer tokens would be computed with prefix sharing, but {told}"
        ]
        assert batching["missed"] > 0.1
    else:
        assert missed == []
    if told.endswith("off"):
        return
    with pytest.raises(ModelError) as caught:
        fit("on", **{**sections, "data": {"prefix_sharing": "on"}})
    assert told in str(caught.value)
    assert "set data.prefix_sharing: auto or off" in str(caught.value)


def test_rows_with_little_in_common_share_it_only_if_asked_to(fit: Fit, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(layout_test, "LEAST", 0.05)
    alone = {"train": {"batch_size": 1}}
    batching = fit(**alone).facts()["batching"]
    assert batching["why_not_shared"] == "the rows of a step share too few tokens (2.8 %)"
    assert batching["missed"] == 0, "nothing to regret"
    assert fit("on", **alone, data={"prefix_sharing": "on"}).facts()["batching"]["saved"] == 0.0279


def test_rows_of_an_int8_base_are_not_packed(fit: Fit):
    """LLM.int8() chooses what stays in 16 bit over all tokens at once, so that no row is ever alone."""
    assert fit(model={"quantization": "int8"}).facts()["batching"]["packed"] is False
    with pytest.raises(ModelError, match="int8 rounds all rows of a micro-batch together"):
        fit("on", model={"quantization": "int8"}, data={"packing": "on"})


def test_a_packed_run_resumes_bit_for_bit(fit: Fit):
    train = {"epochs": 3, "save_every": 4, "micro_batch_size": 1}
    method = {"lora_dropout": 0.1}
    straight = fit(
        "straight", train=train, method=method, data={"packing": "on"}, objective={"type": "sft", "neftune": 5.0}
    )
    checkpoint.path_of(straight.folder, 9).rename(straight.folder.parent / "gone")
    again = fit(
        "straight",
        train=train,
        method=method,
        data={"packing": "on"},
        objective={"type": "sft", "neftune": 5.0},
        resume=True,
    )
    before = load_file(straight.folder.parent / "gone" / "adapter_model.safetensors")
    after = load_file(checkpoint.path_of(again.folder, 9) / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_packed_full_model_is_saved_with_its_own_attention(fit: Fit):
    done = fit(method={"type": "full"}, optimizer={"type": "adamw", "lr": 1e-3}, data={"packing": "on"})
    assert "loratune" not in (done.folder / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(done.folder).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("relative", "moved"), [(False, 1e-3), (True, 1e-6)])
def test_adafactor_moves_a_matrix_of_zeros(relative: bool, moved: float) -> None:
    """LoRA's B starts at zero: by steps relative to its scale it would take thousands to learn anything."""
    from loratune.optim import Adafactor

    b = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Adafactor(lr=1e-3, relative=relative).build([("lora_B", b)], "cpu")
    b.grad = torch.ones_like(b)
    optimizer.step()
    assert float(b.detach().abs().mean()) == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path, there: bool) -> None:
    victim = tmp_path / "mine.txt"
    if there:
        victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(victim)
    assert lock.holder(tmp_path / "run") is None
    with pytest.raises(RunFolderError, match=r"run/.lock: is a link to .*mine.txt, which is not followed") as caught:
        lock.held(tmp_path / "run").__enter__()
    assert caught.value.exit_code == 6
    assert victim.exists() == there
    assert not there or victim.read_text() == "mine"
    assert (tmp_path / "run" / ".lock").is_symlink()
