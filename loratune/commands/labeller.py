"""A classifier that answers texts with their labels, in `loratune chat`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from loratune.data.collate import collate
from loratune.data.encode import Encoder, Row
from loratune.data.formats import Plain
from loratune.data.sample import Sample
from loratune.errors import Place, UsageError
from loratune.models import score_head
from loratune.models.base_model import Loaded
from loratune.models.policy import Policy

SHOWN = 5  # classes that are told, the most probable first
REWARD = "a reward model scores whole conversations and has no labels: measure it with `loratune eval`"


class Labeller:
    """Answers each text with its class and the probabilities, its classes, or a number.

    Args:
        loaded: a model with a head that scores rows.
        tell: called with each answer.

    Raises:
        UsageError: when it is a reward model.
    """

    room: int | None = None  # an answer needs no positions

    def __init__(self, loaded: Loaded, tell: Callable[[str], None]):
        config = score_head.config_of(loaded.model)
        self._names = [str(config.id2label[index]) for index in range(config.num_labels)]
        if self._names == [score_head.REWARD]:
            raise UsageError(REWARD)
        self._loaded, self._tell = loaded, tell
        self._problem = config.problem_type
        self._encoder = Encoder(loaded.tokenizer)

    def scores(self, text: str) -> torch.Tensor:
        """Return the outputs of the head for a text, float32, (outputs,)."""
        row = self._encoder.encode(Plain(((text, False),), closed=False), Place("text"))
        batch = collate([Sample((Row(row.ids, np.zeros(len(row.ids), bool), row.place, pooled=True),))])
        with torch.no_grad():
            return Policy(self._loaded.model).scores(batch.to(self._loaded.device))[0]

    def say(self, text: str) -> str:
        """Return the label of a text, in one line."""
        answer = self._label(self.scores(text))
        self._tell(f"{answer}\n")
        return answer

    def command(self, line: str) -> str:
        """Raise UsageError: there are no commands."""
        raise UsageError(f"`{line.split()[0]}`: a classifier has no commands; each line is a text to label")

    def _label(self, scores: torch.Tensor) -> str:
        if self._problem == "regression" or len(self._names) == 1:  # of an adapter that records nothing
            return f"{float(scores[0]):.6g}"
        if self._problem == "multi_label_classification":
            chances = scores.sigmoid()
            chosen = [index for index in chances.argsort(descending=True).tolist() if chances[index] > 0.5]
            return ", ".join(f"{self._names[i]} {float(chances[i]):.3f}" for i in chosen) or "none of the classes"
        chances = scores.softmax(-1)
        best = chances.argsort(descending=True).tolist()[:SHOWN]
        return ", ".join(f"{self._names[i]} {float(chances[i]):.3f}" for i in best)
