"""Watch figures of the steps that should not fall, such as log p of chosen answers, and say so once if one does."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from loratune.objectives.section import Watch

LAST = 5  # steps whose mean is compared with the first step: one batch may have unlikely answers by chance


class Watcher:
    """Compare the watched figures with their values in the first step.

    Args:
        watched: by name.
    """

    def __init__(self, watched: Mapping[str, Watch]):
        self._watched = dict(watched)
        self._first: dict[str, float] = {}
        self._last: dict[str, deque[float]] = {name: deque(maxlen=LAST) for name in watched}

    def see(self, step: int, figures: Mapping[str, Any]) -> list[str]:
        """Return a line for each figure that has fallen by too much since the first step; never two for one."""
        return [line for name in [*self._watched] if (line := self._seen(step, name, figures.get(name)))]

    def _seen(self, step: int, name: str, value: Any) -> str:
        if not isinstance(value, (int, float)):  # of no sample of this step, or a damaged line of metrics.jsonl
            return ""
        first, last = self._first.setdefault(name, float(value)), self._last[name]
        last.append(float(value))
        mean = sum(last) / len(last)
        if len(last) < LAST or first - mean <= self._watched[name].fall:
            return ""
        return f"step {step}: {name} has fallen from {first:.2f} to {mean:.2f}: {self._watched.pop(name).told}"
