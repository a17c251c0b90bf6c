"""Small pictures of the attention maps on the first prompt, for the report.

    thumbnail[u, v] = mean over queries t in the u-th part of the prompt of the mass on keys in the v-th part

Of the first window, where attention is windowed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.profiles.metric import Metric
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView, RowBlock

#: Pixels on a side, at most.
SIDE = 48


class Thumbnail(Metric):
    """A head's map, pooled."""

    uses_map = True

    def __init__(self, view: LayerView) -> None:
        super().__init__(view)
        self.side = min(SIDE, view.geometry.length)
        self.sums = torch.zeros(view.call.heads, self.side, self.side, device=view.output.device)
        self.place = torch.arange(view.geometry.length, device=view.output.device) * self.side // view.geometry.length

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        axes = ("site", "head", "query", "key")
        return {"map_thumbnail": MetricInfo(1, axes, "", "attention map of the first prompt, pooled", "definition")}

    def update(self, block: RowBlock) -> None:
        weights = block.weights[0].to(self.sums.dtype)
        count, keys = weights.shape[1:]
        by_key = weights.new_zeros(len(weights), count, self.side)
        by_key.index_add_(2, self.place[:keys], weights)
        self.sums.index_add_(1, self.place[block.first : block.first + count], by_key)

    def result(self) -> dict[str, Tensor]:
        queries = torch.bincount(self.place, minlength=self.side)
        return {"map_thumbnail": self.sums / queries[:, None]}
