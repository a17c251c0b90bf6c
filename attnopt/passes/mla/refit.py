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
from attnopt.passes.common.ridge import OutputFit
from attnopt.passes.mla.layer import LatentLayer
from attnopt.passes.mla.source_layer import SourceLayer

#: Pull of the output projection to the source's, as a share of the mean square of its inputs (docs/mla.md has figures).
OUTPUT_PULL = 0.1


def output_fit(layer: LatentLayer) -> OutputFit:
    """The least-squares fit of a layer's output projection: give it what `mixed` gives and what the layer should."""
    return OutputFit(layer.w_o.T, layer.b_o)


def with_output(layer: LatentLayer, fit: OutputFit, strength: float = OUTPUT_PULL) -> LatentLayer:
    """The layer with the output projection and bias that a fit on all processes' text finds."""
    fit.add_up()
    weight, bias = fit.solve(strength=strength)
    dtype = layer.w_o.dtype
    return layer.with_tensors({"w_o": weight.T.contiguous().to(dtype), "b_o": bias.to(dtype)})


@dataclass(frozen=True)
class Window:
    """Windows that a layer is fitted to or judged by, made when needed.

    Attributes:
        x: attention input [B, S, D].
        target: what the layer should give, [B, S, D].
        weights: token weights [B, S].
        positions: of the tokens [B, S]; None for 0 ... S-1.
    """

    x: Tensor
    target: Tensor
    weights: Tensor
    positions: Tensor | None = None

    def example(self, layer: LatentLayer, source: SourceLayer, turn: int | None = None) -> fitting.Example:
        """These windows for a fit of a layer's weights; with a turn, some queries only, and every turn others."""
        parts = -(-self.x.shape[1] // QUERIES_PER_STEP)
        start, stop = 0, self.x.shape[1]
        if turn is not None:
            start = turn % parts * QUERIES_PER_STEP
            stop = min(stop, start + QUERIES_PER_STEP)

        positions = None if self.positions is None else self.positions[:, :stop]

        def output(weights: Mapping[str, Tensor]) -> Tensor:
            return layer.with_tensors(weights).attend(source, self.x[:, :stop], start, positions)

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
