"""Which heads to remove: one after the other, each time those whose removal costs least after the repair.

The cost of a set R of removed channels of z, with W the rows of the output projection (y = z W) and M the moments:

    fill none     tr(W_R^T M_RR W_R), M = E[z z^T]
    fill mean     the same with the covariance
    fill lsq      tr(W_R^T (M_RR - M_RS M_SS^-1 M_SR) W_R), M the covariance (without a bias: E[z z^T])

For lsq the least squares solution is carried along: removing u from what is left costs tr(W_u^T (P_uu)^-1 W_u) with
P = M_SS^-1 and W the solution so far (block form of Optimal Brain Surgeon, Hassibi and Stork 1993).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.passes.common.moments import Moments
from attnopt.passes.common.repair import Fill
from attnopt.passes.common.ridge import STRENGTH


class Elimination:
    """Costs of removing further channels of one layer.

    Args:
        moments: of the layer.
        fill: how what is removed will be made up for.
    """

    def __init__(self, moments: Moments, fill: Fill) -> None:
        self.least_squares = fill in ("lsq", "lsq-nobias")
        matrix = moments.covariance if fill in ("lsq", "mean") else moments.gram
        self.matrix = (matrix + matrix.T) / 2
        self.weight = moments.weight.clone()
        if self.least_squares:
            pull = STRENGTH * self.matrix.diagonal().mean()
            eye = torch.eye(len(self.matrix), dtype=torch.float64, device=self.matrix.device)
            self.inverse = torch.linalg.inv(self.matrix + pull.clamp_min(1e-300) * eye)
        else:
            self.removed = torch.zeros_like(self.weight)  # M[:, R] W_R

    def cost(self, channels: Sequence[int]) -> float:
        """What removing these channels, too, adds to the squared error."""
        at = torch.tensor(channels)
        weight = self.weight[at]
        if self.least_squares:
            block = self.inverse[at][:, at]
            return max(float((weight * torch.linalg.solve(block, weight)).sum()), 0.0)
        return float((weight * (self.matrix[at][:, at] @ weight + 2 * self.removed[at])).sum())

    def remove(self, channels: Sequence[int]) -> None:
        """Remove them."""
        at = torch.tensor(channels)
        if self.least_squares:
            block, column = self.inverse[at][:, at], self.inverse[:, at]
            ahead = torch.linalg.solve(block, column.T)  # P_uu^-1 P_uS
            self.weight = self.weight - ahead.T @ self.weight[at]
            self.inverse = self.inverse - column @ ahead
            self.weight[at] = 0
        else:
            self.removed += self.matrix[:, at] @ self.weight[at]


@dataclass(frozen=True)
class Order:
    """The order in which units of a layer (or of layers that lose them together) would be removed.

    Attributes:
        units: heads of each unit.
        removed: numbers of the units, the one that is missed least first; the last unit is never removed.
        costs: what each removal adds to the squared error relative to the stream's size.
    """

    units: tuple[tuple[int, ...], ...]
    removed: tuple[int, ...]
    costs: tuple[float, ...]


def removal_order(
    layers: Sequence[Elimination], widths: Sequence[int], units: Sequence[tuple[int, ...]], classes: Sequence[int]
) -> Order:
    """Remove units greedily until one is left in each class.

    Args:
        layers: of layers that lose the same heads.
        widths: d_v of each.
        units: heads of each unit.
        classes: of each unit; removals go round the classes, so that their numbers never differ by more than one.
    """
    left = {c: [u for u in range(len(units)) if classes[u] == c] for c in dict.fromkeys(classes)}
    removed: list[int] = []
    costs: list[float] = []
    while any(len(members) > 1 for members in left.values()):
        most = max(len(members) for members in left.values())
        candidates = [u for members in left.values() if len(members) == most for u in members]
        priced = [(sum(_cost(e, w, units[u]) for e, w in zip(layers, widths, strict=True)), u) for u in candidates]
        cost, unit = min(priced)
        for elimination, width in zip(layers, widths, strict=True):
            elimination.remove(_channels(units[unit], width))
        left[classes[unit]].remove(unit)
        removed.append(unit)
        costs.append(cost)
    return Order(tuple(units), tuple(removed), tuple(costs))


def order_of_scores(scores: Tensor, units: Sequence[tuple[int, ...]], classes: Sequence[int]) -> Order:
    """The order that given scores [H] (high: keep) lead to; equal scores go by number.

    Args:
        scores: of the heads.
        units, classes: as for `removal_order`.
    """
    value = [float(sum(scores[h] for h in unit)) for unit in units]
    left = {c: [u for u in range(len(units)) if classes[u] == c] for c in dict.fromkeys(classes)}
    removed: list[int] = []
    while any(len(members) > 1 for members in left.values()):
        most = max(len(members) for members in left.values())
        unit = min((value[u], -u) for members in left.values() if len(members) == most for u in members)[1]
        left[classes[-unit]].remove(-unit)
        removed.append(-unit)
    size = max(sum(value), 1e-300)
    return Order(tuple(units), tuple(removed), tuple(value[u] / size for u in removed))


def _cost(elimination: Elimination, width: int, unit: Sequence[int]) -> float:
    return elimination.cost(_channels(unit, width))


def _channels(unit: Sequence[int], width: int) -> list[int]:
    return [h * width + i for h in unit for i in range(width)]


def counts_for_budget(orders: Sequence[Order], steps: Sequence[int], total: int) -> list[int]:
    """How many units to remove from each layer so that `total` are gone, cheapest first.

    A layer's units go in its order; a later removal that costs less than an earlier one is taken with it.

    Args:
        orders: of each layer.
        steps: heads that a removal takes from each layer.
        total: heads to remove in all.
    """
    taken = [0] * len(orders)
    gone = 0
    while True:
        best: tuple[float, int] | None = None
        for place, order in enumerate(orders):
            if taken[place] < len(order.removed) and gone + steps[place] <= total:
                price = order.costs[taken[place]] / steps[place]
                best = min(best, (price, place)) if best is not None else (price, place)
        if best is None:
            return taken
        taken[best[1]] += 1
        gone += steps[best[1]]
