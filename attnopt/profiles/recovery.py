"""Text to learn from, beside the calibration text: the model writes as much as is asked for, in parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt.profiles.calibration import SAMPLING_BATCH, Writer
from attnopt.progress import Reporter

if TYPE_CHECKING:
    from attnopt.rewriter.source import ModelSource


def self_written(
    source: ModelSource,
    tokens: int,
    context: int,
    seed: int,
    kept: Callable[[int, Callable[[], Tensor]], Tensor],
    *,
    device: str = "cpu",
    memory_budget: float | None = None,
    reporter: Reporter | None = None,
) -> Tensor:
    """More text that the model writes itself, for `Calibration.recovery`, in parts that can be kept.

    Args:
        source, tokens, context, device, memory_budget, reporter: as for `self_sampled`.
        seed: of the calibration text, which is other text than this.
        kept: gets the number of a part and what makes it; returns the part, which it may have from an unfinished run.

    Returns:
        int64 [n, context].

    Raises:
        UnsupportedError: as `self_sampled`.
    """
    count = -(-tokens // context)
    # Made when the first part has to be written, if one has to.
    writer = cache(partial(Writer.of, source, device, memory_budget))

    def write(part: int) -> Tensor:
        own = (seed * 1_000_003 + part + 1) * 2_147_483_629 % (1 << 62)
        return writer().write(min(SAMPLING_BATCH, count - part * SAMPLING_BATCH), context, own, reporter).long()

    return torch.cat([kept(part, partial(write, part)) for part in range(-(-count // SAMPLING_BATCH))])
