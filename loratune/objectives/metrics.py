"""Metrics of an answer against its reference, and confidence intervals of means. Pure functions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000


def normalized(text: str) -> str:
    """Return a text in lower case without punctuation, articles and extra spaces, as SQuAD's evaluation does.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, and its evaluation script.
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, reference: str) -> float:
    """Return 1 if both are the same text, leading and trailing white space ignored, else 0."""
    return float(answer.strip() == reference.strip())


def contains(answer: str, reference: str) -> float:
    """Return 1 if the answer contains the reference, case ignored, else 0."""
    return float(reference.strip().lower() in answer.lower())


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean (0-1) of precision and recall over words. Source: arXiv:1606.05250, sec. 6.1."""
    given, wanted = normalized(answer).split(), normalized(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def regex_match(found: str | None, wanted: str | None, reference: str) -> float:
    """Return 1 if a pattern finds the same in an answer and in its reference, else 0.

    Args:
        found: in the answer, by `regex_match.found`.
        wanted: found in the reference.
        reference: used as it is where the pattern finds nothing in it.
    """
    return float(found == (wanted or reference.strip()))


def choice(answer: str, reference: str, choices: Sequence[str]) -> float:
    """Return 1 if the first choice named in the answer is the first one named in the reference, else 0."""
    return float(_first(answer, choices) is not None and _first(answer, choices) == _first(reference, choices))


def _first(text: str, choices: Sequence[str]) -> str | None:
    places = []
    for word in choices:
        match = re.search(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text, re.IGNORECASE)
        if match:
            places.append((match.start(), -len(word), word))
    return min(places)[2] if places else None


def interval(
    numerators: Sequence[float], denominators: Sequence[float] | None = None, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean, or of a ratio of sums, over rows.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, sec. 13.3.

    Args:
        numerators: one value per row.
        denominators: of the ratio, one per row; None for a plain mean.
        seed: of the resampling.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, dtype=np.float64)
    random = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        rows = random.integers(0, len(top), len(top))
        ratios[index] = top[rows].sum() / max(bottom[rows].sum(), 1e-12)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def confusion(wanted: np.ndarray, given: np.ndarray, classes: int) -> np.ndarray:
    """Return how often each class (rows) was taken for each class (columns), int64, (classes, classes)."""
    found: np.ndarray = np.bincount(wanted * classes + given, minlength=classes * classes).reshape(classes, classes)
    return found


def macro_f1(wanted: np.ndarray, given: np.ndarray) -> float:
    """Return the mean (0-1) of the F1 of each class that is wanted or given, both bool, (rows, classes)."""
    right, there = (wanted & given).sum(0), wanted.sum(0) + given.sum(0)
    some = there > 0
    return float(np.mean(2 * right[some] / there[some])) if some.any() else 0.0


def matthews(table: np.ndarray) -> float:
    """Return Matthews' correlation coefficient of a `confusion` table, -1 to 1; 0 where it is not defined.

    Source: Gorodkin 2004, Comparing two K-category assignments by a K-category correlation coefficient, eq. 8.
    """
    total, right = float(table.sum()), float(np.trace(table))
    wanted, given = table.sum(1).astype(np.float64), table.sum(0).astype(np.float64)
    spread = (total**2 - (wanted**2).sum()) * (total**2 - (given**2).sum())
    return (right * total - float(wanted @ given)) / float(np.sqrt(spread)) if spread > 0 else 0.0


def auroc(positive: np.ndarray, scores: np.ndarray) -> float:
    """Return how often a positive row scores higher than a negative one, ties counted half; NaN without both kinds.

    Source: Hanley & McNeil 1982, as the Mann-Whitney statistic.

    Args:
        positive: bool, (rows,).
        scores: (rows,).
    """
    number = int(positive.sum())
    if not 0 < number < len(positive):
        return float("nan")
    _, index, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[index]  # of tied scores the mean
    return float((ranks[positive].sum() - number * (number + 1) / 2) / (number * (len(positive) - number)))


def macro_auroc(wanted: np.ndarray, scores: np.ndarray) -> float:
    """Return the mean `auroc` of the classes that some rows have and some have not; both (rows, classes)."""
    each = [auroc(wanted[:, index], scores[:, index]) for index in range(wanted.shape[1])]
    known = [one for one in each if not np.isnan(one)]
    return float(np.mean(known)) if known else float("nan")


def with_interval(
    f: Callable[[np.ndarray], float], rows: int, seed: int = 0, times: int = 500
) -> tuple[float, float, float]:
    """Return a function of all rows, given by their numbers, and the ends of its interval, as `interval`."""
    random = np.random.default_rng(seed)
    found = [f(random.integers(0, rows, rows)) for _ in range(times)]
    low, high = np.quantile([one for one in found if not np.isnan(one)] or [float("nan")], [0.025, 0.975])
    return f(np.arange(rows)), float(low), float(high)
