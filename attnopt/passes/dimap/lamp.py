"""The score by which weights of different layers are compared (DIMAP, arXiv 2404.13648; LAMP, arXiv 2010.07611).

Sorted by size, w_(1) >= w_(2) >= ..., entry j of a layer scores

    Imp(w_(j)) = w_(j)^2 / sum_{i <= j} w_(i)^2

which is the share of the layer's remaining energy that removing it costs, and bounds the relative distortion of the
output. The largest entry of every layer scores 1, so no layer is emptied; within a layer the order is that of size; and
scaling a layer changes nothing. Scores of one module are compared with one threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnopt.rewriter.weights import derived_op

#: Bins of the logarithm of the scores: what lies in the bin of the threshold is then sorted exactly.
BINS = 1 << 16
LOWEST = -80.0


def scores(flat: Tensor) -> Tensor:
    """Imp of the entries of a layer, in descending order, float64.

    Args:
        flat: all its entries, any order.
    """
    square = flat.double().pow(2).sort(descending=True, stable=True).values
    return square / square.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)


def kept_counts(layers: Sequence[Callable[[], Tensor]], keep: int) -> list[int]:
    """How many entries of each layer are among the `keep` highest scores of all.

    Layers are read one at a time, twice: once to find the bin of scores that the threshold lies in, once to sort what
    is in that bin. Equal scores go to the earlier layer, then to the lower index.

    Args:
        layers: give the entries of each layer.
        keep: how many to keep in all; at least one of each layer is kept.
    """
    histogram = torch.zeros(len(layers), BINS, dtype=torch.long)
    for place, read in enumerate(layers):
        histogram[place] = torch.bincount(_bin(scores(read())), minlength=BINS)
    above = histogram.sum(0).flip(0).cumsum(0).flip(0)  # entries in this bin or a higher one
    if keep >= int(above[0]):
        return histogram.sum(1).tolist()
    edge = int((above > keep).nonzero().max()) if bool((above > keep).any()) else 0
    sure = histogram[:, edge + 1 :].sum(1)
    inside: list[Tensor] = []
    for place, read in enumerate(layers):
        if int(histogram[place, edge]):
            start = int(sure[place])
            inside.append(scores(read())[start : start + int(histogram[place, edge])])
        else:
            inside.append(torch.zeros(0, dtype=torch.float64))
    owner = torch.cat([torch.full((len(part),), place) for place, part in enumerate(inside)])
    order = torch.cat(inside).sort(descending=True, stable=True).indices
    missing = max(0, keep - int(sure.sum()))
    return (sure + torch.bincount(owner[order[:missing]], minlength=len(layers))).clamp(min=1).tolist()


def _bin(score: Tensor) -> Tensor:
    """Bin of each score; higher scores have higher numbers."""
    log = score.clamp_min(2.0**LOWEST).log2()
    return ((log - LOWEST) * ((BINS - 1) / -LOWEST)).floor().long().clamp(0, BINS - 1)


def group_scores(norms: Tensor) -> Tensor:
    """Group LAMP: S_g = n_g^2 / sum_{n_g' >= n_g} n_g'^2 over the groups of a layer; the largest scores 1.

    Args:
        norms: [groups], norms of the groups of weights that go together.

    Returns:
        [groups] float64; equal norms rank by number.
    """
    square = norms.double().pow(2)
    order = square.sort(descending=True, stable=True).indices
    result = torch.empty_like(square)
    result[order] = square[order] / square[order].cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return result


@derived_op
def keep_largest(x: Tensor, *, counts: tuple[int, ...]) -> Tensor:
    """x with all but its largest entries set to zero; ties keep the lower index.

    Args:
        x: any shape; with n counts its first axis is cut into n equal parts that are treated one by one.
        counts: how many entries each part keeps.
    """
    parts = x.reshape(len(counts), -1)
    order = parts.abs().sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(parts.shape[1], device=x.device)
    mask = torch.zeros_like(parts, dtype=torch.bool)
    kept = rank[None] < torch.tensor(counts, device=x.device)[:, None]
    return torch.where(mask.scatter(1, order, kept), parts, torch.zeros_like(parts)).reshape(x.shape)


def exact_count(total: int, sparsity: float) -> int:
    """Entries to keep of `total`."""
    return total - math.floor(total * sparsity + 0.5)
