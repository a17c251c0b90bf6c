"""Divides the cached tokens of a batch among thread blocks. Only tensor operations: no value reaches the host.

A sequence (a request, or a request and a key/value head) has some blocks of BN slots. With N thread blocks to fill, a
thread block should get about `payload = ceil(sum(blocks + OVERHEAD) / N)` units of work, where OVERHEAD is the price of
starting a part; sequence i becomes ceil(blocks_i / (payload - OVERHEAD)) parts of nearly equal size, never more than
its blocks. There are at most sequences + N parts, so the grid is static and a CUDA graph can replay it for other
lengths. The idea of balancing by cost is that of FlashMLA's scheduler. Imports only torch; copied into packages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: What starting a part costs, in blocks.
OVERHEAD = 5


@dataclass(frozen=True)
class Schedule:
    """Work items, all int32.

    Attributes:
        sequence: [items], -1 for items without work.
        start, stop: [items], range of blocks.
        first_item: [sequences + 1], items of sequence i are first_item[i] ... first_item[i + 1] - 1.
    """

    sequence: Tensor
    start: Tensor
    stop: Tensor
    first_item: Tensor


def schedule(blocks: Tensor, parts: int) -> Schedule:
    """Divide sequences among thread blocks.

    Args:
        blocks: int [sequences], blocks of each sequence; may be 0.
        parts: thread blocks to fill, at least 1.

    Returns:
        sequences + parts work items.
    """
    blocks = blocks.to(torch.int64)
    count = blocks.shape[0]
    device = blocks.device
    cost = (blocks + OVERHEAD).sum()
    payload = torch.div(cost + parts - 1, parts, rounding_mode="floor") + OVERHEAD
    per_part = (payload - OVERHEAD).clamp(min=1)
    # A sequence without blocks still gets a part, which writes "nothing seen".
    pieces = torch.div(blocks + per_part - 1, per_part, rounding_mode="floor").clamp(min=1)
    first = torch.zeros(count + 1, dtype=torch.int64, device=device)
    torch.cumsum(pieces, 0, out=first[1:])
    item = torch.arange(count + parts, device=device)
    sequence = torch.searchsorted(first, item, right=True) - 1
    used = item < first[-1]
    at = sequence.clamp(0, count - 1)
    place = item - first[at]
    size = torch.div(blocks[at] + pieces[at] - 1, pieces[at], rounding_mode="floor")
    start = torch.minimum(place * size, blocks[at])
    stop = torch.minimum(start + size, blocks[at])
    return Schedule(
        torch.where(used, at, -1).to(torch.int32), start.to(torch.int32), stop.to(torch.int32), first.to(torch.int32)
    )


def streaming_blocks(lengths: Tensor, sinks: Tensor, windows: Tensor, tokens: int, block: int) -> Tensor:
    """Blocks that a step reads per (request, key/value head), int [B, G]; the kernels count them the same way.

    Args:
        lengths: int [B], tokens cached, the query tokens included.
        sinks, windows: int [G]; window 0 means that the head sees everything.
        tokens: query tokens per request.
        block: slots in a block.
    """
    whole = torch.div(lengths + block - 1, block, rounding_mode="floor")[:, None]
    sink_blocks = torch.div(sinks + block - 1, block, rounding_mode="floor")[None, :]
    oldest = lengths[:, None] - tokens + 1 - windows[None, :]
    recent = torch.maximum(torch.div(oldest, block, rounding_mode="trunc"), sink_blocks)
    streamed = torch.where(recent < whole, sink_blocks + whole - recent, whole.clamp(max=sink_blocks))
    streamed = torch.minimum(streamed, whole.expand_as(streamed))
    return torch.where(windows[None, :] > 0, streamed, whole.expand_as(streamed))
