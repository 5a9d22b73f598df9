"""Tokenize rows, and mark which tokens are trained.

Trained are exactly the assistant's words and the token that ends its turn; `assistant_turns.py` finds them in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np

from loratune.data import fast_bpe, long_text
from loratune.data.assistant_turns import LaterTurnsChangeIt, Span, Turns
from loratune.data.fast_bpe import Tokens
from loratune.data.formats import Conversation, Plain, RowError
from loratune.errors import ModelError, Place
from loratune.models.tokenizing import adds_bos_itself

Whole = Conversation | Plain  # an example that is tokenized as one text
_NO_LABELS = np.empty(0, dtype=np.float32)


def _no_labels() -> np.ndarray:
    return _NO_LABELS


@dataclass(frozen=True)
class Row:
    """A tokenized row.

    Attributes:
        ids: token ids, int32, shape (tokens,).
        trained: True for label tokens, bool, shape (tokens,).
        place: where the row came from.
        labels: what the data row says besides its texts, float32, shape (labels,); see its format.
        pooled: whether the objective looks at its last token, and at no label token.
        state: what the head reads at its last token, float32, (width,), where it is known.
    """

    ids: np.ndarray
    trained: np.ndarray
    place: Place
    labels: np.ndarray = field(default_factory=_no_labels)
    pooled: bool = False
    state: np.ndarray | None = None

    def count(self) -> int:
        """Return the number of label tokens but the first of a row, which nothing predicts."""
        return int(self.trained[1:].sum())


@dataclass(frozen=True)
class _Encoding:
    """An encoding of the library `tokenizers`, with the interface of `Tokens`."""

    found: Any

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.found.ids
        return ids

    def first_at(self, character: int) -> int | None:
        token: int | None = self.found.char_to_token(character)
        return None if token is None or self.found.token_to_chars(token)[0] != character else token

    def last_before(self, character: int) -> int | None:
        token: int | None = self.found.char_to_token(character - 1)
        return None if token is None or self.found.token_to_chars(token)[1] > character else token

    def end(self, token: int) -> int:
        end: int = self.found.token_to_chars(token)[1]
        return end


@dataclass(frozen=True)
class _Draft:
    """A row before it is tokenized: texts that are tokenized separately, and trained spans of the first (characters).

    There are no texts where plain text is too long to be tokenized at once.
    """

    example: Whole
    texts: tuple[str, ...]
    spans: tuple[Span, ...] = ()


class Encoder:
    """Turns examples into rows for one tokenizer and its chat template.

    Args:
        tokenizer: of the base model.
        own: whether nothing else uses the tokenizer, so that it need not be copied.

    Raises:
        ModelError: when the tokenizer has no fast implementation (masks need its character offsets).
    """

    def __init__(self, tokenizer: Any, own: bool = False):
        if not tokenizer.is_fast:
            raise ModelError(
                "this tokenizer has no fast implementation", "its offsets are needed to find the label tokens"
            )
        self.tokenizer = tokenizer
        self.turns = Turns(tokenizer)
        self.adds_bos = adds_bos_itself(tokenizer)
        self._own = own
        self.special: frozenset[int] = frozenset(
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        ) | frozenset(i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None)
        self._is_special = np.zeros(max(self.special, default=0) + 2, dtype=bool)  # by token id; the last for all above
        self._is_special[list(self.special)] = True

    # The following is computed for the first text: cached rows don't need it.

    @cached_property
    def _markers(self) -> tuple[str, ...]:
        """The texts of the special tokens, except for BOS, which ends no text."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        kept = (index for index in self.special if index != bos or index == eos)
        return tuple(
            sorted((str(self.tokenizer.convert_ids_to_tokens(index)) for index in kept), key=len, reverse=True)
        )

    @cached_property
    def _backend(self) -> Any:
        """The tokenizer without its post-processor, which would trim white space from offsets and add tokens."""
        from tokenizers import Tokenizer, processors

        given = self.tokenizer.backend_tokenizer
        backend: Any = given if self._own else Tokenizer.from_str(given.to_str())
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.no_truncation()
        backend.no_padding()
        return backend

    @cached_property
    def _divisible(self) -> bool:
        """Whether a text can be cut without changing its tokens: some tokenizers add a space before every text."""
        alone = self._backend.encode("a", add_special_tokens=False).ids
        return bool(self._backend.decode(alone + alone) == self._backend.decode(alone) * 2)

    @cached_property
    def _words(self) -> fast_bpe.Words | None:
        """The table of words."""
        return fast_bpe.of(self._backend)

    def encode(self, example: Whole, place: Place) -> Row:
        """Return an example as a row of tokens.

        Raises:
            RowError: when the template refuses the messages, or it is not certain which tokens are trained.
        """
        draft = self._draft(example)
        return self._finish(draft, list(self._tokenized(draft.texts)), place)

    def rows(self, example: Whole, place: Place) -> list[Row]:
        """Return an example as one row, or as one row per trained turn; see `batch`.

        Raises:
            RowError: as `encode`.
        """
        (found,) = self.batch([(example, place)])
        if isinstance(found, RowError):
            raise found
        return found

    def batch(self, examples: Sequence[tuple[Whole, Place]]) -> list[list[Row] | RowError]:
        """Return each example as one row, as one row per trained turn, or its error.

        Templates of reasoning models omit thoughts from all turns but the last, so one row can't show every turn as the
        model must write it. Then each turn is a row of its own, after exactly the prompt that a server renders for it.
        """
        drafts = [_result(self._drafts, example) for example, _ in examples]
        texts = [text for some in drafts if not isinstance(some, RowError) for draft in some for text in draft.texts]
        encoded = self._tokenized(texts)
        found: list[list[Row] | RowError] = []
        for some, (_, place) in zip(drafts, examples, strict=True):
            if isinstance(some, RowError):
                found.append(some)
                continue
            pieces = [list(islice(encoded, len(draft.texts))) for draft in some]
            try:
                found.append([self._finish(*one, place) for one in zip(some, pieces, strict=True)])
            except RowError as error:
                found.append(error)
        return found

    def _drafts(self, example: Whole) -> list[_Draft]:
        try:
            return [self._draft(example)]
        except LaterTurnsChangeIt:
            assert isinstance(example, Conversation)
            if example.whole:
                what = "the chat template renders earlier turns differently once others follow"
                raise RowError("", f"can't be trained on as a whole: {what}; use `train_on: assistant`") from None
            turns = [index for index, trained in enumerate(example.trained) if trained]
            return [
                self._draft(
                    replace(example, messages=example.messages[: i + 1], trained=tuple(j == i for j in range(i + 1)))
                )
                for i in turns
            ]

    def _draft(self, example: Whole) -> _Draft:
        if isinstance(example, Conversation):
            text, spans = self.turns.ended(example, *self.turns.spans(example), self._markers)
            return _Draft(example, (text,), tuple(spans))
        texts = tuple(text for text, _ in example.segments)
        if (length := sum(map(len, texts))) > long_text.LONG:
            if not self._divisible and len(texts) > 1:
                told = f"prompt and completion of {length:,} characters; at most {long_text.LONG:,} are tokenized"
                raise RowError("", f"{told}, as this tokenizer puts a space before every text; split the row")
            return _Draft(example, ())
        return _Draft(example, texts if self._divisible else ("".join(texts),))

    def _tokenized(self, texts: Sequence[str]) -> Iterator[Tokens | _Encoding | RowError]:
        """Yield each text as tokens, or its error."""
        quick = [self._words.encode(text) if self._words else None for text in texts]
        others = [text for text, found in zip(texts, quick, strict=True) if found is None]
        try:
            left: Any = map(_Encoding, self._backend.encode_batch(others, add_special_tokens=False))
        except TypeError:  # one of them has half of a surrogate pair: then one by one
            left = (_result(lambda text: _Encoding(self._encode(text)), text) for text in others)
        return (found or next(left) for found in quick)

    def _encode(self, text: str) -> Any:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except TypeError:  # half of a surrogate pair, which JSON can contain
            raise RowError("", "has a lone surrogate (half a character)") from None

    def _finish(self, draft: _Draft, pieces: Sequence[Tokens | _Encoding | RowError], place: Place) -> Row:
        tokens = []
        for piece in pieces:
            if isinstance(piece, RowError):
                raise piece
            tokens.append(piece)
        if isinstance(draft.example, Plain):
            return self._plain(draft.example, tokens, place)
        (piece,), (text,) = tokens, draft.texts
        ids = np.array(piece.ids, dtype=np.int32)
        trained = self._at_edges(piece, ids, draft.spans, text)
        if trained is None:
            ids, offsets = self._tokens(text, [start for start, _ in draft.spans])
            trained = np.zeros(len(ids), dtype=bool)
            for start, end in draft.spans:
                self._mark(trained, ids, offsets, start, end, text)
        self._check_bos(ids)
        return Row(ids, trained | draft.example.whole, place)

    def _at_edges(
        self, piece: Tokens | _Encoding, ids: np.ndarray, spans: Sequence[Span], text: str
    ) -> np.ndarray | None:
        """Return which tokens are trained if token boundaries match both edges of each span, else None.

        The result is that of `_tokens` and `_mark`, without the offsets of every token, which cost as much as the
        tokenizing itself.
        """
        trained = np.zeros(len(ids), dtype=bool)
        special = np.flatnonzero(self._is_special[np.minimum(ids, len(self._is_special) - 1)])
        for start, end in spans:
            first, last = piece.first_at(start), piece.last_before(end)
            if first is None or last is None:
                return None
            stop = np.searchsorted(special, last, side="right") - 1  # the last special token up to there
            if stop < 0 or special[stop] < first or text[piece.end(int(special[stop])) : end].strip():
                return None  # `_mark` says what is wrong
            trained[first : special[stop] + 1] = True
        return trained

    def _tokens(self, text: str, cuts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize a text such that no token crosses a cut, and return ids and offsets (tokens, 2).

        At a cut the prompt ends and the model continues: it can't write a token that crosses it, such as two line ends
        merged into one. Only a special token that includes the white space after it may: it is in the prompt already.
        """
        ids, offsets = self._pieces(text, [0, len(text)])
        common = ~np.isin(ids, list(self.special))
        if not any((common & (offsets[:, 0] < cut) & (cut < offsets[:, 1])).any() for cut in cuts):
            return ids, offsets
        if not self._divisible:
            raise RowError(
                "", "a token spans the prompt's end and the answer's start; begin the answer with a space or a word"
            )
        return self._pieces(text, [0, *cuts, len(text)])

    def _pieces(self, text: str, edges: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = [np.empty(0, np.int32)], [np.empty((0, 2), np.int64)]
        for start, end in pairwise(edges):
            piece = self._encode(text[start:end])
            ids.append(np.array(piece.ids, dtype=np.int32))
            offsets.append(np.array(piece.offsets, dtype=np.int64).reshape(-1, 2) + start)
        return np.concatenate(ids), np.concatenate(offsets)

    def _mark(self, trained: np.ndarray, ids: np.ndarray, offsets: np.ndarray, start: int, end: int, text: str) -> None:
        """Set `trained` on the tokens of a turn, including the token that ends it."""
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
            raise RowError("", "begins with two BOS tokens: one from the chat template, one from the messages")

    def _plain(self, example: Plain, pieces: Sequence[Tokens | _Encoding], place: Place) -> Row:
        """Join segments that were tokenized separately, as a prompt is when served.

        With one BOS where the tokenizer adds one, and EOS at the end where the example has an end.
        """
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        flags = [learn for _, learn in example.segments]
        if not pieces:
            parts = [(ids, learn) for text, learn in example.segments for ids in self._of_long(text)]
        elif self._divisible:
            parts = [(_ids(piece), learn) for piece, learn in zip(pieces, flags, strict=True)]
        else:
            cuts = list(accumulate(len(text) for text, _ in example.segments))
            found, offsets = self._tokens("".join(text for text, _ in example.segments), cuts[:-1])
            # a token belongs to the segment it begins in
            parts = list(zip(np.split(found, np.searchsorted(offsets[:, 0], cuts[:-1])), flags, strict=True))
        parts = [part for part in parts if len(part[0])]
        if self.adds_bos and not (parts and parts[0][0][0] == bos):
            parts.insert(0, (np.array([bos], dtype=np.int32), False))
        if example.closed and eos is not None and not (parts and parts[-1][0][-1] == eos):
            parts.append((np.array([eos], dtype=np.int32), True))
        ids = np.concatenate([np.empty(0, np.int32), *(one for one, _ in parts)])  # the only copy, however long
        return Row(ids, np.repeat([learn for _, learn in parts], [len(one) for one, _ in parts]).astype(bool), place)

    def _of_long(self, text: str) -> Iterator[np.ndarray]:
        """Yield the token ids of a text of any length in parts, each int32, shape (tokens,); see `long_text`."""

        def ids(part: str) -> Sequence[int]:
            (found,) = self._tokenized([part])
            if isinstance(found, RowError):
                raise found
            return found.ids

        for part in long_text.pieces(text, ids, not self._divisible):
            yield np.array(ids(part), dtype=np.int32)


def _ids(piece: Tokens | _Encoding) -> np.ndarray:
    return np.array(piece.ids, dtype=np.int32)


def _result(function: Any, argument: Any) -> Any:
    """Return the result of a function, or the RowError it raises: one bad row must not stop the others."""
    try:
        return function(argument)
    except RowError as error:
        return error
