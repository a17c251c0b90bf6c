"""Muon: steps along the orthogonalised momentum of a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnopt.rewriter.precision import multiplies_bfloat16

#: Of the quintic iteration, and how often it is done (Jordan et al. 2024, "Muon: an optimizer for hidden layers").
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
#: Root mean square of an entry in an update at rate 1, which matches Adam's (Liu et al. 2025, arXiv 2502.16982).
SIZE = 0.2


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, whose updates have Adam's size.

    The same as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, but for one thing: that one always multiplies
    bfloat16 matrices, which a processor without instructions for them does 25 times as slowly as float32 ones.

    Args:
        params: matrices, or groups of them.
        lr: length of a step.
        momentum: share of the momentum that is kept.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.001, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalised(matrix.grad.lerp(momentum, group["momentum"]))
                matrix.add_(update, alpha=-group["lr"] * SIZE * math.sqrt(max(matrix.shape)))


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U Vᵀ for a matrix U S Vᵀ: singular values between 0.5 and 1.5, by Newton-Schulz iterations.

    Args:
        matrix: [m, n].
    """
    x = matrix.bfloat16() if multiplies_bfloat16(matrix.device) else matrix
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
