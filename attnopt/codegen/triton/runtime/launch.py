"""Host side of the kernels: shapes, schedule, launch. Imports only torch and triton; copied into packages.

Caches are paged, [pages, PAGE, w] for latents and [pages, heads, PAGE, w] for keys and values. A contiguous buffer
[B, C, w] with C a multiple of PAGE is the same memory with the table b * C/PAGE + i (`contiguous_table`).
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
import triton
from torch import Tensor

from . import gqa_decode as gqa
from . import prefill as prompt
from .combine import combine
from .designs import latent_constants, latent_kernel
from .schedule import Schedule, schedule, streaming_blocks
from .select import (
    PAGE,
    Config,
    Tuned,
    gqa_decode_config,
    latent_key,
    map_decode_config,
    mla_decode_config,
    pow2,
    prefill_config,
)

LOG2E = math.log2(math.e)
#: Tuned picks beside this file, one per device and Triton version.
CONFIGS = Path(__file__).with_name("configs")
#: Shared memory per thread block and multiprocessors, for machines without a device (tests).
NO_DEVICE = ("sm90", 232_448, 8)


@lru_cache
def device_facts(index: int | None) -> tuple[str, int, int]:
    """(architecture, bytes of shared memory per block, multiprocessors) of a device; None for none."""
    if index is None:
        return NO_DEVICE
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], 65_536, properties.multi_processor_count
    arch = f"sm{properties.major}{properties.minor}"
    shared = int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return arch, shared, properties.multi_processor_count


@lru_cache
def tuned(arch: str, index: int | None = None) -> Tuned:
    """The picks for an architecture, the installed Triton and, where a pick needs it, a device."""
    device = None if index is None else torch.cuda.get_device_name(index)
    return Tuned(CONFIGS / f"{arch}.json", arch, triton.__version__, device)


def facts_of(x: Tensor) -> tuple[str, int, int]:
    """`device_facts` of a tensor's device."""
    return device_facts(x.device.index if x.is_cuda else None)


def precision_of(dtype: torch.dtype) -> str:
    """How products of that type are rounded: exactly for float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def contiguous_table(batch: int, capacity: int, device: torch.device) -> Tensor:
    """Page table of a contiguous buffer of `capacity` slots per request.

    Raises:
        ValueError: if `capacity` is no multiple of PAGE.
    """
    if capacity % PAGE:
        raise ValueError(f"a contiguous cache needs a multiple of {PAGE} slots, not {capacity}")
    pages = capacity // PAGE
    return torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)


def _merge(
    partial: Tensor, partial_lse2: Tensor, work: Schedule, rows: int, width: int, dtype: torch.dtype, add: bool = False
) -> tuple[Tensor, Tensor]:
    sequences = work.first_item.shape[0] - 1
    out = torch.empty(sequences, rows, width, dtype=dtype, device=partial.device)
    lse2 = torch.empty(sequences, rows, dtype=torch.float32, device=partial.device)
    slice_ = min(pow2(width), 128)
    grid = (sequences, rows, triton.cdiv(width, slice_))
    combine[grid](
        partial, partial_lse2, work.first_item, out, lse2, ROWS=rows, WIDTH=width, BW=slice_, SUM=add, num_warps=4
    )
    return out, lse2


def latent_decode(
    q: Tensor,
    cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    config: Config | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Absorbed attention with a paged latent cache.

    Args:
        q: [B, tokens, H, R + P], contiguous.
        cache: [pages, PAGE, R + P]; table: int32 [B, pages]; lengths: int32 [B], query tokens included.
        rank: R. scale: of the scores.
        config: design and tile; None for the tuned or default one.
        parts: thread blocks to fill; None for what the device holds.

    Returns:
        mixed latents [B, tokens, H, R] in q's type, and lse2 float32 [B, tokens, H].
    """
    batch, tokens, heads, width = q.shape
    rope, rows = width - rank, tokens * heads
    arch, shared, sms = facts_of(q)
    if config is None:
        shape = latent_key(heads, rank, rope, cache.shape[1], q.element_size(), tokens)
        default = mla_decode_config(rows, rank, rope, q.element_size(), arch, shared)
        config = tuned(arch, q.device.index).get("mla_decode", shape, default)
    tiles = triton.cdiv(rows, config.BH)
    parts = parts or max(1, sms * (2 if config.kernel == "mla_decode_d1" and config.num_warps == 4 else 1) // tiles)
    blocks = torch.div(lengths + config.BN - 1, config.BN, rounding_mode="floor")
    work = schedule(blocks, parts)
    items = work.sequence.shape[0]
    partial = torch.empty(items, rows, rank, dtype=torch.float32, device=q.device)
    partial_lse2 = torch.empty(items, rows, dtype=torch.float32, device=q.device)
    latent_kernel(config)[(items, tiles)](
        q, cache, table, lengths, work.sequence, work.start, work.stop, partial, partial_lse2,
        scale * LOG2E, table.stride(0),
        **latent_constants(config, heads, tokens, rank, rope, cache.shape[1], precision_of(q.dtype)),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    out, lse2 = _merge(partial, partial_lse2, work, rows, rank, q.dtype)
    return out.view(batch, tokens, heads, rank), lse2.view(batch, tokens, heads)


def grouped_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor | None,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    windows: Tensor | None = None,
    active: Tensor | None = None,
    scores: Tensor | None = None,
    config: Config | None = None,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with paged keys and values.

    Args:
        q: [B, tokens, H, D], contiguous; keys, values: [pages, G, PAGE, D] and [pages, G, PAGE, DV].
        table, lengths, scale, config, parts: as for `latent_decode`; without a table, keys and values are contiguous,
            [B, G, C, D] and [B, G, C, DV].
        softcap: bound on the logits; 0 for none.
        sinks, windows: int32 [G]: a head sees its first `sinks` and last `windows` slots; window 0: all slots.
        active: int32 [B, k]: only these groups are computed, the others give 0.
        scores: float32 [B, G, tokens * H/G, C], filled with base-2 logits for layers that share the map.

    Returns:
        [B, tokens, H, DV] in q's type and lse2 float32 [B, tokens, H].

    Raises:
        ValueError: `scores` with `active` or windows.
    """
    batch, tokens, heads, width = q.shape
    groups, value_width = keys.shape[1], values.shape[3]
    size = heads // groups
    rows = tokens * size
    arch, shared, sms = facts_of(q)
    if scores is not None and (windows is not None or active is not None):
        raise ValueError("a map can be shared only if every head computes all of it")
    if config is None:
        shape = f"H{heads} G{groups} D{width} DV{value_width} {q.element_size()} sq{tokens}"
        default = gqa_decode_config(rows, width, value_width, q.element_size(), arch, shared)
        config = tuned(arch).get("gqa_decode", shape, default)
    none = lengths
    sequences = groups if active is None else active.shape[1]
    if windows is not None:
        sinks = torch.zeros_like(windows) if sinks is None else sinks
        blocks = streaming_blocks(lengths, sinks, windows, tokens, config.BN)
        if active is not None:
            blocks = blocks.gather(1, active.long())
    else:
        blocks = torch.div(lengths + config.BN - 1, config.BN, rounding_mode="floor")[:, None].expand(-1, sequences)
    work = schedule(blocks.reshape(-1), parts or 2 * sms)
    items = work.sequence.shape[0]
    partial = torch.empty(items, rows, value_width, dtype=torch.float32, device=q.device)
    partial_lse2 = torch.empty(items, rows, dtype=torch.float32, device=q.device)
    gqa.gqa_decode[(items,)](
        q, keys, values, none if table is None else table, lengths,
        none if sinks is None else sinks, none if windows is None else windows,
        none if active is None else active, work.sequence, work.start, work.stop,
        partial, partial_lse2, partial if scores is None else scores,
        scale * LOG2E, softcap * LOG2E, 0 if table is None else table.stride(0),
        0 if scores is None else scores.shape[3], keys.shape[2],
        GROUPS=groups, ACTIVE=sequences, GROUP=size, TOKENS=tokens, D=width, DV=value_width,
        PAGE=0 if table is None else keys.shape[2],
        BH=config.BH, BN=config.BN, BD=pow2(width), BV=pow2(value_width),
        ROUTED=active is not None, STREAMING=windows is not None, SOFTCAP=softcap > 0, STORE_MAP=scores is not None,
        PRECISION=precision_of(q.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    found, found_lse2 = _merge(partial, partial_lse2, work, rows, value_width, q.dtype)
    found = found.view(batch, sequences, tokens, size, value_width)
    found_lse2 = found_lse2.view(batch, sequences, tokens, size)
    if active is not None:
        out = q.new_zeros(batch, groups, tokens, size, value_width)
        lse2 = torch.full((batch, groups, tokens, size), float("-inf"), device=q.device)
        index = active.long()[:, :, None, None]
        lse2.scatter_(1, index.expand_as(found_lse2), found_lse2)
        found = out.scatter_(1, index[..., None].expand_as(found), found)
        found_lse2 = lse2
    out = found.permute(0, 2, 1, 3, 4).reshape(batch, tokens, heads, value_width)
    return out, found_lse2.permute(0, 2, 1, 3).reshape(batch, tokens, heads)


def map_decode(
    scores: Tensor, lse2: Tensor, values: Tensor, table: Tensor | None, lengths: Tensor, parts: int | None = None
) -> Tensor:
    """Values under the map of another layer.

    Args:
        scores: as `grouped_decode` filled them, [B, G, rows, C].
        lse2: float32 [B, G, rows].
        values: [pages, G, PAGE, DV] of this layer; without a table contiguous, [B, G, C, DV].

    Returns:
        [B, G, rows, DV] in the type of `values`.
    """
    batch, groups, rows, slots = scores.shape
    width = values.shape[3]
    config = map_decode_config(rows)
    _, _, sms = facts_of(values)
    blocks = torch.div(lengths + config.BN - 1, config.BN, rounding_mode="floor")[:, None].expand(-1, groups)
    work = schedule(blocks.reshape(-1), parts or 2 * sms)
    items = work.sequence.shape[0]
    partial = torch.empty(items, rows, width, dtype=torch.float32, device=values.device)
    gqa.map_decode[(items,)](
        scores, lse2.contiguous(), values, lengths if table is None else table, lengths,
        work.sequence, work.start, work.stop, partial,
        0 if table is None else table.stride(0), slots, values.shape[2],
        GROUPS=groups, GROUP=rows, TOKENS=1, DV=width, PAGE=0 if table is None else values.shape[2],
        BH=config.BH, BN=config.BN, BV=pow2(width), PRECISION=precision_of(values.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    out, _ = _merge(partial, partial, work, rows, width, values.dtype, add=True)
    return out.view(batch, groups, rows, width)


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
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a prompt; arguments and result as `reference.prefill`, lengths int32, tensors contiguous."""
    batch, heads, queries, width = q.shape
    groups, keys, nope = k.shape[1:]
    rope, value_width = width - nope, v.shape[3]
    arch, shared, _ = facts_of(q)
    if config is None:
        default = prefill_config(nope, rope, value_width, q.element_size(), arch, shared)
        config = tuned(arch).get("prefill", f"DN{nope} DR{rope} DV{value_width} {q.element_size()}", default)
    out = torch.empty(batch, queries, heads, value_width, dtype=q.dtype, device=q.device)
    lse2 = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    prompt.prefill[(triton.cdiv(queries, config.BH), batch * heads)](
        q, k, k if k_rope is None else k_rope, v, out, lse2, lengths, scale * LOG2E, softcap * LOG2E, queries, keys,
        HEADS=heads, GROUP=heads // groups, KR_HEADS=1 if k_rope is None else k_rope.shape[1],
        DN=nope, DR=rope, DV=value_width,
        BM=config.BH, BN=config.BN, BD=pow2(nope), BR=pow2(max(rope, 1)), BV=pow2(value_width),
        CAUSAL=causal, WINDOW=window, SOFTCAP=softcap > 0, PRECISION=precision_of(q.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse2
