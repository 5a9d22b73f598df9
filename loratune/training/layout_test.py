"""Whether a model keeps packed rows apart, and may share what they have in common: found out by trying it."""

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

LENGTH = 48  # tokens of a row of the self-test, where the model looks at all of it
LOOKED_AT = 48  # first and last tokens of a row whose logits are compared
# how far logits may lie apart, relative: when the row before changes; packed and alone
TOLERANCES = {"float32": (1e-4, 1e-3), "half": (1e-2, 5e-2)}
LEAST = 0.02  # part of the tokens of a step that sharing must save, to be worth its index
KERNELS = 0.2  # how far two kernels' rounding in 16 bit may bring logits apart, relative: 4-6 % over 30 layers
NOISE = 2  # times as far as a row is by other kernels without packing, it may be in a pack


@dataclass(frozen=True)
class Packing:
    """How the rows of a step are put together.

    Attributes:
        layout: side by side, padded to the longest; or in packs.
        by: the attention that keeps them apart: `rows` (ours) or `mask` (the model's own, told by positions).
        why_not: packing was not chosen because of this.
        why_not_shared: nor sharing because of this.
        saved: part (0-1) of the tokens of a step that need not be computed as rows share; 0 where they don't.
        missed: part (0-1) of them that need not be, could rows share as they were to.
        why_mask: why a mask keeps rows apart where our attention was to; a mask takes every pair of tokens.
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
        """Whether rows stand behind one another, sharing or not."""
        return self.layout != "padded"


def choose(recipe: Recipe, loaded: Loaded, net: Any, rows: Rows, accelerator: Accelerator) -> Packing:
    """Decide whether rows are packed and share what they have in common; leave the model with the attention for it.

    A self-test decides, not a list of models: see `why_not`. Every process comes to the same answer.

    Args:
        recipe: its `data.packing` and `data.prefix_sharing`: on insists, auto does it where it is exact and pays, off
            never.
        loaded: the base model.
        net: the base with what is trained on it.
        rows: to train on; the self-test is made of their tokens.
        accelerator: precision and the other processes.

    Raises:
        ModelError: when one of them is on and can't be done.
    """
    wish, shared = recipe.data.packing, recipe.data.prefix_sharing
    if wish == "off":
        found = Packing("padded", why_not="data.packing: off", why_not_shared="data.packing: off")
    elif recipe.method.padded_only:
        reason = f"`method: {recipe.method.type}` puts something before each row"
        found = Packing("padded", why_not=reason, why_not_shared=reason)
    elif loaded.quantization == "int8":  # LLM.int8() chooses outlier columns over all tokens at once
        reason = "int8 rounds all rows of a micro-batch together"
        found = Packing("padded", why_not=reason, why_not_shared=reason)
    else:
        found = _tried(recipe, loaded, net, rows, accelerator)
    if wish == "on" and not found.packed:
        raise _refused(recipe, "data.packing", f"this model does not keep packed rows apart: {found.why_not}")
    if shared == "on" and found.layout != "shared":
        raise _refused(recipe, "data.prefix_sharing", f"rows can't share what they begin with: {found.why_not_shared}")
    return found


def _refused(recipe: Recipe, key: str, reason: str) -> ModelError:
    return ModelError(Problem(f"`{key}: on`, and {reason}", Place(recipe.model.base), f"set {key}: auto or off"))


def shareable(recipe: Recipe, rows: Rows, device: str, world: int) -> tuple[float, str]:
    """Return what part of the tokens sharing would save, and why it is not done, whatever the self-test would say.

    The part is 0 where nobody would want it.
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
        return 0.0, f"the rows of a step have too little in common ({100 * saved:.1f} % of their tokens)"
    return saved, "neftune draws noise for each row apart" if recipe.objective.is_noisy else ""


def why_not(
    net: Any, rows: tuple[Row, Row, Row], alone: torch.Tensor,
    autocast: Callable[[], AbstractContextManager[Any]], rounding: str, layout: Layout = "packed",
) -> str:  # fmt: skip
    """Return why packed rows don't stay apart in a model, or nothing when they do.

    A row's logits must be those of the row alone, to what another order of summing explains: hardly anything in
    float32, which says all. In 16 bit it explains more. So there, with the row before it exchanged for another of the
    same length, they must stay the same as well: kernels and shapes are the same, so hardly a bit may change; and
    logits that are off by other kernels are told from packing by the row alone in the attention, and by the row beside
    another in a padded batch, whose products round otherwise, too.
    Rows that share must not hide what is drawn at random for each of them.

    Args:
        net: the model, with the attention to be tried.
        rows: two of one length, and the one that stands behind either.
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
            return "it draws something at random for each token (dropout), and for each row apart"
        off = _distance(behind, alone)
        if rounding == "float32" and float(off.max()) <= leak:  # it makes no difference whether a row stands before
            return ""
        other, _ = _logits(net, [before, second], autocast, layout)
    except torch.OutOfMemoryError:
        raise
    except (packed_attention.Unfit, TypeError, ValueError, RuntimeError) as error:  # whatever a model or kernel refuses
        if isinstance(error, TypeError) and packed_attention.is_ours(error):
            raise
        return (str(error).splitlines() or [type(error).__name__])[0]
    seen = float(_distance(other, behind).max())
    if not seen <= leak:
        return f"a row's logits change by {seen:.1%} with the row before it"
    # in 16 bit a few tokens may choose other experts: the middle one of the later tokens tells
    found = float(off.max() if rounding == "float32" else off[-len(off) // 2 :].median())
    if found <= apart:
        return ""
    if rounding == "half" and found <= KERNELS:  # by the packing, or by other kernels, which round a row as well?
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
    """Return why packed rows give no gradient, or nothing when they do: some kernels lack a backward pass for a width.

    Args:
        net: the model, with the attention to be tried.
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
    """Try our attention, then the model's own; return the first that keeps rows apart."""
    own = str(loaded.model.config._attn_implementation)
    half = loaded.dtype is not torch.float32 or accelerator.mixed_precision != "no"
    made = _rows(rows, recipe.data.max_length, loaded.model.config)
    alone, _ = _logits(net, [made[-1]], accelerator.autocast, "padded")
    saved, unshared = shareable(recipe, rows, accelerator.device.type, accelerator.num_processes)
    ways: list[tuple[str, str, Layout]] = []
    if recipe.model.attention in ("auto", "sdpa") and (half or loaded.device.type == "cpu"):
        layouts: list[Layout] = ["packed"] if unshared else ["shared", "packed"]
        ways += [("rows", packed_attention.NAME, layout) for layout in layouts]
    if own != "eager" or recipe.data.packing == "on":  # eager computes every pair of tokens: padding costs less
        ways.append(("mask", own, "packed"))
    reasons: dict[str, str] = {}  # why each layout was not chosen, by the first attention that was tried
    packed_attention.register()
    for by, name, layout in ways:
        loaded.model.set_attn_implementation(name)
        if loaded.model.config._attn_implementation != name:
            told = ["its attention can't be exchanged"]
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
            unshared = unshared or reasons.get("shared", f"`{own}` attention can't be told what rows share")
            why_mask = reasons.get("packed", "") if by == "mask" else ""
            return Packing(layout, by, why_not_shared=unshared, missed=saved, why_mask=why_mask)
    loaded.model.set_attn_implementation(own)
    reason = reasons.get("packed", f"`{own}` attention costs more for packs than for rows")
    return Packing("padded", why_not=reason, why_not_shared=reason)


def _rows(rows: Rows, max_length: int, config: Any) -> tuple[Row, Row, Row]:
    """Return three rows made of the tokens of real ones: two of one length, and one longer than any window.

    They begin alike, so that a layout which shares has something to share.
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
    """Return logits of the first and last tokens of the last row but its very last, float32, (tokens, words).

    They are those of a training, unless it draws something at random (dropout): then those of an evaluation, and True.
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
    """Return how far logits lie from others at each token, relative to how much these vary over the words."""
    apart = torch.linalg.vector_norm(one - other, dim=-1)
    spread = torch.linalg.vector_norm(other - other.mean(dim=-1, keepdim=True), dim=-1)
    relative: torch.Tensor = apart / spread.clamp_min(torch.finfo(torch.float32).tiny)
    return relative
