"""From a fraction of the cache to sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.mla import budget
from attnopt.passes.mla.budget import HeldOut, Split
from attnopt.rewriter.site import AttentionSite, CacheEntry, CacheSpec, RopeSpec
from tests import models
from tests.passes.mla.layers import source, statistics, text, weights_of


def site(kv_heads: int = 3, d: int = 64) -> AttentionSite:
    """The sizes of SmolLM2-135M unless others are given."""
    plain = models.captured("llama")[1].site_list[0]
    cache = CacheSpec((CacheEntry("key", kv_heads, d), CacheEntry("value", kv_heads, d)))
    rope = RopeSpec(tuple(1 / (i + 1) for i in range(d // 2)), "half")
    return replace(plain, heads=3 * kv_heads, kv_heads=kv_heads, d_qk=d, d_v=d, cache=cache, rope=rope)


@pytest.mark.parametrize(("keep", "numbers"), [(0.75, 288), (0.5, 192), (1 / 3, 128), (0.33, 128), (0.25, 96)])
def test_fractions_of_the_cache(keep: float, numbers: int) -> None:
    assert budget.kept_numbers(site(), keep) == numbers


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("lane", [True, False])
def test_candidates_keep_the_budget_and_make_sense(keep: float, lane: bool) -> None:
    for facts in (site(), site(8, 128), site(1, 8), site(2, 4)):
        total = budget.kept_numbers(facts, keep)
        splits = budget.candidates(facts, total, lane)
        assert splits
        assert {split.total for split in splits} == {total}
        assert [s.rope for s in splits] == sorted({s.rope for s in splits})
        for split in splits:
            budget.check_split(facts, split, lane, force=True)


def test_a_cache_that_does_not_shrink_is_refused_unless_forced() -> None:
    for split in (Split(96, 288), Split(192, 256)):
        with pytest.raises(UnsupportedError, match="no fewer than the 384"):
            budget.check_split(site(), split, True, force=False)
        budget.check_split(site(), split, True, force=True)
    budget.check_split(site(), Split(96, 287), True, force=False)


@pytest.mark.parametrize(
    ("split", "words"),
    [(Split(7, 20), "not an even number"), (Split(0, 20), "not an even number"), (Split(194, 20), "more than the 192"),
     (Split(16, 1), "beside the lane")],
)  # fmt: skip
def test_sizes_that_make_no_sense_are_refused(split: Split, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        budget.check_split(site(), split, True, force=False)


def test_the_best_split_has_the_smallest_finite_error() -> None:
    errors = {Split(8, 8): 3.0, Split(12, 4): 2.0, Split(14, 2): float("nan")}
    assert budget.best_split(errors) == Split(12, 4)
    assert budget.best_split({Split(12, 4): 1.0, Split(8, 8): 1.0}) == Split(8, 8)
    with pytest.raises(UnsupportedError, match="finite"):
        budget.best_split({Split(8, 8): float("inf")})


def test_split_errors_are_measured_on_held_out_text() -> None:
    layer = source(8, 4, 8, width=64)
    x = text(layer, batch=2, seed=8)
    found = budget.split_errors(
        statistics(layer, text(layer, batch=16)),
        [HeldOut(x, layer.attend(x), weights_of(x), 1.0)],
        [Split(2, 10), Split(16, 32), Split(32, 33)],
        lane=True,
    )
    values = list(found.values())
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-9 * values[0]


def test_a_token_that_is_lost_anyway_does_not_decide_the_split() -> None:
    layer = source(8, 4, 8, width=64)
    x = text(layer, batch=2, seed=8)
    weights = weights_of(x)
    splits = [Split(2, 10), Split(16, 32)]
    plain, huge = (
        budget.split_errors(statistics(layer), [HeldOut(x, layer.attend(x) + shift, weights, 1.0)], splits, lane=True)
        for shift in (0.0, torch.zeros(1, x.shape[1], 1).index_fill(1, torch.tensor([0]), 1e6))
    )
    for split in splits:
        assert huge[split] <= plain[split] + 1 / x.shape[1]
