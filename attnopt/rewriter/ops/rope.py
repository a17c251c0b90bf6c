"""`attnopt::rope`: rotary position embedding (Su et al., RoFormer, arXiv 2104.09864, eq. 34)."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.rewriter.ops.autograd import register_reference_autograd


def rope_reference(
    x: Tensor, positions: Tensor, inv_freq: Tensor, style: str, offset: int, attention_scaling: float
) -> Tensor:
    """Turn pair m of the rotary dims by angle positions * inv_freq[m]. Differentiable plain torch.

    Angles, cosines and sines are float32 whatever x is, as in transformers, so that a rewritten model turns by the
    very same angles as its source.

    Args:
        x: [B, N, S, d].
        positions: int [B|1, S].
        inv_freq: [n], radians per position; 2n dims from `offset` on are rotary, the rest pass.
        style: "half" pairs dims (m, m + n), "interleaved" pairs (2m, 2m + 1), counted from `offset`.
        attention_scaling: factor on cos and sin.

    Returns:
        x with its rotary dims turned, in x's dtype and layout.

    Raises:
        ValueError: for another style, or if the rotary dims do not fit in d.
    """
    n = inv_freq.shape[0]
    if offset < 0 or offset + 2 * n > x.shape[-1]:
        raise ValueError(f"{2 * n} rotary dims from {offset} do not fit in a head of {x.shape[-1]}")
    angle = positions[:, None, :, None].to(torch.float32) * inv_freq.to(torch.float32)
    compute = torch.promote_types(x.dtype, torch.float32)
    cos = (angle.cos() * attention_scaling).to(compute)
    sin = (angle.sin() * attention_scaling).to(compute)
    before, turned, after = x.split([offset, 2 * n, x.shape[-1] - offset - 2 * n], dim=-1)
    if style == "half":
        a, b = turned.to(compute).chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    elif style == "interleaved":
        a, b = turned[..., 0::2].to(compute), turned[..., 1::2].to(compute)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        raise ValueError(f"unknown rope style {style!r}; known: half, interleaved")
    return torch.cat([before, turned.to(x.dtype), after], dim=-1)


@torch.library.custom_op("attnopt::rope", mutates_args=())
def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, style: str, offset: int, attention_scaling: float) -> Tensor:
    """`attnopt::rope`; arguments and result as in `rope_reference`."""
    return rope_reference(x, positions, inv_freq, style, offset, attention_scaling)


@rope.register_fake
def _(x: Tensor, positions: Tensor, inv_freq: Tensor, style: str, offset: int, attention_scaling: float) -> Tensor:
    return x.new_empty(x.shape)


register_reference_autograd(rope, rope_reference)
