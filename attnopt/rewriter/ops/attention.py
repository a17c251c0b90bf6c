"""`attnopt::attention` and its two relatives: what every captured attention layer is normalised to.

    logits[b,h,i,j] = scale * q[b,h,i] . k[b,h//(H/G),j]            then softcap * tanh(logits / softcap) if softcap > 0
                      + bias[b,h,i,j]                               -inf where key j is not visible to query i
    out[b,i,h]      = sum_j softmax_j(logits[b,h,i,:] (+ sink h)) v[b,h//(H/G),j]

Key j sits at absolute position j (no left padding); query i at q_pos[b,i], or T-S+i when q_pos is None. Key j is
visible if j <= position (causal) and j > position - window (window > 0). The order scale, softcap, bias is that of
Gemma 2 in transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.rewriter.ops.autograd import register_reference_autograd


def visible_keys(
    queries: int, keys: int, q_pos: Tensor | None, causal: bool, window: int, device: torch.device
) -> Tensor | None:
    """Which keys each query sees.

    Returns:
        bool [B|1, 1, queries, keys], or None if every query sees every key.
    """
    if not causal and window <= 0:
        return None
    if q_pos is None:
        q_pos = torch.arange(keys - queries, keys, device=device)[None]
    i = q_pos[:, None, :, None]
    j = torch.arange(keys, device=device)[None, None, None, :]
    seen = j > i - window if window > 0 else torch.ones_like(j <= i)
    return seen & (j <= i) if causal else seen


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """The formula of this module, with the S x T weights materialised. Heads already equal in number.

    Softmax runs in float32 at least, as transformers' eager attention does.

    Args:
        q, k, v: [B, H, S, d], [B, H, T, d], [B, H, T, dv].
        seen: bool, broadcastable to [B, H, S, T], or None.

    Returns:
        [B, H, S, dv] in v's dtype.
    """
    logits = torch.matmul(q, k.transpose(-1, -2)) * scale
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    if seen is not None:
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    if sinks is None:
        weights = torch.softmax(logits, dim=-1)
    else:
        sink = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(weights.to(v.dtype), v)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, seen: Tensor | None = None) -> Tensor:
    """torch's own attention, without S x T weights in memory where it has a kernel for that.

    Args:
        q, k, v: [B, H, S, d], [B, G, T, d] and [B, G, T, dv].
        causal: query i sees keys up to i; S = T.
        seen: what else queries see, bool, broadcastable to [B, H, S, T]; or None.

    Returns:
        [B, H, S, dv].
    """
    width = v.shape[3]
    if q.device.type == "cpu" and width != q.shape[3]:  # that kernel wants one width; the other takes twice as long
        widest = max(width, q.shape[3])
        q, k, v = (torch.nn.functional.pad(x, (0, widest - x.shape[3])) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, 0.0, causal, scale=scale, enable_gqa=grouped)
    return out[..., :width]


def _fuses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    layer: int,
) -> bool:
    """Whether `attention_reference` leaves these arguments to `fused_attention`."""
    plain = softcap <= 0 and sinks is None
    aligned = q_pos is None and q.shape[2] == k.shape[2] and bias is None and window <= 0
    # Autocast brings them to one type; queries and keys come from the rotation in float32 there.
    alike = q.dtype == k.dtype == v.dtype or torch.is_autocast_enabled(q.device.type)
    return plain and aligned and alike


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    layer: int,
) -> Tensor:
    """Softmax attention; see the formula at the head of this module. Differentiable plain torch.

    Args:
        q: [B, H, S, d].
        k, v: [B, G, T, d] and [B, G, T, dv]; G divides H, group g serves heads g*H/G ... (g+1)*H/G - 1.
        bias: additive, broadcastable to [B, H, S, T]; or None.
        q_pos: absolute positions of the queries, int [B|1, S]; None means T-S ... T-1.
        scale: factor on q.k.
        causal, window: which keys are visible; window 0 means no window.
        softcap: bound on the logits; 0 means none.
        sinks: [H] logits of a virtual key with value 0; or None.
        layer: index of the layer, for people and passes; no effect.

    Returns:
        [B, S, H, dv].
    """
    if _fuses(q, k, v, bias, q_pos, scale, causal, window, softcap, sinks, layer):
        return fused_attention(q, k, v, causal, scale).transpose(1, 2).contiguous()
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    seen = visible_keys(q.shape[2], k.shape[2], q_pos, causal, window, q.device)
    return explicit_attention(q, k, v, bias, seen, scale, softcap, sinks).transpose(1, 2).contiguous()


def _output_like(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("attnopt::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    layer: int,
) -> Tensor:
    """`attnopt::attention`; arguments and result as in `attention_reference`."""
    return attention_reference(q, k, v, bias, q_pos, scale, causal, window, softcap, sinks, layer)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    layer: int,
) -> Tensor:
    return _output_like(q, v)


def _shared_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    owner: int,
    layer: int,
) -> Tensor:
    return attention_reference(q, k, v, bias, q_pos, scale, causal, window, softcap, sinks, layer)


@torch.library.custom_op("attnopt::shared_attention", mutates_args=())
def shared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    owner: int,
    layer: int,
) -> Tensor:
    """Attention whose map is that of layer `owner`: q and k are the owner's, v is this layer's own.

    The mathematics is that of `attention_reference`; the op exists so that codegen may compute the map once.
    """
    return _shared_reference(q, k, v, bias, q_pos, scale, causal, window, softcap, sinks, owner, layer)


@shared_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    owner: int,
    layer: int,
) -> Tensor:
    return _output_like(q, v)


def _routed_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    layer: int,
) -> Tensor:
    out = attention_reference(q, k, v, bias, q_pos, scale, causal, window, softcap, sinks, layer)
    return out * gates.to(out.dtype)[..., None]


@torch.library.custom_op("attnopt::routed_attention", mutates_args=())
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    layer: int,
) -> Tensor:
    """Attention whose head outputs are multiplied by gates [B, S, H]; a gate of 0 means the head may be skipped."""
    return _routed_reference(q, k, v, gates, bias, q_pos, scale, causal, window, softcap, sinks, layer)


@routed_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    q_pos: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    layer: int,
) -> Tensor:
    return _output_like(q, v)


register_reference_autograd(attention, attention_reference, lean=_fuses)
register_reference_autograd(shared_attention, _shared_reference, lean=lambda *args: _fuses(*args[:-1]))
register_reference_autograd(
    routed_attention, _routed_reference, lean=lambda q, k, v, gates, *rest: _fuses(q, k, v, *rest)
)
