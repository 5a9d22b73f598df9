"""The files of a base model, from a hub id, a folder or a .gguf file, and the checks before they are used."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from loratune.errors import ModelError, Place, Problem, SafetyError, SetupError, shorten
from loratune.models import config_files, rope_scaling, safety
from loratune.models.section import Model
from loratune.system import files

_DIGESTS: dict[tuple[Path, int, int, int], str] = {}  # by path, inode, size and modification time
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9](?:[\w.-]{0,94}\w)?", re.ASCII)
_TELLING = ("run.json", "adapter_config.json", "config.json")  # files that identify a run, adapter or model folder
_PATIENCE = 5.0  # seconds to wait for the first answer of the hub
_FORM = 2  # version of the folders made from .gguf files: older ones are converted again


def local_folder(section: Model) -> str:
    """Return the folder or hub id to load from; a .gguf file is first converted to a folder in the cache."""
    return str(from_gguf(Path(section.base))) if section.base.endswith(".gguf") else section.base


def folder_of(section: Model) -> Path:
    """Return the folder on this machine with the files of a base model that was loaded before.

    Raises:
        ModelError: when a hub model is not in the cache.
    """
    from huggingface_hub import snapshot_download

    folder = Path(local_folder(section))
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(section.base, revision=section.revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise unusable(section.base, error, "model") from None


def fetch(section: Model) -> None:
    """Download the files of a hub model that are not in the cache, without those that can hold code.

    Raises:
        ModelError: when that fails.
    """
    from huggingface_hub import snapshot_download

    if section.base.endswith(".gguf") or os.path.isabs(section.base):
        return
    try:
        snapshot_download(section.base, revision=section.revision, allow_patterns=["*.json", "*.safetensors"])
    except (OSError, ValueError) as error:
        raise unusable(section.base, error, "model") from None


def from_gguf(file: Path) -> Path:
    """Dequantize a .gguf file to a safetensors folder in the cache, once; return the folder.

    The weights are written in bfloat16. The folder's name contains the sha256 of the file, so that another file of the
    same name is never confused with it.

    Raises:
        SetupError: when the package `gguf` is missing.
        ModelError: when transformers can't read the file.
    """
    import torch
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise SetupError("a .gguf base needs the package `gguf`", "pip install 'loratune[gguf]'")
    with _opened(file) as stream:
        digest = _digest(file, stream)
    target = cache() / "gguf" / f"{file.stem}-{digest[:16]}-{_FORM}"
    if (target / "config.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        arguments: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.bfloat16}
        if "GgufConfig" in dir(transformers):  # newer releases keep the blocks packed by default
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        with contextlib.redirect_stderr(io.StringIO()):  # hides its progress bar, which can't be turned off
            model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), **arguments)
        if "quantization_config" in model.config:
            del model.config.quantization_config
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        rope_scaling.complete(model.config, file)
        model.to(torch.bfloat16).save_pretrained(staging)
        config_files.write_config(staging, None, model.config, "bfloat16")
        tokenizer.save_pretrained(staging)
        config_files.for_older_readers(staging)
        staging.rename(target)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if (target / "config.json").exists():  # another process was faster
            return target
        raise unusable(str(file), error, "model") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def _opened(file: Path) -> io.BufferedReader:
    try:
        return files.opened(file)
    except OSError as error:
        raise ModelError(Problem(f"can't be read: {error.strerror}", Place(str(file)))) from None


def _digest(file: Path, stream: io.BufferedReader) -> str:
    """Return the sha256 (hex) of a file, read only once while it is unchanged, as each checkpoint needs it."""
    about = os.fstat(stream.fileno())
    key = (file, about.st_ino, about.st_size, about.st_mtime_ns)
    if key not in _DIGESTS:
        _DIGESTS[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _DIGESTS[key]


def cache() -> Path:
    """Return the cache folder: $LORATUNE_CACHE, else loratune in the user's cache folder."""
    if os.environ.get("LORATUNE_CACHE"):
        return Path(os.environ["LORATUNE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loratune"


def check(section: Model, folder: str, trust: bool) -> None:
    """Check the files of a model before transformers reads them; those of a hub model are downloaded first.

    Raises:
        ModelError: when they can't be found or downloaded.
        SafetyError: when they would run code or refer to files outside of their folder.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if os.path.isabs(folder) and not os.path.exists(folder):
        raise ModelError(Problem("no such folder", Place(folder), "give the base's new path"))
    if Path(folder).is_dir():
        safety.check_folder(Path(folder), trust, section.attention)
        return
    _check_reachable(section, folder)
    files: dict[str, Path] = {}
    for name in safety.CONFIGS:
        try:
            files[name] = Path(hf_hub_download(folder, name, revision=section.revision))
        except (OSError, ValueError, EntryNotFoundError) as error:
            if name == "config.json" or not isinstance(error, EntryNotFoundError):
                raise unusable(section.base, error, "model") from None  # unseen files are not loaded
    safety.check_configs(files, trust, section.attention)


def check_subject(name: str, hub: bool = True) -> None:
    """Refuse a run, adapter or model that does not exist; checked before torch is imported, so that it is fast.

    Args:
        name: as it was given.
        hub: whether it may be a model of the hub.

    Raises:
        ModelError: as `check_name`.
    """
    if files.there(files.local(name)):
        return
    if not hub:
        raise ModelError(Problem("no such folder", Place(name), nearby(name) or "name a run or an adapter folder"))
    check_name(name)


def check_name(name: str) -> None:
    """Refuse a name that is neither a folder nor a possible hub id, before the hub is asked.

    Raises:
        ModelError: with the name of a similar folder, if there is one.
    """
    first = name.partition("/")[0]
    like_a_path = name.startswith((".", "/", "~")) or name.endswith(("/", ".gguf")) or name.count("/") > 1
    if like_a_path or not _HUB_ID.fullmatch(name) or "--" in name or ".." in name:
        raise ModelError(Problem("no such folder", Place(name), nearby(name)))
    if "/" in name and Path(first).is_dir():
        hint = nearby(name) or f"`{first}` is a folder here; a model on the hub is named OWNER/NAME"
        raise ModelError(Problem("no such folder", Place(name), hint))


def nearby(name: str) -> str | None:
    """Return a hint with the run, adapter or model folder whose name is most similar to a missing one."""
    path = files.local(name)
    try:
        folders = [file.name for file in path.parent.iterdir() if any((file / one).is_file() for one in _TELLING)]
    except (OSError, ValueError):
        return None
    close = difflib.get_close_matches(path.name, folders, 1)
    return f"did you mean `{path.parent / close[0]}`?" if close else None


def _check_reachable(section: Model, folder: str) -> None:
    """Ask the hub once, with a short timeout, whether it has a model that is not in the cache.

    Without this a mistyped name, or a machine without a network, costs half a minute of retries.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.is_offline_mode() or isinstance(
        try_to_load_from_cache(folder, "config.json", revision=section.revision), str
    ):
        return
    try:
        HfApi().model_info(folder, revision=section.revision, timeout=_PATIENCE)
    except (HfHubHTTPError, HFValidationError) as error:
        raise unusable(section.base, error, "model") from None
    except Exception as error:  # network errors: the client raises dozens of classes
        told = f"no such folder, and the hub can't be asked for it ({type(error).__name__})"
        raise ModelError(Problem(told, Place(section.base), nearby(section.base))) from None


def unusable(base: str, error: Exception, what: str) -> ModelError | SafetyError:
    """Return the error for the user after transformers or the hub failed to load `what`."""
    from huggingface_hub import is_offline_mode

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    if "trust_remote_code" in str(error):
        remedy = "use a model that transformers supports, or read that code and give --trust-remote-code"
        return SafetyError(Problem("the model wants to run its own code", Place(base), remedy))
    if "does not appear to have a file named model.safetensors" in str(error):
        return SafetyError(Problem("it has no safetensors; a pickle can run code", Place(base), safety.CONVERT))
    hint = None
    if not Path(base).is_absolute():
        hint = nearby(base) or "there is no such folder either; paths in a recipe are relative to it"
        if is_offline_mode():
            hint = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: only models in the local cache can be used"
    return ModelError(Problem(f"the {what} can't be loaded: {shorten(reason, 300)}", Place(base), hint))
