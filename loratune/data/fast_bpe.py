"""Byte-level BPE with a cache of words: the same ids as the tokenizer, several times as fast.

Such a tokenizer splits a text at its added tokens, splits the rest into words by regular expressions, and encodes each
word by itself. Most words recur, so their ids are cached. The expressions are run by Python's `re`, only on texts whose
characters have the same class in every version of Unicode. Other texts, and tokenizers with further steps, are left to
the library.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

KEPT = 1 << 16  # words whose ids are cached: about 15 MB
LONGEST = 32  # characters of a cached word: longer ones rarely recur

Cut = Callable[[str], list[str]]

# Latin, Greek, Cyrillic and typographic signs, without the long s, which equals s where case is ignored
_BLOCKS = (
    (0x21, 0x7F),
    (0xA1, 0x17F),
    (0x180, 0x250),
    (0x370, 0x500),
    (0x2010, 0x2028),
    (0x2030, 0x205F),
    (0x20A0, 0x2200),
)
_EMOJIS = (0x1F300, 0x1F650)  # symbols since Unicode 6
_SPACES = "\t\n\r "
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # built into `ByteLevel`
_PARTS = re.compile(
    r"\\p\{(\w+)\}|\\(.)|(\[\^?)|(\])|([\^$]|&&|\}\+)", re.DOTALL
)  # parts of an expression, and doubtful ones


class Tokens:
    """A tokenized text.

    Attributes:
        ids: token ids.
    """

    def __init__(self, table: _Table):
        self.ids: list[int] = []
        self._table = table
        # for each part (an added token or the text between two): its first character and token, and its words
        self._characters: list[int] = []
        self._tokens: list[int] = []
        self._words: list[Sequence[str]] = []

    def first_at(self, character: int) -> int | None:
        """Return the token that begins with a character, or None where it is inside a word."""
        part = bisect_right(self._characters, character) - 1
        begins, token = self._characters[part], self._tokens[part]
        for word in self._words[part]:
            if begins >= character:
                break
            begins, token = begins + len(word), token + len(self._table[word])
        return token if begins == character else None

    def last_before(self, character: int) -> int | None:
        """Return the token that ends before a character, or None where that is inside a word."""
        token = self.first_at(character)
        return None if token is None else token - 1

    def end(self, token: int) -> int:
        """Return the character after an added token."""
        part = bisect_right(self._tokens, token) - 1
        return self._characters[part] + len(self._words[part][0])

    def add(self, character: int, words: Sequence[str]) -> None:
        """Append a part that begins with a character."""
        self._characters.append(character)
        self._tokens.append(len(self.ids))
        self._words.append(words)
        self.ids.extend(chain.from_iterable(map(self._table.__getitem__, words)))


class Words:
    """Turn texts into tokens; thread-safe."""

    def __init__(self, backend: Any, added: Sequence[re.Pattern[str]], cuts: Sequence[Cut]):
        self._added, self._cuts = added, cuts
        self._table = _Table(backend)

    def encode(self, text: str) -> Tokens | None:
        """Return a text as tokens, or None if it contains characters that are left to the library."""
        tokens, character = Tokens(self._table), 0
        for part, added in self._parts(text):
            if not added and _OTHERS.search(part):
                return None
            tokens.add(character, (part,) if added else self._cut(part))
            character += len(part)
        return tokens

    def _parts(self, text: str) -> list[tuple[str, bool]]:
        """Return a text in parts, and whether each is an added token."""
        parts = [(text, False)]
        for pattern in self._added:
            parts = [
                (piece, added or bool(index & 1))
                for part, added in parts
                for index, piece in enumerate([part] if added else pattern.split(part))
            ]
        return [(part, added) for part, added in parts if part]

    def _cut(self, text: str) -> list[str]:
        first, *others = self._cuts
        words = first(text)
        for cut in others:
            words = [piece for word in words for piece in cut(word)]
        return words


class _Table(dict[str, tuple[int, ...]]):
    """The ids of words; those of added tokens by their content."""

    def __init__(self, backend: Any):
        self._model = backend.model
        self._added = {token.content: (index,) for index, token in backend.get_added_tokens_decoder().items()}
        super().__init__(self._added)

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize("".join(map(_BYTES.__getitem__, word.encode()))))
        if len(word) <= LONGEST:
            if len(self) >= KEPT:
                self.clear()
                self.update(self._added)
            self[word] = ids
        return ids


def of(backend: Any) -> Words | None:
    """Return a table of words for a tokenizer of the library `tokenizers`, or None if it has other steps.

    Its results are first compared with the library's on random texts.
    """
    said = json.loads(backend.to_str())
    model, normalizer, step = said["model"], said["normalizer"], said["pre_tokenizer"]
    tokens = list(backend.get_added_tokens_decoder().values())
    if (
        model["type"] != "BPE" or model["dropout"] or model["byte_fallback"] or model["continuing_subword_prefix"]
        or model["end_of_word_suffix"] or step is None or backend.encode_special_tokens
        or (normalizer is not None and normalizer["type"] != "NFC")
        or any(token.lstrip or token.rstrip or token.single_word or not token.content for token in tokens)
    ):  # fmt: skip
        return None
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    if [number for number, part in enumerate(steps, 1) if part["type"] == "ByteLevel"] != [len(steps)]:
        return None
    cuts = [_cut(part) for part in steps]
    if None in cuts:
        return None
    # matched before the text is normalized, then after; the longest match wins
    kinds = [[re.escape(token.content) for token in tokens if token.normalized is after] for after in (False, True)]
    added = [re.compile(f"({'|'.join(sorted(kind, key=len, reverse=True))})") for kind in kinds if kind]
    words = Words(backend, added, [cut for cut in cuts if cut is not None])
    return words if _agree(words, backend, [token.content for token in tokens]) else None


def _agree(words: Words, backend: Any, added: Sequence[str]) -> bool:
    draw = random.Random(0)
    fragments = [
        *"aZéßжΩ09²½'.,!?_-#/<>|“”…€😀",
        *_SPACES,
        "\r\n",
        "  ",
        "'s",
        "'LL",
        "the",
        "Über",
        "2026",
        "://",
        *added[:64],
    ]
    for _ in range(48):
        text = "".join(draw.choices(fragments, k=64))
        mine = words.encode(text)
        if mine is None or mine.ids != backend.encode(text, add_special_tokens=False).ids:
            return False
    return True


def _cut(step: dict[str, Any]) -> Cut | None:
    """Return a pre-tokenizer step (of tokenizer.json) as a function of a text, or None if it is not supported."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        pattern = _GPT2 if step["use_regex"] else None
        if pattern is None:
            return lambda text: [text]  # earlier steps have split the text
    elif step["type"] == "Digits":
        pattern = r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        given = step["pattern"]
        pattern = given["Regex"] if "Regex" in given else re.escape(given["String"])
    else:
        return None
    translated = _translated(pattern)
    return None if translated is None else _cut_by(translated)


def _cut_by(pattern: re.Pattern[str]) -> Cut:
    """Return a function that splits a text into matches and the text between them."""

    def cut(text: str) -> list[str]:
        found: list[str] = pattern.findall(text)
        if sum(map(len, found)) == len(text):
            return found
        pieces, end = [], 0
        for match in pattern.finditer(text):
            pieces += [text[end : match.start()], match[0]]
            end = match.end()
        return [piece for piece in (*pieces, text[end:]) if piece]

    return cut


def _translated(pattern: str) -> re.Pattern[str] | None:
    """Return an Oniguruma expression, as tokenizers use it, in Python's syntax, or None where the two may differ."""
    inside = doubtful = False

    def part(found: re.Match[str]) -> str:
        nonlocal inside, doubtful
        kind, escaped, opens, closes, other = found.groups()
        if opens or closes:
            doubtful |= inside is bool(opens)  # a nested class
            inside = bool(opens)
        elif other:
            doubtful |= not (inside and other in "^$")
        elif kind or escaped in ("s", "S"):
            members = _class_of(one for one, its in _CHARACTERS.items() if its.startswith(kind or "Z"))
            doubtful |= escaped == "S" if inside else not members
            return members if inside else f"[{'^' if escaped == 'S' else ''}{members}]"
        else:
            doubtful |= escaped.isalnum() and escaped not in "rnt"
        return found[0]

    python = _PARTS.sub(part, pattern)
    if doubtful or "[]" in python or "[^]" in python:  # an empty class
        return None
    try:
        translated = re.compile(python)
    except re.error:
        return None
    return None if translated.groups or translated.match("") else translated


def _class_of(characters: Iterable[str]) -> str:
    """Return the content of a character class, as ranges."""
    ranges: list[tuple[int, int]] = []
    for code in sorted(map(ord, characters)):
        first, last = ranges.pop() if ranges and ranges[-1][1] == code - 1 else (code, code)
        ranges.append((first, max(last, code)))
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


def _characters() -> dict[str, str]:
    """Return the characters that are supported here, with their category.

    Their category is the same in every Unicode since 3.2, or 6; none is a mark, a control, or changed by NFC.
    """
    old, now = unicodedata.ucd_3_2_0.category, unicodedata.category
    found = (chr(code) for first, end in _BLOCKS for code in range(first, end))
    kept = (one for one in found if now(one) == old(one) and unicodedata.normalize("NFC", one) == one)
    signs = (*kept, *(one for one in map(chr, range(*_EMOJIS)) if now(one)[0] == "S"))
    return {one: now(one) for one in signs if now(one)[0] not in "CMZ"} | dict.fromkeys(_SPACES, "Z")


def _bytes() -> list[str]:
    """Return the character for each byte in a byte-level vocabulary (GPT-2's)."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (code for code in range(256) if code not in shown)
    signs = {code: chr(code) for code in shown} | {code: chr(0x100 + index) for index, code in enumerate(others)}
    return [signs[code] for code in range(256)]


_CHARACTERS = _characters()
_OTHERS = re.compile(f"[^{_class_of(_CHARACTERS)}]")
_BYTES = _bytes()
