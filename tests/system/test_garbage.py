"""Cyclic garbage is looked for seldom while a run starts, and as usual from its first step on."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from loratune.events import Event, StepDone
from loratune.models import base_model
from loratune.system import garbage
from tests.conftest import Fit


def test_seldom_and_then_as_before() -> None:
    before = gc.get_threshold()
    with garbage.seldom():
        assert gc.get_threshold()[0] == garbage.NEW
    assert gc.get_threshold() == before
    with pytest.raises(KeyError), garbage.seldom():
        raise KeyError
    assert gc.get_threshold() == before


def test_a_run_looks_for_it_as_usual_once_it_trains(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    load = base_model.load

    def loading(*args: Any, **kwargs: Any) -> Any:
        seen["loading"] = gc.get_threshold()[0]
        return load(*args, **kwargs)

    def hear(event: Event) -> None:
        if isinstance(event, StepDone):
            seen["training"] = gc.get_threshold()[0]

    monkeypatch.setattr(base_model, "load", loading)
    fit(on_event=hear)
    assert seen == {"loading": garbage.NEW, "training": gc.get_threshold()[0]}
    assert seen["training"] < garbage.NEW
