"""Least squares of a layer's output projection on what its heads give, from sums over calibration text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.rewriter import parallel
from attnopt.rewriter.precision import exact_products

#: Strength of the pull to the old weights, as a share of the mean square of the features.
STRENGTH = 0.01


class OutputFit:
    """min over W, b of sum_t w_t ||T_t - Z_t W - b||^2 + mu ||W - W_0||^2, with mu set by `STRENGTH`.

    The pull to W_0, not to zero, makes the fit never worse than W_0 on the text it is made on.

    Args:
        weight: W_0 [features, D], in the order of the features given to `add`.
        bias: b_0 [D], or None for zeros.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        features, width = weight.shape
        self.weight = weight.double()
        self.bias = torch.zeros(width, dtype=torch.float64, device=weight.device) if bias is None else bias.double()
        self._gram = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=weight.device)
        self._cross = torch.zeros(features + 1, width, dtype=torch.float64, device=weight.device)
        self._square = 0.0
        self._size = 0.0

    def add(self, features: Tensor, target: Tensor, weights: Tensor) -> None:
        """Add tokens.

        Args:
            features: Z [..., features].
            target: T [..., D].
            weights: w [...].
        """
        z, wanted = features.flatten(0, -2), target.flatten(0, -2)
        z = torch.cat([z, z.new_ones(z.shape[0], 1)], 1)
        each = weights.flatten()[:, None].to(z.dtype)
        with exact_products():
            error = wanted - z @ torch.cat([self.weight, self.bias[None]]).to(z.dtype)
            self._gram += ((z * each).T @ z).double()
            self._cross += ((z * each).T @ error).double()
        self._square += float((each * error**2).sum())
        self._size += float((each * wanted**2).sum())

    def add_up(self) -> None:
        """Sum over all processes, each of which has added its share of the text."""
        parallel.add_up(self._gram, self._cross)
        self._square, self._size = parallel.sum_of(self._square, self._size)

    @property
    def error_before(self) -> float:
        """Weighted squared error of W_0 and b_0 relative to the target's square."""
        return self._square / max(self._size, 1e-300)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """The same of other weights, on the text that was added."""
        change = torch.cat([weight.double() - self.weight, (bias.double() - self.bias)[None]])
        gram = (self._gram + self._gram.T) / 2
        moved = float((change * (gram @ change)).sum()) - 2 * float((change * self._cross).sum())
        return max(self._square + moved, 0.0) / max(self._size, 1e-300)

    def means(self) -> tuple[Tensor, Tensor]:
        """(W_0, the best bias for it)."""
        count = self._gram[-1, -1].clamp_min(1e-300)
        return self.weight, self.bias + self._cross[-1] / count

    def solve(self, *, bias: bool = True, strength: float = STRENGTH) -> tuple[Tensor, Tensor]:
        """(W [features, D], b [D]), float64.

        Args:
            bias: whether b may change.
            strength: of the pull to W_0.
        """
        size = len(self._gram) - (not bias)
        gram = (self._gram + self._gram.T)[:size, :size] / 2
        pull = torch.full((size,), strength, dtype=torch.float64, device=gram.device) * gram.diagonal()[:-1].mean()
        if bias:
            pull[-1] = 1e-9 * gram[-1, -1]  # the bias is not pulled
        change = torch.linalg.solve(gram + torch.diag(pull.clamp(min=1e-300)), self._cross[:size])
        if bias:
            return self.weight + change[:-1], self.bias + change[-1]
        return self.weight + change, self.bias.clone()


class HeldOut:
    """Error of output projections on the held-out windows.

    Args:
        rows: features, targets and token weights of each batch of them.
    """

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        self._rows = rows

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """Weighted squared error relative to the targets' square."""
        error, size = 0.0, 0.0
        with exact_products():
            for features, target, importance in self._rows:
                each = importance[..., None].to(target.dtype)
                found = features @ weight.to(features.dtype) + bias.to(features.dtype)
                error += float((each * (found - target) ** 2).sum())
                size += float((each * target**2).sum())
        error, size = parallel.sum_of(error, size)
        return error / max(size, 1e-300)
