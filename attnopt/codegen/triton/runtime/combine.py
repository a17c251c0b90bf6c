"""Triton kernel: merges the parts of split attention.

    M = max lse_i;  w_i = 2^(lse_i - M);  out = sum w_i o_i / sum w_i;  lse = M + log2 sum w_i

over the parts of a sequence; a sequence without visible keys gets 0 and -inf. With SUM the parts just add.
This file imports only triton; it is copied into packages. Reference: `reference.combine`.
"""

import triton
import triton.language as tl


@triton.jit
def combine(
    partial, partial_lse2, first_item, out, lse2,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences, ROWS, slices of WIDTH).

    Args:
        partial: float32 [items, ROWS, WIDTH]; partial_lse2: float32 [items, ROWS].
        first_item: int32 [sequences + 1]; parts of sequence i are first_item[i] ... first_item[i + 1] - 1.
        out: [sequences, ROWS, WIDTH]; lse2: float32 [sequences, ROWS], base 2.
    """
    sequence = tl.program_id(0)
    row = tl.program_id(1)
    w = tl.program_id(2) * BW + tl.arange(0, BW)
    start = tl.load(first_item + sequence)
    stop = tl.load(first_item + sequence + 1)
    acc = tl.zeros([BW], tl.float32)
    m = float("-inf")
    total = 0.0
    for item in range(start, stop):
        where = (item * ROWS + row).to(tl.int64)
        part = tl.load(partial + where * WIDTH + w, mask=w < WIDTH, other=0.0)
        if SUM:
            acc += part
        else:
            lse = tl.load(partial_lse2 + where)
            m_new = tl.maximum(m, lse)
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            alpha = tl.exp2(m - shift)
            weight = tl.exp2(lse - shift)
            acc = acc * alpha + part * weight
            total = total * alpha + weight
            m = m_new
    if not SUM:
        acc = tl.where(total > 0, acc / total, 0.0)
        if tl.program_id(2) == 0:
            tl.store(lse2 + sequence * ROWS + row, m + tl.log2(total))
    where = (sequence * ROWS + row).to(tl.int64) * WIDTH
    tl.store(out + where + w, acc.to(out.dtype.element_ty), mask=w < WIDTH)
