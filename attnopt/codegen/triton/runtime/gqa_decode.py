"""Triton kernels: decoding with cached keys and values, one key/value head per work item.

`gqa_decode` serves multi-head, grouped and multi-query attention, sink + recent windows per key/value head, routed
groups (a list of active groups per request), and it can leave its scores behind for layers that share its map.
`map_decode` is such a layer: it reads the map and its own values, no queries and no keys.

A sequence of the work list is (request, i); i is the group, or a place in the list of active groups. Row r of the
TOKENS * GROUP rows of a group belongs to token r // GROUP and to head group * GROUP + r % GROUP.

This file imports only triton; it is copied into packages. References: `reference.grouped_decode`, `map_decode`.
"""

import triton
import triton.language as tl


@triton.jit
def _slot_base(
    table, request, group, slot, last_page, table_stride, capacity, GROUPS: tl.constexpr, PAGE: tl.constexpr
):
    """Row of a head's slot in memory, int64. PAGE 0: requests lie one after another, `capacity` slots each."""
    if PAGE == 0:
        return (request.to(tl.int64) * GROUPS + group) * capacity + slot
    page = tl.load(table + request * table_stride + tl.minimum(slot // PAGE, last_page))
    return (page.to(tl.int64) * GROUPS + group) * PAGE + slot % PAGE


@triton.jit
def _physical(block, sink, window, length, TOKENS: tl.constexpr, BN: tl.constexpr):
    """The block of the cache that logical block `block` of a head with sinks and a window is; window 0: all are."""
    sink_blocks = (sink + BN - 1) // BN
    recent = tl.maximum((length - TOKENS + 1 - window) // BN, sink_blocks)
    skipped = tl.where(block < sink_blocks, block, block - sink_blocks + recent)
    return tl.where(window > 0, skipped, block)


@triton.jit
def gqa_decode(
    q, keys, values, table, lengths, sinks, windows, active, item_sequence, item_start, item_stop,
    partial, partial_lse2, scores,
    scale_log2, softcap_log2, table_stride, map_stride, capacity,
    GROUPS: tl.constexpr, ACTIVE: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    ROUTED: tl.constexpr, STREAMING: tl.constexpr, SOFTCAP: tl.constexpr, STORE_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (work items,).

    Args:
        q: [B, TOKENS, GROUPS * GROUP, D].
        keys, values: [pages, GROUPS, PAGE, D] and [pages, GROUPS, PAGE, DV]; or, with PAGE 0, [B, GROUPS, capacity, D]
            and [B, GROUPS, capacity, DV], and `table` is not read.
        table: int32 page ids, row stride `table_stride`; lengths: int32 [B], query tokens included.
        sinks, windows: int32 [GROUPS]: a head sees its first `sinks` and its last `windows` slots (STREAMING).
        active: int32 [B, ACTIVE], ids of active groups (ROUTED).
        item_*: as for `mla_decode`; the sequence is request * ACTIVE + i.
        partial: float32 [items, TOKENS * GROUP, DV]; partial_lse2: float32 [items, TOKENS * GROUP].
        scores: float32 [B, GROUPS, TOKENS * GROUP, map_stride], base-2 logits (STORE_MAP).
        softcap_log2: softcap times log2(e) (SOFTCAP).
    """
    ROWS: tl.constexpr = TOKENS * GROUP
    item = tl.program_id(0)
    sequence = tl.load(item_sequence + item)
    if sequence >= 0:
        request = sequence // ACTIVE
        group = sequence % ACTIVE
        if ROUTED:
            group = tl.load(active + sequence)
        start = tl.load(item_start + item)
        stop = tl.load(item_stop + item)
        length = tl.load(lengths + request)
        last_page = 0
        if PAGE > 0:
            last_page = tl.maximum(length - 1, 0) // PAGE
        sink = 0
        window = 0
        if STREAMING:
            sink = tl.load(sinks + group)
            window = tl.load(windows + group)
        h = tl.arange(0, BH)
        d = tl.arange(0, BD)
        dv = tl.arange(0, BV)
        limit = length - TOKENS + h // GROUP + 1
        row = (request * TOKENS + h // GROUP) * (GROUPS * GROUP) + group * GROUP + h % GROUP
        query = tl.load(q + row.to(tl.int64)[:, None] * D + d[None, :],
                        mask=(h < ROWS)[:, None] & (d < D)[None, :], other=0.0)  # fmt: skip
        m = tl.full([BH], float("-inf"), tl.float32)
        total = tl.zeros([BH], tl.float32)
        acc = tl.zeros([BH, BV], tl.float32)
        slot = _physical(start, sink, window, length, TOKENS, BN) * BN
        base = _slot_base(table, request, group, slot, last_page, table_stride, capacity, GROUPS, PAGE)
        for block in range(start, stop):
            n = slot + tl.arange(0, BN)
            offset = tl.arange(0, BN)[:, None]
            seen = n < length
            k = tl.load((keys + base * D) + offset * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
            v = tl.load((values + base * DV) + offset * DV + dv[None, :],
                        mask=seen[:, None] & (dv < DV)[None, :], other=0.0)  # fmt: skip
            slot = _physical(block + 1, sink, window, length, TOKENS, BN) * BN
            base = _slot_base(table, request, group, slot, last_page, table_stride, capacity, GROUPS, PAGE)
            s = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale_log2
            if SOFTCAP:
                # tanh(x) = 1 - 2 / (exp(2 x) + 1); the logits are in base 2.
                s = softcap_log2 * (1 - 2 / (tl.exp(2 * s / softcap_log2) + 1))
            visible = n[None, :] < limit[:, None]
            if STREAMING:
                recent = (n[None, :] >= limit[:, None] - window) | (window == 0)
                visible = visible & (recent | (n[None, :] < sink))
            s = tl.where(visible, s, float("-inf"))
            if STORE_MAP:
                where = ((request * GROUPS + group) * ROWS + h).to(tl.int64)[:, None] * map_stride + n[None, :]
                tl.store(scores + where, s, mask=(h < ROWS)[:, None] & (n < map_stride)[None, :])
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[:, None])
            alpha = tl.exp2(m - shift)
            total = total * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc=acc * alpha[:, None], input_precision=PRECISION)
            m = m_new
        out = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
        where = (item * ROWS + h).to(tl.int64)
        tl.store(partial + where[:, None] * DV + dv[None, :], out, mask=(h < ROWS)[:, None] & (dv < DV)[None, :])
        tl.store(partial_lse2 + where, m + tl.log2(total), mask=h < ROWS)


@triton.jit
def map_decode(
    scores, lse2, values, table, lengths, item_sequence, item_start, item_stop, partial,
    table_stride, map_stride, capacity,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Values under another layer's map: sum of exp2(s - lse2) v. No maximum and no rescaling; parts just add.

    Args:
        scores: float32 [B, GROUPS, TOKENS * GROUP, map_stride], as `gqa_decode` left them.
        lse2: float32 [B, GROUPS, TOKENS * GROUP], base 2, of the whole map.
        values, table, lengths, item_*: as for `gqa_decode`.
        partial: float32 [items, TOKENS * GROUP, DV].
    """
    ROWS: tl.constexpr = TOKENS * GROUP
    item = tl.program_id(0)
    sequence = tl.load(item_sequence + item)
    if sequence >= 0:
        request = sequence // GROUPS
        group = sequence % GROUPS
        start = tl.load(item_start + item)
        stop = tl.load(item_stop + item)
        length = tl.load(lengths + request)
        last_page = 0
        if PAGE > 0:
            last_page = tl.maximum(length - 1, 0) // PAGE
        h = tl.arange(0, BH)
        dv = tl.arange(0, BV)
        row = (sequence * ROWS + h).to(tl.int64)
        norm = tl.load(lse2 + row, mask=h < ROWS, other=0.0)
        norm = tl.where(norm == float("-inf"), 0.0, norm)
        acc = tl.zeros([BH, BV], tl.float32)
        base = _slot_base(table, request, group, start * BN, last_page, table_stride, capacity, GROUPS, PAGE)
        for block in range(start, stop):
            n = block * BN + tl.arange(0, BN)
            seen = n < length
            v = tl.load((values + base * DV) + tl.arange(0, BN)[:, None] * DV + dv[None, :],
                        mask=seen[:, None] & (dv < DV)[None, :], other=0.0)  # fmt: skip
            base = _slot_base(table, request, group, (block + 1) * BN, last_page, table_stride, capacity, GROUPS, PAGE)
            s = tl.load(scores + row[:, None] * map_stride + n[None, :],
                        mask=(h < ROWS)[:, None] & seen[None, :], other=float("-inf"))  # fmt: skip
            p = tl.exp2(s - norm[:, None])
            acc = tl.dot(p.to(v.dtype), v, acc=acc, input_precision=PRECISION)
        where = (item * ROWS + h).to(tl.int64)
        tl.store(partial + where[:, None] * DV + dv[None, :], acc, mask=(h < ROWS)[:, None] & (dv < DV)[None, :])
