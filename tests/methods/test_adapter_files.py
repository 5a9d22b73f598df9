"""Mutilated adapters: each is refused with a message, and whole ones of every kind load."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loratune import recipe
from loratune.commands import opened_model
from loratune.errors import ModelError, SafetyError
from loratune.methods import adapter_files
from loratune.methods.attach import attach
from loratune.training import run
from tests import tiny

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]
Mutilation = Callable[[Path, random.Random], None]


def tensors(change: Callable[[Tensors, str], None], only: str = "lora") -> Mutilation:
    """Return a mutilation of one tensor, chosen by the seed among those whose names hold `only`."""

    def apply(folder: Path, rng: random.Random) -> None:
        state = load_file(folder / TENSORS)
        change(state, rng.choice(sorted(name for name in state if only in name)))
        save_file(state, folder / TENSORS)

    return apply


def config(change: Callable[[dict[str, Any], random.Random], None]) -> Mutilation:
    def apply(folder: Path, rng: random.Random) -> None:
        known = json.loads((folder / CONFIG).read_text())
        change(known, rng)
        (folder / CONFIG).write_text(json.dumps(known))

    return apply


def raw(name: str, change: Callable[[bytes, random.Random], bytes]) -> Mutilation:
    def apply(folder: Path, rng: random.Random) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes(), rng))

    return apply


def drop_half(state: Tensors, name: str) -> None:
    for key in sorted(state)[::2]:
        del state[key]


def swap_prefix(state: Tensors, name: str) -> None:
    for key in list(state):
        state[key.replace("base_model.model.", "base_model.")] = state.pop(key)


def zero(state: Tensors, name: str) -> None:
    for key in state:
        if "lora_B" in key:
            state[key] = torch.zeros_like(state[key])


def spoil(value: float) -> Callable[[Tensors, str], None]:
    def change(state: Tensors, name: str) -> None:
        state[name].view(-1)[-1] = value

    return change


def reheaded(change: Callable[[dict[str, Any], random.Random], None]) -> Mutilation:
    """Return a mutilation of the header of the safetensors file, its length kept right."""

    def apply(data: bytes, rng: random.Random) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header, rng)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return raw(TENSORS, apply)


def a_tensor(header: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    return header[rng.choice(sorted(key for key in header if key != "__metadata__"))]


# name -> (mutilation, how often, with other seeds)
MUTILATIONS: dict[str, tuple[Mutilation, int]] = {
    "one key dropped": (tensors(lambda state, name: state.__delitem__(name)), 4),
    "half of the keys dropped": (tensors(drop_half), 1),
    "every B dropped": (tensors(lambda s, n: [s.__delitem__(k) for k in list(s) if "lora_B" in k] and None), 1),
    "one key renamed": (tensors(lambda state, name: state.update({name.replace("proj", "prj"): state.pop(name)})), 3),
    "another layer": (tensors(lambda s, n: s.update({n.replace("layers.1", "layers.7"): s.pop(n)}), "layers.1"), 2),
    "another prefix": (tensors(swap_prefix), 1),
    "one key more": (tensors(lambda state, name: state.update({f"{name}.more": torch.ones(2)})), 2),
    "a base weight slipped in": (tensors(lambda s, n: s.update({"base_model.model.model.norm.weight": torch.ones(64)})), 1),
    "transposed": (tensors(lambda state, name: state.update({name: state[name].T.contiguous()})), 3),
    "one row more": (tensors(lambda s, n: s.update({n: torch.cat([s[n], s[n][:1]])})), 2),
    "flat": (tensors(lambda state, name: state.update({name: state[name].flatten()})), 1),
    "B all zero": (tensors(zero), 1),
    "NaN": (tensors(spoil(float("nan"))), 2),
    "infinite": (tensors(spoil(float("inf"))), 1),
    "integers": (tensors(lambda state, name: state.update({name: state[name].to(torch.int32)})), 1),
    "no tensors": (tensors(lambda state, name: state.clear()), 1),
    "a smaller rank in the config": (config(lambda c, r: c.update(r=2)), 1),
    "a larger rank in the config": (config(lambda c, r: c.update(r=8)), 1),
    "a gigantic rank in the config": (config(lambda c, r: c.update(r=10**12)), 1),
    "a rank of text": (config(lambda c, r: c.update(r="four")), 1),
    "rank 0": (config(lambda c, r: c.update(r=0)), 1),
    "a rank pattern": (config(lambda c, r: c.update(rank_pattern={"q_proj": 2})), 1),
    "fewer target modules": (config(lambda c, r: c.update(target_modules=["q_proj"])), 1),
    "other target modules": (config(lambda c, r: c.update(target_modules=["nothing"])), 1),
    "target modules of numbers": (config(lambda c, r: c.update(target_modules=[1, 2])), 1),
    "a broken expression": (config(lambda c, r: c.update(target_modules="(((")), 1),
    "DoRA without its tensors": (config(lambda c, r: c.update(use_dora=True)), 1),
    "a head that is not there": (config(lambda c, r: c.update(modules_to_save=["lm_head"])), 1),
    "another kind": (config(lambda c, r: c.update(peft_type="IA3")), 1),
    "an unknown kind": (config(lambda c, r: c.update(peft_type="NOTHING")), 1),
    "no kind": (config(lambda c, r: c.pop("peft_type") and None), 1),
    "a task nobody knows": (config(lambda c, r: c.update(task_type="NOTHING")), 1),
    "a start nobody knows": (config(lambda c, r: c.update(init_lora_weights="nothing")), 1),
    "a key nobody knows": (config(lambda c, r: c.update(scale_by_the_moon=2)), 1),
    "the config cut": (raw(CONFIG, lambda data, rng: data[: rng.randrange(1, len(data) - 2)]), 3),
    "the config empty": (raw(CONFIG, lambda data, rng: b""), 1),
    "the config a list": (raw(CONFIG, lambda data, rng: b"[1]"), 1),
    "the config not UTF-8": (raw(CONFIG, lambda data, rng: b"\xff" + data), 1),
    "the config nested deep": (raw(CONFIG, lambda data, rng: b'{"a":' * 100_000), 1),
    "the tensors cut": (raw(TENSORS, lambda data, rng: data[: rng.randrange(9, len(data) - 1)]), 4),
    "the tensors empty": (raw(TENSORS, lambda data, rng: b""), 1),
    "the tensors of noise": (raw(TENSORS, lambda data, rng: rng.randbytes(len(data))), 1),
    "a header of 2^63 bytes": (raw(TENSORS, lambda data, rng: (1 << 63).to_bytes(8, "little") + data[8:]), 1),
    "a header that is not JSON": (raw(TENSORS, lambda data, rng: data[:8] + b"x" + data[9:]), 1),
    "offsets beyond the end": (reheaded(lambda h, r: a_tensor(h, r).update(data_offsets=[0, 1 << 40])), 1),
    "offsets below zero": (reheaded(lambda h, r: a_tensor(h, r).update(data_offsets=[-8, 8])), 1),
    "a dtype nobody knows": (reheaded(lambda h, r: a_tensor(h, r).update(dtype="F99")), 1),
    "a shape of text": (reheaded(lambda h, r: a_tensor(h, r).update(shape=["a"])), 1),
    "overlapping tensors": (reheaded(lambda h, r: [v.update(data_offsets=[0, 1024]) for k, v in h.items() if k != "__metadata__"] and None), 1),
    "the tensors gone": (lambda folder, rng: (folder / TENSORS).unlink(), 1),
    "the tensors a folder": (lambda folder, rng: ((folder / TENSORS).unlink(), (folder / TENSORS).mkdir())[1], 1),
}  # fmt: skip
CASES = [(name, seed) for name, (_, number) in MUTILATIONS.items() for seed in range(number)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = run.train(recipe.load(tiny.write_recipe(folder, base, rows=8))).folder
    kept = folder / "adapter"
    kept.mkdir()
    for name in (CONFIG, TENSORS):
        shutil.copy(done / name, kept / name)
    return kept


@pytest.fixture(scope="module")
def net(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def test_there_are_fifty() -> None:
    assert len(CASES) >= 50


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_a_mutilated_adapter_is_refused(whole: Path, base: Path, tmp_path: Path, name: str, seed: int) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(whole, folder)
    MUTILATIONS[name][0](folder, random.Random(f"{name} {seed}"))
    before = torch.get_rng_state()
    with pytest.raises(ModelError) as caught:
        opened_model.load(opened_model.open_subject(str(folder), str(base)))
    assert str(folder) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    torch.set_rng_state(before)


def test_the_key_is_named(whole: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(whole, folder)
    state = load_file(folder / TENSORS)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    save_file({name: tensor for name, tensor in state.items() if name != key}, folder / TENSORS)
    with pytest.raises(ModelError, match=f"lacks tensors that this base and its config require: `{key}`"):
        opened_model.load(opened_model.open_subject(str(folder), str(base)))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "patterns": {"rank_pattern": {"q_proj": 8, "down_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    "token rows": {"trainable_token_indices": [1, 2]},
    "biases": {"bias": "lora_only"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_adapters_of_every_kind_load(base: Path, tmp_path: Path, kind: str) -> None:
    """As PEFT itself writes them, and with what it writes: every tensor arrives."""
    torch.manual_seed(0)
    made = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **KINDS[kind]}),
    )
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "lora_embedding" in name:
            torch.nn.init.normal_(parameter)
    with pytest.warns() if kind == "an embedding" else _no_warning():
        made.save_pretrained(tmp_path / "adapter")
    loaded = opened_model.load(opened_model.open_subject(str(tmp_path / "adapter")))
    ids = torch.arange(20)[None]
    made.eval()
    with torch.no_grad():
        expected = made(input_ids=ids).logits
        found = loaded.model.to(torch.float32)(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4 if loaded.dtype is torch.float32 else 0.5)


def _no_warning() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_a_second_adapter_that_fails_leaves_nothing(whole: Path, net: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(whole, bad)
    tensors(lambda state, name: state.__delitem__(name))(bad, random.Random(0))
    both = attach(net, whole, "default")
    with pytest.raises(ModelError):
        attach(both, bad, "second")
    assert set(both.peft_config) == {"default"}
    attach(both, whole, "second")
    assert set(both.peft_config) == {"default", "second"}
    both.unload()


HOOKS: dict[str, dict[str, Any]] = {
    "auto_mapping": {"auto_mapping": {"base_model_class": "x", "parent_library": "canary"}},
    "megatron": {"megatron_config": {"a": 1}, "megatron_core": "canary"},
    "megatron_core": {"megatron_core": "canary"},
    "runtime_config": {"runtime_config": {"ephemeral_gpu_offload": True}},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "corda": {"corda_config": {"cache_file": "canary.pt"}},
    "lora_ga": {"lora_ga_config": {"cache_file": "canary.pt"}},
    "tokenizer_kwargs": {"tokenizer_kwargs": {"trust_remote_code": True}},
    "prompt tuning": {
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "TEXT",
        "tokenizer_name_or_path": "some/canary",
    },
    "xlora": {"peft_type": "XLORA", "adapters": {"a": "some/canary"}},
    "a revision that leads out": {"base_model_name_or_path": "some/model", "revision": "../../canary"},
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_in_a_config_are_refused(
    whole: Path, base: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(whole, folder)
    config(lambda known, rng: known.update(HOOKS[name]))(folder, random.Random(0))
    (tmp_path / "canary.py").write_text(f"open({str(tmp_path / 'touched')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SafetyError) as caught:
        opened_model.load(opened_model.open_subject(str(folder), None if "revision" in HOOKS[name] else str(base)))
    assert caught.value.exit_code == 7
    assert not (tmp_path / "touched").exists()


def test_a_pickled_adapter_is_refused(whole: Path, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(whole, folder)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(SafetyError, match="a pickle"):
        opened_model.load(opened_model.open_subject(str(folder), str(base)))


def _peft(base: Path, folder: Path, kind: str) -> Path:
    """Write an adapter of PEFT's own with numbers in it, and return its folder."""
    net: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made: Any = (
        peft.AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=9, target_modules=["q_proj"])
        if kind == "ADALORA"
        else peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    )
    net = peft.get_peft_model(net, made)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    net.save_pretrained(folder)
    return folder


KEPT = "rank_pattern"
SPOILT: list[tuple[str, dict[str, Any], str]] = [
    (
        "PROMPT_TUNING",
        {"num_virtual_tokens": 10**9},
        "has the shape (5, 64), the config asks for 1,000,000,000 virtual",
    ),
    ("PROMPT_TUNING", {"token_dim": 10**9}, "the config asks for 5 virtual tokens of 1000000000 numbers"),
    ("PROMPT_TUNING", {"num_virtual_tokens": 5.5}, "must be an integer above 0, given `5.5`"),
    ("PROMPT_TUNING", {"task_type": None}, "`task_type` None: only soft prompts of causal LMs are supported"),
    ("PROMPT_TUNING", {"task_type": "SEQ_2_SEQ_LM"}, "`task_type` SEQ_2_SEQ_LM: only soft prompts"),
    ("PROMPT_TUNING", {"num_transformer_submodules": 2}, "`num_transformer_submodules` 2: only soft prompts"),
    ("ADALORA", {KEPT: {"a": [True] * 3}}, "must hold a list of `init_r` (4) booleans"),
    ("ADALORA", {KEPT: {"a": [[1]] * 4}}, "must hold a list of `init_r` (4) booleans"),
    ("ADALORA", {KEPT: {"a": 4}}, "must hold a list of `init_r` (4) booleans"),
    ("ADALORA", {KEPT: [1]}, "must hold a list of `init_r` (4) booleans"),
    ("ADALORA", {KEPT: {"a": [True] * 4}, "init_r": 10**9}, "list of `init_r` (1,000,000,000) booleans"),
    ("ADALORA", {"init_r": 10**9}, "the config asks for rank 1000000000, the tensors have 4"),
    ("ADALORA", {"lora_alpha": float("inf")}, "`lora_alpha` must be a number above 0, given `inf`"),
]


@pytest.mark.parametrize(("kind", "change", "said"), SPOILT)
def test_soft_prompts_and_adalora_of_other_tools(
    base: Path, tmp_path: Path, kind: str, change: dict[str, Any], said: str
) -> None:
    """What PEFT would make room for, or read as something else, is refused before it does."""
    folder = _peft(base, tmp_path / "adapter", kind)
    adapter_files.check(folder)
    config(lambda known, rng: known.update(change))(folder, random.Random(0))
    with pytest.raises(ModelError) as caught:
        adapter_files.check(folder)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "only", "said"),
    [("ADALORA", "lora_E", "changes nothing: every E is zero"), ("ADALORA", "lora_B", "changes nothing: every B"),
     ("PROMPT_TUNING", "", "has no `prompt_embeddings`")],
)  # fmt: skip
def test_tensors_of_other_tools_that_do_nothing(base: Path, tmp_path: Path, kind: str, only: str, said: str) -> None:
    folder = _peft(base, tmp_path / "adapter", kind)
    state = load_file(folder / TENSORS)
    changed = {
        f"{name}{'' if only else '.other'}": tensor * (only not in name if only else 1)
        for name, tensor in state.items()
    }
    save_file(changed, folder / TENSORS)
    with pytest.raises(ModelError) as caught:
        adapter_files.check(folder)
    assert said in str(caught.value)


def test_adapters_of_two_kinds_are_not_held_at_once(whole: Path, base: Path, tmp_path: Path) -> None:
    net = attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), whole, "default")
    other = _peft(base, tmp_path / "adapter", "PROMPT_TUNING")
    with pytest.raises(ModelError, match="of type PROMPT_TUNING, and one of type LORA is loaded") as caught:
        attach(net, other, "second")
    assert "open it alone" in str(caught.value)
    assert set(net.peft_config) == {"default"}
