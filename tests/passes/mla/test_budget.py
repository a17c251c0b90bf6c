"""From a fraction of the cache to sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.mla import budget
from attnopt.passes.mla.budget import HeldOut, Split
from attnopt.passes.mla.probe import Probe
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


@pytest.mark.parametrize(
    ("kv_heads", "d", "total", "sizes"),
    [(3, 64, 96, (48, 96, 192)), (3, 64, 192, (96, 192, 376)), (3, 64, 288, (144, 288, 376)), (2, 8, 16, (8, 16, 30)),
     (1, 10, 4, (4, 8)), (3, 64, 376, (184, 376)), (3, 64, 400, (200, 400))],
)  # fmt: skip
def test_sizes_to_try_are_around_the_mean_and_below_what_is_kept(
    kv_heads: int, d: int, total: int, sizes: tuple[int, ...]
) -> None:
    assert budget.sizes_to_try(site(kv_heads, d), total) == sizes


def test_numbers_go_where_they_gain_most() -> None:
    steep, flat = {8: 4.0, 16: 1.0, 32: 0.1}, {8: 0.5, 16: 0.4, 32: 0.3}
    assert budget.allocate([flat, steep], 32, 8) == (8, 24)
    assert budget.allocate([steep, steep], 32, 8) == (16, 16)
    assert budget.allocate([flat, flat, steep], 24, 8) == (8, 8, 8)
    assert budget.allocate([steep, {8: 0.0, 16: 0.0, 32: 0.0}], 64, 8) == (32, 8), "what gains nothing gets nothing"


def test_a_loss_that_rises_with_the_size_is_not_paid_for() -> None:
    assert budget.allocate([{8: 1.0, 16: 2.0, 32: 3.0}, {8: 1.0, 16: 0.5, 32: 0.2}], 40, 8) == (8, 32)
    assert budget.allocate([{8: 1.0, 16: 2.0, 32: 0.5}], 32, 8) == (32,), "a bump is passed over"


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="not finite"):
        budget.allocate([{8: 1.0, 16: float("nan")}], 16, 8)


def test_a_first_layer_that_is_left_alone_does_not_say_the_step() -> None:
    losses = {
        "second": {Split(16, 32): 0.5, Split(32, 64): 0.3, Split(64, 128): 0.2},
        "third": {Split(20, 28): 0.9, Split(40, 56): 0.3, Split(80, 112): 0.1},
    }
    sites = {"first": site(1, 10), "second": site(), "third": site()}
    found = Probe({}, {}, losses).allocated(sites, 96, lane=False)
    assert found == {"second": Split(32, 64), "third": Split(40, 56)}


_LOSSES = st.tuples(*(st.floats(1e-6, 10) for _ in range(3))).map(lambda x: dict(zip((2, 4, 8), x, strict=True)))


@given(st.lists(_LOSSES, min_size=1, max_size=4), st.integers(0, 12))
def test_no_division_on_the_hulls_is_better(losses: list[dict[int, float]], more: int) -> None:
    total = 2 * len(losses) + 2 * more
    found = budget.allocate(losses, total, 2)
    assert sum(found) <= total
    assert all(2 <= size <= 8 and size % 2 == 0 for size in found)
    hulls = [_hull(layer) for layer in losses]
    best = _least(hulls, total)
    assert sum(hull[size] for hull, size in zip(hulls, found, strict=True)) == pytest.approx(best, abs=1e-9)


def _hull(losses: dict[int, float]) -> dict[int, float]:
    """The largest convex function below the loss at 2, 4, 6 and 8, by trying all chords."""
    points = dict(budget._interpolated(losses, 2))
    found = {}
    for x in points:
        chords = [
            points[a] if a == b else points[a] + (points[b] - points[a]) * (x - a) / (b - a)
            for a in points for b in points if a <= x <= b
        ]  # fmt: skip
        found[x] = min(chords)
    return found


def _least(hulls: list[dict[int, float]], total: int) -> float:
    if not hulls:
        return 0.0
    room = total - 2 * (len(hulls) - 1)
    return min(loss + _least(hulls[1:], total - size) for size, loss in hulls[0].items() if size <= room)
