"""Recovery of one layer on calibration text: output projection by ridge regression, then all weights by Adam.

Both minimise the token-weighted squared difference to a target for the layer's output; targets are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def solve(self, strength: float = 0.01) -> LatentLayer:
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
class Example:
    """Some windows for a refit, made when needed.

    Attributes:
        x: attention input [B, S, D].
        target: what the layer should give, [B, S, D].
        weights: token weights [B, S].
    """

    x: Tensor
    target: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Fitted:
    """Result of a refit.

    Attributes:
        layer: the better of start and end on the selection windows.
        before, after: weighted relative squared error on the selection windows at the start, and of `layer`.
        steps: taken.
    """

    layer: LatentLayer
    before: float
    after: float
    steps: int


#: Each makes what one step is taken on.
Examples = Sequence[Callable[[], Sequence[Example]]]

#: Queries of a window that one step looks at. Attention is most of a step's work, and a part of the queries asks all
#: weights; the next pass over the text looks at another part.
QUERIES_PER_STEP = 256

#: Everything but the angles.
TRAINED = (
    "query", "query_bias", "encoder", "encoder_bias", "rope", "rope_bias", "w_uk", "w_uv", "value_mean", "w_o", "b_o",
)  # fmt: skip


def error_of(layer: LatentLayer, source: SourceLayer, examples: Examples) -> float:
    """Weighted squared error relative to the weighted square of the targets."""
    error, size = 0.0, 0.0
    for make in examples:
        for example in make():
            error += float(_squared(layer.attend(source, example.x) - example.target, example))
            size += float(_squared(example.target, example))
    error, size = parallel.sum_of(error, size)
    return error / max(size, 1e-300)


def refit(
    layer: LatentLayer,
    source: SourceLayer,
    train: Examples,
    held_out: Examples,
    *,
    epochs: int = 4,
    rate: float = 0.0015,
    checks: int = 2,
    seed: int = 0,
) -> Fitted:
    """Fit all weights of a layer with Adam; one example a step, learning rate warmed up and then cosine to zero.

    Steps are relative to each matrix's size, so that one rate fits all matrices and models. The result is never worse
    on the held-out examples than the start: the best of the start and `checks` points along the way is kept.

    Args:
        layer: the start.
        source: the layer it was made from.
        train, held_out: examples to fit on and to judge by.
        epochs: passes over `train`. Of several processes, each steps on one of its own examples, all together.
        rate: largest relative step.
        checks: how often the held-out error is looked at, the end included.
        seed: of the order of examples.
    """
    before = error_of(layer, source, held_out)
    best, best_error = layer, before
    train = train[: parallel.smallest_of(len(train))]  # all processes take equally many steps
    steps = epochs * len(train)
    if steps == 0 or before < 1e-12:
        return Fitted(layer, before, before, 0)
    trained = {n: t.clone().requires_grad_() for n, t in layer.tensors().items() if n in TRAINED and t.numel()}
    if source.normed or source.b_q is None:
        trained.pop("query_bias", None)  # the emitted layer has none
    size = {n: max(float(t.detach().pow(2).mean().sqrt()), 1e-4) for n, t in trained.items()}
    optimizer = torch.optim.Adam(
        [{"params": [t], "lr": rate * size[n], "full": rate * size[n]} for n, t in trained.items()], betas=(0.9, 0.95)
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)]).tolist()
    (scale,) = parallel.sum_of(sum(float(_squared(example.target, example)) for example in train[order[0]]()))
    scale = max(scale / parallel.world(), 1e-300)
    looks = [int(n) for n in torch.randint(1 << 16, (len(train),), generator=generator)]  # where each window begins
    look = {round(steps * (i + 1) / checks) for i in range(checks)}
    with torch.enable_grad():
        for step, index in enumerate(order):
            factor = min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * factor
            now = layer.with_tensors(trained)
            optimizer.zero_grad()
            for example in train[index]():
                part = _part(example, looks[index])
                start = part.x.shape[1] - part.target.shape[1]
                (_squared(now.attend(source, part.x, start) - part.target, part) / scale).backward()
            looks[index] += 1
            parallel.average_gradients(trained.values())
            torch.nn.utils.clip_grad_norm_(list(trained.values()), 1e3)
            optimizer.step()
            if step + 1 in look:
                now = layer.with_tensors({n: t.detach().clone() for n, t in trained.items()})
                with torch.no_grad():
                    error = error_of(now, source, held_out)
                if error < best_error:
                    best, best_error = now, error
    return Fitted(best, before, best_error, steps)


def _part(example: Example, turn: int) -> Example:
    """Some queries of an example's windows, and all that they see; the `turn` says which, and all have their turn."""
    parts = -(-example.x.shape[1] // QUERIES_PER_STEP)
    start = turn % parts * QUERIES_PER_STEP
    stop = start + QUERIES_PER_STEP
    return Example(example.x[:, :stop], example.target[:, start:stop], example.weights[:, start:stop])


def _squared(vectors: Tensor, example: Example) -> Tensor:
    """Weighted sum of squares of vectors [B, S, D]."""
    return (example.weights[..., None].to(vectors.dtype) * vectors**2).sum()
