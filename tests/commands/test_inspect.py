"""`loratune inspect`: rows as the model sees them, for a terminal, a program and a page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loratune import recipe
from loratune.cli import app
from loratune.commands import inspect
from loratune.errors import UsageError
from tests import pairs, tiny


@pytest.fixture
def path(tmp_path: Path, base: Path) -> Path:
    written = tiny.write_recipe(tmp_path, base)
    rows = tiny.chats(5)
    rows[1]["messages"] = [{"role": "user", "content": "<b> & ü?"}, {"role": "assistant", "content": "naïve 🦜"}]
    tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    return written


def test_trained_text_is_marked_and_nothing_is_lost(path: Path) -> None:
    shown = inspect.inspect(recipe.load(path), row=2).shown[0]
    text = "<|im_start|>user\n<b> & ü?<|im_end|>\n<|im_start|>assistant\nnaïve 🦜<|im_end|>\n"
    assert "".join(piece.text for piece in shown.pieces) == text
    assert "".join(piece.text for piece in shown.pieces if piece.trained) == "naïve 🦜<|im_end|>"
    assert [p.text for p in shown.pieces if p.special] == ["<|im_start|>", "<|im_end|>"] * 2
    assert (shown.number, shown.place) == (2, f"{path.parent / 'train.jsonl'}:2")
    assert shown.tokens == sum(piece.tokens for piece in shown.pieces)
    assert shown.trained_tokens == sum(piece.tokens for piece in shown.pieces if piece.trained)


def test_brackets_without_colour_and_green_with_it(path: Path) -> None:
    found = inspect.inspect(recipe.load(path), row=2)
    assert "assistant\n[[naïve 🦜<|im_end|>]]\n" in inspect.as_text(found, colour=False)
    assert "\x1b[32;1mnaïve 🦜<|im_end|>\x1b[0m" in inspect.as_text(found, colour=True)


def test_which_rows(path: Path) -> None:
    loaded = recipe.load(path)
    assert [row.number for row in inspect.inspect(loaded, number=2).shown] == [1, 2]
    drawn = [row.number for row in inspect.inspect(loaded, random=True, number=4).shown]
    assert drawn == [row.number for row in inspect.inspect(loaded, random=True, number=4).shown]
    assert len(set(drawn)) == 4
    assert drawn != [1, 2, 3, 4]
    with pytest.raises(UsageError, match="no row 6: there are 5, counted from 1"):
        inspect.inspect(loaded, row=6)


def test_page_shows_the_row_and_escapes_it(path: Path) -> None:
    page = inspect.as_html(inspect.inspect(recipe.load(path), row=2), "a <title>")
    assert "<b>" not in page
    body = re.search("<pre>(.*)</pre>", page, re.DOTALL)
    assert body is not None
    assert "<|im_start|>user\n<b> & ü?" in unescape(re.sub("<[^>]*>", "", body[1]))
    assert 'class="t ">naïve 🦜' in page
    assert "http" not in page


def test_command(path: Path, tmp_path: Path) -> None:
    out = CliRunner().invoke(app, ["inspect", str(path), "--row", "2", "--json"])
    found = json.loads(out.stdout)
    assert found["rows"] == 5
    assert found["shown"][0]["number"] == 2
    plain = CliRunner().invoke(app, ["inspect", str(path)])
    assert plain.stdout.count("\nrow ") == 3
    page = CliRunner().invoke(app, ["inspect", str(path), "--html", str(tmp_path / "page.html")])
    assert page.stdout.strip() == str(tmp_path / "page.html")
    assert "row 3" in (tmp_path / "page.html").read_text(encoding="utf-8")
    again = CliRunner().invoke(app, ["inspect", str(path), "--html", str(tmp_path / "page.html")])
    assert again.exit_code == 0
    before = path.read_bytes()
    mistaken = CliRunner().invoke(app, ["inspect", str(path), "--html", str(path)])
    assert "is not overwritten" in str(mistaken.exception)
    assert path.read_bytes() == before


CODE = """
import sys
from loratune import recipe
from loratune.commands import inspect as inspecting
found = inspecting.inspect(recipe.load("recipe.yaml"), number=5)
print("torch" in sys.modules, [row.tokens for row in found.shown])
"""


ALONE = "import sys, transformers.tokenization_utils_tokenizers; print('torch' in sys.modules)"


def test_rows_are_read_without_torch(path: Path) -> None:
    alone = subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE], capture_output=True, text=True, check=True)
    if alone.stdout.strip() == "True":
        pytest.skip("this transformers imports torch with its tokenizers")
    done = subprocess.run([sys.executable, "-c", CODE], cwd=path.parent, capture_output=True, text=True)
    lengths = [row.tokens for row in inspect.inspect(recipe.load(path), number=5).shown]
    assert (done.stdout.strip(), done.stderr) == (f"False {lengths}", "")


def test_a_pair_is_one_row_with_its_answers_named(tmp_path: Path, base: Path) -> None:
    written = tiny.write_recipe(tmp_path, base, objective="dpo")
    tiny.write_jsonl(tmp_path / "train.jsonl", pairs.rows(5))
    loaded = recipe.load(written)
    found = inspect.inspect(loaded, row=2)
    assert (found.rows, found.pairs) == (5, True)
    assert [(row.number, row.answer, row.place[-2:]) for row in found.shown] == [
        (2, "chosen", ":2"),
        (2, "rejected", ":2"),
    ]
    assert ["".join(p.text for p in row.pieces if p.trained)[:3] for row in found.shown] == ["yes", "no "]
    text = inspect.as_text(found, colour=False)
    assert text.startswith("5 pairs, ")
    assert "\npair 2 chosen  " in text
    assert "\npair 2 rejected  " in text
    assert "<h2>pair 2 rejected</h2>" in inspect.as_html(found, "pairs")
    assert [row.number for row in inspect.inspect(loaded, number=2).shown] == [1, 1, 2, 2]
    assert {row.number for row in inspect.inspect(loaded, random=True, number=5).shown} == {1, 2, 3, 4, 5}
    with pytest.raises(UsageError, match="no pair 6: there are 5, counted from 1"):
        inspect.inspect(loaded, row=6)


def test_rows_that_are_scored_show_their_label_and_no_label_tokens(tmp_path: Path, base: Path) -> None:
    rows = [{"text": "a cat", "label": ["red", "blue"]}, {"text": "a dog", "label": []}]
    cases = (
        (rows, {"type": "labelled", "labels": "several"}, "classify", ["label red, blue", "label none of the classes"]),
        ([{"text": "a", "label": 1.5}, {"text": "b", "label": -2}], {"type": "labelled", "labels": "number"},
         "classify", ["label 1.5", "label -2"]),
        (pairs.rows(2), "preference", "reward", ["chosen", "rejected"] * 2),
    )  # fmt: skip
    for given, format, objective, answers in cases:
        train = str(tiny.write_jsonl(tmp_path / "rows.jsonl", given))
        path = tiny.write_recipe(tmp_path, base, objective=objective, data={"train": train, "format": format})
        found = inspect.inspect(recipe.load(path))
        assert [row.answer for row in found.shown] == answers
        assert found.trained_tokens == sum(row.trained_tokens for row in found.shown) == 0
        text = inspect.as_text(found, colour=False)
        assert "tokens, each row scored at its last, longest" in text
        assert "label token" not in text + inspect.as_html(found, "rows").partition("</p>")[2]
        assert "[[" not in text
