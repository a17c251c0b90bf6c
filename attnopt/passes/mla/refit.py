"""Recovery of one layer on calibration text: output projection by ridge regression, then all weights by gradient steps.

Both minimise the token-weighted squared difference to a target for the layer's output; targets are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Tensor

from attnopt.passes.common import refit as fitting
from attnopt.passes.mla.layer import LatentLayer
from attnopt.passes.mla.source_layer import SourceLayer
from attnopt.rewriter import parallel
from attnopt.rewriter.precision import exact_products


class OutputRidge:
    """Ridge regression of the output projection, pulled to the one it has: min ||T - Z W^T - b||^2 + mu ||W - W0||^2.

    Streams windows: `add` them, then `solve`.

    Args:
        layer: whose output projection is refitted.
    """

    def __init__(self, layer: LatentLayer) -> None:
        width = layer.w_o.shape[1] + 1
        self.layer = layer
        self._gram = torch.zeros(width, width, dtype=torch.float64)
        self._cross = torch.zeros(width, layer.w_o.shape[0], dtype=torch.float64)

    def add(self, mixed: Tensor, target: Tensor, weights: Tensor) -> None:
        """Add windows.

        Args:
            mixed: heads' outputs [B, S, H d_v].
            target: what the layer should give, [B, S, D].
            weights: token weights [B, S].
        """
        error = (target - self.layer.project(mixed)).flatten(0, 1)
        inputs = torch.cat([mixed.flatten(0, 1), torch.ones(mixed.shape[0] * mixed.shape[1], 1).to(mixed)], 1)
        scaled = inputs * weights.flatten()[:, None].to(mixed.dtype)
        with exact_products():
            self._gram += (scaled.T @ inputs).double()
            self._cross += (scaled.T @ error).double()

    def solve(self, strength: float = 0.1) -> LatentLayer:
        """The layer with its new output projection and bias.

        Args:
            strength: ridge as a share of the mean square of the inputs.
        """
        parallel.add_up(self._gram, self._cross)
        gram = (self._gram + self._gram.T) / 2
        ridge = torch.full((gram.shape[0],), strength, dtype=torch.float64) * gram.diagonal()[:-1].mean()
        ridge[-1] = 1e-9 * gram[-1, -1]  # the bias is not pulled
        change = torch.linalg.solve(gram + torch.diag(ridge.clamp(min=1e-300)), self._cross).T
        dtype = self.layer.w_o.dtype
        w_o = (self.layer.w_o.double() + change[:, :-1]).to(dtype)
        b_o = (self.layer.b_o.double() + change[:, -1]).to(dtype)
        return self.layer.with_tensors({"w_o": w_o, "b_o": b_o})


@dataclass(frozen=True)
class Window:
    """Windows that a layer is fitted to or judged by, made when needed.

    Attributes:
        x: attention input [B, S, D].
        target: what the layer should give, [B, S, D].
        weights: token weights [B, S].
    """

    x: Tensor
    target: Tensor
    weights: Tensor

    def example(self, layer: LatentLayer, source: SourceLayer, turn: int | None = None) -> fitting.Example:
        """These windows for a fit of a layer's weights; with a turn, some queries only, and every turn others."""
        parts = -(-self.x.shape[1] // QUERIES_PER_STEP)
        start, stop = 0, self.x.shape[1]
        if turn is not None:
            start = turn % parts * QUERIES_PER_STEP
            stop = min(stop, start + QUERIES_PER_STEP)

        def output(weights: Mapping[str, Tensor]) -> Tensor:
            return layer.with_tensors(weights).attend(source, self.x[:, :stop], start)

        return fitting.Example(output, self.target[:, start:stop], self.weights[:, start:stop])


#: Each makes what one step is taken on.
Windows = Sequence[Callable[[], Sequence[Window]]]

#: Queries of a window that one step looks at. Attention is most of a step's work, and a part of the queries asks all
#: weights; the next pass over the text looks at another part.
QUERIES_PER_STEP = 256

#: Everything but the angles.
TRAINED = (
    "query", "query_bias", "encoder", "encoder_bias", "rope", "rope_bias", "w_uk", "w_uv", "value_mean", "w_o", "b_o",
)  # fmt: skip


def refit(
    layer: LatentLayer,
    source: SourceLayer,
    train: Windows,
    held_out: Windows,
    *,
    epochs: int = 4,
    rate: float | None = None,
    seed: int = 0,
) -> tuple[LatentLayer, fitting.Fitted]:
    """Fit all weights of a layer (`attnopt.passes.common.refit`); never worse on the held-out windows.

    Args:
        layer: the start.
        source: the layer it was made from.
        train, held_out: windows to fit on and to judge by.
        epochs: passes over `train`.
        rate: as there.
        seed: of the order of windows, and of which queries of each are looked at first.

    Returns:
        The better of start and end on the held-out windows, and the errors there.
    """
    start = {n: t for n, t in layer.tensors().items() if n in TRAINED and t.numel()}
    if source.normed or source.b_q is None:
        start.pop("query_bias", None)  # the emitted layer has none
    generator = torch.Generator().manual_seed(seed)
    turns = [count(int(n)) for n in torch.randint(1 << 16, (len(train),), generator=generator)]

    def step(make: Callable[[], Sequence[Window]], turn: Iterator[int]) -> list[fitting.Example]:
        now = next(turn)
        return [window.example(layer, source, now) for window in make()]

    def judged(make: Callable[[], Sequence[Window]]) -> list[fitting.Example]:
        return [window.example(layer, source) for window in make()]

    fitted = fitting.refit(
        start,
        [partial(step, make, turn) for make, turn in zip(train, turns, strict=True)],
        [partial(judged, make) for make in held_out],
        epochs=epochs,
        rate=rate,
        seed=seed,
    )
    return layer.with_tensors(fitted.weights), fitted
