"""Check a chat template, a program from elsewhere: before its use it is rendered in a child process under limits.

Jinja's sandbox keeps a template from the file system and from Python, but limits neither time nor memory: nested loops,
or `'a' * 10**10`, would stop the training.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from loratune.errors import Place, Problem, SafetyError, SetupError, shorten
from loratune.models import _template_probe

LONGEST = 1_000_000  # characters of a template; the longest in use has about 30,000
_NEEDED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PATH")  # variables that some builds of Python need to start
PATIENCE = 60  # seconds for a child that has 5 seconds of CPU time, on a busy machine


def check(template: str, tokens: Mapping[str, str], place: Place, known: Path) -> None:
    """Refuse a chat template that takes too long or too much memory, writes without end, or leaves its sandbox.

    Args:
        template: its source.
        tokens: special tokens that templates may use, such as `bos_token`.
        place: of the template, for the message.
        known: folder that records templates found harmless, so that each is rendered once.

    Raises:
        SafetyError: when it is refused.
        SetupError: when no child process can be started.
    """
    about = json.dumps({"template": template, "tokens": dict(tokens)})
    program = Path(_template_probe.__file__)
    remembered = known / hashlib.sha256(program.read_bytes() + about.encode("utf-8", "surrogatepass")).hexdigest()
    if remembered.exists():
        return
    refused = "is longer than any chat template" if len(template) > LONGEST else _ask(program, about)
    if refused is not None:
        hint = "use another model, or write your own template and name it under `data.chat_template`"
        raise SafetyError(Problem(f"the chat template {shorten(refused, 200)}", place, hint))
    try:
        known.mkdir(parents=True, exist_ok=True)
        remembered.touch()
    except OSError:
        return  # not recorded: it is rendered again next time


def _ask(program: Path, about: str) -> str | None:
    """Return why a template is refused, or None."""
    try:
        # -I: nothing is imported from the working folder; hardly any environment, so nothing to leak
        done = subprocess.run(
            [sys.executable, "-I", str(program)], input=about, capture_output=True, text=True, encoding="utf-8",
            env={name: os.environ[name] for name in _NEEDED if name in os.environ}, timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"is not rendered within {PATIENCE} s"
    except OSError as error:
        raise SetupError(f"no process can be started to check the chat template: {error}") from None
    ready, _, answer = done.stdout.partition("\n")
    if ready != "ready":
        reason = shorten(done.stderr.strip().rpartition("\n")[2], 200)
        raise SetupError(f"the process that checks the chat template does not start: {reason}")
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"takes more than {_template_probe.CPU_SECONDS} s of CPU time to render a few words"
    try:
        refused = json.loads(answer)["refused"]
    except (ValueError, KeyError, TypeError):
        return "crashes the process that renders it"
    return None if refused is None else str(refused)
