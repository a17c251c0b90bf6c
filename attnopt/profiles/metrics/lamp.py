"""LAMP score of a head, from the weights alone.

    S_g = ‖W_g‖² / sum over heads g' of the site with ‖W_g'‖ >= ‖W_g‖ of ‖W_g'‖²

W_g holds all weights of a head: its rows of the query projection, its columns of the output projection, and for an own
key/value head the rows of those. The best head of a layer scores 1. `lamp` is per query head (keys and values enter
only where every query head has its own), `kv_lamp` per KV group with all that belongs to it. LAMP: Lee et al., arXiv
2010.07611, equation 3, on single weights; on heads as in DIMAP (arXiv 2404.13648). "high = keep".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.profiles.profile import MetricInfo
from attnopt.rewriter.site import AttentionSite, Projection

DESCRIBED = {
    "lamp": MetricInfo(1, ("site", "head"), "high_keep", "data-free share of the weights' energy", "arXiv 2010.07611"),
    "kv_lamp": MetricInfo(
        1, ("site", "kv_head"), "high_keep", "data-free share of a KV group's weights", "arXiv 2010.07611"
    ),
}


def lamp_scores(site: AttentionSite, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Scores of a layer's heads and KV groups; empty for latent attention, whose heads share their keys' weights, and
    for layers that take queries, keys or values from another.

    Args:
        site: the layer.
        read: gives a weight by name.
    """
    if site.latent is not None or site.q is None or site.k is None or site.v is None:
        return {}
    groups = site.kv_heads
    queries = _energy(site.q, read).view(site.heads, -1).sum(1)
    outputs = _matrix(site.o, read).pow(2).sum(0).view(site.heads, -1).sum(1)
    keys = _energy(site.k, read).view(groups, -1).sum(1)
    values = _energy(site.v, read).view(groups, -1).sum(1)
    head = queries + outputs
    group = (keys + values).index_add(0, torch.tensor(site.kv_head_of, device=head.device), head)
    return {"lamp": lamp(group if groups == site.heads else head), "kv_lamp": lamp(group)}


def lamp(energy: Tensor) -> Tensor:
    """S_g from the squared norms, [n] -> [n]; equal norms score equally."""
    larger = energy[None] >= energy[:, None]
    return energy / (larger * energy[None]).sum(1).clamp(min=1e-300)


def _energy(projection: Projection, read: Callable[[str], Tensor]) -> Tensor:
    """Sum of squares of each output channel, float64."""
    return _matrix(projection, read).pow(2).sum(1)


def _matrix(projection: Projection, read: Callable[[str], Tensor]) -> Tensor:
    """[out, in] float64."""
    weight = read(projection.weight).double()
    if projection.layout == "conv1d":
        weight = weight.T
    return torch.cat([weight[start:stop] for start, stop in projection.rows])
