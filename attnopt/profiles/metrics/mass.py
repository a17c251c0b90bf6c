"""Where the mass of the map lies: on sinks, near the query, far from it.

    sink_mass       E_t sum_{j < s} a_tj                             StreamingLLM, arXiv 2309.17453
    local_mass(w)   E_t sum_{|t - j| < w} a_tj
    distant_mass    E_t [ 1 - mass on the union of sinks and recent keys ]
    distance_histogram   E_t sum a_tj over |t - j| in 0, 1, 2-3, 4-7, ...

For images, the distance is that of patches on their grid and the sinks are the tokens before them (CLS), which have
distance 0 to everything and count as sinks, never as near. "high = keep" for distant mass: such a head retrieves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.profiles.geometry import bin_labels, bin_of
from attnopt.profiles.metric import Metric, RowMean
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView, RowBlock

_STREAMING = "StreamingLLM, arXiv 2309.17453"


class Mass(Metric):
    """Shares of the mass by place."""

    uses_map = True

    def __init__(self, view: LayerView) -> None:
        super().__init__(view)
        self.histogram, self.sink, self.distant = RowMean(), RowMean(), RowMean()

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        head = ("site", "head")
        windows = tuple(str(w) for w in settings.windows)
        return {
            "sink_mass": MetricInfo(1, head, "", "attention on the first keys", _STREAMING),
            "local_mass": MetricInfo(
                1, (*head, "window"), "", "attention on keys nearer than the window", "definition", windows
            ),
            "distant_mass": MetricInfo(1, head, "high_keep", "attention outside sinks and recent keys", _STREAMING),
            "distance_histogram": MetricInfo(
                1, (*head, "bin"), "", "attention by distance", "definition", bin_labels(bins)
            ),
        }

    def update(self, block: RowBlock) -> None:
        rows = block.counted
        by_distance = block.by_distance[:, :, rows]
        self.histogram.add(by_distance)
        self.sink.add(block.weights[:, :, rows, : self.view.sink].sum(-1))
        self.distant.add(block.total[:, :, rows] - streaming_mass(block)[:, :, rows])

    def result(self) -> dict[str, Tensor]:
        if self.histogram.total is None:
            return {}
        histogram = self.histogram.mean()
        # Windows are powers of two, so that they end where a bin does.
        ends = [1 + int(bin_of(torch.tensor(w - 1))) for w in self.view.settings.windows]
        return {
            "sink_mass": self.sink.mean(),
            "local_mass": torch.stack([histogram[:, :end].sum(-1) for end in ends], -1),
            "distant_mass": self.distant.mean().clamp(min=0),
            "distance_histogram": histogram,
        }


def streaming_mass(block: RowBlock) -> Tensor:
    """Mass on the union of the first `sink` keys and those nearer than `recent`, [N, H, R]."""
    view, rows = block.view, block.rows
    if view.geometry.planar:
        seen = (block.distances < view.recent) | (torch.arange(block.keys, device=rows.device) < view.sink)
        return torch.einsum("nhrt,rt->nhr", block.weights, seen.to(block.weights.dtype))
    end = 1 + int(bin_of(torch.tensor(view.recent - 1)))
    near = block.by_distance[..., :end].sum(-1)
    columns = torch.arange(min(view.sink, block.keys), device=rows.device)
    far = (rows[:, None] - columns).abs() >= view.recent
    return near + (block.weights[..., : view.sink] * far).sum(-1)
