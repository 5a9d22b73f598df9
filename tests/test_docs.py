"""The docs are those of this code: pages are up to date, examples load, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import loratune
from loratune import recipe
from tests import tiny

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _recipes() -> Iterator[object]:
    for page in PAGES:
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            tree = yaml.safe_load(block)
            if isinstance(tree, dict) and {"model", "output"} <= tree.keys():
                yield pytest.param(block, id=f"{page.name}-{number}")


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_check_tells_a_page_that_differs(tmp_path: Path) -> None:
    copy = tmp_path / "generate.py"
    copy.write_text((ROOT / "docs/generate.py").read_text())
    done = subprocess.run([sys.executable, str(copy), "--check"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "docs/recipe.md is not up to date" in done.stderr


@pytest.mark.parametrize("block", list(_recipes()))
def test_recipe_in_a_page_loads(block: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(block)
    for name in re.findall(r"[\w./-]+\.jsonl", block):
        tiny.write_jsonl(tmp_path / name, tiny.chats(2))
    assert recipe.load(path).output.startswith(str(tmp_path))


def test_the_example_of_the_python_page_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    tiny.write_jsonl(tmp_path / "train.jsonl", tiny.chats(24))
    tiny.write_jsonl(tmp_path / "eval.jsonl", tiny.chats(6, seed=1))
    (example,) = PYTHON.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
    exec(compile(example, "docs/python.md", "exec"), {})
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in out.splitlines() if line.startswith("step ") and " of " in line] == [
        f"step {number} of 6" for number in range(1, 7)
    ]
    assert "the best eval loss so far" in out
    assert "merged in float32, the same next token at 100% of positions" in out
    assert err == ""


def test_the_python_page_names_all_that_is_public() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    errors = {name for name in loratune.__all__ if name.endswith("Error") or name == "Interrupted"}
    assert [name for name in loratune.__all__ if name not in errors and f"`{name}" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    local = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link and not link.startswith("#")]
    missing = [link for link in local if not (page.parent / link).exists()]
    assert not missing
