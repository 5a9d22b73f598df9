"""Attention of one long row of a pack with torch's flash kernel on a CPU, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # returns the logsumexp of the scores, too
KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class LongRow:
    """A row that uses torch's kernel: twice, if it has a shared prefix.

    Two attentions of the same queries combine to one over the keys of both, each weighted by its part of the softmax's
    denominator. For the backward pass the kernel needs only that denominator and the output.

    Attributes:
        own: its own tokens in the pack.
        common: indices of its shared prefix, int64, (tokens,); None where there is none.
    """

    own: slice
    common: torch.Tensor | None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (1, heads, own tokens, width) and the logsumexp of the scores, (1, heads, own tokens)."""
        q = query[:, :, self.own]
        out, norm = KERNEL(q, key[:, :, self.own], value[:, :, self.own], 0.0, True, scale=scale)
        if self.common is None:
            return out, norm
        k, v = (part.index_select(2, self.common) for part in (key, value))
        before, norm_before = KERNEL(q, k, v, 0.0, False, scale=scale)
        both = torch.logaddexp(norm, norm_before)
        weighed = out * (norm - both).exp()[..., None] + before * (norm_before - both).exp()[..., None]
        return weighed.to(out.dtype), both

    def backward(
        self, gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
        norm: torch.Tensor, scale: float, into: tuple[torch.Tensor, torch.Tensor, torch.Tensor], add: bool,
    ) -> None:  # fmt: skip
        """Write the row's gradients of queries, keys and values into the pack's, (tokens, heads, width) each.

        Those of keys and values are added if `add` is set.
        """
        of_query, of_key, of_value = into
        q, g, made = query[:, :, self.own], gradient[:, :, self.own], out[None, self.own].transpose(1, 2)
        heads = key.shape[1]

        def through(where: Any, causal: bool) -> list[torch.Tensor]:
            # keys are repeated for each query head: the kernel would sum the gradients of a shared one in bfloat16
            k, v = (p[:, :, where].repeat_interleave(query.shape[1] // heads, dim=1) for p in (key, value))
            of_q, of_k, of_v = KERNEL_BACKWARD(g, q, k, v, made, norm, 0.0, causal, scale=scale)
            return [
                of_q[0].transpose(0, 1),
                *(p[0].unflatten(0, (heads, -1)).sum(1).transpose(0, 1) for p in (of_k, of_v)),
            ]

        of_query[self.own], of_k, of_v = through(self.own, True)
        if add:
            of_key[self.own] += of_k
            of_value[self.own] += of_v
        else:
            of_key[self.own], of_value[self.own] = of_k, of_v
        if self.common is not None:
            of_q, of_k, of_v = through(self.common, False)
            of_query[self.own] += of_q
            of_key.index_add_(0, self.common, of_k.to(of_key.dtype))
            of_value.index_add_(0, self.common, of_v.to(of_value.dtype))
