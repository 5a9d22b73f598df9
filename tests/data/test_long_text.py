from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loratune.data import long_text
from loratune.data.encode import Encoder
from loratune.data.formats import Plain, RowError
from loratune.errors import Place
from tests import tiny

SOME = "It's 2026: the cat, the dog\n\nand  (two) trees; 字の。字と, über\t'all' of them 😀 said so.\nThey'll run "


def trained(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with merges: one that cuts words as GPT-2's does, or one that puts a space before a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>" if kind == "spaced" else None))
    if kind == "spaced":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        backend.train_from_iterator([SOME] * 9, trainers.BpeTrainer(vocab_size=220, special_tokens=["<unk>", "</s>"]))
        from tokenizers import decoders

        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    from tokenizers import decoders

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    backend.train_from_iterator([SOME] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("kind", ["words", "spaced", "bytes"])
@pytest.mark.parametrize("length", [60, 101, 997])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(kind: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(tiny.tokenizer() if kind == "bytes" else trained(kind))
    assert encoder._divisible is (kind != "spaced")
    example = Plain(((SOME * 30, True),), divisible=True)
    whole = encoder.encode(example, Place("a"))
    given: list[int] = []
    tokenized = encoder._tokenized
    monkeypatch.setattr(encoder, "_tokenized", lambda texts: (given.extend(map(len, texts)), tokenized(texts))[1])
    monkeypatch.setattr(long_text, "LONG", length)
    found = encoder.encode(example, Place("a"))
    assert found.ids.tolist() == whole.ids.tolist()
    assert found.trained.tolist() == whole.trained.tolist()
    assert (found.ids.dtype, found.trained.dtype) == (np.int32, np.bool_)
    assert max(given) <= max(length, 129)
    assert len(given) > 3 * 30 * len(SOME) / length


def test_prompt_and_completion_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(trained("words"))
    example = Plain(((SOME * 9, False), (SOME * 8, True)))
    whole = encoder.encode(example, Place("a"))
    monkeypatch.setattr(long_text, "LONG", 100)
    found = encoder.encode(example, Place("a"))
    assert found.ids.tolist() == whole.ids.tolist()
    assert found.trained.tolist() == whole.trained.tolist()
    assert 0 < found.count() < len(found.ids)
    with pytest.raises(
        RowError, match=r"prompt and completion of 1,6\d\d characters; at most 100 are tokenized, as this"
    ):
        Encoder(trained("spaced")).encode(example, Place("a"))


def test_what_can_not_be_cut_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "LONG", 100)
    text = "a b " + "c" * 200
    with pytest.raises(RowError, match=r"no end of a word within 100 characters from character 4 on; split it into"):
        Encoder(trained("words")).encode(Plain(((text, True),)), Place("a"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text.jsonl", "text.txt", "chat.jsonl"])
def test_the_longest_rows_take_no_more_than_two_gigabytes(tmp_path: Path, base: Path, kind: str) -> None:
    """15 MB in a line, 60 MB in a .txt file, and the longest conversation, with a token for each byte."""
    import json

    words, (form, end) = "some words of a long, long tale\n", kind.split(".")
    if form == "chat":
        half = words * (2_090_000 // len(words))
        row = json.dumps({"messages": [{"role": r, "content": half} for r in ("user", "assistant")]})
    else:
        row = words * ((15 if end == "jsonl" else 60) * 1_000_000 // len(words))
        row = json.dumps({"text": row}) if end == "jsonl" else row
    (tmp_path / f"rows.{end}").write_text(row)
    path = tiny.write_recipe(tmp_path, base, data={"train": f"rows.{end}", "format": form, "max_length": 1 << 23,
                                                  "on_long": "split" if form == "text" else "error"})  # fmt: skip
    program = (
        "import resource, runpy, sys; sys.argv = ['loratune', 'inspect', sys.argv[1], '--json', '-n', '1']\n"
        "try: runpy.run_module('loratune', run_name='__main__')\n"
        "finally: sys.stderr.write(str([resource.getrusage(who).ru_maxrss for who in (0, -1)]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    used = json.loads(done.stderr[done.stderr.rindex("[") :])
    assert sum(used) * 1024 < 2e9
