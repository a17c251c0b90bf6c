"""Entropy of the attention map, as a share of the largest possible.

    entropy_h = E_t [ -sum_j a_tj log a_tj / log n_t ],   n_t keys visible to query t, n_t >= 2

1 is uniform, 0 is one-hot. With learned sinks, a is renormalised over the keys. Descriptive (Clark et al., arXiv
1906.04341, section 3.3, give it in nats).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.profiles.metric import Metric, RowMean
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView, RowBlock


class Entropy(Metric):
    """Mean entropy of a head's rows."""

    uses_map = True

    def __init__(self, view: LayerView) -> None:
        super().__init__(view)
        self.rows = RowMean()

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        return {
            "entropy": MetricInfo(1, ("site", "head"), "", "1 = spread evenly, 0 = on one key", "arXiv 1906.04341, 3.3")
        }

    def update(self, block: RowBlock) -> None:
        weights = block.weights[:, :, block.counted]
        total = block.total[:, :, block.counted]
        logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
        plain = -torch.einsum("nhrt,nhrt->nhr", weights, logs)
        entropy = plain / total + total.log()
        visible = self.view.geometry.visible(block.rows[block.counted])
        if self.view.call.window:
            visible = visible.clamp(max=self.view.call.window)
        many = visible >= 2
        self.rows.add((entropy / visible.clamp(min=2).to(entropy).log())[:, :, many])

    def result(self) -> dict[str, Tensor]:
        if self.rows.total is None:
            return {}
        return {"entropy": self.rows.mean()}
