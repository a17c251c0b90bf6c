"""What attention calls of a Dynamo graph are replaced by.

Everything is computed from the call's own operands, inside the graph: parameters reach a backend as inputs, and a
tensor derived from one and kept would go stale, silently, at the next update.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """`scaled_dot_product_attention` with heads un-repeated, differentiable plain torch.

    One query per request meets all heads of its group in one product: keys and values are read once, not once a head.

    Args:
        q: [B, H, S, d]; k, v: [B, G, T, d] and [B, G, T, dv], G divides H.
        mask: bool or additive, broadcastable to [B, H, S, T], or None.
        causal: as in SDPA (upper-left aligned).
        scale: factor on q.k.

    Returns:
        [B, H, S, dv].
    """
    heads, length, groups = q.shape[1], q.shape[2], k.shape[1]
    if length == 1 and not causal and heads != groups:
        rows = q.unflatten(1, (groups, heads // groups))[:, :, :, 0] * scale
        logits = torch.matmul(rows, k.transpose(2, 3))
        if mask is not None:
            # [B, 1, 1, T] fits as it is; a mask per head is [B, H, 1, T].
            spread = mask if mask.shape[1] == 1 else mask.unflatten(1, (groups, -1)).squeeze(3)
            logits = logits.masked_fill(~spread, float("-inf")) if mask.dtype == torch.bool else logits + spread
        weights = torch.softmax(logits, dim=-1)
        if mask is not None and mask.dtype == torch.bool:
            weights = weights.nan_to_num(0.0)  # as SDPA: a query that sees nothing gets 0
        return torch.matmul(weights, v).flatten(1, 2).unsqueeze(2)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != groups
    )


def attention_map(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Attention weights [B, H, S, T]; arguments as for `grouped_sdpa`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.matmul(q * scale, k.transpose(2, 3))
    if causal:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~seen, float("-inf"))
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    weights = torch.softmax(logits.float(), dim=-1)
    weights = weights.nan_to_num(0.0) if mask is not None and mask.dtype == torch.bool else weights
    return weights.to(q.dtype)


def apply_map(weights: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, dv] from weights [B, H, S, T] and values [B, G, T, dv]."""
    return torch.matmul(weights, v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1))


def live_heads(x: Tensor, heads: list[int]) -> Tensor:
    """Some heads of [B, H, S, d]."""
    return x.index_select(1, torch.tensor(heads, device=x.device))


def with_dead_heads(x: Tensor, heads: list[int], count: int) -> Tensor:
    """[B, count, S, d] with `x` at `heads` and zeros elsewhere."""
    out = x.new_zeros(x.shape[0], count, x.shape[2], x.shape[3])
    return out.index_copy(1, torch.tensor(heads, device=x.device), x)


@torch.library.custom_op("attnopt::decode_attention", mutates_args=())
def decode_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of a few new tokens to all that is cached, by attnopt's Triton kernel; no mask, no gradient.

    Args:
        q: [B, H, S, d], at the end of the keys; k, v: [B, G, T, d] and [B, G, T, dv].

    Returns:
        [B, H, S, dv].
    """
    from attnopt.codegen.triton.runtime.launch import grouped_decode

    lengths = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)
    out, _ = grouped_decode(q.transpose(1, 2).contiguous(), k.contiguous(), v.contiguous(), None, lengths, scale)
    return out.transpose(1, 2).contiguous()


@decode_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@decode_attention.register_kernel("cpu")
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return grouped_sdpa(q, k, v, None, False, scale).contiguous()
