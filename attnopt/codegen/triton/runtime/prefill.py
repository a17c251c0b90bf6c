"""Triton kernel: attention over a prompt, keys and values per head, queries at the end of the keys.

Head widths are split into an unrotated part DN and a rotary part DR, so that 192 = 128 + 64 and 96 = 64 + 32 need no
padding to a power of two; DR = 0 is ordinary attention. The rotary key may be shared by all heads (KR_HEADS = 1).
This file imports only triton; it is copied into packages. Reference: `reference.prefill`.
"""

import triton
import triton.language as tl


@triton.jit
def prefill(
    q, k, k_rope, v, out, lse2, lengths,
    scale_log2, softcap_log2, queries, keys,
    HEADS: tl.constexpr, GROUP: tl.constexpr, KR_HEADS: tl.constexpr,
    DN: tl.constexpr, DR: tl.constexpr, DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (query tiles, batch * HEADS).

    Args:
        q: [B, HEADS, queries, DN + DR].
        k: [B, HEADS // GROUP, keys, DN]; k_rope: [B, KR_HEADS, keys, DR]; v: [B, HEADS // GROUP, keys, DV].
        out: [B, queries, HEADS, DV]; lse2: float32 [B, HEADS, queries], base 2.
        lengths: int32 [B], keys that count; query i of request b has position lengths[b] - queries + i.
        WINDOW: keys a query sees up to its own; 0 for all.
        softcap_log2: softcap times log2(e) (SOFTCAP).
    """
    tile = tl.program_id(0)
    request = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    group = head // GROUP
    length = tl.load(lengths + request)
    i = tile * BM + tl.arange(0, BM)
    position = length - queries + i
    d = tl.arange(0, BD)
    r = tl.arange(0, BR)
    dv = tl.arange(0, BV)
    rows = q + ((request * HEADS + head).to(tl.int64) * queries + i)[:, None] * (DN + DR)
    query = tl.load(rows + d[None, :], mask=(i < queries)[:, None] & (d < DN)[None, :], other=0.0)
    if DR > 0:
        query_rope = tl.load(rows + DN + r[None, :], mask=(i < queries)[:, None] & (r < DR)[None, :], other=0.0)
    first_key = (request * (HEADS // GROUP) + group).to(tl.int64) * keys
    rope_head = (request * KR_HEADS + head % KR_HEADS).to(tl.int64) * keys
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    stop = length
    if CAUSAL:
        stop = tl.minimum(length, length - queries + (tile + 1) * BM)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(length - queries + tile * BM - WINDOW + 1, 0) // BN * BN
    for n0 in range(start, stop, BN):
        n = n0 + tl.arange(0, BN)
        seen = n < length
        kn = tl.load(k + (first_key + n)[:, None] * DN + d[None, :], mask=seen[:, None] & (d < DN)[None, :], other=0.0)
        s = tl.dot(query, tl.trans(kn), input_precision=PRECISION) * scale_log2
        if DR > 0:
            kr = tl.load(k_rope + (rope_head + n)[:, None] * DR + r[None, :],
                         mask=seen[:, None] & (r < DR)[None, :], other=0.0)  # fmt: skip
            s += tl.dot(query_rope, tl.trans(kr), input_precision=PRECISION) * scale_log2
        if SOFTCAP:
            s = softcap_log2 * (1 - 2 / (tl.exp(2 * s / softcap_log2) + 1))
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (n[None, :] <= position[:, None])
        if WINDOW > 0:
            visible = visible & (n[None, :] > position[:, None] - WINDOW)
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(m - shift)
        total = total * alpha + tl.sum(p, 1)
        values = tl.load(v + (first_key + n)[:, None] * DV + dv[None, :],
                         mask=seen[:, None] & (dv < DV)[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(p.to(values.dtype), values, acc=acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    result = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
    where = ((request * queries + i).to(tl.int64) * HEADS + head)[:, None] * DV + dv[None, :]
    tl.store(out + where, result.to(out.dtype.element_ty), mask=(i < queries)[:, None] & (dv < DV)[None, :])
    tl.store(lse2 + (request * HEADS + head).to(tl.int64) * queries + i, m + tl.log2(total), mask=i < queries)
