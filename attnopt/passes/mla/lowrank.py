"""Low rank of several linear maps at once, each with its own error metric and its own second moment of the input.

    minimise over E [r, p] and U_b:   sum_b tr( S_b (A_b - U_b E) C_b (A_b - U_b E)ᵀ )

With one C for all blocks the solution is closed: with T = S^½ A and T C Tᵀ = U Λ Uᵀ, E = U_rᵀ T. Keys and values of
different heads see the text under different weights, so that is only the start; from there E and U_b are improved in
turn (alternating least squares), each step a linear solve in the space of moments, without touching the text again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOOR = 1e-10
_RIDGE = 1e-14


@dataclass(frozen=True)
class Block:
    """One map to be approximated.

    Attributes:
        rows: A_b, [m, p].
        metric: S_b, [m, m] symmetric positive semidefinite.
        cls: index of its second moment.
    """

    rows: Tensor
    metric: Tensor
    cls: int


@dataclass(frozen=True)
class LowRank:
    """An approximation A_b ~ U_b E.

    Attributes:
        encoder: E, [r, p].
        decoders: U_b, [m_b, r].
        loss: the objective.
        total: the objective with E = 0.
    """

    encoder: Tensor
    decoders: tuple[Tensor, ...]
    loss: float
    total: float


def factor(moment: Tensor) -> Tensor:
    """F with F Fᵀ = C for a positive semidefinite matrix, up to a change of C by `_RIDGE` of its trace."""
    ridge = _RIDGE * float(moment.diagonal().sum())
    lower, failed = torch.linalg.cholesky_ex(moment + ridge * torch.eye(len(moment), dtype=moment.dtype))
    if not int(failed):
        return lower
    values, vectors = torch.linalg.eigh((moment + moment.mT) / 2)
    return vectors * values.clamp(min=max(ridge, 1e-300)).sqrt()


def joint(blocks: Sequence[Block], moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The closed form for one second moment C for all blocks.

    Args:
        blocks: the maps; their `cls` is ignored.
        moment: C, [p, p].
        rank: r.

    Returns:
        E [r, p], and all eigenvalues, descending: the loss with the best decoders is the sum of those from the r-th on.
    """
    rows = sum(block.rows.shape[0] for block in blocks)
    if rows <= len(moment):
        stacked = torch.cat([factor(block.metric).mT @ block.rows for block in blocks])
        values, vectors = _descending(stacked @ moment @ stacked.mT)
        return vectors[:, :rank].mT @ stacked, values
    # The smaller side: with C = F Fᵀ and T F = U Λ^½ Vᵀ, E = Uᵀ T = Λ^-½ Vᵀ Fᵀ TᵀT, and T itself is not needed.
    inner = sum((block.rows.mT @ block.metric @ block.rows for block in blocks), torch.zeros_like(moment))
    half = factor(moment)
    values, vectors = _descending(half.mT @ inner @ half)
    kept = values[:rank]
    scale = torch.where(kept > _RIDGE * values[0], kept.clamp(min=1e-300).rsqrt(), 0.0)
    return (half @ (vectors[:, :rank] * scale)).mT @ inner, values


def _descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first and none below zero, and eigenvectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return values.flip(-1).clamp(min=0), vectors.flip(-1)


def whiten(encoder: Tensor, moment: Tensor) -> Tensor:
    """The same row space with E C Eᵀ = I; directions without energy become zero rows at the end."""
    values, vectors = _descending(encoder @ moment @ encoder.mT)
    alive = values > _FLOOR * values[0].clamp(min=1e-300)
    scale = torch.where(alive, values.clamp(min=1e-300).rsqrt(), 0.0)
    return _fixed_signs((vectors * scale).mT @ encoder)


def _fixed_signs(encoder: Tensor) -> Tensor:
    """Rows with a positive largest entry: eigenvectors have no sign of their own, files should."""
    largest = encoder.gather(1, encoder.abs().argmax(1, keepdim=True))
    return encoder * torch.where(largest < 0, -1.0, 1.0)


def decode(blocks: Sequence[Block], moments: Tensor, encoder: Tensor) -> tuple[Tensor, ...]:
    """The best U_b = A_b C_b Eᵀ (E C_b Eᵀ)⁺ for an encoder; S_b does not matter."""
    regressions = {}
    for cls in {block.cls for block in blocks}:
        crossed = moments[cls] @ encoder.mT
        gram = encoder @ crossed
        regressions[cls] = crossed @ torch.linalg.pinv((gram + gram.mT) / 2, rtol=1e-12, hermitian=True)
    return tuple(block.rows @ regressions[block.cls] for block in blocks)


def loss_of(blocks: Sequence[Block], moments: Tensor, encoder: Tensor, decoders: Sequence[Tensor]) -> float:
    """The objective."""
    total = 0.0
    for block, up in zip(blocks, decoders, strict=True):
        error = block.rows - up @ encoder
        total += float(((block.metric @ error @ moments[block.cls]) * error).sum())
    return max(total, 0.0)


def fit(
    blocks: Sequence[Block], moments: Tensor, common: Tensor, rank: int, sweeps: int = 3, steps: int = 8
) -> LowRank:
    """Approximate the blocks: closed form on a common moment, then alternating least squares.

    Args:
        blocks: the maps.
        moments: [classes, p, p], C by class.
        common: [p, p], the moment to start with.
        rank: r; directions that the blocks do not need become zero rows.
        sweeps: of alternating least squares.
        steps: of conjugate gradients in each.
    """
    width = blocks[0].rows.shape[1]
    usable = min(rank, width, sum(block.rows.shape[0] for block in blocks))
    encoder = whiten(joint(blocks, common, usable)[0], common)
    decoders = decode(blocks, moments, encoder)
    total = sum(float(((b.metric @ b.rows @ moments[b.cls]) * b.rows).sum()) for b in blocks)
    best = loss_of(blocks, moments, encoder, decoders)
    for _ in range(sweeps if best > 1e-12 * total else 0):
        improved = whiten(_encode(blocks, moments, encoder, decoders, steps), common)
        new_decoders = decode(blocks, moments, improved)
        loss = loss_of(blocks, moments, improved, new_decoders)
        if not loss < best:
            break
        encoder, decoders, best = improved, new_decoders, loss
    if usable < rank:
        encoder = torch.cat([encoder, encoder.new_zeros(rank - usable, width)])
        decoders = tuple(torch.cat([up, up.new_zeros(up.shape[0], rank - usable)], 1) for up in decoders)
    return LowRank(encoder, tuple(decoders), best, total)


def _encode(
    blocks: Sequence[Block], moments: Tensor, encoder: Tensor, decoders: Sequence[Tensor], steps: int
) -> Tensor:
    """Improve E for given decoders: conjugate gradients on sum_b U_bᵀ S_b U_b E C_b = sum_b U_bᵀ S_b A_b C_b."""
    classes = sorted({block.cls for block in blocks})
    left = {cls: encoder.new_zeros(encoder.shape[0], encoder.shape[0]) for cls in classes}
    rows = {cls: torch.zeros_like(encoder) for cls in classes}
    for block, up in zip(blocks, decoders, strict=True):
        weighted = up.mT @ block.metric
        left[block.cls].addmm_(weighted, up)
        rows[block.cls].addmm_(weighted, block.rows)
    right = torch.zeros_like(encoder)
    for cls in classes:
        right.addmm_(rows.pop(cls), moments[cls])

    def apply(e: Tensor) -> Tensor:
        result = torch.zeros_like(e)
        for cls in classes:
            result.addmm_(left[cls] @ e, moments[cls])
        return result

    outer = _inverse(sum((left[cls] for cls in classes), torch.zeros_like(left[classes[0]])))
    inner = _inverse(torch.stack([moments[cls] for cls in classes]).mean(0))
    return _conjugate_gradients(apply, right, encoder, lambda e: outer @ e @ inner, steps)


def _inverse(matrix: Tensor) -> Tensor:
    ridge = 1e-6 * matrix.diagonal().mean().clamp(min=1e-300)
    return torch.linalg.inv(matrix + ridge * torch.eye(matrix.shape[0], dtype=matrix.dtype))


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    steps: int,
) -> Tensor:
    """Some steps of preconditioned conjugate gradients towards apply(x) = right, from `start`; `right` is overwritten.

    In place, because these are the largest tensors of a conversion.
    """
    x, residual = start.clone(), right.sub_(apply(start))
    direction = precondition(residual)
    power = float(residual.flatten() @ direction.flatten())
    for _ in range(steps):
        if power <= 0:
            break
        image = apply(direction)
        curvature = float(direction.flatten() @ image.flatten())
        if curvature <= 0:
            break
        x.add_(direction, alpha=power / curvature)
        residual.sub_(image, alpha=power / curvature)
        del image
        z = precondition(residual)
        new_power = float(residual.flatten() @ z.flatten())
        direction.mul_(new_power / power).add_(z)
        power = new_power
    return x
