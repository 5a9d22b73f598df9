"""Attention that keeps the rows of a pack apart, put in through transformers' own interface."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.kernels import cpu_attention, gpu_kernels

NAME = "loratune_rows"  # of this attention among transformers'

# what models hand on to their attention though it changes no score
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions",
    "output_hidden_states", "output_router_logits", "num_items_in_batch", "return_dict",
}  # fmt: skip


class Unfit(Exception):
    """A model's attention wants something that this one can't give row by row; the text says what."""


def is_ours(error: BaseException) -> bool:
    """Return whether an error was raised in or below this attention: a TypeError there is a wrong call of ours."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == __file__:
            return True
        frame = frame.tb_next
    return False


def register() -> None:
    """Make this attention known to transformers under NAME, beside its own."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, sliding_window: int | None = None, cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None, cu_seq_lens_k: torch.Tensor | None = None, max_length_k: int | None = None,
    key_places: torch.Tensor | None = None, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend within each row of a pack; where nothing is packed this is transformers' sdpa.

    On a GPU all rows go through one kernel: torch's variable-length attention, or where they are of one length and have
    nothing in common cuDNN's, if a training found it right (`gpu_kernels`). On a CPU through products over tiles or the
    kernel behind sdpa; with dropout or a window each row through its own scaled_dot_product_attention.

    Args:
        module: the layer that calls.
        query: (batch, heads, tokens, width); a pack has batch 1.
        key: (batch, heads or fewer, tokens, width).
        value: as `key`.
        attention_mask: of transformers; None for a pack, unless it had to be written out.
        dropout: part (0-1) of the scores left out.
        scaling: of the scores; None for 1 / sqrt(width).
        is_causal: as for sdpa.
        sliding_window: how many tokens a token sees, itself included; None for all before it.
        cu_seq_lens_q: where the own tokens of each row of the pack begin, and the last end, int32, (rows + 1,).
        max_length_q: most own tokens of a row.
        cu_seq_lens_k: where each row begins in `key_places`, and the last ends, int32, (rows + 1,).
        max_length_k: length of the longest row in tokens.
        key_places: where all tokens of each row stand in the pack, int64, (tokens of all rows,): there first those that
            it has in common with rows before it, then its own; None for rows that have none in common.
        others: whatever else the model hands to its attention.

    Returns:
        (batch, tokens, heads, width), and None for the weights.

    Raises:
        Unfit: when something in `others` would change the scores of a pack.
    """
    sdpa = AttentionInterface()["sdpa"]
    if cu_seq_lens_q is None or attention_mask is not None:  # a mask that was written out keeps the rows apart itself
        return sdpa(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    for name, given in others.items():
        if name not in _HARMLESS and given is not None and given is not False:
            raise Unfit(f"its attention takes `{name}`, which packed rows can't be given")
    assert len(query) == 1, "a pack is one sequence"
    if query.is_cuda:
        if dropout:
            raise Unfit("its attention has dropout, which the kernel for packed rows has not")
        assert max_length_q is not None
        parts, starts, longest = (query, key, value), (cu_seq_lens_q, cu_seq_lens_k), (max_length_q, max_length_k)
        return on_gpu(parts, scaling, sliding_window, starts, longest, key_places), None
    own = cu_seq_lens_q.diff().tolist()
    lengths = own if key_places is None or cu_seq_lens_k is None else cu_seq_lens_k.diff().tolist()
    windowed = sliding_window is not None and max(lengths) > sliding_window
    if query.dtype in (torch.bfloat16, torch.float32) and not (windowed or dropout or is_causal is False):
        scale = scaling or query.shape[-1] ** -0.5
        return cpu_attention.attend(query, key, value, own, scale, key_places, lengths), None
    by_itself = partial(sdpa, module, dropout=dropout, scaling=scaling, is_causal=is_causal)
    return _one_by_one(by_itself, (query, key, value), own, lengths, key_places, sliding_window), None


def mask(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True,
    use_vmap: bool = False, **others: Any,
) -> torch.Tensor | None:  # fmt: skip
    """Return no mask for a pack, whose rows `attend` keeps apart by their lengths; else the mask of sdpa.

    transformers sees from the restarting positions that rows are packed: it then forbids to leave the mask to
    `is_causal`. A pattern of the model's own (`use_vmap`) is always written out.
    """
    packed = attention_mask is None and not allow_is_causal_skip and not use_vmap and q_length == kv_length > 1
    if packed:
        return None
    sdpa_mask = AttentionMaskInterface()["sdpa"]
    return sdpa_mask(  # type: ignore[no-any-return]
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip, use_vmap=use_vmap, **others,
    )  # fmt: skip


def on_gpu(
    parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scaling: float | None, window: int | None,
    starts: tuple[torch.Tensor, torch.Tensor | None], longest: tuple[int, int | None], places: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Attend within the rows of a pack by one kernel; return (1, tokens, heads, width of a value).

    Args:
        parts: query, key and value, as `attend` gets them.
        scaling: of the scores.
        window: how many tokens a token sees.
        starts: where the own tokens of each row begin, and where each row begins in `places`; None as the latter.
        longest: own tokens and tokens of the longest row; None as the latter.
        places: where the tokens of each row stand, or None.
    """
    tokens = parts[0].shape[2]
    if places is not None and len(places) == tokens:  # rows have nothing in common: their own tokens, in order
        places = None
    (own, whole), (most, of_whole) = starts, longest
    if places is not None and whole is not None and of_whole is not None:
        return varlen(*parts, scaling, window, (own, whole), (most, of_whole), places)
    if _is_even(parts[0], parts[2], len(own) - 1, most, window):
        try:
            return even(*parts, scaling, most)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # right at the lengths that were tried, and no plan for this one
            told = next(iter(str(error).strip().splitlines()), "no reason given")
            warnings.warn(f"cuDNN's attention is no longer used: {told}", stacklevel=2)
            gpu_kernels.drop("even_rows", parts[0].device)
    return varlen(*parts, scaling, window, (own, own), (most, most), None)


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None,
    starts: tuple[torch.Tensor, torch.Tensor], longest: tuple[int, int], places: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Attend through torch's kernel for rows of different lengths; return (1, tokens, heads, width of a value).

    Where a row has more keys than queries, the last of both stand under one another.
    """
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    wider = query.shape[-1] - value.shape[-1]  # latent attention has narrower values than keys, the kernel has not
    value = torch.nn.functional.pad(value, (0, wider)) if wider else value
    q, k, v = (part.squeeze(0).transpose(0, 1).to(half) for part in (query, key, value))  # (tokens, heads, width)
    if places is not None:
        k, v = (_Gathered.apply(part, places) for part in (k, v))  # type: ignore[no-untyped-call]
    # the operator below torch's `varlen_attn`, whose arguments are others in each release; it knows fewer key heads
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, *starts, *longest, 0.0, window is None, False, scale=scaling,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )[0]  # fmt: skip
    return out[None, ..., : out.shape[-1] - wider]


def _is_even(query: torch.Tensor, value: torch.Tensor, rows: int, longest: int, window: int | None) -> bool:
    """Return whether the rows of a pack may go through `even`: of one length, and one that comes again.

    cuDNN plans for each shape anew, which takes longer than it saves. What is cut to a length or split comes again:
    multiples of 256, and one less, as the last token of a row is only foretold.
    """
    return (
        gpu_kernels.uses("even_rows", query.device)
        and rows * longest == query.shape[2]
        and (longest % 256 == 0 or longest % 256 == 255)
        and (window is None or window >= longest)
        and query.shape[-1] == value.shape[-1]
    )


def even(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, length: int
) -> torch.Tensor:
    """Attend in rows of one length through sdpa, cuDNN's kernel first; return (1, tokens, heads, width)."""
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    # (rows, heads, length, width): views
    q, k, v = (p.view(p.shape[1], -1, length, p.shape[3]).transpose(0, 1).to(half) for p in (query, key, value))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).reshape(1, -1, *out.shape[1::2])


def _one_by_one(
    sdpa: Callable[..., Any], parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor], own: list[int],
    lengths: list[int], places: torch.Tensor | None, window: int | None,
) -> torch.Tensor:  # fmt: skip
    """Attend in each row of a pack through a kernel of its own; return (1, tokens, heads, width of a value)."""
    of_rows = (part if places is None else part.index_select(2, places) for part in parts)
    rows = (torch.split_with_sizes(part, lengths, dim=2) for part in of_rows)  # each slice would get a full gradient
    out = []
    for q, k, v, asks in zip(*rows, own, strict=True):
        seen = _band(q.shape[2], window, q.device) if window is not None and q.shape[2] > window else None
        out.append(sdpa(q, k, v, seen)[0][:, -asks:])
    return torch.cat(out, dim=1)


class _Gathered(torch.autograd.Function):
    """`part[places]`, (places, heads, width); the gradients of one token are added up in float32, then rounded."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.tokens = len(part)
        return part.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        gradient = outer[0]
        added = torch.zeros(ctx.tokens, *gradient.shape[1:], dtype=torch.float32, device=gradient.device)
        return added.index_add_(0, places, gradient.float()).to(gradient.dtype), None


def _band(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """Return what each token of a row sees through a window, (1, 1, tokens, tokens)."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)[None, None]
