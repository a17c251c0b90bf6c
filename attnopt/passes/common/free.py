"""What of a weight may be trained, and what must stay exactly as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite

#: A matrix of which so much is zero was pruned, even if not in this run. Weights that come from few bits hold zeros by
#: chance: 0.03 % where a block has an offset (Q4_1), a tenth where it has none (Q4_0, by a normal's density).
PRUNED_SHARE = 0.2


def free_of(program: Program, name: str, start: Tensor) -> Tensor | None:
    """What of a weight may change, as a mask of its shape; None for all of it.

    Pruned zeros stay: all zeros after `dimap`, else those of a matrix that has many. So does a latent's constant lane.
    """
    free = None
    if start.dim() > 1:
        zero = start == 0
        share = float(zero.float().mean())
        if (0 if _zeroed(program) else PRUNED_SHARE) < share < 1:
            free = ~zero
    for site in program.site_list:
        lane = lane_of(site)
        if lane is not None and site.latent is not None and name in (site.latent.kv_a.weight, site.latent.kv_a.bias):
            free = torch.ones_like(start, dtype=torch.bool) if free is None else free
            free[lane] = False
    return free


def _zeroed(program: Program) -> bool:
    """True if a pass has set weights to zero to stay so."""
    return any(entry.summary.get("zeroed") for entry in program.history)


def lane_of(site: AttentionSite) -> int | None:
    """Row of the latent's constant lane in the encoder, None without one."""
    latent = site.latent
    return latent.kv_a.rows[0][0] + latent.kv_lora_rank - 1 if latent is not None and latent.lane else None
