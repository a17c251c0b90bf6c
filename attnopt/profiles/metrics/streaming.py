"""Streaming gate error: DuoAttention's question, measured instead of trained.

    streaming_error_k = E_t ‖ sum_{h in group k} (ctx~_h - ctx_h) W_O^h ‖² / E_t ‖y_t‖²

ctx~_h is the head's output if it sees only the sinks and the recent keys, its weights renormalised over them.
DuoAttention (arXiv 2410.10819, section 2.2) learns a gate per KV head for the same replacement by its effect on the
last layer; this is its effect on the layer's own output, y. "high = keep dense".
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.profiles.metric import Metric
from attnopt.profiles.metrics.mass import streaming_mass
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView, RowBlock
from attnopt.rewriter.site import AttentionSite


class Streaming(Metric):
    """NMSE of the layer's output when a KV head streams."""

    uses_map = True

    def __init__(self, view: LayerView) -> None:
        super().__init__(view)
        self.error = torch.zeros(view.site.kv_heads, dtype=torch.float64, device=view.output.device)

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        return {
            "streaming_error": MetricInfo(
                1, ("site", "kv_head"), "high_keep", "NMSE of the output when a KV head streams", "arXiv 2410.10819"
            )
        }

    @classmethod
    def obstacle(cls, site: AttentionSite) -> str | None:
        return None if site.mask.causal else "only causal layers can stream"

    def update(self, block: RowBlock) -> None:
        view, weights = self.view, block.weights
        count = weights.shape[2]
        start = max(0, block.first - view.recent + 1)  # the first key that is recent for some row
        if start <= view.sink:
            columns = torch.arange(block.keys, device=weights.device)
        else:
            near = torch.arange(start, block.keys, device=weights.device)
            columns = torch.cat([torch.arange(view.sink, device=weights.device), near])
        seen = (block.rows[:, None] - columns < view.recent) | (columns < view.sink)
        kept = weights[..., columns] * seen
        values = view.call.v[:, :, columns]
        grouped = kept.reshape(kept.shape[0], view.call.groups, -1, len(columns))
        context = (grouped @ values).view(*kept.shape[:3], -1)
        # Weight on learned sinks stays where it is: they are part of every softmax.
        left = streaming_mass(block) + (1 - block.total if view.call.sinks is not None else 0)
        context = context / left.clamp(min=torch.finfo(left.dtype).tiny)[..., None]
        if view.call.gates is not None:
            gates = view.call.gates[:, block.first : block.first + count]
            context = context * gates.transpose(1, 2)[..., None]
        dense = view.context[:, block.first : block.first + count].transpose(1, 2)
        change = (context - dense).transpose(1, 2).flatten(0, 1)
        self.error += view.group_norms(change).pow(2).sum(0)

    def result(self) -> dict[str, Tensor]:
        return {"streaming_error": self.error / self.view.output.double().pow(2).sum().clamp(min=1e-300)}
