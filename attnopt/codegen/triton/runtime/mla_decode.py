"""Triton kernels: absorbed decoding of Multi-head Latent Attention, one read of the latent cache per step.

A query row attends to cached vectors [latent (R), rotary key (P)]; the latent is key and value at once, so every block
of the cache is loaded once and used twice. The cache is split over thread blocks by work items (`schedule.py`) and
the parts are merged by `combine.py`. Rows are (query token, head) pairs: row r of S * H belongs to token r // H.

Three designs for different numbers of rows, chosen in `select.py`:
    D1  few rows (tiles of 16 or 32): mma.sync; the id of the next page is loaded before this block's mathematics, so
        that the pipeliner sees direct loads and keeps two blocks in flight
    D2  17 to 32 rows on Hopper: operands swapped, S^T = C Q^T, so that cache rows fill the wgmma tile, rows are its N
    D3  64 rows: the product with the values runs one block behind (P is carried, the block is read again), which keeps
        the two products independent: a chained one would be computed twice
A fourth, D4, is in `mla_decode_gluon.py`.

This file imports only triton; it is copied into packages. Reference: `reference.latent_decode`.
"""

import triton
import triton.language as tl


@triton.jit
def _block_base(table, request, block, last_page, table_stride, BN: tl.constexpr, PAGE: tl.constexpr):
    """Slot of the first row of a block, int64. The page is clamped, so a look-ahead never leaves the table."""
    page = tl.load(table + request * table_stride + tl.minimum(block * BN // PAGE, last_page))
    return page.to(tl.int64) * PAGE + block * BN % PAGE


@triton.jit
def _load_block(
    cache,
    base,
    seen,
    R: tl.constexpr,
    P: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    NARROW: tl.constexpr,
):
    """A block of cached vectors: latents [BN, BR] and rotary keys [BN, BP]; rows that are not seen are zero.

    NARROW: 32-bit offsets from one 64-bit base (fewer registers); otherwise 64-bit offsets per row.
    """
    n = tl.arange(0, BN)
    r = tl.arange(0, BR)
    p = tl.arange(0, BP)
    if NARROW:
        rows = (cache + base * (R + P)) + n[:, None] * (R + P)
    else:
        rows = cache + (base + n)[:, None] * (R + P)
    latent = tl.load(rows + r[None, :], mask=seen[:, None] & (r < R)[None, :], other=0.0)
    key = tl.load(rows + R + p[None, :], mask=seen[:, None] & (p < P)[None, :], other=0.0)
    return latent, key


@triton.jit
def _load_query(
    q,
    first,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BH: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    request,
):
    """Query rows first ... first + BH - 1 of a request: latent part [BH, BR] and rotary part [BH, BP]."""
    h = first + tl.arange(0, BH)
    r = tl.arange(0, BR)
    p = tl.arange(0, BP)
    rows = q + (request * ROWS + h).to(tl.int64)[:, None] * (R + P)
    q_latent = tl.load(rows + r[None, :], mask=(h < ROWS)[:, None] & (r < R)[None, :], other=0.0)
    q_rope = tl.load(rows + R + p[None, :], mask=(h < ROWS)[:, None] & (p < P)[None, :], other=0.0)
    return q_latent, q_rope


@triton.jit
def mla_decode_d1(
    q, cache, table, lengths, item_sequence, item_start, item_stop, partial, partial_lse2,
    scale_log2, table_stride,
    H: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Design D1. Grid: (work items, row tiles).

    Args:
        q: [B, TOKENS * H, R + P].
        cache: [slots, R + P]; request b's slot s is at table[b, s // PAGE] * PAGE + s % PAGE.
        table: int32 page ids, row stride `table_stride`.
        lengths: int32 [B], tokens cached, the query tokens included.
        item_sequence, item_start, item_stop: int32, request and range of blocks of BN slots; request -1: no work.
        partial: float32 [items, TOKENS * H, R]; partial_lse2: float32 [items, TOKENS * H], base 2.
        scale_log2: scale of the scores times log2(e).
    """
    ROWS: tl.constexpr = TOKENS * H
    item = tl.program_id(0)
    first = tl.program_id(1) * BH
    request = tl.load(item_sequence + item)
    if request >= 0:
        start = tl.load(item_start + item)
        stop = tl.load(item_stop + item)
        length = tl.load(lengths + request)
        last_page = tl.maximum(length - 1, 0) // PAGE
        h = first + tl.arange(0, BH)
        limit = length - TOKENS + h // H + 1
        q_latent, q_rope = _load_query(q, first, ROWS, R, P, BH, BR, BP, request)
        m = tl.full([BH], float("-inf"), tl.float32)
        total = tl.zeros([BH], tl.float32)
        acc = tl.zeros([BH, BR], tl.float32)
        base = _block_base(table, request, start, last_page, table_stride, BN, PAGE)
        for block in range(start, stop):
            n = block * BN + tl.arange(0, BN)
            latent, key = _load_block(cache, base, n < length, R, P, BR, BP, BN, NARROW)
            base = _block_base(table, request, block + 1, last_page, table_stride, BN, PAGE)
            s = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
            s = tl.dot(q_rope, tl.trans(key), acc=s, input_precision=PRECISION)
            s = tl.where(n[None, :] < limit[:, None], s * scale_log2, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[:, None])
            alpha = tl.exp2(m - shift)
            total = total * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(latent.dtype), latent, acc=acc * alpha[:, None], input_precision=PRECISION)
            m = m_new
        out = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
        r = tl.arange(0, BR)
        where = (item * ROWS + h).to(tl.int64)
        tl.store(partial + where[:, None] * R + r[None, :], out, mask=(h < ROWS)[:, None] & (r < R)[None, :])
        tl.store(partial_lse2 + where, m + tl.log2(total), mask=h < ROWS)


@triton.jit
def mla_decode_d2(
    q, cache, table, lengths, item_sequence, item_start, item_stop, partial, partial_lse2,
    scale_log2, table_stride,
    H: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Design D2: scores and output are held transposed, [BN, BH] and [BR, BH]. Arguments as for `mla_decode_d1`."""
    ROWS: tl.constexpr = TOKENS * H
    item = tl.program_id(0)
    first = tl.program_id(1) * BH
    request = tl.load(item_sequence + item)
    if request >= 0:
        start = tl.load(item_start + item)
        stop = tl.load(item_stop + item)
        length = tl.load(lengths + request)
        last_page = tl.maximum(length - 1, 0) // PAGE
        h = first + tl.arange(0, BH)
        limit = length - TOKENS + h // H + 1
        q_latent, q_rope = _load_query(q, first, ROWS, R, P, BH, BR, BP, request)
        m = tl.full([BH], float("-inf"), tl.float32)
        total = tl.zeros([BH], tl.float32)
        acc = tl.zeros([BR, BH], tl.float32)
        base = _block_base(table, request, start, last_page, table_stride, BN, PAGE)
        for block in range(start, stop):
            n = block * BN + tl.arange(0, BN)
            latent, key = _load_block(cache, base, n < length, R, P, BR, BP, BN, NARROW)
            base = _block_base(table, request, block + 1, last_page, table_stride, BN, PAGE)
            s = tl.dot(latent, tl.trans(q_latent), input_precision=PRECISION)
            s = tl.dot(key, tl.trans(q_rope), acc=s, input_precision=PRECISION)
            s = tl.where(n[:, None] < limit[None, :], s * scale_log2, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 0))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[None, :])
            alpha = tl.exp2(m - shift)
            total = total * alpha + tl.sum(p, 0)
            acc = tl.dot(tl.trans(latent), p.to(latent.dtype), acc=acc * alpha[None, :], input_precision=PRECISION)
            m = m_new
        out = tl.where(total[None, :] > 0, acc / total[None, :], 0.0)
        r = tl.arange(0, BR)
        where = (item * ROWS + h).to(tl.int64)
        tl.store(partial + where[None, :] * R + r[:, None], out, mask=(h < ROWS)[None, :] & (r < R)[:, None])
        tl.store(partial_lse2 + where, m + tl.log2(total), mask=h < ROWS)


@triton.jit
def mla_decode_d3(
    q, cache, table, lengths, item_sequence, item_start, item_stop, partial, partial_lse2,
    scale_log2, table_stride,
    H: tl.constexpr, TOKENS: tl.constexpr, R: tl.constexpr, P: tl.constexpr, PAGE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Design D3: the weights of a block meet its values one iteration later. Arguments as for `mla_decode_d1`."""
    ROWS: tl.constexpr = TOKENS * H
    item = tl.program_id(0)
    first = tl.program_id(1) * BH
    request = tl.load(item_sequence + item)
    if request >= 0:
        start = tl.load(item_start + item)
        stop = tl.load(item_stop + item)
        length = tl.load(lengths + request)
        last_page = tl.maximum(length - 1, 0) // PAGE
        h = first + tl.arange(0, BH)
        r = tl.arange(0, BR)
        limit = length - TOKENS + h // H + 1
        q_latent, q_rope = _load_query(q, first, ROWS, R, P, BH, BR, BP, request)
        m = tl.full([BH], float("-inf"), tl.float32)
        total = tl.zeros([BH], tl.float32)
        acc = tl.zeros([BH, BR], tl.float32)
        p = tl.zeros([BH, BN], q_latent.dtype)
        base = _block_base(table, request, start, last_page, table_stride, BN, PAGE)
        before = base
        for block in range(start, stop):
            n = block * BN + tl.arange(0, BN)
            latent, key = _load_block(cache, base, n < length, R, P, BR, BP, BN, NARROW)
            s = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION) * scale_log2
            s += tl.dot(q_rope, tl.trans(key), input_precision=PRECISION) * scale_log2
            s = tl.where(n[None, :] < limit[:, None], s, float("-inf"))
            # Every block before the last one of a request is full, so only emptiness has to be masked.
            full = tl.arange(0, BN) < (block - start) * BN
            values = tl.load(cache + (before + tl.arange(0, BN))[:, None] * (R + P) + r[None, :],
                             mask=full[:, None] & (r < R)[None, :], other=0.0)  # fmt: skip
            acc = tl.dot(p, values, acc=acc, input_precision=PRECISION)
            m_new = tl.maximum(m, tl.max(s, 1))
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            weights = tl.exp2(s - shift[:, None])
            alpha = tl.exp2(m - shift)
            total = total * alpha + tl.sum(weights, 1)
            acc = acc * alpha[:, None]
            p = weights.to(q_latent.dtype)
            m = m_new
            before = base
            base = _block_base(table, request, block + 1, last_page, table_stride, BN, PAGE)
        seen = (stop - 1) * BN + tl.arange(0, BN) < tl.where(stop > start, length, -BN)
        values = tl.load(cache + (before + tl.arange(0, BN))[:, None] * (R + P) + r[None, :],
                         mask=seen[:, None] & (r < R)[None, :], other=0.0)  # fmt: skip
        acc = tl.dot(p, values, acc=acc, input_precision=PRECISION)
        out = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)
        where = (item * ROWS + h).to(tl.int64)
        tl.store(partial + where[:, None] * R + r[None, :], out, mask=(h < ROWS)[:, None] & (r < R)[None, :])
        tl.store(partial_lse2 + where, m + tl.log2(total), mask=h < ROWS)
