"""Aligning the heads of two layers: they may hold the same heads in another order (LiSA, arXiv 2408.01890).

The assignment with the largest summed correlation, by the Hungarian method. With grouped keys a permutation must
respect groups: query heads are assigned within each pair of groups, then groups to groups.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def align_heads(similarity: Tensor, groups: int) -> Tensor:
    """The source head that each consumer head matches.

    Args:
        similarity: [H, H], of source head (row) and consumer head (column).
        groups: K, key/value heads; H / K query heads each, in order.

    Returns:
        int64 [H], a permutation that maps groups onto groups.
    """
    heads = similarity.shape[0]
    size = heads // groups
    tiles = similarity.double().view(groups, size, groups, size).transpose(1, 2)  # [source, consumer, size, size]
    inner = {}
    value = torch.zeros(groups, groups, dtype=torch.float64)
    for i in range(groups):
        for j in range(groups):
            rows, columns = linear_sum_assignment(tiles[i, j].numpy(), maximize=True)
            matched = torch.empty(size, dtype=torch.long)
            matched[torch.from_numpy(columns)] = torch.from_numpy(rows)
            inner[i, j] = matched
            value[i, j] = tiles[i, j][matched, torch.arange(size)].sum()
    sources, consumers = linear_sum_assignment(value.numpy(), maximize=True)
    result = torch.empty(heads, dtype=torch.long)
    for i, j in zip(sources.tolist(), consumers.tolist(), strict=True):
        result[j * size : (j + 1) * size] = i * size + inner[i, j]
    return result
