"""Fits the weights of one layer to a target by gradient steps, layer by layer, on calibration text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.rewriter import parallel

#: Largest relative step.
RATE = 0.003
#: Rates that are tried where one is to be chosen, as multiples of it.
RACE = (0.5, 1.0, 2.0)
#: Root mean square of an entry in an update of Muon at rate 1, as `match_rms_adamw` scales it.
MUON_SIZE = 0.2
#: How often `backtracking` tries, each time with steps so much shorter, until the error falls below so much of what it
#: was; and by how much they may grow again from layer to layer.
ATTEMPTS, SHORTER, WORTH, LONGER = 3, 3.0, 0.99, 1.5
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
        rate: largest relative step.
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
    rate: float = RATE,
    checks: int = 2,
    seed: int = 0,
    free: Mapping[str, Tensor] | None = None,
) -> Fitted:
    """Gradient steps on all weights, one of `train` a step.

    Matrices take Muon's steps (Jordan et al. 2024: orthogonalised momentum), which lower the error about twice as far
    as as many of Adam's do; biases take Adam's. Steps are relative to each weight's size, so that one rate fits all
    matrices and models. The learning rate is warmed up and then falls to zero as a cosine. The result is never worse on
    the held-out windows than the start: the best of the start and `checks` points along the way is kept.

    Args:
        start: weights by name.
        train, held_out: examples to fit on and to judge by.
        epochs: passes over `train`. Of several processes, each steps on one of its own examples, all together.
        rate: largest relative step.
        checks: how often the held-out error is looked at, the end included.
        seed: of the order of examples.
        free: masks of what may change, of the weights of which not everything may.
    """
    before = error_of(start, held_out)
    best, best_error = dict(start), before
    train = train[: parallel.smallest_of(len(train))]  # all processes take equally many steps
    steps = epochs * len(train)
    if steps == 0 or before < 1e-12:
        return Fitted(best, before, before, rate)
    fit = _Fit(start, rate, free or {})
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(epochs)]).tolist()
    (scale,) = parallel.sum_of(sum(float(_squared(example.target, example)) for example in train[order[0]]()))
    scale = max(scale / parallel.world(), 1e-300)
    look = {round(steps * (i + 1) / checks) for i in range(checks)}
    for step, index in enumerate(order):
        factor = min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for example in train[index]():
            with torch.enable_grad():
                weights = fit.weights()
                loss = _squared(example.output(weights) - example.target, example) / scale
                loss = loss if example.penalty is None else loss + example.penalty(weights)
                loss.backward()
        fit.step(factor)
        if step + 1 in look:
            now = {name: value.detach().clone() for name, value in fit.weights().items()}
            error = error_of(now, held_out)
            if error < best_error:
                best, best_error = now, error
    return Fitted(best, before, best_error, rate)


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
            muon = torch.optim.Muon(
                self._groups(matrices, rate / MUON_SIZE),
                weight_decay=0.0,
                momentum=0.9,
                adjust_lr_fn="match_rms_adamw",
            )
            self.optimizers.append(muon)
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


def backtracking(
    start: Mapping[str, Tensor], train: Examples, held_out: Examples, *, epochs: int, rate: float, seed: int = 0
) -> Fitted:
    """`refit`, again with shorter steps while that brings nothing: the less error is left, the shorter they must be.

    Args:
        start, train, held_out, epochs, seed: as for `refit`.
        rate: to begin with; see `next_rate`.
    """
    for shorter in range(ATTEMPTS):
        fitted = refit(start, train, held_out, epochs=epochs, rate=rate / SHORTER**shorter, seed=seed)
        if fitted.after < WORTH * fitted.before:
            break
    return fitted


def next_rate(rate: float) -> float:
    """Where to begin in the next layer: with steps somewhat longer than those that served this one."""
    return min(RATE, LONGER * rate)


def best_rate(
    start: Mapping[str, Tensor],
    train: Examples,
    held_out: Examples,
    *,
    seed: int = 0,
    free: Mapping[str, Tensor] | None = None,
) -> float:
    """The rate, of a few, that lowers the held-out error most in one pass over the text.

    Steps are relative to the size of the weights, so that what is best for one layer serves the others of its model.

    Args:
        start, train, held_out, seed, free: as for `refit`.
    """
    error = {
        factor: refit(start, train, held_out, epochs=1, rate=RATE * factor, checks=1, seed=seed, free=free).after
        for factor in RACE
    }
    return RATE * min(RACE, key=lambda factor: (error[factor], factor))


def default_epochs(tokens: int) -> int:
    """Passes over so much text in a refit: new text serves better than the same once more, and time stays bounded."""
    return max(1, min(EPOCHS, round(REFIT_TOKENS / max(1, tokens))))


def size_of(weight: Tensor) -> float:
    """Root mean square of a weight; of matrices that start at zero, what is usual at random."""
    size = float(weight.pow(2).mean().sqrt())
    return 0.02 if size == 0 and weight.dim() > 1 else max(size, 1e-4)
