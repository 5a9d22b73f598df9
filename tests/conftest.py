"""What nearly every test needs: a tiny random base model on disk, and a way to train on it in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune import recipe
from loratune.console import Terminal
from loratune.events import Listener
from loratune.system import startup
from loratune.training import run, setup
from tests import tiny

torch.set_num_threads(1)  # the models are tiny, and the machine may be shared


@dataclass
class Trained:
    """A finished training, with the model as it lies in memory."""

    run: run.Run
    recipe: recipe.Recipe
    net: Any

    @property
    def folder(self) -> Path:
        return self.run.folder

    def events(self, kind: str = "step") -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl of one kind."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def column(self, name: str) -> list[float]:
        """Return one number of every step."""
        return [event[name] for event in self.events()]

    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())


Fit = Callable[..., Trained]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CI", "1")
    with startup.quiet():
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny base model, in float32."""
    return tiny.save(tmp_path_factory.mktemp("base"))


@pytest.fixture
def fit(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Return a function that writes a recipe for the tiny base, trains it and returns run, recipe and model.

    Its first argument names the folder of recipe and run; `rows`, `resume`, `overwrite`, `allow_drift` and `on_event`
    are passed on, everything else is a section of the recipe. What happens is printed as on the command line.
    """
    nets: list[Any] = []
    prepare = setup.prepare

    def spy(*given: Any) -> Any:
        job = prepare(*given)
        nets.append(job.net)
        return job

    monkeypatch.setattr(setup, "prepare", spy)

    def train(
        name: str = "a",
        *,
        on: Path | None = None,
        rows: int = 24,
        resume: bool = False,
        overwrite: bool = False,
        allow_drift: bool = False,
        on_event: Listener | None = None,
        **sections: Any,
    ) -> Trained:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        loaded = recipe.load(tiny.write_recipe(folder, on or base, rows=rows, **sections))
        hear = on_event or Terminal()
        done = run.train(loaded, resume=resume, overwrite=overwrite, allow_drift=allow_drift, on_event=hear)
        return Trained(done, loaded, nets.pop())

    return train


@pytest.fixture(scope="session")
def prompts(base: Path) -> list[torch.Tensor]:
    """Return token ids of a few prompts, each of shape (1, tokens)."""
    tokens = tiny.tokenizer()
    texts = ["a blue cat", "the dog runs", "one two three four five six seven", "<|im_start|>user\nred<|im_end|>\n"]
    return [torch.tensor([tokens(text).input_ids]) for text in texts]


def adapted(base: Path, folder: Path) -> Any:
    """Return a base with an adapter on it, as PEFT alone puts them together."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(net, str(folder))


@torch.no_grad()
def logits(net: Any, prompts: list[torch.Tensor]) -> torch.Tensor:
    """Return the logits of all prompts in evaluation mode, float32, shape (tokens of all, vocabulary)."""
    net.eval()
    return torch.cat([net(input_ids=prompt, use_cache=False).logits[0].float() for prompt in prompts])
