from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ET

import pytest

from loratune.runs import loss_plot

SVG = "{http://www.w3.org/2000/svg}"
Points = list[tuple[float, float]]


def drawn(svg: str) -> tuple[list[Points], Points]:
    """Return the points of all lines and the dots; everything must lie in the picture."""
    root = ET.fromstring(svg)
    assert root.get("viewBox") == f"0 0 {loss_plot.WIDTH} {loss_plot.HEIGHT}"
    lines = [
        [tuple(map(float, p.split(","))) for p in line.get("points", "").split()]
        for line in root.iter(f"{SVG}polyline")
    ]
    dots = [(float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in root.iter(f"{SVG}circle")]
    rules = [
        (float(e.get(f"x{i}", "nan")), float(e.get(f"y{i}", "nan"))) for e in root.iter(f"{SVG}line") for i in "12"
    ]
    words = [(float(e.get("x", "nan")), float(e.get("y", "nan"))) for e in root.iter(f"{SVG}text")]
    for x, y in [*(p for line in lines for p in line), *dots, *rules, *words]:
        assert 0 <= x <= loss_plot.WIDTH
        assert 0 <= y <= loss_plot.HEIGHT
    return lines, dots


CURVES: dict[str, tuple[Points, Points]] = {
    "usual": ([(i, 3 * 0.98**i + 0.1 * (i % 3)) for i in range(1, 200)], [(50, 2.0), (100, 1.2), (199, 0.9)]),
    "one point": ([(1, 2.5)], []),
    "one of each": ([(7, 2.5)], [(7, 2.4)]),
    "empty": ([], []),
    "only eval": ([], [(10, 1.0), (20, 0.5)]),
    "flat": ([(1, 0.7), (2, 0.7), (3, 0.7)], []),
    "zero": ([(1, 0.0), (2, 0.0)], []),
    "tiny": ([(1, 1e-12), (2, 3e-12)], []),
    "huge": ([(1, 1e30), (100_000, 1e-3)], [(50_000, 1e20)]),
    "flat and huge": ([(1, 1e30), (2, 1e30)], []),
    "nearly flat and huge": ([(1, 1e17), (2, 1e17 + 16)], []),
    "negative": ([(1, -4.0), (2, 2.0)], []),
    "holes": ([(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)], [(2, math.nan), (4, -math.inf)]),
    "nothing finite": ([(1, math.nan)], [(1, math.inf)]),
}


@pytest.mark.parametrize("name", CURVES)
def test_every_curve_is_a_picture(name: str) -> None:
    train, evaluation = CURVES[name]
    lines, dots = drawn(loss_plot.loss_svg(train, evaluation, "a <b> & 'c'", "nats per token"))
    finite = [p for p in train if math.isfinite(p[1])]
    shown = [p for p in evaluation if math.isfinite(p[1])]
    wanted = [len(finite)] * 2 * bool(finite) + [len(shown)] * bool(shown)
    assert [len(line) for line in lines] == wanted
    assert len(dots) == len(shown)


def test_random_curves_are_pictures() -> None:
    rng = random.Random(0)
    for _ in range(100):
        scale = 10 ** rng.uniform(-6, 6)
        train = [(step, rng.gauss(0, 1) * scale) for step in sorted(rng.sample(range(1, 10_000), rng.randint(1, 30)))]
        drawn(loss_plot.loss_svg(train, train[::7], "x", "per pair"))


def test_points_stand_where_they_belong() -> None:
    (raw, _, held), dots = drawn(
        loss_plot.loss_svg([(1, 4.0), (2, 2.0), (3, 0.0)], [(1, 2.0), (3, 0.0)], "x", "per pair")
    )
    assert [x for x, _ in raw] == [
        loss_plot.LEFT,
        (loss_plot.LEFT + loss_plot.WIDTH - loss_plot.RIGHT) / 2,
        loss_plot.WIDTH - loss_plot.RIGHT,
    ]
    assert [y for _, y in raw] == [
        loss_plot.TOP,
        (loss_plot.TOP + loss_plot.HEIGHT - loss_plot.BOTTOM) / 2,
        loss_plot.HEIGHT - loss_plot.BOTTOM,
    ]
    assert held == dots == [(raw[0][0], raw[1][1]), raw[2]]


def test_the_title_is_escaped() -> None:
    root = ET.fromstring(loss_plot.loss_svg([], [], "a <b> & c", "per pair"))
    assert root.findtext(f"{SVG}title") == "a <b> & c"


def test_smoothed_is_a_running_mean() -> None:
    assert loss_plot.smoothed([]) == []
    assert loss_plot.smoothed([(1, 5.0)]) == [(1, pytest.approx(5.0))]
    assert [y for _, y in loss_plot.smoothed([(i, 3.0) for i in range(9)])] == pytest.approx([3.0] * 9)
    got = loss_plot.smoothed([(1, 1.0), (2, 2.0), (3, 4.0)], keep=0.5)
    assert got == [(1, pytest.approx(1.0)), (2, pytest.approx(5 / 3)), (3, pytest.approx((0.25 + 1 + 4 * 1) / 1.75))]


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.3, 9.7, [0, 2, 4, 6, 8, 10]), (90, 110, [90, 95, 100, 105, 110])],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, wanted: list[float]) -> None:
    assert loss_plot._ticks(low, high) == pytest.approx(wanted)
