"""Gluon kernel: absorbed decoding of Multi-head Latent Attention for tiles of 64 rows on Hopper, design D4.

What Triton decides for the other designs is said here. Two warp groups share both products of a tile: warps lie [4, 2]
over its 64 rows and its columns, for scores [64, BN] and output [64, BR] alike, so nothing is computed twice and the
values are read once, from the block that the scores came from. Blocks of the cache lie in a ring of STAGES buffers,
filled with cp.async, whose mask writes zeros where rows are not seen (0 * NaN is NaN).

STAGES >= 3: the scores of block j + 1 are issued before the softmax of block j, so that the tensor cores have work
during it. Two buffers are in use, STAGES - 2 in flight. Waiting for the values of block j only in the next iteration
would leave no gap at all, but then the assembler cannot follow the registers and lets no wgmma overlap with anything
(`Figures.serialised` of the compiler's side tells).
STAGES = 2: one buffer in use, one in flight, products and softmax take turns; it lets wide latents have BN = 64.

This file imports only triton, and needs its Gluon; import it through `designs.py`. Copied into packages. Reference:
`reference.latent_decode`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

#: The barrier of a thread block: Triton 3.7's name, then 3.6's.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
#: cp.async: Triton 3.9's name, then 3.6's.
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def _copy_layout(width, warps):
    """Threads of a block over rows of `width` 2-byte numbers, 16 bytes each."""
    across = min(width // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [warps, 1], [1, 0])


@gluon.constexpr_function
def _mma_layout(columns):
    """A 64-row tile over two warp groups, half of the columns each."""
    return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, columns // 2, 16])


@gluon.jit
def _copy_rows(buffer, rows, count, WIDTH: gl.constexpr, STRIDE: gl.constexpr):
    """Start copying [rows of the buffer, WIDTH] numbers; rows from `count` on and columns past WIDTH become zero."""
    layout: gl.constexpr = _copy_layout(buffer.shape[1], gl.num_warps())
    n = gl.arange(0, buffer.shape[0], gl.SliceLayout(1, layout))
    r = gl.arange(0, buffer.shape[1], gl.SliceLayout(0, layout))
    seen = (n < count)[:, None] & (r < WIDTH)[None, :]
    async_load(buffer, rows + n[:, None] * STRIDE + r[None, :], mask=seen)


@gluon.jit
def _slot(table, request, block, last_page, table_stride, BN: gl.constexpr, PAGE: gl.constexpr):
    """Slot of the first row of a block, int64. The page is clamped, so a look-ahead never leaves the table."""
    page = gl.load(table + request * table_stride + gl.minimum(block * BN // PAGE, last_page))
    return page.to(gl.int64) * PAGE + block * BN % PAGE


@gluon.jit
def _copy_block(latents, keys, cache, slot, block, stop, length, R: gl.constexpr, P: gl.constexpr):
    """Start copying a block into its buffers, as one group; nothing is read from `stop` on."""
    BN: gl.constexpr = latents.shape[0]
    count = gl.where(block < stop, length - block * BN, 0)
    rows = cache + slot * (R + P)
    _copy_rows(latents, rows, count, R, R + P)
    _copy_rows(keys, rows + R, count, P, R + P)
    async_copy.commit_group()


@gluon.jit
def _arrived(PENDING: gl.constexpr):
    """Wait until all but the last PENDING groups are in shared memory, for all threads and for the tensor cores."""
    async_copy.wait_group(PENDING)
    fence_async_shared()
    barrier()


@gluon.jit
def _scores(q_latent, q_rope, latent, key, LAYOUT: gl.constexpr):
    """Issue [64, BN] unscaled scores of a block: two groups of wgmma."""
    s = gl.full([q_latent.shape[0], latent.shape[0]], 0.0, gl.float32, LAYOUT)
    s = warpgroup_mma(q_latent, latent.permute([1, 0]), s, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, key.permute([1, 0]), s, is_async=True)


@gluon.jit
def _weights(s, m, total, limit, block, scale_log2, LAYOUT: gl.constexpr):
    """Weights [64, BN] of a block; the new maximum, the sums so far per column, and the factor of what came before."""
    n = block * s.shape[1] + gl.arange(0, s.shape[1], gl.SliceLayout(0, LAYOUT))
    s = gl.where(n[None, :] < limit[:, None], s * scale_log2, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1))
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s - shift[:, None])
    alpha = gl.exp2(m - shift)
    return p, m_new, total * alpha[:, None] + p, alpha


@gluon.jit
def _put_weights(weights, p):
    """Weights to where the tensor cores read them."""
    weights.store(p.to(weights.dtype))
    fence_async_shared()
    barrier()


@gluon.jit
def mla_decode_d4(
    q, cache, table, lengths, item_sequence, item_start, item_stop, partial, partial_lse2,
    scale_log2, table_stride,
    H: gl.constexpr, TOKENS: gl.constexpr, R: gl.constexpr, P: gl.constexpr, PAGE: gl.constexpr,
    BH: gl.constexpr, BN: gl.constexpr, BR: gl.constexpr, BP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Design D4. Grid and arguments as for `mla_decode_d1`; 16-bit numbers, 8 divides R and P, eight warps.

    Args:
        STAGES: blocks of the cache in shared memory, at least 2.
    """
    ROWS: gl.constexpr = TOKENS * H
    AHEAD: gl.constexpr = STAGES > 2
    S: gl.constexpr = _mma_layout(BN)
    O: gl.constexpr = _mma_layout(BR)  # noqa: E741
    dtype: gl.constexpr = cache.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BR], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BP], dtype)
    item = gl.program_id(0)
    first = gl.program_id(1) * BH
    request = gl.load(item_sequence + item)
    if request >= 0:
        start = gl.load(item_start + item)
        stop = gl.load(item_stop + item)
        length = gl.load(lengths + request)
        last_page = gl.maximum(length - 1, 0) // PAGE
        q_latent = gl.allocate_shared_memory(dtype, [BH, BR], wide)
        q_rope = gl.allocate_shared_memory(dtype, [BH, BP], narrow)
        latents = gl.allocate_shared_memory(dtype, [STAGES, BN, BR], wide)
        keys = gl.allocate_shared_memory(dtype, [STAGES, BN, BP], narrow)
        weights = gl.allocate_shared_memory(dtype, [BH, BN], gl.NVMMASharedLayout.get_default_for([BH, BN], dtype))
        rows = q + (request * ROWS + first).to(gl.int64) * (R + P)
        _copy_rows(q_latent, rows, ROWS - first, R, R + P)
        _copy_rows(q_rope, rows + R, ROWS - first, P, R + P)
        for place in gl.static_range(STAGES - 1):  # the first group holds the queries, too
            slot = _slot(table, request, start + place, last_page, table_stride, BN, PAGE)
            _copy_block(latents.index(place), keys.index(place), cache, slot, start + place, stop, length, R, P)
        h = first + gl.arange(0, BH, gl.SliceLayout(1, S))
        limit = length - TOKENS + h // H + 1
        m = gl.full([BH], float("-inf"), gl.float32, gl.SliceLayout(1, S))
        total = gl.zeros([BH, BN], gl.float32, S)
        acc = gl.zeros([BH, BR], gl.float32, O)
        slot = _slot(table, request, start + STAGES - 1, last_page, table_stride, BN, PAGE)
        if AHEAD:
            _arrived(STAGES - 2)
            s = _scores(q_latent, q_rope, latents.index(0), keys.index(0), S)
            s = warpgroup_mma_wait(0, deps=[s])
        for block in range(start, stop):
            here = (block - start) % STAGES
            behind = (block - start + STAGES - 1) % STAGES  # its values were used in the last iteration
            load = block + STAGES - 1
            if AHEAD:
                ahead = (block - start + 1) % STAGES
                _arrived(STAGES - 3)
                s_next = _scores(q_latent, q_rope, latents.index(ahead), keys.index(ahead), S)
                _copy_block(latents.index(behind), keys.index(behind), cache, slot, load, stop, length, R, P)
            else:
                _arrived(STAGES - 2)
                s = _scores(q_latent, q_rope, latents.index(here), keys.index(here), S)
                _copy_block(latents.index(behind), keys.index(behind), cache, slot, load, stop, length, R, P)
                s = warpgroup_mma_wait(0, deps=[s])
            slot = _slot(table, request, load + 1, last_page, table_stride, BN, PAGE)
            p, m, total, alpha = _weights(s, m, total, limit, block, scale_log2, S)
            _put_weights(weights, p)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O))[:, None]
            acc = warpgroup_mma(weights, latents.index(here), acc, is_async=True)
            if AHEAD:
                acc, s = warpgroup_mma_wait(0, deps=[acc, s_next])
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
        async_copy.wait_group(0)
        seen = gl.sum(total, 1)
        gl.store(partial_lse2 + (item * ROWS + h).to(gl.int64), m + gl.log2(seen), mask=h < ROWS)
        share = gl.convert_layout(gl.where(seen > 0, 1.0 / seen, 0.0), gl.SliceLayout(1, O))
        h = first + gl.arange(0, BH, gl.SliceLayout(1, O))
        r = gl.arange(0, BR, gl.SliceLayout(0, O))
        where = (item * ROWS + h).to(gl.int64)
        out = partial + where[:, None] * R + r[None, :]
        gl.store(out, acc * share[:, None], mask=(h < ROWS)[:, None] & (r < R)[None, :])
