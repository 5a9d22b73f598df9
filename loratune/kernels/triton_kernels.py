"""Triton kernels for the operations between matrix products, each with the function that calls it.

Importing this module imports `triton`, which comes with torch for CUDA only; so it is imported inside functions. All
arithmetic is in float32, whatever the dtype of the tensors; row offsets are 64-bit. The figures are bytes read and
written for n numbers of 2 bytes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

WIDEST = 32768  # numbers of a row that one program of a norm holds
_TILE = 2048  # numbers that one program holds where rows are narrow
_GATE = 1024  # columns of one program of a SwiGLU
_WORDS = 4096  # words of a vocabulary that one program holds at once
_BLOCKS = 64  # blocks of scales that one program dequantizes


@triton.jit
def _norm(
    x_ptr, weight_ptr, out_ptr, scale_ptr, rows, width, x_stride, epsilon, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + epsilon)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    normed = (x * scale[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)  # transformers rounds here, too
    out = (normed * weight[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * width + column[None, :], out, mask=inside)


@triton.jit
def _norm_back(
    g_ptr, x_ptr, scale_ptr, weight_ptr, out_ptr, rows, width, g_stride, x_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    g = tl.load(g_ptr + row[:, None] * g_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    normed, wide = x * scale, g * weight[None, :]
    along = (tl.sum(normed * wide, axis=1) / width)[:, None]
    out = ((wide - normed * along) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * width + column[None, :], out, mask=inside)


@triton.jit
def _gate(gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    opened = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)  # torch rounds here, too
    tl.store(out_ptr + row * width + column, (opened * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_back(
    g_ptr, gate_ptr, up_ptr, of_gate_ptr, of_up_ptr, width, g_stride, gate_stride, up_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(g_ptr + row * g_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-gate))
    opened = gate * share
    of_gate = g * up * (share + opened * (1.0 - share))
    to = row * width + column
    tl.store(of_gate_ptr + to, of_gate.to(of_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(of_up_ptr + to, (g * opened).to(of_up_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _cross_entropy(
    logit_ptr, target_ptr, loss_ptr, stride, smoothing, WORDS: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logit_ptr + row * stride
    target = tl.load(target_ptr + row)
    of_target = tl.load(base + target).to(tl.float32)  # before the first reduction, and so before any store
    highest = -float("inf")
    ones = 0.0
    total = 0.0
    for start in range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        x = tl.load(base + word, mask=word < WORDS, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, axis=0))
        ones = ones * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), axis=0)
        highest = higher
        total += tl.sum(tl.where(word < WORDS, x, 0.0), axis=0)
    log_sum = highest + tl.log(ones)
    tl.store(loss_ptr + row, log_sum - (1.0 - smoothing) * of_target - smoothing * (total / WORDS))
    if GRADIENT:
        tl.debug_barrier()
        for start in range(0, WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)
            x = tl.load(base + word, mask=word < WORDS, other=-float("inf")).to(tl.float32)
            wanted = tl.where(word == target, 1.0 - smoothing, 0.0) + smoothing / WORDS
            tl.store(base + word, (tl.exp(x - log_sum) - wanted).to(logit_ptr.dtype.element_ty), mask=word < WORDS)


@triton.jit
def _nf4(
    packed_ptr, scale_ptr, code_of_scale_ptr, scale_of_scale_ptr, offset_ptr, code_ptr, out_ptr, blocks, count,
    NESTED: tl.constexpr, SIZE: tl.constexpr, SIZE_OF_SCALE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < blocks
    if NESTED:
        step = tl.load(scale_ptr + block, mask=there, other=0).to(tl.int32)
        coarse = tl.load(scale_of_scale_ptr + block // SIZE_OF_SCALE, mask=there, other=0.0)
        scale = tl.load(code_of_scale_ptr + step) * coarse + tl.load(offset_ptr)
    else:
        scale = tl.load(scale_ptr + block, mask=there, other=0.0)
    byte = block[:, None] * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    both = tl.load(packed_ptr + byte, mask=byte * 2 < count, other=0).to(tl.int32)
    first = tl.load(code_ptr + (both >> 4)) * scale[:, None]
    second = tl.load(code_ptr + (both & 15)) * scale[:, None]
    out = tl.interleave(first, second).to(out_ptr.dtype.element_ty)
    place = block[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out_ptr + place, out, mask=place < count)


@triton.jit
def _turn(
    x_ptr, out_ptr, cos_ptr, sin_ptr, heads, half, head_stride,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate the heads of one token; pointers point to its first number."""
    column = tl.arange(0, HALF)
    head = tl.arange(0, HEADS).to(tl.int64)[:, None]
    here = column < half
    inside = (head < heads) & here[None, :]
    kind = out_ptr.dtype.element_ty
    cos_1 = tl.load(cos_ptr + column, mask=here, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos_ptr + half + column, mask=here, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin_ptr + column, mask=here, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin_ptr + half + column, mask=here, other=0.0).to(tl.float32)[None, :]
    place = x_ptr + head * head_stride + column[None, :]
    one = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        first, other = one * cos_1, two * sin_2
        second, less = two * cos_2, -one * sin_1
    else:
        first, other = one * cos_1, -two * sin_1
        second, less = two * cos_2, one * sin_2
    # products are rounded as transformers rounds them
    first = first.to(kind).to(tl.float32) + other.to(kind).to(tl.float32)
    second = second.to(kind).to(tl.float32) + less.to(kind).to(tl.float32)
    to = out_ptr + head * (2 * half) + column[None, :]
    tl.store(to, first.to(kind), mask=inside)
    tl.store(to + half, second.to(kind), mask=inside)


@triton.jit
def _rotary(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, tokens, half, q_heads, k_heads,
    q_batch, q_head, q_token, k_batch, k_head, k_token, cos_batch, cos_token, sin_batch, sin_token,
    BACK: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // tokens, place % tokens
    cos = cos_ptr + batch * cos_batch + token * cos_token
    sin = sin_ptr + batch * sin_batch + token * sin_token
    q = q_ptr + batch * q_batch + token * q_token
    k = k_ptr + batch * k_batch + token * k_token
    _turn(q, q_out_ptr + place * q_heads * (2 * half), cos, sin, q_heads, half, q_head, BACK, Q_HEADS, HALF)
    _turn(k, k_out_ptr + place * k_heads * (2 * half), cos, sin, k_heads, half, k_head, BACK, K_HEADS, HALF)


def norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w x / sqrt(mean(x^2) + e) and 1 / sqrt(...), float32, (..., 1): 2 n bytes read, 2 n written."""
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    grid, tile = _tiles(rows)
    if rows.numel():
        with _on(x):
            _norm[grid](rows, weight, out, scale, *rows.shape, rows.stride(0), epsilon, **tile)
    return out, scale


def norm_back(gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a norm's x: 4 n bytes read, 2 n written."""
    g, rows = _rows(gradient), _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, tile = _tiles(rows)
    if rows.numel():
        with _on(x):
            _norm_back[grid](g, rows, scale, weight, out, *rows.shape, g.stride(0), rows.stride(0), **tile)
    return out


def gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) up: 4 n bytes read, 2 n written."""
    a, b = _rows(gate), _rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        with _on(out):
            _gate[_grid(a)](a, b, out, a.shape[1], a.stride(0), b.stride(0), BLOCK=_GATE, num_warps=4)
    return out


def gate_back(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and of up: 6 n bytes read, 4 n written."""
    g, a, b = _rows(gradient), _rows(gate), _rows(up)
    of_gate, of_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if of_gate.numel():
        strides = (g.stride(0), a.stride(0), b.stride(0))
        with _on(of_gate):
            _gate_back[_grid(a)](g, a, b, of_gate, of_up, a.shape[1], *strides, BLOCK=_GATE, num_warps=4)
    return of_gate, of_up


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0, gradient: bool = True
) -> torch.Tensor:
    """Return the cross entropy of each row in nats, float32, (rows,); logits are replaced by their gradient.

    4 n bytes read and 2 n written; without the gradient 2 n read, and the logits are unchanged.

    Args:
        logits: (rows, vocabulary), each row contiguous.
        targets: int64, (rows,).
        smoothing: part (0-1) of each target spread over the whole vocabulary.
        gradient: whether logits are replaced by softmax - target.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    words = logits.shape[1]
    block = min(_WORDS, triton.next_power_of_2(words))
    if len(logits):
        with _on(logits):
            _cross_entropy[(len(logits),)](
                logits, targets.contiguous(), losses, logits.stride(0), smoothing, WORDS=words, GRADIENT=gradient,
                BLOCK=block, num_warps=max(1, block // 512),
            )  # fmt: skip
    return losses


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys rotated by their angles, or the gradients of that: 2 n bytes read, 2 n written.

    Args:
        query: (batch, heads, tokens, width), or its gradient.
        key: (batch, heads or fewer, tokens, width), or its gradient.
        cos: (batch or 1, tokens, width).
        sin: as `cos`.
        back: whether gradients are given.

    Returns:
        Two tensors of the shapes of query and key; in memory the heads of a token are contiguous, as in a product's
        output.
    """
    query, key = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key))
    batch, heads, tokens, width = query.shape
    outs = [part.new_empty(batch, tokens, part.shape[1], width) for part in (query, key)]
    if outs[0].numel():
        strides = [stride if of.shape[0] > 1 else 0 for of in (cos, sin) for stride in of.stride()[:1]]
        with _on(query):
            _rotary[(batch * tokens,)](
                query, key, cos, sin, *outs, tokens, width // 2, heads, key.shape[1], *query.stride()[:3],
                *key.stride()[:3], strides[0], cos.stride(1), strides[1], sin.stride(1), BACK=back,
                Q_HEADS=triton.next_power_of_2(heads), K_HEADS=triton.next_power_of_2(key.shape[1]),
                HALF=triton.next_power_of_2(width // 2), num_warps=4,
            )  # fmt: skip
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)


def nf4(
    packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, size: int, shape: torch.Size, dtype: torch.dtype,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int] | None,
) -> torch.Tensor:  # fmt: skip
    """Return dequantized 4-bit weights: 0.53 bytes read and 2 written for each, scales of scales included.

    Args:
        packed: two weights a byte, the first in the high bits, uint8.
        absmax: scale of each block: float32, or if nested its index in a table, uint8.
        code: the 16 numbers, float32.
        size: weights of a block.
        shape: of the weights.
        dtype: of the weights.
        nested: the table of scales, float32, (256,); the factor of each group of scales, float32; the offset of all,
            float32, (); the number of scales in a group.
    """
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    blocks = triton.cdiv(out.numel(), size)
    table, coarse, offset, group = nested or (absmax, absmax, absmax, 1)
    if blocks:
        with _on(out):  # no fused multiply-add: bitsandbytes rounds in between
            _nf4[(triton.cdiv(blocks, _BLOCKS),)](
                packed, absmax, table, coarse, offset, code, out, blocks, out.numel(), NESTED=nested is not None,
                SIZE=size, SIZE_OF_SCALE=group, BLOCKS=_BLOCKS, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor as (rows, width) with contiguous rows, copied only if necessary."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _tiles(rows: torch.Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid and the constants of a norm: a program takes whole rows, several if they are narrow."""
    block = triton.next_power_of_2(rows.shape[1])
    at_once = max(1, _TILE // block)
    warps = min(16, max(1, at_once * block // 512))
    return (triton.cdiv(rows.shape[0], at_once),), {"ROWS": at_once, "BLOCK": block, "num_warps": warps}


def _grid(rows: torch.Tensor) -> tuple[int, int]:
    return rows.shape[0], triton.cdiv(rows.shape[1], _GATE)


def _on(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which the device of a tensor is the current one, which Triton launches on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
