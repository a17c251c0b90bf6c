"""How far a ranking of heads can be trusted: does another half of the prompts give the same one?

spearman        rank correlation of the values of two halves of the prompts, over all heads
jaccard@0.25    overlap of the quarter of the heads with the smallest values, between bootstrap samples of the
                prompts: mean of |A n B| / |A u B|
"""

from __future__ import annotations

import torch
from scipy.stats import spearmanr
from torch import Tensor

#: Bootstrap samples.
SAMPLES = 20


def stability(per_prompt: Tensor, seed: int = 0) -> dict[str, float]:
    """Of values by prompt [n, ...]; empty for fewer than four prompts or heads.

    Args:
        per_prompt: values; NaN is left out.
        seed: of the bootstrap.
    """
    values = per_prompt.flatten(1)
    values = values[:, ~values.isnan().any(0)]
    n, heads = values.shape
    if n < 4 or heads < 4:
        return {}
    halves = values[0::2].mean(0), values[1::2].mean(0)
    if any(float(half.max() - half.min()) == 0 for half in halves):
        return {}
    generator = torch.Generator().manual_seed(seed)
    chosen = max(1, heads // 4)
    sets = []
    for _ in range(SAMPLES):
        picked = torch.randint(n, (n,), generator=generator)
        lowest = values[picked].mean(0).argsort(stable=True)[:chosen]
        sets.append(set(lowest.tolist()))
    overlaps = [len(a & b) / len(a | b) for a, b in zip(sets[0::2], sets[1::2], strict=True)]
    return {
        "spearman": float(spearmanr(halves[0].numpy(), halves[1].numpy()).statistic),
        "jaccard@0.25": sum(overlaps) / len(overlaps),
    }
