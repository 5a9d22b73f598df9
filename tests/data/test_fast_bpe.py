"""Ids by a table of words are those the library gives; what the table can't do is left to it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as cut

from loratune.data import encode, fast_bpe

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str) -> Any:
    return cut.Split(Regex(pattern), "isolated")


FAMILIES = {
    "gpt-2": lambda: cut.ByteLevel(add_prefix_space=False),
    "smollm": lambda: cut.Sequence([cut.Digits(individual_digits=True), cut.ByteLevel(add_prefix_space=False)]),
    "numbers": lambda: cut.Sequence([cut.Digits(), cut.ByteLevel(add_prefix_space=False)]),
    "llama-3": lambda: cut.Sequence([split(LLAMA3), cut.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "qwen-2": lambda: cut.Sequence([split(QWEN2), cut.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "gpt-oss": lambda: cut.Sequence([split(O200K), cut.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "deepseek": lambda: cut.Sequence(
        [
            split(r"[\r\n]"),
            split(r"\s?[\p{L}]+"),
            split(r"\s?[\p{P}]+"),
            cut.Split("€", "isolated"),
            cut.Digits(individual_digits=True),
            cut.ByteLevel(add_prefix_space=False),
        ]
    ),
}
TOKENS = (
    AddedToken("<|im_start|>", special=True, normalized=False),
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<|im_end|>\n", special=True, normalized=False),  # of two that fit the longer one counts
    AddedToken("<｜end▁of▁sentence｜>", special=True, normalized=False),
    AddedToken("<tool>", normalized=True),
    AddedToken("  ", normalized=True),
)


def tokenizer(step: Any, tokens: tuple[AddedToken, ...] = TOKENS, normalizer: Any = None) -> Any:
    """Return a tokenizer whose merges were learned on some of this project's own words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = step
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    learned = [text.read_text(encoding="utf-8") for text in sorted(Path(__file__).parent.glob("test_*.py"))[:8]]
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=cut.ByteLevel.alphabet(), show_progress=False)
    made.train_from_iterator(learned, trainer)
    made.add_special_tokens([token for token in tokens if token.special])
    made.add_tokens([token for token in tokens if not token.special])
    return made


def texts(seed: int, number: int) -> list[str]:
    """Return texts of characters and bits that are cut in many ways."""
    draw = random.Random(seed)
    characters = sorted(fast_bpe._CHARACTERS)
    bits = [
        *"abcxyzABZ0189 \n\t.,'\"-_()", " ", "\r\n", "   ", "\n\n", " \n", "'s", "'LL", "don't", "we've", "ÀÉ", "ñ",
        "12345", "²³", "½", "https://", "```\n", "été", "Привет", "λόγος", "“so”", "…", "€5", "😀😀",
        *(token.content for token in TOKENS),
    ]  # fmt: skip
    made = []
    for _ in range(number):
        size = draw.choice([0, 1, 2, 3, 8, 30, 200])
        made.append("".join(draw.choice(bits) if draw.random() < 0.8 else draw.choice(characters) for _ in range(size)))
    return made


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["as it is", "nfc"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_and_edges_are_those_of_the_library(family: str, normalizer: Any) -> None:
    backend = tokenizer(FAMILIES[family](), normalizer=normalizer)
    table = fast_bpe.of(backend)
    assert table is not None
    added = {backend.token_to_id(token.content) for token in TOKENS}
    for text in texts(seed=len(family), number=800):
        mine, library = table.encode(text), backend.encode(text, add_special_tokens=False)
        known = encode._Encoding(library)
        last = {end: index for index, (_, end) in enumerate(library.offsets)}  # of one character's tokens the last
        assert mine is not None
        assert mine.ids == known.ids, text
        for at in range(1, len(text), 7):
            assert mine.first_at(at) in (None, known.first_at(at)), (text, at)
            assert mine.last_before(at) in (None, last.get(at)), (text, at)
        for index, token in enumerate(mine.ids):
            if token in added:
                assert mine.end(index) == known.end(index)
                assert mine.first_at(mine.end(index)) == (index + 1)
    assert table.encode("").ids == []  # type: ignore[union-attr]


def test_a_full_table_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_bpe, "KEPT", 40)
    backend = tokenizer(FAMILIES["llama-3"]())
    table = fast_bpe.of(backend)
    assert table is not None
    for text in texts(seed=5, number=200):
        found = table.encode(text)
        assert found is not None
        assert found.ids == backend.encode(text, add_special_tokens=False).ids
        assert len(table._table) <= 41


@pytest.mark.parametrize(
    "text",
    ["e\u0301", "\u00a0", "\u200b", "漢字", "ſ", "\x00", "\x1c", "\u2028", "\ud800", "👍🏽\u200d", "\u037e", "\u1e9e"],
    ids=ascii,
)
def test_other_characters_are_left_to_the_library(text: str) -> None:
    table = fast_bpe.of(tokenizer(FAMILIES["qwen-2"](), normalizer=normalizers.NFC()))
    assert table is not None
    assert table.encode(f"a {text} b") is None


OTHERS = {
    "a space before": lambda: tokenizer(cut.ByteLevel(add_prefix_space=True)),
    "metaspace": lambda: tokenizer(cut.Metaspace()),
    "white space": lambda: tokenizer(cut.Whitespace()),
    "one more step behind": lambda: tokenizer(cut.Sequence([cut.ByteLevel(add_prefix_space=False), cut.Digits()])),
    "merged with what is before": lambda: tokenizer(
        cut.Sequence([cut.Split(Regex(" "), "merged_with_previous"), cut.ByteLevel(add_prefix_space=False)])
    ),
    "inverted": lambda: tokenizer(
        cut.Sequence([cut.Split(Regex(r"\w+"), "isolated", invert=True), cut.ByteLevel(add_prefix_space=False)])
    ),
    "words": lambda: tokenizer(cut.Sequence([split(r"\w+"), cut.ByteLevel(add_prefix_space=False)])),
    "lines": lambda: tokenizer(cut.Sequence([split(r"^a"), cut.ByteLevel(add_prefix_space=False)])),
    "a class in a class": lambda: tokenizer(cut.Sequence([split(r"[a[bc]]"), cut.ByteLevel(add_prefix_space=False)])),
    "a class and a class": lambda: tokenizer(cut.Sequence([split(r"[a-z&&b]"), cut.ByteLevel(add_prefix_space=False)])),
    "all but letters": lambda: tokenizer(cut.Sequence([split(r"\P{L}+"), cut.ByteLevel(add_prefix_space=False)])),
    "in a class all but white space": lambda: tokenizer(
        cut.Sequence([split(r"[\S]+"), cut.ByteLevel(add_prefix_space=False)])
    ),
    "marks": lambda: tokenizer(cut.Sequence([split(r"[\p{M}]+"), cut.ByteLevel(add_prefix_space=False)])),
    "nothing": lambda: tokenizer(cut.Sequence([split(r"a*"), cut.ByteLevel(add_prefix_space=False)])),
    "another normalizer": lambda: tokenizer(cut.ByteLevel(add_prefix_space=False), normalizer=normalizers.Lowercase()),
    "takes white space": lambda: tokenizer(
        cut.ByteLevel(add_prefix_space=False), (*TOKENS, AddedToken("<|end|>", rstrip=True, special=True))
    ),
    "whole words only": lambda: tokenizer(
        cut.ByteLevel(add_prefix_space=False), (*TOKENS, AddedToken("end", single_word=True))
    ),
    "not a pair encoding": lambda: Tokenizer(models.WordLevel({"a": 0})),
    "no cuts at all": lambda: Tokenizer(models.BPE()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tokenizers_are_left_to_the_library(name: str) -> None:
    assert fast_bpe.of(OTHERS[name]()) is None


def test_a_tokenizer_that_disagrees_is_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_bpe, "_GPT2", r"\p{L}+")
    assert fast_bpe.of(tokenizer(FAMILIES["gpt-2"]())) is None
