"""Self-tests before training: does a model keep packed rows separate, and is prefix sharing exact on it?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from loratune.data import batches, prefix_sharing
from loratune.data.collate import collate
from loratune.data.dataset import Rows
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import single
from loratune.errors import ModelError, Place, Problem
from loratune.kernels import packed_attention
from loratune.models.base_model import Loaded
from loratune.models.policy import Policy
from loratune.recipe import Recipe

LENGTH = 48  # tokens of a row of the self-test, for a model without a sliding window
LOOKED_AT = 48  # first and last tokens of a row whose logits are compared
# allowed relative difference of logits: when the preceding row changes; between packed and alone
TOLERANCES = {"float32": (1e-4, 1e-3), "half": (1e-2, 5e-2)}
LEAST = 0.02  # fraction of the tokens of a step that prefix sharing must save to be worth its overhead
KERNELS = 0.2  # largest relative difference of logits that two kernels' 16-bit rounding may cause: 4-6 % over 30 layers
NOISE = 2  # times the difference that other kernels cause without packing: a packed row may differ by so much


@dataclass(frozen=True)
class Packing:
    """How the rows of a step are put together.

    Attributes:
        layout: padded to the longest row, or packed.
        by: the attention that separates rows: `rows` (ours) or `mask` (the model's own, which sees positions restart).
        why_not: why rows are not packed.
        why_not_shared: why common prefixes are not shared.
        saved: fraction (0-1) of the tokens of a step that prefix sharing saves; 0 without it.
        missed: fraction (0-1) of them that prefix sharing would save, were it possible.
        why_mask: why a mask is used instead of our attention; with a mask all pairs of tokens are computed.
    """

    layout: Layout
    by: str = ""
    why_not: str = ""
    why_not_shared: str = ""
    saved: float = 0.0
    missed: float = 0.0
    why_mask: str = ""

    @property
    def packed(self) -> bool:
        """Whether rows are packed, with prefix sharing or without."""
        return self.layout != "padded"


def choose(recipe: Recipe, loaded: Loaded, net: Any, rows: Rows, accelerator: Accelerator) -> Packing:
    """Decide on packing and prefix sharing, and set the model's attention accordingly.

    A self-test decides, not a list of models: see `why_not`. All processes get the same answer.

    Args:
        recipe: its `data.packing` and `data.prefix_sharing`: `on` requires it, `auto` does it where it is exact and
            worth it, `off` never does.
        loaded: the base model.
        net: the base with what is trained on it.
        rows: to train on; the self-test uses their tokens.
        accelerator: precision and the other processes.

    Raises:
        ModelError: when one of them is `on` and not possible.
    """
    wish, shared = recipe.data.packing, recipe.data.prefix_sharing
    if wish == "off":
        found = Packing("padded", why_not="data.packing: off", why_not_shared="data.packing: off")
    elif recipe.method.padded_only:
        reason = f"`method: {recipe.method.type}` puts virtual tokens before each row"
        found = Packing("padded", why_not=reason, why_not_shared=reason)
    elif loaded.quantization == "int8":  # LLM.int8() chooses outlier columns over all tokens at once
        reason = "int8 rounds all rows of a micro-batch together"
        found = Packing("padded", why_not=reason, why_not_shared=reason)
    else:
        found = _tried(recipe, loaded, net, rows, accelerator)
    if wish == "on" and not found.packed:
        raise _refused(recipe, "data.packing", f"this model does not keep packed rows apart: {found.why_not}")
    if shared == "on" and found.layout != "shared":
        raise _refused(recipe, "data.prefix_sharing", f"prefix sharing is not possible: {found.why_not_shared}")
    return found


def _refused(recipe: Recipe, key: str, reason: str) -> ModelError:
    return ModelError(Problem(f"`{key}: on`, but {reason}", Place(recipe.model.base), f"set {key}: auto or off"))


def shareable(recipe: Recipe, rows: Rows, device: str, world: int) -> tuple[float, str]:
    """Return the fraction (0-1) of tokens that prefix sharing would save, and a reason against it or nothing.

    The self-test is not considered here. The fraction is 0 where prefix sharing is off or not worth it.
    """
    wish = recipe.data.prefix_sharing
    if wish == "off":
        return 0.0, "data.prefix_sharing: off"
    settings, budget = recipe.train, batches.AUTO_TOKENS[device]
    saved = batches.saved(
        rows,
        settings.batch_size,
        settings.micro_batch_size,
        settings.seed,
        budget,
        rows.per_sample * recipe.data.max_length,
        world,
    )
    if wish == "auto" and saved < LEAST:
        return 0.0, f"the rows of a step share too few tokens ({100 * saved:.1f} %)"
    return saved, "neftune draws noise for each row separately" if recipe.objective.is_noisy else ""


def why_not(
    net: Any, rows: tuple[Row, Row, Row], alone: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[Any]], rounding: str, layout: Layout = "packed",
) -> str:  # fmt: skip
    """Return why a model does not keep packed rows separate, or nothing when it does.

    A row's logits must be those of the row alone, up to rounding from another order of sums. In float32 that is next to
    nothing, and this one comparison decides. In 16 bits rounding is larger, so there is a second one: when the
    preceding row is replaced by another of the same length, the logits must not change. Kernels and shapes are the same
    then, so hardly a bit may differ. Where logits are off, two runs without packing show whether other kernels are the
    cause: the row alone in the tested attention, and the row with another one in a padded batch.
    Prefix sharing is refused where something random is drawn for each row (dropout).

    Args:
        net: the model, set to the attention to test.
        rows: two of the same length, and a third that is packed behind either.
        alone: logits of the last row, by the model's own attention.
        autocast: context of mixed precision.
        rounding: a key of TOLERANCES.
        layout: of the packs.
    """
    first, before, second = rows
    leak, apart = TOLERANCES[rounding]
    try:
        behind, drew = _logits(net, [first, second], autocast, layout)
        if drew and layout == "shared":
            return "it draws random numbers (dropout) for each row separately"
        off = _distance(behind, alone)
        if rounding == "float32" and float(off.max()) <= leak:  # a preceding row makes no difference
            return ""
        other, _ = _logits(net, [before, second], autocast, layout)
    except torch.OutOfMemoryError:
        raise
    except (packed_attention.Unfit, TypeError, ValueError, RuntimeError) as error:  # all that models and kernels raise
        if isinstance(error, TypeError) and packed_attention.is_ours(error):
            raise
        return (str(error).splitlines() or [type(error).__name__])[0]
    seen = float(_distance(other, behind).max())
    if not seen <= leak:
        return f"a row's logits change by {seen:.1%} with the row before it"
    # in 16 bits a few tokens may be routed to other experts: so the median over the later tokens
    found = float(off.max() if rounding == "float32" else off[-len(off) // 2 :].median())
    if found <= apart:
        return ""
    if rounding == "half" and found <= KERNELS:  # by packing, or by other kernels, which round a row alone as well?
        by_itself, _ = _logits(net, [second], autocast, layout)
        beside, _ = _logits(net, [first, second], autocast, "padded")
        noise = [_distance(one, alone)[-len(off) // 2 :].median() for one in (by_itself, beside)]
        if found <= NOISE * float(max(noise)):
            return ""
    return f"a row's logits are {found:.1%} off when it is packed"


def why_no_gradient(
    net: Any, rows: tuple[Row, Row, Row], autocast: Callable[[], AbstractContextManager[Any]],
    layout: Layout,
) -> str:  # fmt: skip
    """Return why the backward pass of packed rows fails, or nothing: some kernels have none for a head size.

    Args:
        net: the model, set to the attention to test.
        rows: as for `why_not`.
        autocast: context of mixed precision.
        layout: of the packs.
    """
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    net.train()
    try:
        with torch.enable_grad(), autocast():
            total = Policy(net).cross_entropy(collate(single(rows[1:]), layout).to(trained[0].device))
        torch.autograd.grad(total, trained, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


def _tried(recipe: Recipe, loaded: Loaded, net: Any, rows: Rows, accelerator: Accelerator) -> Packing:
    """Try our attention, then the model's own; return the first that keeps rows separate."""
    own = str(loaded.model.config._attn_implementation)
    half = loaded.dtype is not torch.float32 or accelerator.mixed_precision != "no"
    made = _rows(rows, recipe.data.max_length, loaded.model.config)
    alone, _ = _logits(net, [made[-1]], accelerator.autocast, "padded")
    saved, unshared = shareable(recipe, rows, accelerator.device.type, accelerator.num_processes)
    ways: list[tuple[str, str, Layout]] = []
    if recipe.model.attention in ("auto", "sdpa") and (half or loaded.device.type == "cpu"):
        layouts: list[Layout] = ["packed"] if unshared else ["shared", "packed"]
        ways += [("rows", packed_attention.NAME, layout) for layout in layouts]
    if own != "eager" or recipe.data.packing == "on":  # eager computes all pairs of tokens: padding is cheaper
        ways.append(("mask", own, "packed"))
    reasons: dict[str, str] = {}  # why each layout was rejected, with the first attention that was tried
    packed_attention.register()
    for by, name, layout in ways:
        loaded.model.set_attn_implementation(name)
        if loaded.model.config._attn_implementation != name:
            told = ["its attention can't be replaced"]
        else:
            rounding = "half" if half else "float32"
            reason = why_not(net, made, alone, accelerator.autocast, rounding, layout)
            if not reason and by == "rows" and loaded.device.type == "cuda":
                reason = why_no_gradient(net, made, accelerator.autocast, layout)
            told = [reason for reason in gather_object([reason]) if reason]  # all processes must decide alike
        if told:
            reasons.setdefault(layout, told[0])
        elif layout == "shared":
            return Packing(layout, by, saved=saved)
        else:
            unshared = unshared or reasons.get("shared", f"`{own}` attention does not support prefix sharing")
            why_mask = reasons.get("packed", "") if by == "mask" else ""
            return Packing(layout, by, why_not_shared=unshared, missed=saved, why_mask=why_mask)
    loaded.model.set_attn_implementation(own)
    reason = reasons.get("packed", f"`{own}` attention costs more for packs than for rows")
    return Packing("padded", why_not=reason, why_not_shared=reason)


def _rows(rows: Rows, max_length: int, config: Any) -> tuple[Row, Row, Row]:
    """Return three rows of real tokens: two of the same length, and one longer than any sliding window.

    They have a common prefix, so that prefix sharing is tested.
    """
    known = config.get_text_config().to_dict()
    windows = [
        value for name, value in known.items() if ("window" in name or "chunk" in name) and isinstance(value, int)
    ]
    longest = max([LENGTH, *(2 * window for window in windows if window < max_length)])
    tokens = np.unique(np.concatenate([rows[i].ids for i in range(min(len(rows), 64))]))
    random = np.random.default_rng(0)
    place = rows[0].place

    alike = random.choice(tokens, min(LENGTH, max_length) // 4)

    def made(length: int) -> Row:
        length = max(2, min(length, max_length))
        ids = np.concatenate([alike, random.choice(tokens, length)])[:length]
        return Row(ids.astype(np.int32), np.ones(length, dtype=bool), place)

    return made(LENGTH // 2 + 1), made(LENGTH // 2 + 1), made(longest)


def _logits(
    net: Any, rows: list[Row], autocast: Callable[[], AbstractContextManager[Any]], layout: Layout
) -> tuple[torch.Tensor, bool]:
    """Return logits of the first and last tokens of the last row, without its very last: float32, (tokens, vocabulary).

    They are computed in training mode; where that is random (dropout), in evaluation mode, and True is returned, too.
    """
    device = next(net.parameters()).device
    inputs = collate(single(rows), layout).to(device).inputs
    if layout == "shared":
        places = prefix_sharing.lay(rows).places[-1]  # the very last token is not among them
    else:
        count = len(rows[-1].ids)
        places = np.arange(inputs["input_ids"].numel() - count, inputs["input_ids"].numel() - 1)
    chosen = torch.from_numpy(np.union1d(places[:LOOKED_AT], places[-LOOKED_AT:])).to(device)

    def made(training: bool) -> torch.Tensor:
        net.train(training)
        with torch.no_grad(), autocast():
            return Policy(net).logits_at(inputs, chosen).float()

    before = _randomness(net)
    logits = made(training=True)
    drew = not torch.equal(before, _randomness(net))
    return (made(training=False) if drew else logits), drew


def _randomness(net: Any) -> torch.Tensor:
    """Return the state of the random numbers of a model's device."""
    device = next(net.parameters()).device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the difference of logits at each token, relative to their spread over the vocabulary."""
    apart = torch.linalg.vector_norm(one - other, dim=-1)
    spread = torch.linalg.vector_norm(other - other.mean(dim=-1, keepdim=True), dim=-1)
    relative: torch.Tensor = apart / spread.clamp_min(torch.finfo(torch.float32).tiny)
    return relative
