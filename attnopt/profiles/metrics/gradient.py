"""Importance by gradients, from one backward pass.

    michel           E_t | <ctx_h(t), dL/dctx_h(t)> |                   Michel et al., arXiv 1905.10650, equation 2
    map_influence    E_t sum_j |E_tj|,   E_tj = a_tj (<g_t, a_t> - g_tj) / (1 - a_tj),   g = dL/da
                                                                        MoA, arXiv 2406.14909, section 4.1
    map_influence_distance   the same by |t - j|: what a span costs that ends there

Absolute values are taken per token, so scores of batches add up (the scripts that take one per batch let signs
cancel). E_tj is the change of the loss if key j is dropped for query t and the row is renormalised, exact for a loss
linear in the map. g_tj = <dL/dctx_t, v_j> and <g_t, a_t> = <dL/dctx_t, ctx_t>, so only dL/dctx is kept. L is summed
over a prompt's tokens: the scores do not depend on its length. "high = keep".
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.profiles.geometry import bin_labels
from attnopt.profiles.metric import Metric, RowMean
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView, RowBlock


class Michel(Metric):
    """Sensitivity of the loss to a gate on the head."""

    uses_gradient = True

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        return {
            "michel": MetricInfo(
                1, ("site", "head"), "high_keep", "sensitivity of the loss to the head", "arXiv 1905.10650, eq. 2"
            )
        }

    def result(self) -> dict[str, Tensor]:
        assert self.view.grad is not None
        products = (self.view.context.double() * self.view.grad).sum(-1)
        return {"michel": products.abs().mean((0, 1))}


class MapInfluence(Metric):
    """First-order effect on the loss of dropping single keys."""

    uses_map = True
    uses_gradient = True

    def __init__(self, view: LayerView) -> None:
        super().__init__(view)
        self.rows = RowMean()

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        head, source = ("site", "head"), "arXiv 2406.14909, 4.1"
        return {
            "map_influence": MetricInfo(1, head, "high_keep", "loss change if keys are dropped one by one", source),
            "map_influence_distance": MetricInfo(
                1,
                (*head, "bin"),
                "high_keep",
                "loss change if keys at that distance are dropped",
                source,
                bin_labels(bins),
            ),
        }

    def update(self, block: RowBlock) -> None:
        self.rows.add(block.binned(map_effects(block)))

    def result(self) -> dict[str, Tensor]:
        by_distance = self.rows.mean()
        return {"map_influence": by_distance.sum(-1), "map_influence_distance": by_distance}


def map_effects(block: RowBlock) -> Tensor:
    """|E_tj|, [N, H, R, keys]."""
    view, weights = block.view, block.weights
    assert view.grad is not None
    rows = slice(block.first, block.first + weights.shape[2])
    grad = view.grad[:, rows].transpose(1, 2)
    if view.call.gates is not None:
        grad = grad * view.call.gates[:, rows].transpose(1, 2)[..., None]
    n, heads, count, width = grad.shape
    values = view.call.v[:, :, : block.keys]
    of_map = (grad.reshape(n, view.call.groups, -1, width) @ values.mT).view(n, heads, count, -1)
    along = torch.einsum("nhrt,nhrt->nhr", of_map, weights)[..., None]
    rest = 1 - weights
    # Where one key has all the weight there is nothing to renormalise to: its whole effect is lost.
    alone = rest < 16 * torch.finfo(weights.dtype).eps
    effect = weights * (along - of_map) / rest.masked_fill_(alone, 1.0)
    return torch.where(alone, weights * of_map, effect).abs_()
