"""Hide secrets: tokens, passwords in URLs, and environment variables with such names.

Every message, log line and text file passes through `redact`; a recipe that holds a secret is refused
(`config/decode.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from urllib.parse import quote

HIDDEN = "***"
SHORTEST = 8  # characters of an environment variable's value to be hidden: shorter ones are words like `true`
_NAMES = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_FIELD = r"(?:[\w-]*[_-])?(?:password|passwd|passphrase|secret|api[_-]?key|access[_-]?key|private[_-]?key|auth)|token"
_SECRET_KEY = re.compile(
    rf"(?:{_FIELD}|(?:hf|hub|huggingface|wandb|auth|access|api|use_auth)[_-]?token)", re.IGNORECASE
)
_SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        hf_[A-Za-z0-9]{16,}                                     # Hugging Face
      | (?:api_org_)[A-Za-z0-9]{16,}
      | sk-(?=[\w-]*[0-9])[A-Za-z0-9_-]{16,}                    # OpenAI, Anthropic and those who follow them
      | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,}
      | glpat-[A-Za-z0-9_-]{16,}
      | (?:AKIA|ASIA)[A-Z0-9]{16}                               # Amazon
      | AIza[A-Za-z0-9_-]{30,}                                  # Google
      | xox[abeoprs]-[A-Za-z0-9-]{10,}                          # Slack
      | eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]*)?   # a signed JSON token
    ) | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----[^-]*""",
    re.VERBOSE,
)
_IN_URL = re.compile(r"(?<=://)[^\s/@'\"`]+(?=@)")
_IN_QUERY = re.compile(
    r"(?<=[?&])((?:[\w-]*(?:token|secret|password|signature|credential|key)|sig)=)[^\s&'\"`]+", re.IGNORECASE
)
_IN_LINE = re.compile(rf"(?<![\w-])((?:{_SECRET_KEY.pattern})[\"']?\s*[:=]\s*[\"']?)([^\s\"',}}]{{6,}})", re.IGNORECASE)


def redact(text: str) -> str:
    """Return text with every secret in it hidden."""
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(HIDDEN, _SHAPES.sub(HIDDEN, text))
    return _IN_QUERY.sub(rf"\1{HIDDEN}", text)


def redact_line(text: str) -> str:
    """Return a line of a recipe with its secrets hidden, also the value of a key such as `password`."""
    return _IN_LINE.sub(rf"\1{HIDDEN}", redact(text))


def names_secret(key: str) -> bool:
    """Return whether a key names a secret, such as `hf_token` or `password`, and not `num_memory_tokens`."""
    return _SECRET_KEY.fullmatch(key) is not None


def looks_secret(value: str) -> bool:
    """Return whether a value is, or contains, a token or a URL with a password."""
    return bool(_SHAPES.search(value) or _IN_URL.search(value) or _IN_QUERY.search(value))


def _of_environment() -> Iterator[str]:
    """Yield values of environment variables named like secrets, plain and as JSON, Python and URLs encode them."""
    for name, value in os.environ.items():
        if len(value) < SHORTEST or not _NAMES.search(name) or (value.startswith("/") and os.path.exists(value)):
            continue
        yield from dict.fromkeys((value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value, safe="")))
