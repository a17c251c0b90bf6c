"""What of a weight may be trained, and what must stay exactly as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite


def free_of(program: Program, name: str, start: Tensor) -> Tensor | None:
    """What of a weight may change, as a mask of its shape; None for all of it.

    Zeros in a matrix that is not all zero are pruned ones and stay; so does a latent's constant lane.
    """
    free = None
    if start.dim() > 1:
        zero = start == 0
        if bool(zero.any()) and not bool(zero.all()):
            free = ~zero
    for site in program.site_list:
        lane = lane_of(site)
        if lane is not None and site.latent is not None and name in (site.latent.kv_a.weight, site.latent.kv_a.bias):
            free = torch.ones_like(start, dtype=torch.bool) if free is None else free
            free[lane] = False
    return free


def lane_of(site: AttentionSite) -> int | None:
    """Row of the latent's constant lane in the encoder, None without one."""
    latent = site.latent
    return latent.kv_a.rows[0][0] + latent.kv_lora_rank - 1 if latent is not None and latent.lane else None
