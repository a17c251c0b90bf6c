"""Streaming results equal the dense formula, in float64, block by block of any size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnopt.profiles.metric import Metric
from attnopt.profiles.metrics.contribution import Contribution
from attnopt.profiles.metrics.entropy import Entropy
from attnopt.profiles.metrics.lamp import lamp, lamp_scores
from attnopt.profiles.metrics.mass import Mass
from attnopt.profiles.metrics.patterns import PATTERNS, RetainedMass, vertical_slash
from attnopt.profiles.metrics.qnorm import QueryNorm
from attnopt.profiles.metrics.retrieval import copying, make_needles
from attnopt.profiles.metrics.streaming import Streaming
from attnopt.profiles.metrics.thumbnail import Thumbnail
from attnopt.profiles.view import LayerView
from tests import models
from tests.profiles.opening import SETTINGS, blocks, dense_map, random_view

VIEWS = {
    "causal": {},
    "window": {"window": 20},
    "sinks": {"sinks": True},
    "softcap": {"softcap": 1.5},
    "both": {"causal": False},
    "image": {"causal": False, "image": True},
    "windows": {"causal": False, "image": True, "windows": 3, "length": 16},
    "long": {"length": 150, "recent": 16},
}


@pytest.fixture(params=list(VIEWS))
def view(request: pytest.FixtureRequest) -> LayerView:
    return random_view(**VIEWS[request.param])


def measured(kind: type[Metric], view: LayerView, step: int = 64) -> dict[str, Tensor]:
    metric = kind(view)
    for block in blocks(view, step):
        metric.update(block)
    found = metric.result()
    described = kind.describe(SETTINGS, view.bins)
    assert set(found) <= set(described)
    for name, value in found.items():
        assert value.ndim == len(described[name].axes) - 1, name
    return found


def counted(view: LayerView, values: Tensor) -> Tensor:
    """Mean over windows and counted rows of [N, H, T, ...]."""
    return values[:, :, view.skip :].mean((0, 2))


def distances(view: LayerView) -> Tensor:
    length = view.geometry.length
    return view.geometry.distances(torch.arange(length), length)


def test_entropy(view: LayerView) -> None:
    weights = dense_map(view.call)
    share = weights / weights.sum(-1, keepdim=True)
    entropy = -(share * torch.where(share > 0, share, 1.0).log()).sum(-1)
    length = view.geometry.length
    seen = torch.arange(length) + 1 if view.call.causal else torch.full((length,), length)
    if view.call.window:
        seen = seen.clamp(max=view.call.window)
    expected = counted(view, entropy / seen.clamp(min=2).double().log())
    found = measured(Entropy, view)["entropy"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_mass(view: LayerView) -> None:
    weights, apart = dense_map(view.call), distances(view)
    columns = torch.arange(view.geometry.length)
    found = measured(Mass, view)
    sink = counted(view, weights[..., : view.sink].sum(-1))
    torch.testing.assert_close(found["sink_mass"], sink)
    for place, window in enumerate(SETTINGS.windows):
        near = counted(view, (weights * (apart < window)).sum(-1))
        torch.testing.assert_close(found["local_mass"][:, place], near)
    seen = (apart < view.recent) | (columns < view.sink)
    torch.testing.assert_close(found["distant_mass"], counted(view, (weights * ~seen).sum(-1)))
    torch.testing.assert_close(found["distance_histogram"].sum(-1), counted(view, weights.sum(-1)))


def test_retained_mass(view: LayerView) -> None:
    weights, apart = dense_map(view.call), distances(view)
    length = view.geometry.length
    found = measured(RetainedMass, view)
    columns, slashes = vertical_slash(view)
    at = torch.arange(length)
    difference = at[:, None] - at
    by_diagonal = slashes[..., difference + length]
    kept = {
        "dense": torch.ones(length, length),
        "sink_recent": ((apart < view.recent) | (at < view.sink)).double(),
        "vertical_slash": torch.maximum(columns[:, :, None].expand_as(weights), by_diagonal),
    }
    for name, mask in kept.items():
        rows = (weights * mask).sum(-1)[:, :, view.skip :]
        place = PATTERNS.index(name)
        torch.testing.assert_close(found["retained_mass"][:, place], rows.mean((0, 2)), msg=name)
        torch.testing.assert_close(found["retained_mass_min"][:, place], rows.amin((0, 2)), msg=name)
    assert int(columns[0, 0].sum()) + int(slashes[0, 0].sum()) == view.budget
    assert bool((found["retained_mass"] <= 1 + 1e-9).all())
    assert bool((found["retained_mass_p05"] >= found["retained_mass_min"]).all())


def test_block_topk_keeps_the_best_tiles() -> None:
    view = random_view(length=150, recent=64)  # 68 keys: one tile of 64
    weights = torch.nn.functional.pad(dense_map(view.call), (0, 42, 0, 42))
    tiles = weights.unflatten(3, (3, 64)).unflatten(2, (3, 64)).sum((3, 5))
    best = tiles.argmax(-1).repeat_interleave(64, 2)
    mask = torch.nn.functional.one_hot(best, 3).repeat_interleave(64, 3)
    expected = (weights * mask).sum(-1)[:, :, view.skip : 150].mean((0, 2))
    found = measured(RetainedMass, view)["retained_mass"][:, PATTERNS.index("block_topk")]
    torch.testing.assert_close(found, expected)


def test_dropping_mass_moves_an_output_by_no_more_than_the_bound() -> None:
    view = random_view()
    weights, v = dense_map(view.call), view.call.per_head(view.call.v)
    seen = (distances(view) < view.recent) | (torch.arange(50) < view.sink)
    kept = weights * seen
    mass = kept.sum(-1, keepdim=True)
    change = (kept / mass @ v - weights @ v).norm(dim=-1)
    bound = 2 * (1 - mass[..., 0]) * v.norm(dim=-1).amax(-1, keepdim=True)
    assert bool((change <= bound + 1e-12).all())


@pytest.mark.parametrize("name", ["causal", "window", "sinks", "softcap", "long"])
@pytest.mark.parametrize("step", [64, 13])
def test_streaming(name: str, step: int) -> None:
    view = random_view(**VIEWS[name])
    call, length = view.call, view.geometry.length
    hidden = ~((distances(view) < view.recent) | (torch.arange(length) < view.sink))
    bias = torch.where(hidden, -torch.inf, 0.0).double()[None, None]
    streamed = dense_map(type(call)(**{**vars(call), "bias": bias})) @ call.per_head(call.v)
    change = (streamed.transpose(1, 2) - view.context).unflatten(2, (call.groups, -1))
    w_o = view.w_o.unflatten(0, (call.groups, -1))
    by_group = torch.einsum("ntkgv,kgvd->ktd", change, w_o).pow(2).sum((1, 2))
    found = measured(Streaming, view, step)["streaming_error"]
    torch.testing.assert_close(found, by_group / view.output.pow(2).sum(), rtol=1e-8, atol=1e-14)


def test_streaming_heads_that_see_everything_lose_nothing() -> None:
    assert float(measured(Streaming, random_view(recent=64))["streaming_error"].max()) < 1e-25


def test_contribution(view: LayerView) -> None:
    added = torch.einsum("nthv,hvd->nthd", view.context, view.w_o).flatten(0, 1)
    found = measured(Contribution, view)
    sizes = added.norm(dim=-1)
    torch.testing.assert_close(found["contribution"], sizes.mean(0))
    torch.testing.assert_close(found["contribution_variance"], sizes.var(0, unbiased=False))
    grouped = added.unflatten(1, (view.call.groups, -1)).sum(2).norm(dim=-1)
    torch.testing.assert_close(found["kv_contribution"], grouped.mean(0))
    torch.testing.assert_close(found["contribution_cosine"].diagonal(), torch.ones(4, dtype=torch.float64))


def test_query_norm(view: LayerView) -> None:
    norms = view.call.q.norm(dim=-1)
    torch.testing.assert_close(measured(QueryNorm, view)["q_norm"], norms.mean((0, 2)))


def test_thumbnail() -> None:
    view = random_view(length=96)
    found = measured(Thumbnail, view, 64)["map_thumbnail"]
    expected = dense_map(view.call)[0].unflatten(2, (48, 2)).sum(3).unflatten(1, (48, 2)).mean(2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_lamp_by_hand() -> None:
    # Norms 4, 9, 9, 1: the largest score their share of the equal ones, the smallest of all.
    found = lamp(torch.tensor([4.0, 9.0, 9.0, 1.0]))
    torch.testing.assert_close(found, torch.tensor([4 / 22, 0.5, 0.5, 1 / 23]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_lamp_of_a_model_reads_the_right_rows(family: str) -> None:
    program = models.captured(family)[1]
    site = program.site_list[0]
    assert site.q is not None and site.k is not None and site.v is not None
    score = lamp_scores(site, program.weights.get)
    assert score["lamp"].shape == (site.heads,)
    assert score["kv_lamp"].shape == (site.kv_heads,)
    head = 1

    def without(projection: object, start: int, stop: int, columns: bool) -> dict[str, Tensor]:
        matrix = program.weights.get(projection.weight).clone()  # type: ignore[attr-defined]
        flipped = (projection.layout == "conv1d") != columns  # type: ignore[attr-defined]
        rows = [r for a, b in projection.rows for r in range(a, b)][start:stop]  # type: ignore[attr-defined]
        if columns:
            rows = list(range(start, stop))
        if flipped:
            matrix[:, rows] = 0
        else:
            matrix[rows] = 0
        return {projection.weight: matrix}  # type: ignore[attr-defined]

    changed = without(site.o, head * site.d_v, (head + 1) * site.d_v, True)
    changed |= without(site.q, head * site.d_qk, (head + 1) * site.d_qk, False)
    if site.heads == site.kv_heads and site.q.weight != site.k.weight:
        changed |= without(site.k, head * site.d_qk, (head + 1) * site.d_qk, False)
        changed |= without(site.v, head * site.d_v, (head + 1) * site.d_v, False)
    again = lamp_scores(site, lambda name: changed.get(name, program.weights.get(name)))
    assert float(again["lamp"][head]) < float(score["lamp"].min()) + 1e-9
    if site.heads != site.kv_heads or site.q.weight != site.k.weight:
        assert float(again["lamp"][head]) == 0


def test_a_head_that_copies_scores_one_and_others_do_not() -> None:
    needle = make_needles(200, 1, 8, 60, seed=3)[0]
    ids = needle.ids[0]
    one_hot = torch.nn.functional.one_hot(ids, 200).double()
    # Keys hold the token before, queries the token: the head looks at what followed the token last time.
    before = torch.cat([torch.zeros(1, 200, dtype=torch.float64), one_hot[:-1]])
    q = torch.stack([one_hot, torch.ones_like(one_hot)])[None] * 50
    k = torch.stack([before, torch.ones_like(before)])[None]
    view = random_view(2, 2, 60, q=q, k=k, v=torch.ones(1, 2, 60, 5, dtype=torch.float64), scale=1.0)
    found = copying(view, needle)
    assert found["retrieval"].tolist() == [1.0, 0.0]
    assert float(found["copy_mass"][0]) > 0.99
    assert float(found["copy_mass"][1]) < 0.05


def test_needles() -> None:
    needles = make_needles(100, 5, 6, 40, seed=0)
    again = make_needles(100, 5, 6, 40, seed=0)
    for needle, same in zip(needles, again, strict=True):
        ids = needle.ids[0]
        assert torch.equal(ids, same.ids[0])
        assert len(ids) == 40
        # x_{k+1} follows x_k where it is looked at, and the tokens are nowhere else.
        assert torch.equal(ids[needle.queries + 1], ids[needle.targets])
        assert all(int((ids == token).sum()) == 2 for token in ids[needle.targets])
    assert len({int(needle.targets[0]) for needle in needles}) > 1


def test_names_say_what_they_are() -> None:
    for kind in (Entropy, Mass, RetainedMass, Streaming, Contribution, QueryNorm, Thumbnail):
        for name, info in kind.describe(SETTINGS, 8).items():
            assert info.help and info.source and math.isfinite(info.version), name
