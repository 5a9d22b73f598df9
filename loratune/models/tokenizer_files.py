"""A tokenizer's files: those of the base, byte for byte, except for a changed chat template or padding token.

transformers 5 writes a tokenizer in a form that older versions can't load, and omits files (vocabulary, merges,
sentencepiece model). Training changes nothing but these, so nothing else is rewritten.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loratune.models import config_files, fingerprint, safety
from loratune.system import run_files

CONFIG, TEMPLATE, TEMPLATES = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
MAP = "special_tokens_map.json"
_OLD_TEMPLATE = "chat_template.json"  # written with processors of older models
PATTERNS = (*run_files.TOKENIZER, *run_files.TEMPLATES)


def write(target: Path, source: Path, tokenizer: Any, alone: bool, padding: bool = False) -> None:
    """Write a tokenizer's files into a folder.

    Args:
        target: folder of an adapter or a full model.
        source: folder the tokenizer was loaded from; its files are copied.
        tokenizer: as it was trained with.
        alone: whether there is no config.json beside them, which may name the tokenizer's class.
        padding: whether its padding token was chosen, see `score_head.choose_padding`, and is written.
    """
    clear(target)
    if not any(_found(source, run_files.TOKENIZER)):
        tokenizer.save_pretrained(target)
        config_files.for_older_readers(target)
        return
    own = template_of(source)
    changed = _normal(tokenizer.chat_template) != own
    for file in _found(source, run_files.TOKENIZER if changed else PATTERNS):
        place = target / file.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
    if changed:
        _write_template(target, source, tokenizer.chat_template)
    if padding and tokenizer.pad_token not in (None, *_padding(target)):
        _write_padding(target, str(tokenizer.pad_token))
    if alone and (target / "tokenizer.json").is_file():
        _name_class(target, tokenizer)


def clear(folder: Path) -> None:
    """Delete a tokenizer's files from a folder, so that none of another one remains."""
    for file in [*_found(folder, PATTERNS)]:
        file.unlink()


def template_of(folder: Path) -> dict[str, str]:
    """Return the chat templates in a tokenizer's files, by name; `default` is the one used when none is named."""
    if (folder / TEMPLATE).is_file():
        more = {file.stem: file.read_text(encoding="utf-8") for file in (folder / TEMPLATES).glob("*.jinja")}
        return {**more, "default": (folder / TEMPLATE).read_text(encoding="utf-8")}
    if (folder / CONFIG).is_file():
        return _normal(safety.read_object(folder / CONFIG).get("chat_template"))
    return {}


def _write_template(target: Path, source: Path, template: Any) -> None:
    """Write a chat template to the place where the source has its own, else to the file that all programs read."""
    named = _normal(template)
    if (source / TEMPLATE).is_file():
        (target / TEMPLATE).write_bytes(named.get("default", "").encode())  # as bytes: its line ends are part of it
    if (source / _OLD_TEMPLATE).is_file():
        config_files.write(target / _OLD_TEMPLATE, {"chat_template": named.get("default", "")})
    config = safety.read_object(target / CONFIG) if (target / CONFIG).is_file() else {}
    if "chat_template" in config or not (source / TEMPLATE).is_file():
        several = [{"name": name, "template": text} for name, text in named.items()]
        config_files.write(
            target / CONFIG, {**config, "chat_template": template if isinstance(template, str) else several}
        )


def _padding(folder: Path) -> list[str]:
    """Return the padding tokens that a tokenizer's files name: one, if they agree."""
    named = [safety.read_object(folder / name).get("pad_token") for name in (CONFIG, MAP) if (folder / name).is_file()]
    return [one["content"] if isinstance(one, dict) else one for one in named if one is not None]


def _write_padding(target: Path, token: str) -> None:
    """Write a padding token into the files that name one."""
    for name in (CONFIG, MAP):
        if (target / name).is_file() or name == CONFIG:
            known = safety.read_object(target / name) if (target / name).is_file() else {}
            config_files.write(target / name, {**known, "pad_token": token})


def _name_class(target: Path, tokenizer: Any) -> None:
    """Set a class in tokenizer_config.json with which the files alone load as the same tokenizer.

    Without config.json some programs choose another class, which may split texts differently.
    """
    config = safety.read_object(target / CONFIG) if (target / CONFIG).is_file() else {}
    if config.get("tokenizer_class") and _is_same(target, tokenizer):
        return
    config_files.write(target / CONFIG, {**config, "tokenizer_class": config_files.GENERIC})
    if not _is_same(target, tokenizer):
        clear(target)
        tokenizer.save_pretrained(target)
        config_files.for_older_readers(target)


def _is_same(folder: Path, tokenizer: Any) -> bool:
    """Return whether a folder's files, read alone, load as the given tokenizer."""
    from transformers import AutoTokenizer

    if "auto_map" in safety.read_object(folder / CONFIG):
        return True  # its own code would have to run
    try:
        found = fingerprint.of_tokenizer(AutoTokenizer.from_pretrained(folder))
    except Exception:  # foreign files: what can't be read is not the same
        return False
    return found["sha256"] == fingerprint.of_tokenizer(tokenizer)["sha256"]


def _normal(template: Any) -> dict[str, str]:
    """Return chat templates by name, from any of the forms in which tokenizers store them."""
    if isinstance(template, list):
        return {str(one["name"]): one["template"] for one in template}
    if isinstance(template, dict):
        return dict(template)
    return {"default": template} if template else {}


def _found(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files of a folder that match any pattern, each once."""
    seen: set[Path] = set()
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file not in seen:
                seen.add(file)
                yield file
