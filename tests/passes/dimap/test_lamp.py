"""LAMP scores and thresholds: largest 1, order, scale, exact counts, no layer emptied."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.passes.dimap.lamp import exact_count, group_scores, keep_largest, kept_counts, scores


def layers(seed: int, sizes: tuple[int, ...] = (50, 80, 31)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) * 10.0 ** (i - 1) for i, size in enumerate(sizes)]


def brute(parts: list[torch.Tensor], keep: int) -> list[int]:
    every = torch.cat([scores(part) for part in parts])
    owner = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    best = owner[every.sort(descending=True, stable=True).indices[:keep]]
    return torch.bincount(best, minlength=len(parts)).tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([1e-3, 0.5, 7.0, 1e4]))
def test_the_largest_scores_one_and_scale_changes_nothing(seed: int, factor: float) -> None:
    (x, *_) = layers(seed)
    found = scores(x)
    assert float(found[0]) == 1
    assert bool((found[:-1] >= found[1:]).all())
    assert torch.allclose(scores(x.double() * factor), scores(x.double()), rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.integers(3, 161))
def test_counts_are_those_of_one_sort(seed: int, keep: int) -> None:
    parts = layers(seed)
    found = kept_counts([lambda part=part: part for part in parts], keep)
    assert found == brute(parts, keep)
    assert sum(found) == keep


def test_no_layer_is_emptied() -> None:
    parts = layers(0)
    assert min(kept_counts([lambda part=part: part for part in parts], 3)) == 1


def test_equal_layers_of_different_scale_keep_the_same() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    parts = [x * 1e-3, x, x * 1e3]
    found = kept_counts([lambda part=part: part for part in parts], 300)
    assert all(abs(count - 100) <= 1 for count in found)
    magnitude = torch.cat(parts).abs().sort(descending=True, stable=True).indices[:300]
    assert int((magnitude >= 2000).sum()) == 300  # global magnitude empties two layers


def test_ties_go_to_the_lower_index() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0], [0.0, 2.0, -2.0]])
    assert keep_largest(x, counts=(2,)).tolist() == [[0, 0, 0], [0, 2, -2]]
    assert keep_largest(x, counts=(2, 1)).tolist() == [[1, -1, 0], [0, 2, 0]]
    assert kept_counts([lambda: torch.ones(4), lambda: torch.ones(4)], 3) == [2, 1]


def test_groups_rank_like_weights() -> None:
    found = group_scores(torch.tensor([1.0, 3.0, 2.0]))
    assert found.tolist() == pytest.approx([1 / 14, 1, 4 / 13])


@pytest.mark.parametrize(("total", "sparsity", "kept"), [(10, 0.5, 5), (7, 0.5, 3), (10, 0, 10), (3, 0.99, 0)])
def test_counts_are_rounded_half_up(total: int, sparsity: float, kept: int) -> None:
    assert exact_count(total, sparsity) == kept
