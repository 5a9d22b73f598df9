"""Rows to tokens, with the truth about which of them are trained.

Trained are exactly the assistant's words and the token that ends its turn; `turns.py` says where they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from loratune.errors import ModelError, Place, Problem
from loratune.formats import Conversation, Example, Plain, RowError
from loratune.templates import TEMPLATES
from loratune.turns import LaterTurnsChangeIt, Span, Turns


@dataclass(frozen=True)
class Row:
    """A tokenized row.

    Attributes:
        ids: token ids, int32, shape (tokens,).
        trained: True where the token is to be learned, bool, shape (tokens,).
        place: where the row came from.
    """

    ids: np.ndarray
    trained: np.ndarray
    place: Place

    def count(self) -> int:
        """Return the number of tokens that can be trained: the first of a row has nothing before it."""
        return int(self.trained[1:].sum())


def with_template(tokenizer: Any, choice: str | None) -> Any:
    """Give a tokenizer the chat template a recipe names (None: it keeps its own); it is saved with the tokenizer.

    Args:
        tokenizer: of the base model.
        choice: one of `TEMPLATES`, or the path of a file.

    Raises:
        ModelError: when the file can't be read, or ChatML is asked of a tokenizer that has no token to end its turns.
    """
    if choice is None:
        return tokenizer
    if choice in TEMPLATES:
        if choice == "chatml" and "<|im_end|>" not in tokenizer.get_added_vocab():
            hint = "`chat_template: alpaca` ends turns with the end of text, which every base model has"
            raise ModelError("`data.chat_template: chatml`: this tokenizer has no token `<|im_end|>`", hint)
        tokenizer.chat_template = ("{{ bos_token }}" if _adds_bos(tokenizer) else "") + TEMPLATES[choice]
        return tokenizer
    try:
        tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(Problem(f"the chat template can't be read: {error}", Place(choice))) from None
    return tokenizer


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


class Encoder:
    """Turns examples into rows for one tokenizer and its chat template.

    Raises:
        ModelError: when the tokenizer has no fast implementation (masks need its character offsets).
    """

    def __init__(self, tokenizer: Any):
        from tokenizers import Tokenizer, processors

        if not tokenizer.is_fast:
            raise ModelError(
                "this tokenizer has no fast implementation", "its offsets are needed to know which tokens are trained"
            )
        self.tokenizer = tokenizer
        self.turns = Turns(tokenizer)
        # A copy without the post-processor: it would trim white space off the offsets, and no token may be added here.
        self._backend: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)
        self._backend.no_truncation()
        self._backend.no_padding()
        # Some tokenizers put a space before every text: with these no text can be cut without a trace.
        alone = self._backend.encode("a", add_special_tokens=False).ids
        self._divisible = self._backend.decode(alone + alone) == self._backend.decode(alone) * 2
        self.special: frozenset[int] = frozenset(
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        ) | frozenset(i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None)
        self.adds_bos = _adds_bos(tokenizer)

    def encode(self, example: Example, place: Place) -> Row:
        """Return an example as a row of tokens.

        Raises:
            RowError: when the template refuses the messages, or the trained tokens can't be known with certainty.
        """
        if isinstance(example, Plain):
            return self._plain(example, place)
        text, spans = self.turns.spans(example)
        ids, offsets = self._tokens(text, [start for start, _ in spans])
        self._check_bos(ids)
        trained = np.full(len(ids), example.whole)
        for start, end in spans:
            self._mark(trained, ids, offsets, start, end, text)
        return Row(ids, trained, place)

    def rows(self, example: Example, place: Place) -> list[Row]:
        """Return an example as one row, or as one row per trained turn.

        Templates of reasoning models leave thoughts out of all turns but the last, so one row can't show every turn as
        it will be written. Then each turn is a row of its own, behind the very prompt a server renders for it.

        Raises:
            RowError: as `encode`.
        """
        try:
            return [self.encode(example, place)]
        except LaterTurnsChangeIt:
            assert isinstance(example, Conversation)
            turns = [index for index, trained in enumerate(example.trained) if trained]
            return [
                self.encode(
                    replace(example, messages=example.messages[: i + 1], trained=tuple(j == i for j in range(i + 1))),
                    place,
                )
                for i in turns
            ]

    def _tokens(self, text: str, cuts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize a text so that no token reaches over a cut, and return ids and offsets (tokens, 2).

        At a cut the prompt ends and the model goes on: a token over it, such as two line ends made one, can't be what
        it writes there. Only a special token that swallows the white space behind it may: it is in the prompt already.
        """
        ids, offsets = self._pieces(text, [0, len(text)])
        common = ~np.isin(ids, list(self.special))
        if not any((common & (offsets[:, 0] < cut) & (cut < offsets[:, 1])).any() for cut in cuts):
            return ids, offsets
        if not self._divisible:
            raise RowError(
                "", "a token reaches from the prompt into the answer; begin the answer with a space or a word"
            )
        return self._pieces(text, [0, *cuts, len(text)])

    def _pieces(self, text: str, edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end in pairwise(edges):
            try:
                piece = self._backend.encode(text[start:end], add_special_tokens=False)
            except TypeError:  # half of a surrogate pair, as JSON can spell it
                raise RowError("", "holds half a character (a lone surrogate)") from None
            ids += piece.ids
            offsets += [(start + first, start + last) for first, last in piece.offsets]
        return np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2)

    def _mark(self, trained: np.ndarray, ids: np.ndarray, offsets: np.ndarray, start: int, end: int, text: str) -> None:
        """Set `trained` on the tokens inside a turn, up to and with the token that ends it."""
        inside = np.flatnonzero((offsets[:, 0] >= start) & (offsets[:, 1] <= end))
        ends = [int(index) for index in inside if int(ids[index]) in self.special]
        if not ends or text[offsets[ends[-1], 1] : end].strip():
            raise RowError(
                "",
                "the chat template ends the answer without a special token: the model would not learn to stop",
            )
        trained[inside[inside <= ends[-1]]] = True

    def _check_bos(self, ids: np.ndarray) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None and bos != self.tokenizer.eos_token_id and len(ids) > 1 and ids[0] == bos and ids[1] == bos:
            raise RowError("", "begins with two BOS tokens: the chat template writes one and the messages another")

    def _plain(self, example: Plain, place: Place) -> Row:
        """Tokenize segments apart, as a prompt is at serving; one BOS where the tokenizer adds one, EOS at the end."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        cuts = list(accumulate(len(text) for text, _ in example.segments))
        whole = "".join(text for text, _ in example.segments)
        tokens, offsets = self._pieces(whole, [0, *cuts]) if self._divisible else self._tokens(whole, cuts[:-1])
        segment = np.searchsorted(cuts[:-1], offsets[:, 0], side="right")  # the one each token begins in
        ids: list[int] = tokens.tolist()
        trained: list[bool] = np.array([learn for _, learn in example.segments])[segment].tolist()
        if self.adds_bos and ids[:1] != [bos]:
            ids, trained = [bos, *ids], [False, *trained]
        if eos is not None and ids[-1:] != [eos]:
            ids, trained = [*ids, eos], [*trained, True]
        return Row(np.array(ids, dtype=np.int32), np.array(trained, dtype=bool), place)
