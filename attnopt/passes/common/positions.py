"""Positions of the tokens of a window: with gaps, so that short windows show long distances."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.rewriter.program import Program

#: One of so many windows has a gap in its positions, of so many tokens at least.
SPACED, LEAST_GAP = 2, 64


def reach_of(program: Program) -> int:
    """How long a text the model is promised to read; 0 if that is unknown, or some layers see a window alone.

    Layers with a sliding window count tokens, so that tokens that were moved away would still be seen.
    """
    if any(site.mask.window is not None for site in program.site_list):
        return 0
    known = program.config.get("max_position_embeddings")
    return known if isinstance(known, int) else 0


def spaced(count: int, length: int, reach: int, first: int = 0) -> Tensor:
    """Positions of the tokens of windows [count, length]: every `SPACED`-th window has a gap.

    What is fitted to windows that are far shorter than the text that a model is promised to read knows nothing of the
    distances beyond them. Rotary positions matter by their differences alone, so a window whose second part is moved
    away shows long distances at the price of a short window (PoSE, Zhu et al. 2023, arXiv 2309.10400). Gaps of all
    sizes are equally likely in the logarithm. Windows get the same positions whatever process has them.

    Args:
        count, length: of the windows.
        reach: the longest text; positions stay below it. No gaps if windows are as long.
        first: number of the first of these windows among all.
    """
    positions = torch.arange(length).repeat(count, 1)
    room = reach - length
    if room <= 0 or length < 4:
        return positions
    for index in range((SPACED - 1 - first) % SPACED, count, SPACED):
        generator = torch.Generator().manual_seed(first + index)
        size, place = torch.rand(2, generator=generator).tolist()
        cut = round(length * (0.25 + 0.5 * place))
        positions[index, cut:] += round(LEAST_GAP * (room / LEAST_GAP) ** size) if room > LEAST_GAP else room
    return positions
