"""Hostile models and templates: no canary is touched, and each is refused with exit code 7."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune import recipe
from loratune.commands import evaluate, inspect, opened_model
from loratune.config import section
from loratune.data import chat_template
from loratune.errors import LoratuneError, ModelError, Place, RecipeError, SafetyError, UsageError
from loratune.models import base_model, template_check, tokenizing
from loratune.models.section import Model
from loratune.system import storage
from loratune.training import run
from tests import templates, tiny
from tests.conftest import Fit

ENDLESS = [pytest.mark.slow, pytest.mark.faults]  # each takes the 5 s of CPU time it is allowed

# ---------------------------------------------------------------- chat templates

_CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
BOMBS = {
    "a range of 10^10": "{% for i in range(10**10) %}{% endfor %}",
    "a string of 10^10": "{{ 'a' * 10**10 }}",
    "a string of 10^10, folded late": "{% set n = messages|length * 10**10 %}{{ 'a' * n }}",
    "a width of 10^10": "{{ '%9999999999d' % 1 }}",
    "a format of 10^10": "{{ '{:>9999999999}'.format(1) }}",
    "centred": "{{ 'a'.center(10**10) }}",
    "filter center": "{{ 'a'|center(10**10) }}",
    "a list that doubles": "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "a text that doubles": "{% set ns = namespace(t='aa') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "an endless macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested loops in the source": "{% for i in range(2) %}" * 3000 + "{% endfor %}" * 3000,
    "output": "{% for i in range(99999) %}{{ messages[0].content * 9 }}{% endfor %}",
    "an error of 100 MB": "{{ raise_exception('a' * 10**8) }}",
    "a megabyte of source": "{# " + "a" * 1_100_000 + " #}" + _CHAT,
}
ESCAPES = {
    "__class__": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an item": "{{ ''['__class__'] }}",
    "a filter": "{{ ''|attr('__class__') }}",
    "a filter in pieces": "{{ ''|attr('__cla' ~ 'ss__') }}",
    "in hexadecimal": "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "map": "{{ messages|map(attribute='__class__')|list }}",
    "sort": "{{ messages|sort(attribute='__class__')|list }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "joiner": "{{ joiner.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "namespace": "{{ namespace.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "self": "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "raise_exception": "{{ raise_exception.__globals__.__builtins__.open('CANARY', 'w') }}",
    "strftime_now": "{{ strftime_now.__globals__['sys'].modules['os'].system('touch CANARY') }}",
    "a generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "format_map": "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "changes a message": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "from import": "{% from 'os' import system %}",
    "extends": "{% extends '/etc/passwd' %}",
    "only for an answer": "{% if messages|length > 1 %}{{ ''|attr('__cla' ~ 'ss__') }}{% endif %}" + _CHAT,
}
SLOW = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ 9**(9**9) }}",
    "lipsum without end": "{% for i in range(99999) %}{% set x = lipsum(n=50) %}{% endfor %}",
    "a filter in a loop": "{% for i in range(99999) %}{% set x = range(99999)|sort|list %}{% endfor %}",
    "only for tools": "{% if tools %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
}
HOSTILE = [
    *(pytest.param(text, id=name) for name, text in {**BOMBS, **ESCAPES}.items()),
    pytest.param(SLOW["loops in loops"], id="loops in loops"),
    *(pytest.param(text, id=name, marks=ENDLESS) for name, text in SLOW.items() if name != "loops in loops"),
]


def folder_with(base: Path, folder: Path, template: str) -> Path:
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_refused(base: Path, tmp_path: Path, template: str) -> None:
    folder = folder_with(base, tmp_path / "model", template)
    began = time.perf_counter()
    with pytest.raises(SafetyError) as caught:
        tokenizing.load(Model(base=str(folder)))
    assert caught.value.exit_code == 7
    assert "the chat template" in str(caught.value)
    assert len(str(caught.value)) < 800
    assert time.perf_counter() - began < 60
    assert not list(Path().iterdir()), "a canary was touched"


def test_what_was_refused_is_not_remembered_as_harmless(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(SafetyError):
            template_check.check(ESCAPES["an item"], {}, Place("here"), tmp_path / "known")


def test_there_are_enough_of_them() -> None:
    assert len({**BOMBS, **ESCAPES, **SLOW}) >= 40


def test_a_template_file_of_a_recipe_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(BOMBS["a string of 10^10"])
    with pytest.raises(SafetyError, match="512 MiB"):
        chat_template.with_template(tiny.tokenizer(), tiny.data(chat_template=str(tmp_path / "template.jinja")))


def test_every_template_of_a_tokenizer_is_checked(base: Path, tmp_path: Path) -> None:
    folder = folder_with(base, tmp_path / "model", tiny.CHATML)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(ESCAPES["__class__"])
    with pytest.raises(SafetyError):
        tokenizing.load(Model(base=str(folder)))


@pytest.mark.parametrize("family", templates.FAMILIES, ids=lambda family: family.name)
def test_templates_of_real_families_are_fine(family: templates.Family, tmp_path: Path) -> None:
    tokenizing.check_template(family.template, family.tokenizer(), "here")


def test_templates_that_only_refuse_or_fail_are_fine(tmp_path: Path) -> None:
    for text in ("{{ raise_exception('no') }}", "{{ nothing.at.all }}", "{% if %}", "{{ messages[7].content }}", ""):
        template_check.check(text, {}, Place("here"), tmp_path / "known")


def test_a_template_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template_check.check(tiny.CHATML, {}, Place("here"), tmp_path / "known")
    monkeypatch.setattr(template_check.subprocess, "run", lambda *_, **__: pytest.fail("a second time"))
    template_check.check(tiny.CHATML, {}, Place("here"), tmp_path / "known")


def test_the_child_sees_no_secret_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    real = template_check.subprocess.run

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options["env"])
        return real(*arguments, **options)

    monkeypatch.setenv("HF_TOKEN", "canary")
    monkeypatch.setattr(template_check.subprocess, "run", spy)
    template_check.check(tiny.CHATML, {}, Place("here"), tmp_path / "known")
    assert set(seen[0]) <= {"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}


# ---------------------------------------------------------------- model folders


class Bomb:
    """Touches the canary when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch CANARY",)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Return a change of a JSON file of a model folder."""

    def apply(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))

    return apply


def code(folder: Path) -> None:
    """Put code that touches the canary wherever a config could name it."""
    touch = "import pathlib; pathlib.Path('CANARY').touch()\n"
    for name in ("evil.py", "modeling_evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(touch + "class Evil: pass\n")


def pickled(name: str, keep: bool = False) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        if not keep:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Bomb()))

    return apply


def index(*names: str) -> Callable[[Path], None]:
    """Return a change that spreads a model over files of these names, by an index."""

    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file(state, folder / "part.safetensors", metadata={"format": "pt"})
        (folder.parent / "out.safetensors").write_bytes((folder / "part.safetensors").read_bytes())
        weights = {key: names[number % len(names)] for number, key in enumerate(state)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))

    return apply


def linked(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return apply


def distributed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "shard-00001-model-00001-of-00001.safetensors")
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))


def other_model_inside(folder: Path) -> None:
    edit("adapter_config.json", peft_type="LORA", base_model_name_or_path="some/canary")(folder)


KERNEL = "some-org/some-kernel"
FOLDERS: dict[str, Callable[[Path], None]] = {
    "pytorch_model.bin": pickled("pytorch_model.bin"),
    "model.pt": pickled("model.pt"),
    "consolidated.00.pth": pickled("consolidated.00.pth"),
    "model.pkl": pickled("model.pkl"),
    "a distributed checkpoint": distributed,
    "an index of pickles": index("pytorch_model.bin"),
    "an index that leads out": index("../out.safetensors"),
    "an absolute index": lambda folder: index(str(folder.parent / "out.safetensors"))(folder),
    "an index that half leads out": index("part.safetensors", "../out.safetensors"),
    "auto_map": edit("config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
    "auto_map of an unknown type": edit("config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
    "auto_map elsewhere": edit("config.json", auto_map={"AutoModelForCausalLM": "some/canary--evil.Evil"}),
    "auto_map of the tokenizer": edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    "auto_map as a list": edit("tokenizer_config.json", auto_map=["evil.Evil", None]),
    "auto_map of the processor": edit("processor_config.json", auto_map={"AutoProcessor": "evil.Evil"}),
    "auto_map inside": edit("config.json", text_config={"auto_map": {"AutoConfig": "evil.Evil"}}),
    "_attn_implementation": edit("config.json", _attn_implementation=KERNEL),
    "attn_implementation": edit("config.json", attn_implementation=f"{KERNEL}:evil"),
    "_attn_implementation_internal": edit("config.json", _attn_implementation_internal=KERNEL),
    "attn_implementation inside": edit("config.json", text_config={"_attn_implementation": KERNEL}),
    "attn_implementation of parts": edit("config.json", attn_implementation={"text_config": f"paged|{KERNEL}@main"}),
    "flash attention that is not installed": edit("config.json", _attn_implementation="flash_attention_3"),
    "experts_implementation": edit("config.json", experts_implementation=KERNEL),
    "kernel_config": edit("config.json", kernel_config={"RMSNorm": f"{KERNEL}:Evil"}),
    "use_kernels": edit("config.json", use_kernels=True),
    "fusion_config": edit("config.json", fusion_config={"patch_embeddings": True}),
    "custom_generate": edit("generation_config.json", custom_generate="some/canary"),
    "an odd quantization": edit("config.json", quantization_config={"quant_method": "evil"}),
    "weights by a name": edit("config.json", transformers_weights="../out.safetensors"),
    "a tokenizer file elsewhere": edit("tokenizer_config.json", tokenizer_file="../../etc/passwd"),
    "a fast tokenizer elsewhere": edit("tokenizer_config.json", fast_tokenizer_files=["tokenizer.../../../x.json"]),
    "a template's name that leads out": edit("tokenizer_config.json", chat_template=[{"name": "../../CANARY", "template": "x"}]),
    "another model inside": other_model_inside,
    "config.json a link": linked("config.json"),
    "the weights a link": linked("model.safetensors"),
    "tokenizer.json a link": linked("tokenizer.json"),
    "the template a link": linked("chat_template.jinja"),
    "a link to itself": lambda folder: ((folder / "generation_config.json").unlink(), (folder / "generation_config.json").symlink_to("generation_config.json"))[1],
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_model_folder_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    code(folder)
    FOLDERS[name](folder)
    for load in (
        lambda: base_model.load(Model(base=str(folder))),
        lambda: opened_model.load(opened_model.open_subject(str(folder))),
        lambda: run.train(recipe.load(tiny.write_recipe(tmp_path, folder, rows=8))),
    ):
        with pytest.raises(SafetyError) as caught:
            load()
        assert caught.value.exit_code == 7
        assert str(folder) in str(caught.value)
    assert not list(Path().iterdir()), "a canary was touched"
    assert not (tmp_path / "run").exists()


def test_there_are_enough_folders() -> None:
    assert len(FOLDERS) >= 35


HARMLESS: dict[str, Callable[[Path], None]] = {
    "as it is": lambda folder: None,
    "code nobody names": code,
    "pickles beside safetensors": pickled("pytorch_model.bin", keep=True),
    "what a trainer leaves": lambda folder: [pickled(n, keep=True)(folder) for n in ("optimizer.pt", "training_args.bin", "rng_state.pth")] and None,
    "known attention": edit("config.json", _attn_implementation="eager"),
    "nothing for attention": edit("config.json", attn_implementation=None, use_kernels=False),
    "an index": index("part.safetensors"),
    "a path of the machine it was made on": edit("tokenizer_config.json", special_tokens_map_file="/home/x/special_tokens_map.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_folder_loads_and_nothing_in_it_is_run(base: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    HARMLESS[name](folder)
    assert base_model.load(Model(base=str(folder))).model is not None
    assert not list(Path().iterdir()), "a canary was touched"


def test_links_inside_the_cache_of_the_hub_are_fine(base: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--some--model"
    (home / "blobs").mkdir(parents=True)
    snapshot = home / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, home / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert base_model.load(Model(base=str(snapshot))).model is not None
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(base / "config.json")
    with pytest.raises(SafetyError, match="points outside"):
        base_model.load(Model(base=str(snapshot)))


# what a hub id leads to, through the cache of the hub in a process of its own, as its folder is fixed at import
_HUB = """
import sys
from loratune.models import fingerprint
from loratune.models import base_model as model
from loratune.models.section import Model
section = Model(base="some/model")
try:
    model.load(section)
    print("loaded", fingerprint.of_base(section).sha256)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(("change", "said"), [
    (lambda folder: None, "loaded"),
    (edit("config.json", auto_map={"AutoConfig": "evil.Evil"}), "SafetyError"),
    (edit("config.json", _attn_implementation=KERNEL), "SafetyError"),
    (edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}), "SafetyError"),
    (index("../out.safetensors"), "SafetyError"),
    (pickled("pytorch_model.bin"), "SafetyError"),
], ids=["sound", "auto_map", "attention", "tokenizer", "index", "pickle"])  # fmt: skip
def test_hub_models_are_checked_before_transformers_sees_them(
    base: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    import subprocess
    import sys

    from loratune.models import fingerprint

    home = tmp_path / "hub" / "models--some--model"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    shutil.copytree(base, home / "snapshots" / ("a" * 40))
    code(home / "snapshots" / ("a" * 40))
    change(home / "snapshots" / ("a" * 40))
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", _HUB], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.startswith(said), done.stdout + done.stderr
    if said == "loaded":
        assert done.stdout.split()[1] == fingerprint.of_folder(base).sha256
    assert not list(Path().iterdir()), "a canary was touched"


# ---------------------------------------------------------------- code that the user trusts


def test_trusted_code_runs_only_with_the_flag(fit: Fit, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "configuration_mine.py").write_text(
        "import pathlib\nfrom transformers import LlamaConfig\npathlib.Path('CANARY').touch()\n"
        "class Mine(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import Mine\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = Mine\n"
    )
    names = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit("config.json", model_type="mine", auto_map=names)(folder)
    path = tiny.write_recipe(tmp_path, folder, rows=8)
    with pytest.raises(SafetyError, match="--trust-remote-code"):
        run.train(recipe.load(path))
    with pytest.raises(SafetyError, match="--trust-remote-code"):
        inspect.inspect(recipe.load(path))
    assert not Path("CANARY").exists()
    assert inspect.inspect(recipe.load(path), trust_remote_code=True).rows == 8
    done = run.train(recipe.load(path), trust_remote_code=True)
    assert Path("CANARY").exists()
    assert storage.read_json(done.folder / "run.json")["trust_remote_code"] is True
    with pytest.raises(SafetyError):
        opened_model.load(opened_model.open_subject(str(done.folder)))
    assert opened_model.load(opened_model.open_subject(str(done.folder), trust=True)).notes == []
    rows = str(tmp_path / "train.jsonl")
    measured = evaluate.evaluate(str(done.folder), data=rows, limit=2, generate=False, trust_remote_code=True)
    assert measured.as_json()["trust_remote_code"] is True


def test_a_recipe_cannot_trust(tmp_path: Path, base: Path) -> None:
    path = tiny.write_recipe(tmp_path, base)
    with pytest.raises(RecipeError, match="a recipe can't run code"):
        recipe.load(path, ["model.trust_remote_code=true"])


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "~/x", "a\0b", "C:\\x", "..\\x", "", None, 7, "."])
def test_names_that_lead_out(name: Any) -> None:
    assert section.is_inside(name) is (name == ".")


@pytest.mark.parametrize("name", ["a", "a.json", "a/b.json", "a..b", "main", "refs/pr/1"])
def test_names_that_stay_inside(name: str) -> None:
    assert section.is_inside(name)


def test_a_manifest_that_leads_out_is_not_believed(fit: Fit) -> None:
    done = fit(rows=8)
    (done.folder.parent / "outside").write_text("x")
    manifest = json.loads((done.folder / "MANIFEST.json").read_text())
    manifest["files"]["../outside"] = {"bytes": 1, "sha256": "0"}
    del manifest["seal"]
    (done.folder / "MANIFEST.json").write_text(storage._sealed(manifest))
    assert storage.verify(done.folder) == "`../outside` points outside its folder"


@pytest.mark.parametrize("field", ["revision", "subset", "split"])
@pytest.mark.parametrize("value", ["../../x", "/etc/passwd", "a\\..\\b", "~root/x"])
def test_fields_that_lead_out(tmp_path: Path, base: Path, field: str, value: str) -> None:
    path = tiny.write_recipe(tmp_path, base)
    where = "model.revision" if field == "revision" else f"data.train.0.{field}"
    with pytest.raises(SafetyError, match=f"{field}.* must not point outside its folder"):
        recipe.load(path, [f"{where}='{value}'"])


def test_an_empty_word_leads_nowhere(tmp_path: Path, base: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.revision.* must not be empty"):
        recipe.load(tiny.write_recipe(tmp_path, base), ["model.revision=''"])


def test_an_output_that_is_a_link_to_itself(tmp_path: Path, base: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    path = tiny.write_recipe(tmp_path, base, rows=8, output="loop")
    with pytest.raises(LoratuneError) as caught:
        run.train(recipe.load(path))
    assert str(tmp_path / "loop") in str(caught.value)
    path = tiny.write_recipe(tmp_path, base, rows=8, data={"train": "./loop"})
    with pytest.raises(RecipeError):
        recipe.load(path)


@pytest.mark.parametrize("where", ["run", "base", "link"])
def test_a_merge_onto_what_it_reads_is_refused(fit: Fit, tmp_path: Path, where: str) -> None:
    import loratune

    base = tiny.save(tmp_path / "base")
    done = fit(on=base, rows=8)
    (tmp_path / "link").symlink_to(base)
    before = sorted((file.name, file.read_bytes()) for file in base.iterdir())
    target = {"run": done.folder, "base": base, "link": tmp_path / "link"}[where]
    with pytest.raises(UsageError, match="is not an empty folder"):
        loratune.merge(done.folder, target)
    assert sorted((file.name, file.read_bytes()) for file in base.iterdir()) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a":' * 100_000, "\x00"])
def test_damaged_configs_are_a_message(base: Path, tmp_path: Path, name: str, text: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / name).write_text(text)
    with pytest.raises(ModelError):
        base_model.load(Model(base=str(folder)))


def test_weights_that_are_no_safetensors(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelError):
        base_model.load(Model(base=str(folder)))
    assert not list(Path().iterdir()), "a canary was touched"
    torch.manual_seed(0)
