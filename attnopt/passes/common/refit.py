"""Fits the weights of one layer to a target by gradient steps, layer by layer, on calibration text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.passes.common.muon import SIZE, Muon
from attnopt.rewriter import parallel

#: Largest relative step to begin with, as a multiple of the root of the relative error. Steps have a length of their
#: own, whatever the gradient's; the error that they stir up grows as its square, and must stay below what is left.
STEP = 0.008
#: How often a refit is tried, each time with steps so much shorter, until halfway the error is no larger than before.
ATTEMPTS, SHORTER = 3, 3.0
#: Passes over little text in a refit, and how many tokens are gone through before there are fewer passes.
EPOCHS, REFIT_TOKENS = 8, 131_072


@dataclass(frozen=True)
class Example:
    """Some windows.

    Attributes:
        output: gives the layer's output [B, S, D] for weights by name.
        target: what it should be.
        weights: of the tokens, [B, S].
        penalty: what is added to the relative squared error while fitting, for weights by name; or None.
    """

    output: Callable[[Mapping[str, Tensor]], Tensor]
    target: Tensor
    weights: Tensor
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class Fitted:
    """Result of a refit.

    Attributes:
        weights: the best seen on the held-out windows.
        before, after: weighted squared error relative to the target's square there, at the start and of `weights`.
        rate: largest relative step of the descent that led there.
    """

    weights: Mapping[str, Tensor]
    before: float
    after: float
    rate: float


#: Each makes what one step is taken on.
Examples = Sequence[Callable[[], Sequence[Example]]]


def error_of(weights: Mapping[str, Tensor], examples: Examples) -> float:
    """Weighted squared error relative to the weighted square of the targets."""
    error, size = 0.0, 0.0
    with torch.no_grad():
        for make in examples:
            for example in make():
                error += float(_squared(example.output(weights) - example.target, example))
                size += float(_squared(example.target, example))
    error, size = parallel.sum_of(error, size)
    return error / max(size, 1e-300)


def refit(
    start: Mapping[str, Tensor],
    train: Examples,
    held_out: Examples,
    *,
    epochs: int,
    rate: float | None = None,
    seed: int = 0,
    free: Mapping[str, Tensor] | None = None,
) -> Fitted:
    """Gradient steps on all weights, one of `train` a step.

    Matrices take Muon's steps (Jordan et al. 2024: orthogonalised momentum), which lower the error about twice as far
    as as many of Adam's do; biases take Adam's. Steps are relative to each weight's size, so that one rule fits all
    matrices and models: the less error is left, the shorter they are, and where they raise it first they are tried
    shorter as well. The learning rate is warmed up and then falls to zero as a cosine. The result is never worse on the
    held-out windows than the start.

    Args:
        start: weights by name.
        train, held_out: examples to fit on and to judge by.
        epochs: passes over `train`. Of several processes, each steps on one of its own examples, all together.
        rate: largest relative step to begin with; by default `STEP` times the root of the error.
        seed: of the order of examples.
        free: masks of what may change, of the weights of which not everything may.
    """
    before = error_of(start, held_out)
    rate = STEP * math.sqrt(before) if rate is None else rate
    train = train[: parallel.smallest_of(len(train))]  # all processes take equally many steps
    best = Fitted(start, before, before, rate)
    if epochs * len(train) == 0 or before < 1e-12:
        return best
    for attempt in range(ATTEMPTS):
        shorter = rate / SHORTER**attempt
        halfway, end = (
            Fitted(weights, before, error_of(weights, held_out), shorter)
            for weights in _descend(start, train, epochs, shorter, seed, free or {})
        )
        best = min(best, halfway, end, key=lambda fitted: fitted.after)
        if halfway.after <= before:
            break
    return best


def _descend(
    start: Mapping[str, Tensor], train: Examples, epochs: int, rate: float, seed: int, free: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """One descent with steps of at most `rate`: the weights halfway and at its end."""
    found = []
    steps = epochs * len(train)
    fit = _Fit(start, rate, free)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)]).tolist()
    (scale,) = parallel.sum_of(sum(float(_squared(example.target, example)) for example in train[order[0]]()))
    scale = max(scale / parallel.world(), 1e-300)
    for step, index in enumerate(order):
        factor = min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for example in train[index]():
            with torch.enable_grad():
                weights = fit.weights()
                loss = _squared(example.output(weights) - example.target, example) / scale
                loss = loss if example.penalty is None else loss + example.penalty(weights)
                loss.backward()
        fit.step(factor)
        if step + 1 in ((steps + 1) // 2, steps):
            found.append({name: value.detach().clone() for name, value in fit.weights().items()})
    return found[0], found[-1]


class _Fit:
    """Weights on their way: matrices by Muon, vectors by Adam; of what may not change, nothing does."""

    def __init__(self, start: Mapping[str, Tensor], rate: float, free: Mapping[str, Tensor]) -> None:
        self.start, self.free = start, free
        # Muon wants matrices: those of several heads are one matrix.
        self.trained = {
            name: (value.flatten(0, -2) if value.dim() > 2 else value).detach().clone().requires_grad_()
            for name, value in start.items()
        }
        matrices = [name for name, value in self.trained.items() if value.dim() == 2]
        vectors = [name for name in self.trained if name not in matrices]
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimizers.append(Muon(self._groups(matrices, rate / SIZE)))
        if vectors:
            self.optimizers.append(torch.optim.Adam(self._groups(vectors, rate), betas=(0.9, 0.95)))

    def _groups(self, names: Sequence[str], rate: float) -> list[dict[str, Any]]:
        return [{"params": [self.trained[n]], "full": rate * size_of(self.start[n].detach())} for n in names]

    def weights(self) -> dict[str, Tensor]:
        """By name, as they are now."""
        return {name: value.view(self.start[name].shape) for name, value in self.trained.items()}

    def step(self, factor: float) -> None:
        """One step along the gradients collected, of a length of `factor` times the largest."""
        for name, mask in self.free.items():
            gradient = self.trained[name].grad
            if gradient is not None:
                gradient *= mask.view(gradient.shape)
        parallel.average_gradients(self.trained.values())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * factor
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in self.free.items():
                value = self.trained[name]
                value.copy_(torch.where(mask.view(value.shape) != 0, value, self.start[name].view(value.shape)))


def _squared(vectors: Tensor, example: Example) -> Tensor:
    """Weighted sum of squares of vectors [B, S, D]."""
    return (example.weights[..., None].to(vectors.dtype) * vectors**2).sum()


def default_epochs(tokens: int) -> int:
    """Passes over so much text in a refit: new text serves better than the same once more, and time stays bounded."""
    return max(1, min(EPOCHS, round(REFIT_TOKENS / max(1, tokens))))


def size_of(weight: Tensor) -> float:
    """Root mean square of a weight; of matrices that start at zero, what is usual at random."""
    size = float(weight.pow(2).mean().sqrt())
    return 0.02 if size == 0 and weight.dim() > 1 else max(size, 1e-4)
