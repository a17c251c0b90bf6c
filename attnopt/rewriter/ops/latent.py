"""`attnopt::latent_attention`: Multi-head Latent Attention on the cached latent (DeepSeek-V2, arXiv 2405.04434, §2.1).

    logits[b,h,i,j] = scale * (q_nope[b,h,i] . W_UK[h] c[b,j]  +  q_rope[b,h,i] . k_rope[b,j])
    out[b,i,h]      = W_UV[h] sum_j softmax_j(logits)[j] c[b,j]

Absorbed form: fold W_UK into the query and apply W_UV after the sum, so that only c [B, T, r] is read. Expanded form:
build K and V per head first, which costs fewer operations when queries are about as many as keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.rewriter.ops.attention import explicit_attention, fused_attention, visible_keys
from attnopt.rewriter.ops.autograd import register_reference_autograd


def absorbing_is_cheaper(queries: int, keys: int, r: int, d_nope: int, d_rope: int, d_v: int) -> bool:
    """Whether the absorbed form needs fewer multiplications per head than the expanded form."""
    absorbed = queries * r * (d_nope + d_v) + queries * keys * (2 * r + d_rope)
    expanded = keys * r * (d_nope + d_v) + queries * keys * (d_nope + d_rope + d_v)
    return absorbed <= expanded


def latent_attention_reference(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    layer: int,
    absorb: bool | None = None,
) -> Tensor:
    """Multi-head latent attention; see the formula at the head of this module. Differentiable plain torch.

    Args:
        q_nope, q_rope: [B, H, S, dn] and [B, H, S, dr] (already turned).
        latent: c, [B, T, r], after its norm if it has one.
        k_rope: the one rotary key, [B, T, dr] (already turned).
        w_uk, w_uv: [H, dn, r] and [H, dv, r].
        q_pos, scale, causal, window, softcap, layer: as in `attention_reference`.
        absorb: force the form; None picks the cheaper one. Both agree to rounding.

    Returns:
        [B, S, H, dv].
    """
    queries, keys = q_nope.shape[2], latent.shape[1]
    if absorb is None:
        absorb = absorbing_is_cheaper(queries, keys, latent.shape[2], q_nope.shape[3], q_rope.shape[3], w_uv.shape[1])
    seen = visible_keys(queries, keys, q_pos, causal, window, q_nope.device)
    if absorb:
        q = torch.cat([torch.matmul(q_nope, w_uk), q_rope], dim=-1)  # [B,H,S,dn] @ [H,dn,r]
        k = torch.cat([latent, k_rope], dim=-1)[:, None]
        mixed = explicit_attention(q, k, latent[:, None], None, seen, scale, softcap, None)
        out = torch.matmul(mixed, w_uv.transpose(-1, -2))
    else:
        k_nope = torch.matmul(latent[:, None], w_uk.transpose(-1, -2))  # [B,1,T,r] @ [H,r,dn]
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1, -1)], dim=-1)
        v = torch.matmul(latent[:, None], w_uv.transpose(-1, -2))
        q = torch.cat([q_nope, q_rope], dim=-1)
        if queries == keys and causal and q_pos is None and window <= 0 and softcap <= 0:
            out = fused_attention(q, k, v, True, scale)
        else:
            out = explicit_attention(q, k, v, None, seen, scale, softcap, None)
    return out.transpose(1, 2).contiguous()


@torch.library.custom_op("attnopt::latent_attention", mutates_args=())
def latent_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    layer: int,
) -> Tensor:
    """`attnopt::latent_attention`; arguments and result as in `latent_attention_reference`."""
    return latent_attention_reference(
        q_nope, q_rope, latent, k_rope, w_uk, w_uv, q_pos, scale, causal, window, softcap, layer
    )


@latent_attention.register_fake
def _(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    layer: int,
) -> Tensor:
    return q_nope.new_empty(q_nope.shape[0], q_nope.shape[2], q_nope.shape[1], w_uv.shape[1])


register_reference_autograd(latent_attention, latent_attention_reference)
