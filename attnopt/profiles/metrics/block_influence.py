"""Block influence: how far the attention turns the residual stream.

    block_influence = 1 - E_t cos(x_t, x_t + y_t)

ShortGPT (arXiv 2403.03853, equation 1), taken of the attention alone. "low = the whole layer's attention may go".
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.profiles.metric import Metric
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.settings import Settings


class BlockInfluence(Metric):
    """1 - cosine of the stream before and after the attention was added."""

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        return {
            "block_influence": MetricInfo(
                1, ("site",), "high_keep", "1 - cosine of the stream before and after", "arXiv 2403.03853, eq. 1"
            )
        }

    def result(self) -> dict[str, Tensor]:
        stream = self.view.stream
        if stream is None:
            return {}
        before = stream.double()
        cosine = torch.cosine_similarity(before, before + self.view.output, dim=-1)
        return {"block_influence": 1 - cosine.mean()}
