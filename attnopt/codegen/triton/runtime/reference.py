"""What every kernel computes, in plain torch, in any precision and on any device. Imports only torch.

Caches are paged: request b's slot s is row s % page of page table[b, s // page]. Base-2 log-sum-exps as in the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gather_pages(cache: Tensor, table: Tensor, length: int, page: int, axis: int) -> Tensor:
    """The first `length` slots of one request.

    Args:
        cache: [pages, page, w] (axis 0) or [pages, G, page, w] (axis 1).
        table: page ids of the request.
    """
    pages = cache[table[: -(-length // page)].long()]
    if axis == 0:
        return pages.flatten(0, 1)[:length]
    return pages.transpose(0, 1).flatten(1, 2)[:, :length]


def _visible(length: int, tokens: int, rows: int, sink: int, window: int, device: torch.device) -> Tensor:
    """bool [tokens * rows, length]: which slots each row sees."""
    limit = length - tokens + torch.arange(tokens, device=device).repeat_interleave(rows) + 1
    slot = torch.arange(length, device=device)[None, :]
    seen = slot < limit[:, None]
    if window > 0:
        seen = seen & ((slot >= limit[:, None] - window) | (slot < sink))
    return seen


def _softmax2(scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and base-2 log-sum-exp of base-2 scores; rows that see nothing get zeros and -inf."""
    scores = scores.masked_fill(~seen, float("-inf"))
    lse2 = torch.logsumexp(scores * math.log(2), -1) / math.log(2)
    weights = torch.exp2(scores - torch.where(lse2.isinf(), 0.0, lse2)[:, None])
    return weights, lse2


def latent_decode(
    q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Absorbed attention.

    Args:
        q: [B, tokens, H, R + P]; cache: [pages, page, R + P]; table: [B, pages]; lengths: [B], query tokens included.

    Returns:
        mixed latents [B, tokens, H, R] and lse2 [B, tokens, H].
    """
    batch, tokens, heads, _ = q.shape
    out, lse = q.new_zeros(batch, tokens, heads, rank), q.new_full((batch, tokens, heads), float("-inf"))
    for b, length in enumerate(lengths.tolist()):
        if length:
            rows = gather_pages(cache, table[b], length, cache.shape[1], 0)
            scores = q[b].flatten(0, 1) @ rows.T * (scale / math.log(2))
            weights, lse2 = _softmax2(scores, _visible(length, tokens, heads, 0, 0, q.device))
            out[b], lse[b] = (weights @ rows[:, :rank]).view(tokens, heads, rank), lse2.view(tokens, heads)
    return out, lse


def grouped_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    windows: Tensor | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with cached keys and values.

    Args:
        q: [B, tokens, H, D]; keys, values: [pages, G, page, D] and [pages, G, page, DV].
        sinks, windows: int [G], see `streaming`; active: int [B, k], groups that are computed, others give 0.

    Returns:
        [B, tokens, H, DV] and lse2 [B, tokens, H].
    """
    batch, tokens, heads, _ = q.shape
    groups, width = keys.shape[1], values.shape[3]
    size = heads // groups
    out, lse = q.new_zeros(batch, tokens, heads, width), q.new_full((batch, tokens, heads), float("-inf"))
    for b, length in enumerate(lengths.tolist()):
        for g in range(groups) if active is None else active[b].tolist():
            if not length:
                continue
            at = slice(g * size, (g + 1) * size)
            k = gather_pages(keys, table[b], length, keys.shape[2], 1)[g]
            v = gather_pages(values, table[b], length, keys.shape[2], 1)[g]
            scores = q[b, :, at].flatten(0, 1) @ k.T * scale
            if softcap > 0:
                scores = torch.tanh(scores / softcap) * softcap
            sink = 0 if sinks is None else int(sinks[g])
            window = 0 if windows is None else int(windows[g])
            seen = _visible(length, tokens, size, sink, window, q.device)
            weights, lse2 = _softmax2(scores / math.log(2), seen)
            out[b, :, at] = (weights @ v).view(tokens, size, width)
            lse[b, :, at] = lse2.view(tokens, size)
    return out, lse


def map_decode(scores: Tensor, lse2: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Values under a map: scores [B, G, rows, slots] (base 2), lse2 [B, G, rows] -> [B, G, rows, DV]."""
    batch, groups, rows, _ = scores.shape
    out = values.new_zeros(batch, groups, rows, values.shape[3])
    for b, length in enumerate(lengths.tolist()):
        if length:
            v = gather_pages(values, table[b], length, values.shape[2], 1)
            norm = torch.where(lse2[b].isinf(), 0.0, lse2[b])
            out[b] = torch.exp2(scores[b, :, :, :length] - norm[..., None]).to(v.dtype) @ v
    return out


def combine(partial: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Merge parts [n, rows, w] with lse2 [n, rows] into [rows, w] and [rows]."""
    top = lse2.max(0).values
    weights = torch.exp2(lse2 - torch.where(top.isinf(), 0.0, top))
    total = weights.sum(0)
    out = (partial * weights[..., None]).sum(0) / torch.where(total > 0, total, 1.0)[:, None]
    return out, top + torch.log2(total)


def prefill(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    lengths: Tensor,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention over a prompt.

    Args:
        q: [B, H, S, DN + DR]; k: [B, G, T, DN]; k_rope: [B, 1 or H, T, DR] or None; v: [B, G, T, DV].
        lengths: [B], keys that count; query i has position lengths[b] - S + i.

    Returns:
        [B, S, H, DV] and lse2 [B, H, S].
    """
    batch, heads, queries, _ = q.shape
    repeats = heads // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    if k_rope is not None:
        k = torch.cat([k, k_rope.expand(-1, heads, -1, -1)], -1)
    out, lse = q.new_zeros(batch, queries, heads, v.shape[3]), q.new_zeros(batch, heads, queries)
    for b, length in enumerate(lengths.tolist()):
        i = length - queries + torch.arange(queries, device=q.device)[:, None]
        j = torch.arange(length, device=q.device)[None, :]
        seen = torch.ones(queries, length, dtype=torch.bool, device=q.device)
        seen = seen & (j <= i) if causal else seen
        seen = seen & (j > i - window) if window > 0 else seen
        for h in range(heads):
            scores = q[b, h] @ k[b, h, :length].T * scale
            if softcap > 0:
                scores = torch.tanh(scores / softcap) * softcap
            weights, lse[b, h] = _softmax2(scores / math.log(2), seen)
            out[b, :, h] = weights @ v[b, h, :length]
    return out, lse
