"""The loss curve as an SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]  # step, loss in nats per label token

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 48, 48
TRAIN, EVAL = "#7a9cc6", "#c2410c"


def loss_svg(train: Sequence[Point], evaluation: Sequence[Point], title: str, unit: str) -> str:
    """Draw train loss (thin: each step, thick: smoothed) and eval loss (dots) over steps.

    Args:
        train: loss of each step.
        evaluation: loss at each evaluation.
        title: shown on top.
        unit: of the loss.

    Returns:
        A standalone SVG document.
    """
    points = [p for p in (*train, *evaluation) if math.isfinite(p[1])]
    high_x = max([x for x, _ in points], default=1.0)
    low_x = min([x for x, _ in points], default=0.0)
    low, high = min([y for _, y in points], default=0.0), max([y for _, y in points], default=1.0)
    size = max(abs(low), abs(high))
    if high - low < 1e-9 * max(1.0, size):  # beyond 1e16 half more is the same number
        room = max(0.5, 0.01 * size)
        low, high = low - room, high + room
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def at(point: Point) -> str:
        x = LEFT + (point[0] - low_x) / max(high_x - low_x, 1e-9) * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="14" fill="#111">{escape(title)}</text>',
    ]
    for value in ticks:
        x, y = at((low_x, value)).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end" fill="#555">{value:g}</text>')
    for value in _ticks(low_x, high_x):
        if value == int(value) and low_x <= value <= high_x:
            x = at((value, low)).split(",")[0]
            parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#555">{value:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end" fill="#555">step</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 8}" fill="#555">loss ({escape(unit)})</text>')
    finite = [p for p in train if math.isfinite(p[1])]
    if finite:
        parts.append(_line([at(p) for p in finite], TRAIN, 1, 0.45))
        parts.append(_line([at(p) for p in smoothed(finite)], TRAIN, 2.5, 1))
    shown = [p for p in evaluation if math.isfinite(p[1])]
    if shown:
        parts.append(_line([at(p) for p in shown], EVAL, 2, 1))
        for p in shown:
            x, y = at(p).split(",")
            parts.append(
                f'<circle cx="{x}" cy="{y}" r="3.5" fill="{EVAL}"><title>step {p[0]:g}: {p[1]:.4f}</title></circle>'
            )
    for index, (label, colour, there) in enumerate((("train", TRAIN, finite), ("eval", EVAL, shown))):
        parts += _legend(WIDTH - RIGHT - 150 + 75 * index, label, colour) if there else []
    return "\n".join([*parts, "</svg>", ""])


def _legend(left: int, label: str, colour: str) -> list[str]:
    return [
        f'<line x1="{left}" y1="18" x2="{left + 20}" y2="18" stroke="{colour}" stroke-width="3"/>',
        f'<text x="{left + 26}" y="22" fill="#111">{label}</text>',
    ]


def smoothed(points: Sequence[Point], keep: float = 0.9) -> list[Point]:
    """Return a bias-corrected exponential moving average: each mean keeps `keep` (0-1) of the previous one."""
    out: list[Point] = []
    mean = weight = 0.0
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        out.append((x, mean / weight))
    return out


def _line(points: Sequence[str], colour: str, width: float, opacity: float) -> str:
    joined = " ".join(points)
    stroke = f'stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"'
    return f'<polyline points="{joined}" fill="none" {stroke}/>'


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round values (1, 2 or 5 times a power of ten) that cover a range."""
    span = max(high - low, 1e-9)
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]
