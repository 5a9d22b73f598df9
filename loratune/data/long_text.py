"""Cut a long text into pieces that are tokenized one after the other, so that memory stays bounded.

Tokenizing takes up to 170 bytes of memory for each byte of the text: names, offsets and alignments of tokens. A text is
cut between two words, where the tokens around the cut are the same as without it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from loratune.data.formats import RowError

LONG = 1 << 20  # characters that are tokenized at once
_AROUND = 64  # characters on each side of a cut that are compared
_TRIES = 256  # places that are tried for one cut
_WINDOW = 1 << 12  # characters that are searched for such places at once

_BETWEEN = re.compile(r"(?<=\n)(?=\S)|(?<=\w)(?= \w)|(?<=\w)(?=[^\w\s])")
_SPACE = re.compile(r"(?<=\w) (?=\w)")  # for a tokenizer that adds a space before every text


def pieces(text: str, ids: Callable[[str], Sequence[int]], puts_space: bool) -> Iterator[str]:
    """Yield a text in pieces of at most `LONG` characters.

    Args:
        text: of any length.
        ids: returns a text's token ids.
        puts_space: whether the tokenizer adds a space before every text; then the space between two pieces is omitted.

    Raises:
        RowError: when it can't be cut, as it has a word of that length.
    """
    places, start = _SPACE if puts_space else _BETWEEN, 0
    while len(text) - start > LONG:
        end, following = _cut(text, start, ids, places)
        yield text[start:end]
        start = following
    yield text[start:]


def _cut(text: str, start: int, ids: Callable[[str], Sequence[int]], places: re.Pattern[str]) -> tuple[int, int]:
    """Return the end of the next piece, as late as possible, and the start of the one after it."""
    tries = 0
    for last in range(start + LONG, start, -_WINDOW):
        found = list(places.finditer(text, max(last - _WINDOW, start + 1), last))
        for place in reversed(found):
            before = text[max(start, place.start() - _AROUND) : place.start()]
            after = text[place.end() : place.end() + _AROUND]
            if [*ids(before), *ids(after)] == list(ids(before + place[0] + after)):
                return place.start(), place.end()
            tries += 1
            if tries == _TRIES:
                break
        if tries == _TRIES:
            break
    told = f"a text that can't be split: no end of a word within {LONG:,} characters from character {start + 1:,} on"
    raise RowError("", f"{told}; split it into several rows, or remove what is not text")
