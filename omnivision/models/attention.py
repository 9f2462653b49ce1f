"""Scaled dot-product attention: torch's, with two changes for CPUs.

Their kernel takes longer to go back through narrow heads (the recipe's decoder has 16 of 24), and through few tokens (which the
trunk sees), in bfloat16 than in float32. There the backward pass is taken in float32, which is more exact, too. And in float32
it is slow where the rows of a narrow head lie far from one another, as those of a common projection of queries, keys and values
do: with many tokens they are copied first. `python -m benchmarks.what_helped` measures both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# From here on bfloat16 is as fast in the backward pass: channels of a head, and tokens.
WIDE_HEAD, MANY_TOKENS = 64, 256
_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: queries (B, heads, M, D), keys and values (B, heads, N, D) -> (B, heads, M, D)."""
    small = q.shape[-1] < WIDE_HEAD or k.shape[-2] < MANY_TOKENS
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and small:
        return _BackwardInFloat32.apply(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def rows_together(projected: Tensor) -> Tensor:
    """Queries, keys and values of a common projection, (3, B, heads, N, D), as `attention` is quickest with them."""
    slow = projected.shape[-1] < WIDE_HEAD and projected.shape[-2] >= MANY_TOKENS and projected.dtype != torch.bfloat16
    return projected.contiguous() if slow and projected.device.type == "cpu" else projected


class _BackwardInFloat32(torch.autograd.Function):
    """The kernel in bfloat16 forward, and in float32 back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made, logsumexp = _KERNEL(q, k, v)
        ctx.save_for_backward(q, k, v, made, logsumexp)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        *given, logsumexp = ctx.saved_tensors
        gradients = _KERNEL_BACKWARD(*(each.float() for each in (gradient, *given)), logsumexp, 0.0, False)
        return tuple(each.to(gradient.dtype) for each in gradients)
