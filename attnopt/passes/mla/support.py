"""Which attention layers can become MLA, and the reason why not."""

from __future__ import annotations

from attnopt.rewriter.site import AttentionSite, NormSpec


def obstacle(site: AttentionSite) -> str | None:
    """Why a layer cannot be converted, in one clause; None if it can."""
    mask = site.mask
    if site.kind == "mla":
        return "it is multi-head latent attention already"
    if site.share is not None:
        return "it reads another layer's map, or keys and values"
    if site.route is not None:
        return "its heads are routed"
    if site.kv_of:
        return "its key heads serve different numbers of query heads"
    if not site.cache.entries:
        return "it is an encoder layer: it keeps no cache that a latent could shrink"
    if not mask.causal:
        return "its mask is not causal"
    if mask.window is not None:
        return f"it sees only the last {mask.window} tokens, and latent attention kernels have no window"
    if mask.softcap is not None:
        return "its logits are soft-capped"
    if mask.sinks is not None:
        return "it has learned attention sinks"
    if mask.bias or mask.alibi:
        return "a position bias is added to its logits"
    if site.q is None or site.k is None or site.v is None:
        return "its queries, keys and values are not plain projections"
    if site.rope is None:
        return "its positions are not rotary"
    if site.d_qk % 2:
        return f"its heads have an odd width of {site.d_qk}"
    for norm, what in ((site.q_norm, "queries"), (site.k_norm, "keys")):
        reason = _norm_obstacle(norm)
        if reason:
            return f"the norm of its {what} {reason}"
    if (site.q_norm is None) != (site.k_norm is None):
        return "only one of queries and keys is normalised"
    if site.heads % site.kv_heads:
        return f"{site.heads} query heads are not a multiple of {site.kv_heads} key heads"
    return None


def _norm_obstacle(norm: NormSpec | None) -> str | None:
    if norm is None:
        return None
    if norm.scope != "head":
        return "spans all heads"
    if norm.kind != "rms" or norm.bias is not None or norm.weight is None or norm.unit_offset:
        return "is not a plain RMS norm"
    return None
