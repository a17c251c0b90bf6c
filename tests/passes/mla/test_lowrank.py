"""Joint low rank: the closed form's bound, and that alternating least squares only improves it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt.passes.mla import lowrank
from attnopt.passes.mla.lowrank import Block
from tests.passes.mla.layers import relative


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def positive(n: int, seed: int) -> Tensor:
    a = random(n, n, seed=seed) * torch.linspace(2, 0.1, n, dtype=torch.float64)
    return a @ a.T


def problem(width: int, sizes: tuple[int, ...], classes: int) -> tuple[list[Block], Tensor]:
    blocks = [Block(random(m, width, seed=i), positive(m, 50 + i), i % classes) for i, m in enumerate(sizes)]
    return blocks, torch.stack([positive(width, 100 + c) for c in range(classes)])


@settings(max_examples=15, deadline=None)
@given(width=st.integers(3, 12), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_the_discarded_eigenvalues_are_the_loss(width: int, sizes: list[int], data: st.DataObject) -> None:
    blocks, moments = problem(width, tuple(sizes), 1)
    rank = data.draw(st.integers(1, min(width, sum(sizes))))
    encoder, values = lowrank.joint(blocks, moments[0], rank)
    assert encoder.shape == (rank, width)
    loss = lowrank.loss_of(blocks, moments, encoder, lowrank.decode(blocks, moments, encoder))
    assert loss == pytest.approx(float(values[rank:].sum()), rel=1e-5, abs=1e-5 * float(values.sum()))


def test_both_forms_of_the_closed_solution_agree() -> None:
    tall, moments = problem(6, (5, 5), 1)
    encoder, values = lowrank.joint(tall, moments[0], 3)
    stacked = torch.cat([lowrank.factor(b.metric).mT @ b.rows for b in tall])
    expected = torch.linalg.eigvalsh(stacked @ moments[0] @ stacked.T).flip(0)
    assert relative(values, expected[:6]) < 1e-8
    decoders = lowrank.decode(tall, moments, encoder)
    assert lowrank.loss_of(tall, moments, encoder, decoders) == pytest.approx(float(expected[3:].sum()), rel=1e-6)


def test_error_falls_with_rank_and_ends_at_nothing() -> None:
    blocks, moments = problem(8, (4, 4), 2)
    common = moments.mean(0)
    losses = [lowrank.fit(blocks, moments, common, rank).loss for rank in range(1, 9)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(losses))
    assert losses[-1] < 1e-9 * lowrank.fit(blocks, moments, common, 1).total


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_alternating_least_squares_improves_the_start(classes: int) -> None:
    blocks, moments = problem(10, (4, 4, 4), classes)
    common = moments.mean(0)
    losses = [lowrank.fit(blocks, moments, common, 4, sweeps=n).loss for n in (0, 1, 4, 12)]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(losses))
    if classes > 1:
        assert losses[-1] < 0.99 * losses[0]


def test_decoders_are_the_best_for_the_encoder() -> None:
    blocks, moments = problem(8, (3, 3), 2)
    encoder = random(3, 8, seed=9)
    decoders = lowrank.decode(blocks, moments, encoder)
    best = lowrank.loss_of(blocks, moments, encoder, decoders)
    for seed in range(5):
        moved = tuple(up + 0.01 * random(*up.shape, seed=seed) for up in decoders)
        assert lowrank.loss_of(blocks, moments, encoder, moved) > best


def test_whitened_rows_have_unit_energy_span_the_same_and_have_fixed_signs() -> None:
    encoder, moment = random(3, 7, seed=1), positive(7, 2)
    white = lowrank.whiten(encoder, moment)
    assert torch.allclose(white @ moment @ white.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    assert torch.linalg.matrix_rank(torch.cat([white, encoder])) == 3
    again = lowrank.whiten(-encoder, moment)
    assert relative(again, white) < 1e-9


def test_more_rank_than_needed_gives_zero_rows() -> None:
    blocks, moments = problem(10, (2, 2), 2)
    low = lowrank.fit(blocks, moments, moments.mean(0), 7)
    assert low.encoder.shape == (7, 10)
    assert float(low.encoder[4:].abs().max()) == 0
    assert low.loss < 1e-9 * low.total


def test_blocks_that_are_zero_are_fine() -> None:
    blocks, moments = problem(6, (3, 3), 2)
    blocks[0] = Block(torch.zeros(3, 6, dtype=torch.float64), blocks[0].metric, 0)
    low = lowrank.fit(blocks, moments, moments.mean(0), 3)
    assert low.loss < 1e-9 * low.total
    assert float(low.decoders[0].abs().max()) < 1e-9


def test_factor_of_a_moment() -> None:
    moment = positive(5, 4)
    half = lowrank.factor(moment)
    assert relative(half @ half.T, moment) < 1e-10
    assert not bool(lowrank.factor(torch.zeros(3, 3, dtype=torch.float64)).abs().max() > 1e-100)
    few = random(5, 2, seed=3)  # fewer vectors than dimensions, and one eigenvalue below zero by rounding
    flat = few @ few.T - 1e-12 * torch.eye(5, dtype=torch.float64)
    half = lowrank.factor(flat)
    assert bool(torch.isfinite(half).all())
    assert relative(half @ half.T, flat) < 1e-9
