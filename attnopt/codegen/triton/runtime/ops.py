"""What a generated model calls: attention with a cache, linear maps, rope. Imports only torch and triton.

Weights and caches have the package's type; the residual stream and norms stay in float32, and linear maps multiply in
the weights' type: half precision only where the matrix units are.

`forced` chooses the kernels: "triton", "reference" (plain torch) or "auto" (Triton for tensors on a GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference

#: Queries up to which decoding kernels are used; longer ones are prompts.
DECODE_TOKENS = 4

_forced = "auto"


def force(kernels: str) -> None:
    """Choose the kernels for all following calls.

    Raises:
        ValueError: for anything but "auto", "triton" and "reference".
    """
    global _forced
    if kernels not in ("auto", "triton", "reference"):
        raise ValueError(f"kernels {kernels!r}; give auto, triton or reference")
    _forced = kernels


def _triton(x: Tensor) -> bool:
    return _forced == "triton" or (_forced == "auto" and x.is_cuda)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, multiplied in the type of W, in float32."""
    y = F.linear(x.to(weight.dtype), weight).float()
    return y if bias is None else y + bias.float()


def embedding(weight: Tensor, ids: Tensor, *_: object) -> Tensor:
    """Rows of a table in float32."""
    return F.embedding(ids, weight).float()


def token_positions(input_ids: Tensor, past_length: Tensor) -> Tensor:
    """Position of every token, int64 [B, S]."""
    return past_length[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)[None, :]


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, style: str, offset: int, attention_scaling: float) -> Tensor:
    """Turn pair m of the rotary dims of x [B, N, S, d] by positions * inv_freq[m], in float32."""
    n = inv_freq.shape[0]
    angle = positions[:, None, :, None].float() * inv_freq.float()
    cos, sin = angle.cos() * attention_scaling, angle.sin() * attention_scaling
    before, turned, after = x.split([offset, 2 * n, x.shape[-1] - offset - 2 * n], dim=-1)
    if style == "half":
        a, b = turned.float().chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        a, b = turned[..., 0::2].float(), turned[..., 1::2].float()
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([before, turned.to(x.dtype), after], dim=-1)


def cache_write(past: Tensor, new: Tensor, past_length: Tensor) -> Tensor:
    """Write rows of `new` into `past` at slots past_length[b] ..., in place, and return `past`.

    Args:
        past: [B, C, w] or [B, G, C, w]; new: the same with S slots.
    """
    slots = past_length[:, None] + torch.arange(new.shape[-2], device=new.device)[None, :]
    rows = torch.arange(past.shape[0], device=past.device)[:, None]
    if past.ndim == 3:
        past[rows, slots] = new.to(past.dtype)
    else:
        past[rows, :, slots] = new.transpose(1, 2).to(past.dtype)
    return past


def _paged(cache: Tensor) -> tuple[Tensor, Tensor]:
    """A contiguous latent buffer [B, C, w] as pages, and their table."""
    from .launch import contiguous_table
    from .select import PAGE

    return cache.view(-1, PAGE, cache.shape[2]), contiguous_table(cache.shape[0], cache.shape[1], cache.device)


def attend_latent(
    q_nope: Tensor, q_rope: Tensor, w_uk: Tensor, w_uv: Tensor, cache: Tensor, past_length: Tensor, scale: float,
    window: int = 0, softcap: float = 0.0, plain: bool = False,
) -> Tensor:  # fmt: skip
    """Multi-head Latent Attention on the cached latents, the query's own among them.

    Args:
        q_nope, q_rope: [B, H, S, dn] and [B, H, S, dr]; w_uk, w_uv: [H, dn, r] and [H, dv, r].
        cache: [B, C, r + dr]; past_length: int64 [B], tokens cached before these.
        window, softcap: as for `attend_grouped`; only with `plain`.
        plain: compute in plain torch, whatever the device: no kernel does this site.

    Returns:
        [B, S, H, dv] in float32.
    """
    tokens, rank = q_nope.shape[2], w_uk.shape[2]
    lengths = (past_length + tokens).to(torch.int32)
    if plain:
        q = torch.cat([torch.matmul(q_nope.to(w_uk.dtype), w_uk), q_rope.to(w_uk.dtype)], -1)
        shared = cache[:, None]
        mixed = attend_reference(q, shared, shared[..., :rank], None, past_length, scale, window, softcap, None)
        return torch.einsum("bshr,hvr->bshv", mixed.to(w_uv.dtype), w_uv).float()
    if tokens <= DECODE_TOKENS or not _triton(cache):
        absorbed = torch.matmul(q_nope.to(w_uk.dtype), w_uk)
        q = torch.cat([absorbed, q_rope.to(w_uk.dtype)], -1).to(cache.dtype).transpose(1, 2).contiguous()
        pages, table = _paged(cache)
        if _triton(cache):
            from .launch import latent_decode

            mixed, _ = latent_decode(q, pages, table, lengths, rank, scale)
        else:
            mixed, _ = reference.latent_decode(q.float(), pages.float(), table, lengths, rank, scale)
        return torch.einsum("bshr,hvr->bshv", mixed.to(w_uv.dtype), w_uv).float()
    from .launch import prefill

    # A prompt: keys and values of what is cached so far are expanded once, which takes far fewer operations.
    longest = int(lengths.max())
    latent, key = cache[:, None, :longest, :rank], cache[:, None, :longest, rank:].contiguous()
    k = torch.matmul(latent, w_uk.transpose(1, 2))
    v = torch.matmul(latent, w_uv.transpose(1, 2))
    q = torch.cat([q_nope, q_rope], -1).to(cache.dtype)
    return prefill(q, k, key, v, lengths, scale)[0].float()


def attend_grouped(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past_length: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    gates: Tensor | None = None,
) -> Tensor:
    """Attention on cached keys and values, the query's own among them.

    Args:
        q: [B, H, S, d]; keys, values: [B, G, C, d] and [B, G, C, dv].
        window: slots a token sees up to its own; 0 for all.
        gates: [B, S, H] factors on the heads' outputs, or None. Groups whose gates are all 0 are not computed.

    Returns:
        [B, S, H, dv] in float32.
    """
    batch, _, tokens, _ = q.shape
    groups = keys.shape[1]
    lengths = (past_length + tokens).to(torch.int32)
    windows = torch.full((groups,), window, dtype=torch.int32, device=q.device) if window > 0 else None
    if tokens <= DECODE_TOKENS or not _triton(keys):
        rows = q.to(keys.dtype).transpose(1, 2).contiguous()
        if _triton(keys):
            from .launch import grouped_decode

            active = _active_groups(gates, groups)
            out, _ = grouped_decode(rows, keys, values, None, lengths, scale, softcap, windows=windows, active=active)
        else:
            table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
            args = (rows.float(), keys.float(), values.float(), table, lengths, scale, softcap)
            out, _ = reference.grouped_decode(*args, windows=windows)
    else:
        from .launch import prefill

        out, _ = prefill(q.to(keys.dtype).contiguous(), keys, None, values, lengths, scale, True, window, softcap)
    out = out.float()
    return out if gates is None else out * gates.float()[..., None]


def _active_groups(gates: Tensor | None, groups: int) -> Tensor | None:
    """Ids of the groups that some token of a request needs, padded to the same number per request; or None for all.

    How many groups are active differs from step to step; it is read back, so a CUDA graph cannot hold routed heads.
    """
    if gates is None:
        return None
    wanted = (gates != 0).any(1).view(gates.shape[0], groups, -1).any(-1)
    count = int(wanted.sum(1).max())
    if count in (0, groups):
        return None
    return wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count].to(torch.int32).contiguous()


def attend_owner(
    q: Tensor, keys: Tensor, values: Tensor, past_length: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """`attend_grouped` of a layer whose map others use.

    Returns:
        its output, and the map for `attend_map`: base-2 scores float32 [B, G, S * H/G, C] and lse2 [B, G, S * H/G].
        None where keeping scores does not pay: for prompts (S x C numbers a head), and in plain torch.
    """
    batch, heads, tokens, _ = q.shape
    if tokens > DECODE_TOKENS or not _triton(keys):
        return attend_grouped(q, keys, values, past_length, scale, 0, softcap), None
    from .launch import grouped_decode

    groups, capacity = keys.shape[1], keys.shape[2]
    scores = torch.empty(batch, groups, tokens * heads // groups, capacity, device=q.device)
    lengths = (past_length + tokens).to(torch.int32)
    rows = q.to(keys.dtype).transpose(1, 2).contiguous()
    out, lse2 = grouped_decode(rows, keys, values, None, lengths, scale, softcap, scores=scores)
    lse2 = lse2.view(batch, tokens, groups, -1).transpose(1, 2).reshape(batch, groups, -1)
    return out.float(), (scores, lse2)


def attend_map(
    owner: tuple[Tensor, Tensor] | None,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    past_length: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of a layer that uses the map of another: queries and keys are the owner's, values its own.

    Args:
        owner: the map, see `attend_owner`; None: it is computed again from the owner's cached keys.
        q, keys, values, past_length, scale, window, softcap: as for `attend_grouped`.
    """
    if owner is None:
        return attend_grouped(q, keys, values, past_length, scale, window, softcap)
    from .launch import map_decode

    batch, heads, tokens, _ = q.shape
    out = map_decode(*owner, values, None, (past_length + tokens).to(torch.int32)).float()
    out = out.view(batch, values.shape[1], tokens, -1, values.shape[3])
    return out.transpose(1, 2).reshape(batch, tokens, heads, values.shape[3])


def expert_linear(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y[i] = weight[expert[i]] x[i] + bias[expert[i]], rows grouped by expert; float32 [N, out]."""
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=weight.shape[0]).tolist()
    pieces = [
        linear(rows, weight[e], None if bias is None else bias[e])
        for e, rows in enumerate(x[order].split(counts))
        if rows.shape[0]
    ]
    out = torch.empty(x.shape[0], weight.shape[1], device=x.device)
    if pieces:
        out[order] = torch.cat(pieces)
    return out


def attend_reference(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, past_length: Tensor, scale: float, window: int,
    softcap: float, sinks: Tensor | None, gates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention in plain torch, for what no kernel does (learned sinks, additive biases); as `attend_grouped`."""
    heads, tokens = q.shape[1], q.shape[2]
    repeats = heads // keys.shape[1]
    k, v = keys.float().repeat_interleave(repeats, 1), values.float().repeat_interleave(repeats, 1)
    logits = torch.matmul(q.float(), k.transpose(2, 3)) * scale
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = logits + bias
    position = (past_length[:, None] + torch.arange(tokens, device=q.device))[:, None, :, None]
    slot = torch.arange(k.shape[2], device=q.device)
    hidden = (slot > position) | (slot <= position - window) if window > 0 else slot > position
    logits = logits.masked_fill(hidden, float("-inf"))
    if sinks is None:
        weights = torch.softmax(logits, -1)
    else:
        sink = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
    out = torch.matmul(weights, v).transpose(1, 2)
    return out if gates is None else out * gates.float()[..., None]
