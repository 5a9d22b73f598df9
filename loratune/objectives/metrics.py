"""Metrics of an answer against its reference, and confidence intervals of means. Pure functions."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

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
