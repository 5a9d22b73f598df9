"""What is set in this process and in other libraries before they do anything: each with its reason."""

from __future__ import annotations

import logging
import os
import sys
import warnings

_PRODUCTS = 64  # kinds of matrix products oneDNN keeps ready: more than one pass over a layer has


def training() -> None:
    """Set all that a training needs."""
    quiet()
    keep_few_products()
    expand_segments()


def quiet() -> None:
    """Keep libraries from writing between our lines; what matters of theirs is told by us."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns; nothing here forks
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("bitsandbytes", "huggingface_hub"):  # a missing optional kernel, retries while offline
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|accelerate)\b.*")


def keep_few_products() -> None:
    """Let oneDNN keep few matrix products ready; to be called before the first.

    Each is made for a number of tokens and takes 0.6 MB, nearly every step has another number, and on its own oneDNN
    keeps a thousand twice: between the places of activations, which then don't fit there any more.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(_PRODUCTS))


def expand_segments() -> None:
    """Let torch's allocator grow its segments; to be called before a GPU is first used.

    Nearly every step has another number of tokens, so each activation another size: in segments of fixed sizes up to
    half a gigabyte of an 8B model's training would lie in pieces too small for the next. Not on Windows and with ROCm,
    where torch has them in part or not at all, and warns.
    """
    import torch

    able = sys.platform != "win32" and torch.version.hip is None
    if able and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
