"""Damaged rows for the objectives that compare or judge answers, or learn labels: rows, or an error that names the file.

A few, in this process; `make test-fuzz` runs a thousand through the command line.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from loratune import inspect, load_recipe
from loratune.errors import DataError
from tests import tiny
from tests.faults import odd_samples


@pytest.mark.parametrize("number", range(30))
def test_rows_or_an_error_that_names_the_file(number: int, tmp_path: Path, base: Path) -> None:
    (tmp_path / "base").symlink_to(base)
    home = tmp_path / "case"
    home.mkdir()
    odd_samples.odd_samples(Random(f"few {number}"), tmp_path, home)
    recipe = load_recipe(home / "recipe.yaml")
    try:
        said = str(inspect(recipe, number=1).shown[0].place)
    except DataError as error:
        said = str(error)
    assert str(home / "rows.") in said


@pytest.mark.parametrize("name", sorted(odd_samples.SOUND))
def test_the_rows_that_are_damaged_are_sound(name: str, tmp_path: Path, base: Path) -> None:
    kind = odd_samples.SOUND[name]
    rows = [row for seed in range(20) for row in kind.rows(Random(seed))]
    given = {"format": kind.format} if kind.format else {}
    sections = {"objective": kind.objective, "method": {"type": kind.method}}
    tiny.write_recipe(tmp_path, base, data={"train": "rows.jsonl", **given}, **sections)
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert inspect(load_recipe(tmp_path / "recipe.yaml")).rows == len(rows)
