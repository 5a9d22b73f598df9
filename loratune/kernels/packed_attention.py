"""Attention within each row of a pack, registered through transformers' attention interface."""

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

NAME = "loratune_rows"  # of this attention in transformers' registry

# arguments that models pass to their attention and that change no score
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "output_attentions",
    "output_hidden_states", "output_router_logits", "num_items_in_batch", "return_dict",
}  # fmt: skip


class Unfit(Exception):
    """A model's attention needs something that this one doesn't support; the message names it."""


def is_ours(error: BaseException) -> bool:
    """Return whether an error was raised in or below this attention: a TypeError there is our own mistake."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == __file__:
            return True
        frame = frame.tb_next
    return False


def register() -> None:
    """Register this attention with transformers under NAME."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    is_causal: bool | None = None, sliding_window: int | None = None, cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None, cu_seq_lens_k: torch.Tensor | None = None, max_length_k: int | None = None,
    key_places: torch.Tensor | None = None, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attend within each row of a pack; without packing this is transformers' sdpa.

    On a GPU one kernel computes all rows: torch's variable-length attention, or cuDNN's where all rows have one length
    and share nothing and it has passed the self-test (`gpu_kernels`). On a CPU rows are computed by products over tiles
    or by the kernel behind sdpa; with dropout or a sliding window each row has its own scaled_dot_product_attention.

    Args:
        module: the calling layer.
        query: (batch, heads, tokens, width); a pack has batch 1.
        key: (batch, heads or fewer, tokens, width).
        value: as `key`.
        attention_mask: of transformers; None for a pack, unless it had to be materialized.
        dropout: fraction (0-1) of the probabilities set to zero.
        scaling: of the scores; None for 1 / sqrt(width).
        is_causal: as for sdpa.
        sliding_window: how many tokens a token attends to, itself included; None for all before it.
        cu_seq_lens_q: start of each row's own tokens in the pack, and the end of the last, int32, (rows + 1,).
        max_length_q: most own tokens of a row.
        cu_seq_lens_k: start of each row in `key_places`, and the end of the last, int32, (rows + 1,).
        max_length_k: length of the longest row in tokens.
        key_places: indices in the pack of all tokens of each row, int64, (tokens of all rows,): first its shared
            prefix, then its own tokens; None where rows share nothing.
        others: other arguments that the model passes to its attention.

    Returns:
        (batch, tokens, heads, width), and None for the weights.

    Raises:
        Unfit: when something in `others` would change the scores of a pack.
    """
    sdpa = AttentionInterface()["sdpa"]
    if cu_seq_lens_q is None or _is_mask(attention_mask):  # a materialized mask separates the rows itself
        return sdpa(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    for name, given in others.items():
        if name not in _HARMLESS and given is not None and given is not False:
            raise Unfit(f"its attention takes `{name}`, which is not supported for packed rows")
    assert len(query) == 1, "a pack is one sequence"
    if query.is_cuda:
        if dropout:
            raise Unfit("its attention has dropout, which the kernel for packed rows does not support")
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


def inputs(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Return a model's inputs; for a pack that this attention separates, with a mask that is none.

    Without it transformers looks at the positions of a pack for restarts, and waits for the device to know them.
    """
    if "cu_seq_lens_q" not in given or model.config._attn_implementation != NAME:
        return given
    return {**given, "attention_mask": torch.empty(1, 0, 0, 0, dtype=torch.bool, device=given["input_ids"].device)}


def _is_mask(given: torch.Tensor | None) -> bool:
    return given is not None and given.numel() > 0


def mask(
    *, q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True,
    use_vmap: bool = False, **others: Any,
) -> torch.Tensor | None:  # fmt: skip
    """Return None for a pack, whose rows `attend` separates by their lengths; else the mask of sdpa.

    transformers detects packed rows by their restarting positions, and then does not allow `is_causal` instead of a
    mask. A model's own mask pattern (`use_vmap`) is always materialized.
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
    """Attend within the rows of a pack with one kernel; return (1, tokens, heads, width of a value).

    Args:
        parts: query, key and value, as `attend` gets them.
        scaling: of the scores.
        window: how many tokens a token attends to, or None for all.
        starts: of each row's own tokens, and of each row in `places` (None without `places`).
        longest: most own tokens of a row, and most tokens (None without `places`).
        places: indices of the tokens of each row, or None.
    """
    tokens = parts[0].shape[2]
    if places is not None and len(places) == tokens:  # rows share nothing: their own tokens, in order
        places = None
    (own, whole), (most, of_whole) = starts, longest
    if places is not None and whole is not None and of_whole is not None:
        return varlen(*parts, scaling, window, (own, whole), (most, of_whole), places)
    if _is_even(parts[0], parts[2], len(own) - 1, most, window):
        try:
            return even(*parts, scaling, most)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # cuDNN has no plan for this length, though it had for those of the self-test
            told = next(iter(str(error).strip().splitlines()), "no reason given")
            warnings.warn(f"cuDNN's attention is no longer used: {told}", stacklevel=2)
            gpu_kernels.drop("even_rows", parts[0].device)
    return varlen(*parts, scaling, window, (own, own), (most, most), None)


def varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None,
    starts: tuple[torch.Tensor, torch.Tensor], longest: tuple[int, int], places: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Attend with torch's variable-length kernel; return (1, tokens, heads, width of a value).

    Where a row has more keys than queries, the last of both are aligned.
    """
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    wider = query.shape[-1] - value.shape[-1]  # the kernel does not support latent attention's narrower values
    value = torch.nn.functional.pad(value, (0, wider)) if wider else value
    q, k, v = (part.squeeze(0).transpose(0, 1).to(half) for part in (query, key, value))  # (tokens, heads, width)
    if places is not None:
        k, v = (_Gathered.apply(part, places) for part in (k, v))  # type: ignore[no-untyped-call]
    # the operator below torch's `varlen_attn`, whose arguments change between releases; it supports fewer key heads
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, *starts, *longest, 0.0, window is None, False, scale=scaling,
        window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )[0]  # fmt: skip
    return out[None, ..., : out.shape[-1] - wider]


def _is_even(query: torch.Tensor, value: torch.Tensor, rows: int, longest: int, window: int | None) -> bool:
    """Return whether `even` is used for a pack: rows of one length, and a length likely to recur.

    cuDNN makes a plan for each new shape, which takes longer than one call saves. Lengths that rows are cut or split to
    recur: multiples of 256, and one less, as the last token of a row is only predicted.
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
    """Attend in rows of one length with sdpa, cuDNN's kernel first; return (1, tokens, heads, width)."""
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
    """Attend in each row of a pack with a call of its own; return (1, tokens, heads, width of a value)."""
    of_rows = (part if places is None else part.index_select(2, places) for part in parts)
    rows = (torch.split_with_sizes(part, lengths, dim=2) for part in of_rows)  # a slice would allocate a full gradient
    out = []
    for q, k, v, asks in zip(*rows, own, strict=True):
        seen = _band(q.shape[2], window, q.device) if window is not None and q.shape[2] > window else None
        out.append(sdpa(q, k, v, seen)[0][:, -asks:])
    return torch.cat(out, dim=1)


class _Gathered(torch.autograd.Function):
    """`part[places]`, (places, heads, width); gradients of a shared token are summed in float32, then rounded."""

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
    """Return the mask of a sliding window, (1, 1, tokens, tokens)."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)[None, None]
