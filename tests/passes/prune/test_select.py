"""Which heads go: predicted costs are the true ones, least squares is never worse, dead heads cost nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.passes.common.moments import Moments
from attnopt.passes.common.ridge import OutputFit
from attnopt.passes.prune.select import Elimination, counts_for_budget, order_of_scores, removal_order

WIDTH, HEADS = 3, 5


def sample(seed: int, tokens: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEADS * WIDTH, HEADS * WIDTH, generator=generator, dtype=torch.float64)
    z = torch.randn(tokens, HEADS * WIDTH, generator=generator, dtype=torch.float64) @ mix + 0.5
    return z, torch.randn(HEADS * WIDTH, 7, generator=generator, dtype=torch.float64)


def moments(z: torch.Tensor, weight: torch.Tensor) -> Moments:
    return Moments(z.T @ z / len(z), z.mean(0), weight)


def channels(heads: list[int]) -> list[int]:
    return [h * WIDTH + i for h in heads for i in range(WIDTH)]


def replayed(z: torch.Tensor, weight: torch.Tensor, gone: list[int], fill: str) -> float:
    """Mean squared error of leaving heads out, computed on the tokens themselves."""
    rest = [c for c in range(z.shape[1]) if c not in channels(gone)]
    y, kept = z @ weight, z[:, rest]
    if fill == "none":
        error = y - kept @ weight[rest]
    elif fill == "mean":
        error = y - kept @ weight[rest]
        error = error - error.mean(0)
    else:
        inputs = torch.cat([kept, torch.ones(len(z), 1, dtype=z.dtype)], 1) if fill == "lsq" else kept
        error = y - inputs @ torch.linalg.lstsq(inputs, y).solution
    return float(error.pow(2).sum() / len(z))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), gone=st.permutations(range(HEADS)).map(lambda p: p[:3]))
@pytest.mark.parametrize("fill", ["none", "mean", "lsq", "lsq-nobias"])
def test_predicted_costs_are_the_replayed_ones(fill: str, seed: int, gone: list[int], without_ridge: None) -> None:
    z, weight = sample(seed)
    elimination = Elimination(moments(z, weight), fill)  # type: ignore[arg-type]  # one of the literals
    total = 0.0
    for head in gone:
        total += elimination.cost(channels([head]))
        elimination.remove(channels([head]))
    assert total == pytest.approx(replayed(z, weight, list(gone), fill), rel=1e-6)


@pytest.fixture(scope="module")
def without_ridge() -> object:
    """Without the ridge the cost is that of plain least squares."""
    patch = pytest.MonkeyPatch()
    patch.setattr("attnopt.passes.prune.select.STRENGTH", 1e-13)
    yield
    patch.undo()


@pytest.mark.parametrize("seed", range(5))
def test_least_squares_is_no_worse_than_means_and_those_no_worse_than_zeros(seed: int) -> None:
    z, weight = sample(seed)
    costs = [replayed(z, weight, [1, 3], fill) for fill in ("lsq", "mean", "none")]
    assert costs == sorted(costs)


@pytest.mark.parametrize("seed", range(5))
def test_the_ridge_is_no_worse_than_the_old_weights(seed: int) -> None:
    z, weight = sample(seed)
    rest = channels([0, 2, 4])
    fit = OutputFit(weight[rest], None)
    fit.add(z[:, rest], z @ weight, torch.ones(len(z)))
    for bias in (True, False):
        assert fit.error(*fit.solve(bias=bias)) <= fit.error_before * (1 + 1e-9)
    assert fit.error(*fit.solve()) <= fit.error(*fit.means()) * (1 + 1e-2)
    assert fit.error(*fit.means()) <= fit.error_before * (1 + 1e-9)


def test_a_dead_head_goes_first_and_costs_nothing() -> None:
    z, weight = sample(0)
    weight[channels([2])] = 0
    for fill in ("none", "mean", "lsq"):
        order = removal_order(
            [Elimination(moments(z, weight), fill)], [WIDTH], [(h,) for h in range(HEADS)], [0] * HEADS
        )
        assert order.removed[0] == 2
        assert order.costs[0] == pytest.approx(0, abs=1e-9)
        assert len(order.removed) == HEADS - 1


def test_a_constant_head_costs_nothing_with_means_and_a_dependent_one_with_least_squares() -> None:
    z, weight = sample(1)
    z[:, channels([1])] = torch.tensor([1.0, -2.0, 3.0], dtype=z.dtype)
    z[:, channels([3])] = z[:, channels([0])] @ torch.randn(3, 3, dtype=z.dtype)
    cost = {fill: Elimination(moments(z, weight), fill) for fill in ("none", "mean", "lsq")}  # type: ignore[arg-type]
    assert cost["mean"].cost(channels([1])) == pytest.approx(0, abs=1e-8)
    assert cost["none"].cost(channels([1])) > 1
    whole = cost["mean"].cost(channels([3]))
    assert cost["lsq"].cost(channels([3])) < 0.2 * whole


def test_classes_stay_even() -> None:
    z, weight = sample(2)
    order = removal_order([Elimination(moments(z, weight), "mean")], [WIDTH], [(h,) for h in range(4)], [0, 0, 1, 1])
    assert sorted(unit // 2 for unit in order.removed) == [0, 1]
    scored = order_of_scores(torch.tensor([4.0, 3.0, 2.0, 1.0]), [(h,) for h in range(4)], [0, 0, 1, 1])
    assert set(scored.removed) == {1, 3}


def test_scores_go_by_number_when_equal() -> None:
    order = order_of_scores(torch.ones(4), [(h,) for h in range(4)], [0] * 4)
    assert order.removed == (3, 2, 1)


def test_the_budget_is_spent_where_it_costs_least() -> None:
    z, weight = sample(3)
    cheap = removal_order([Elimination(moments(z, weight * 0.01), "mean")], [WIDTH], [(h,) for h in range(5)], [0] * 5)
    dear = removal_order([Elimination(moments(z, weight), "mean")], [WIDTH], [(h,) for h in range(5)], [0] * 5)
    assert counts_for_budget([dear, cheap], [1, 1], 4) == [0, 4]
    assert counts_for_budget([dear, cheap], [1, 1], 6) == [2, 4]
    assert counts_for_budget([dear, cheap], [2, 2], 3) == [0, 1]
