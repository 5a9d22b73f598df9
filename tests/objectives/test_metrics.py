from __future__ import annotations

import numpy as np
import pytest

from loratune.objectives import metrics
from loratune.system import regex_match


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The  Cat, sat!", "cat sat"),
        ("A an the", ""),
        ("theatre", "theatre"),
        ("U.S.A.", "usa"),
        (" a-b ", "ab"),
        ("", ""),
    ],
)
def test_normalized(text: str, wanted: str) -> None:
    assert metrics.normalized(text) == wanted


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("the cat sat", "a cat sat", 1),  # articles don't count
        ("Denver Broncos", "The Denver Broncos!", 1),
        ("Broncos", "Denver Broncos", 2 / 3),
        ("in Santa Clara California", "Santa Clara", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("cat cat cat", "cat", 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # a word is matched as often as it stands there
        ("cat cat dog", "cat dog dog", 2 / 3),
        ("yes", "no", 0),
        ("", "", 1),
        ("the", "", 1),
        ("", "word", 0),
        ("word", "!", 0),
    ],
)
def test_token_f1(answer: str, reference: str, f1: float) -> None:
    assert metrics.token_f1(answer, reference) == pytest.approx(f1)
    assert metrics.token_f1(reference, answer) == pytest.approx(f1)


def test_exact_match_and_contains() -> None:
    assert metrics.exact_match(" 42\n", "42") == 1
    assert metrics.exact_match("Yes", "yes") == 0
    assert metrics.contains("The answer is Yes.", " yes ") == 1
    assert metrics.contains("no", "yes") == 0


@pytest.mark.parametrize(
    ("answer", "reference", "pattern", "wanted"),
    [
        ("so: #### 42", "#### 42", r"#### (\d+)", 1),
        ("so: #### 41", "#### 42", r"#### (\d+)", 0),
        ("#### 42", "42", r"#### (\d+)", 1),  # a bare reference
        ("I say 7, then 8", "7", r"\d+", 1),
        ("nothing", "nothing", r"\d+", 0),  # no answer found is no right answer
        ("x= 3 ", "x=3", r"x=\s*(\d)", 1),
    ],
)
def test_regex_match(answer: str, reference: str, pattern: str, wanted: float) -> None:
    found = regex_match.found(pattern, [answer, reference])
    assert metrics.regex_match(*found, reference) == wanted


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("I think yes, not no", "yes", 1),
        ("no or yes", "yes", 0),
        ("YES", "yes.", 1),
        ("yesterday", "yes", 0),  # inside a word it is not that word
        ("perhaps", "perhaps", 0),
        ("yes please", "yes please", 1),  # of two that begin at one place the longer is meant
        ("yes", "yes please", 0),
    ],
)
def test_choice(answer: str, reference: str, wanted: float) -> None:
    assert metrics.choice(answer, reference, ["yes", "no", " yes please"]) == wanted


def test_choices_may_hold_signs() -> None:
    assert metrics.choice("it is C++ I think", "C++", ["C", "C++"]) == 1
    assert metrics.choice("(A)", "A", ["A", "B"]) == 1


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_interval_of_a_big_sample_is_the_normal_one(rate: float) -> None:
    values = (np.random.default_rng(0).random(4000) < rate).astype(float)
    half = 1.96 * (values.var() / len(values)) ** 0.5
    low, high = metrics.interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_interval_of_a_ratio() -> None:
    """Rows count by their tokens; the delta method gives the width to expect."""
    random = np.random.default_rng(1)
    counts = random.integers(1, 40, 3000).astype(float)
    nats = counts * random.gamma(2, 0.7, 3000)
    ratio = nats.sum() / counts.sum()
    half = 1.96 * ((nats - ratio * counts).var() / 3000) ** 0.5 / counts.mean()
    low, high = metrics.interval(nats, counts)
    assert low == pytest.approx(ratio - half, abs=0.15 * half)
    assert high == pytest.approx(ratio + half, abs=0.15 * half)


def test_interval_where_there_is_little_to_say() -> None:
    assert metrics.interval([3.0]) == (3.0, 3.0)
    assert metrics.interval([1.0] * 50) == (1.0, 1.0)
    assert metrics.interval([0.0, 0.0], [0.0, 0.0]) == (0.0, 0.0)
    assert metrics.interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0))
    assert metrics.interval([0.0, 1.0]) == (0.0, 1.0)


def test_interval_depends_on_its_seed_only() -> None:
    values = np.random.default_rng(2).random(30)
    assert metrics.interval(values, seed=1) == metrics.interval(values, seed=1)
    assert metrics.interval(values, seed=1) != metrics.interval(values, seed=2)


# ---------------------------------------------------------------- classes


def test_metrics_of_classes_by_hand() -> None:
    table = metrics.confusion(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2]), 3)
    assert table.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    wanted, given = (np.eye(3, dtype=bool)[of] for of in ([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]))
    assert metrics.macro_f1(wanted, given) == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    assert metrics.matthews(np.array([[3, 1], [2, 4]])) == pytest.approx((3 * 4 - 1 * 2) / (4 * 6 * 5 * 5) ** 0.5)
    assert metrics.matthews(np.array([[5, 0], [5, 0]])) == 0
    positive = np.array([True, True, False, False])
    assert metrics.auroc(positive, np.array([0.9, 0.4, 0.4, 0.1])) == (1 + 1 + 0.5 + 1) / 4
    assert np.isnan(metrics.auroc(np.array([True, True]), np.array([0.1, 0.2])))


def test_metrics_of_classes_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for classes in (2, 3, 7):
        wanted, scores = draw.integers(0, classes, 200), draw.normal(size=(200, classes)).round(1)
        given = scores.argmax(1)
        table = metrics.confusion(wanted, given, classes)
        assert (table == sklearn.confusion_matrix(wanted, given)).all()
        one = np.eye(classes, dtype=bool)
        assert metrics.macro_f1(one[wanted], one[given]) == pytest.approx(
            sklearn.f1_score(wanted, given, average="macro")
        )
        assert metrics.matthews(table) == pytest.approx(sklearn.matthews_corrcoef(wanted, given))
        assert metrics.auroc(wanted == 0, scores[:, 0]) == pytest.approx(
            sklearn.roc_auc_score(wanted == 0, scores[:, 0])
        )


def test_an_interval_of_any_function_of_rows() -> None:
    values = np.random.default_rng(1).normal(size=400)
    mean, low, high = metrics.with_interval(lambda rows: float(values[rows].mean()), 400)
    wanted = metrics.interval(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(wanted, abs=0.02)
