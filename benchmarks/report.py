"""How the figures of a benchmark are told: medians, a table and a picture."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

TITLES = {  # of the arms
    "loratune": "loratune, defaults",
    "loratune-unshared": "loratune, no prefix sharing",
    "loratune-padded": "loratune, rows padded",
    "loratune-compiled": "loratune, `train.compile: on`",
    "loratune-plain": "loratune, `train.kernels: off`",
    "trl": "TRL, defaults",
    "trl-plain": "TRL, loratune's precision, no checkpointing",
    "trl-padding-free": "TRL, the same, padding-free",
    "trl-liger": "TRL, the same, with Liger's kernels",
    "trainer": "Trainer + PEFT, loratune's precision",
    "trainer-axolotl": "Trainer + PEFT, the same, with axolotl's kernels",
    "unsloth": "unsloth",
}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each figure over the rounds of an arm, and the losses of the first."""
    numbers = [name for name, value in rounds[0].items() if isinstance(value, (int, float))]
    return {name: statistics.median(one[name] for one in rounds) for name in numbers} | {"losses": rounds[0]["losses"]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Lay out the results as a Markdown table; a loss is that of the last step."""
    lines = [
        "| | tokens/s | label tokens/s | peak memory | share of matrix rate (with all tokens) | loss | start "
        "| first step done | speed of loratune |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours = results.get("loratune", next(iter(results.values())))["tokens_per_second"]
    for name, one in results.items():
        lines.append(
            f"| {TITLES[name]} | {one['tokens_per_second']:.0f} | {one['trained_tokens_per_second']:.0f} "
            f"| {one['peak_memory'] / 1e9:.2f} GB "
            f"| {one['share_of_matrix_rate']:.0%} ({one['share_with_all_tokens']:.0%}) | {one['losses'][-1]:.4f} "
            f"| {one['start_seconds']:.1f} s | {one['first_step_done']:.1f} s "
            f"| {ours / one['tokens_per_second']:.2f} × |"
        )
    return "\n".join(lines)


def picture(results: dict[str, dict[str, Any]]) -> str:
    """Draw tokens/s and peak memory as bars, in SVG."""
    height, top = 26, 40
    kinds = (
        ("tokens/s", "tokens_per_second", 1, "#2563eb", 270),
        ("peak memory, GB", "peak_memory", 1e9, "#9ca3af", 560),
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {top + height * len(results) + 10}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for title, key, unit, colour, left in kinds:
        most = max(one[key] for one in results.values())
        out.append(f'<text x="{left}" y="24" font-weight="bold">{title}</text>')
        for index, (name, one) in enumerate(results.items()):
            y, width = top + index * height, 200 * one[key] / most
            if left == 270:
                out.append(f'<text x="8" y="{y + 15}">{TITLES[name]}</text>')
            number = one[key] / unit
            out.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{height - 6}" fill="{colour}"/>')
            out.append(f'<text x="{left + width + 6:.1f}" y="{y + 15}">{number:.{0 if unit == 1 else 2}f}</text>')
    return "\n".join([*out, "</svg>\n"])


def keep(out: Path, about: dict[str, Any], median: dict[str, Any]) -> None:
    """Print a table of the medians, and keep figures, table and picture beside one another."""
    if not median:
        sys.exit("no arm came through")
    print(table(median))
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        (".json", json.dumps(about, indent=1) + "\n"),
        (".md", table(median) + "\n"),
        (".svg", picture(median)),
    ):
        out.with_suffix(suffix).write_text(text, encoding="utf-8")
