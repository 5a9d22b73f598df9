"""Load a saved adapter on a base model, with every check, and without a trace where it does not fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from loratune.errors import LoratuneError, ModelError, Place, Problem, shorten
from loratune.methods import adapter_files, targets
from loratune.models import fingerprint, safety, score_head


def attach(net: Any, folder: Path, name: str) -> Any:
    """Load an adapter on a base model (or one more on a PeftModel) under a name; return the PeftModel.

    Raises:
        ModelError: when its tensors don't fit the base, one is missing, too many or not finite, or it changes nothing.
        SafetyError: when it is a pickle, or its config would run or download code.
    """
    import torch

    from loratune.kernels import torch_compile

    with torch_compile.later():
        from peft import PeftConfig, PeftModel

        from loratune.kernels import lora_linear

    adapter_files.check(folder)
    file = folder / "adapter_config.json"
    targets.check_expressions(safety.read_object(file), [one for one, _ in net.named_modules()], Place(str(file)))
    known = isinstance(net, PeftModel)
    if known and (other := str(net.active_peft_config.peft_type.value)) != (
        kind := str(safety.read_object(file)["peft_type"])
    ):
        told = f"is an adapter of type {kind}, and one of type {other} is loaded: PEFT can't hold both"
        raise ModelError(Problem(told, Place(str(folder)), "open it alone"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of missing tensors: `check_complete` refuses them
            if known:
                net.load_adapter(str(folder), adapter_name=name)
            else:
                config = PeftConfig.from_pretrained(str(folder))
                own = config.peft_type == "LORA" and not lora_linear.misfits(net)
                if config.task_type == "SEQ_CLS":
                    score_head.load(net, folder / adapter_files.TENSORS, fingerprint.head(folder))
                    config.task_type = "CAUSAL_LM"  # the head stands beside the language model's
                if own:
                    lora_linear.replace_layers(config)
                net = PeftModel.from_pretrained(net, str(folder), adapter_name=name, config=config)
                if own:
                    lora_linear.join(net)
        adapter_files.check_complete(net, folder, name)
    except BaseException as error:  # foreign files: PEFT can fail on them in any way
        _detach(net, name, known)
        if isinstance(error, (LoratuneError, torch.OutOfMemoryError)) or not isinstance(error, Exception):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = shorten(" ".join(lines[:2]), 300)
        raise ModelError(Problem(f"the adapter does not fit this base: {reason}", Place(str(folder)))) from None
    return net


def _detach(net: Any, name: str, known: bool) -> None:
    """Remove the parts of an adapter that failed to load, so that the model is as before."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if known:
        if name in net.peft_config:
            net.delete_adapter(name)
        return
    for place, module in list(net.named_modules()):
        inner = None
        if isinstance(module, BaseTunerLayer):
            inner = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner = module.original_module
        if inner is not None:
            parent, _, child = place.rpartition(".")
            net.get_submodule(parent).register_module(child, inner)
