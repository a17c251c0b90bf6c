"""Streamed statistics equal the dense formulas, however the text is cut, and say when they are useless."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.passes.common.stream import token_weights
from attnopt.passes.mla.source_layer import SourceLayer
from attnopt.passes.mla.statistics import LayerStatistics, Moment, stride_for
from tests.passes.mla.layers import apart, relative, source, statistics, text, weights_of


def dense(layer: SourceLayer, x: Tensor, weights: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """The sums by their definition, for one window, with everything materialised."""
    plain, keys, values = layer.queries(x)[0], layer.keys(x), layer.values(x)
    u = layer.encoder_input(x, keys, values)[0]
    group = layer.group_of
    q, k, v = layer.rotate(plain[None], positions)[0], layer.rotate(keys, positions)[0][group], values[0][group]
    n = x.shape[1]
    logits = torch.einsum("hid,hjd->hij", q, k) * layer.scale
    hidden = torch.ones(n, n).triu(1).bool()
    a = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    o = torch.einsum("hij,hjv->hiv", a, v)
    effect = torch.einsum("Dhv,hijv->hijD", layer.w_o, v[:, None] - o[:, :, None]).pow(2).sum(-1)
    omega = weights[0][:, None] * a**2 * effect
    delta = (positions[0][None, :] - positions[0][:, None])[..., None] * layer.inv_freq
    per_head = torch.einsum("hij,jp,jq->hpq", omega, u, u)
    averages = torch.einsum("hij,jp->hip", a, u)
    groups = [group == g for g in range(layer.groups)]
    return {
        "queries": torch.einsum("hij,hid,hie->hde", omega, plain, plain),
        "phase": torch.einsum("hij,ijf->hf", omega.to(torch.complex128), torch.exp(1j * delta)),
        "keys": torch.stack([per_head[m].sum(0) for m in groups]),
        "key_weight": torch.stack([omega[m].sum() for m in groups]),
        "values": torch.stack([torch.einsum("hip,hiq,i->pq", averages[m], averages[m], weights[0]) for m in groups]),
        "value_first": torch.stack([torch.einsum("hip,i->p", averages[m], weights[0]) for m in groups]),
    }


@pytest.mark.parametrize("gap", [0, 31])
@pytest.mark.parametrize("form", ["outputs", "inputs", "bias", "norms"])
def test_streamed_sums_are_the_dense_ones(form: str, gap: int) -> None:
    layer = source(4, 2, 6, d_v=4, width=40 if form == "outputs" else 12, bias=form == "bias", norms=form == "norms")
    assert layer.by_outputs == (form != "inputs")
    x = text(layer, batch=1, length=20)
    weights = weights_of(x).double()
    found = LayerStatistics(layer, stride=1)
    positions = apart(1, 20, gap)
    found.update(x, weights, positions if gap else None)
    expected = dense(layer, x, weights, positions)
    assert relative(found.queries, expected["queries"]) < 1e-6
    assert relative(found.phase, expected["phase"]) < 1e-6
    assert relative(found.keys.second, expected["keys"]) < 1e-6
    assert relative(found.keys.weight, expected["key_weight"]) < 1e-6
    assert relative(found.values.second, expected["values"]) < 1e-6
    assert relative(found.values.first, expected["value_first"]) < 1e-6


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 5), stride=st.integers(1, 7))
def test_cutting_the_text_into_pieces_changes_nothing(cut: int, stride: int) -> None:
    layer = source()
    x = text(layer)
    whole, pieces = statistics(layer, x, stride), LayerStatistics(layer, stride)
    for part, weights in zip((x[:cut], x[cut:]), (weights_of(x)[:cut], weights_of(x)[cut:]), strict=True):
        pieces.update(part, weights)
    assert torch.equal(whole.queries, pieces.queries)
    assert torch.equal(whole.keys.second, pieces.keys.second)
    assert torch.equal(whole.values.second, pieces.values.second)
    assert torch.equal(whole.phase, pieces.phase)


def test_looking_at_every_fourth_query_estimates_the_same() -> None:
    layer = source(width=32)
    x = text(layer, batch=24, length=64)
    full, some = statistics(layer, x), statistics(layer, x, stride=4)
    assert relative(some.values.covariance(), full.values.covariance()) < 0.25
    assert relative(some.queries, full.queries) < 0.35
    assert float(some.values.weight.sum()) == pytest.approx(float(full.values.weight.sum()), rel=0.05)


def test_one_pooled_moment_is_the_sum_of_the_groups() -> None:
    layer = source()
    own, pooled = statistics(layer), statistics(layer, pooled=True)
    assert pooled.keys.second.shape[0] == 1
    assert relative(pooled.keys.second[0], own.keys.second.sum(0)) < 1e-9
    assert relative(pooled.values.first[0], own.values.first.sum(0)) < 1e-9


def test_moment_gives_mean_and_covariance() -> None:
    vectors = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    moment = Moment(2, 3)
    moment.add(1, vectors[:20], weights[:20])
    moment.add(1, vectors[20:], weights[20:])
    mean = (weights[:, None] * vectors).sum(0) / weights.sum()
    centred = vectors - mean
    assert relative(moment.mean()[1], mean) < 1e-12
    assert relative(moment.covariance()[1], (weights[:, None] * centred).T @ centred / weights.sum()) < 1e-10
    assert float(moment.weight[0]) == 0
    assert bool(torch.isfinite(moment.covariance()[0]).all())


def test_token_weights_divide_by_the_size_of_the_stream() -> None:
    hidden = torch.ones(1, 16, 4) * torch.arange(1, 17)[None, :, None]
    assert torch.allclose(token_weights(hidden)[0], 1 / torch.arange(1, 17).float() ** 2)


@pytest.mark.parametrize("pooled", [False, True])
def test_windows_of_one_token_count_like_any_others(pooled: bool) -> None:
    layer = source()
    x = text(layer, batch=6, length=1)
    at_once, generic = LayerStatistics(layer, 1, pooled), LayerStatistics(layer, 1, pooled)
    at_once.update(x, weights_of(x))
    for row in range(6):
        window = generic._attend(x[row : row + 1], weights_of(x)[row], torch.zeros(1, 1))
        generic._add_keys(window)
        generic._add_values(window)
        generic.input_mean += (weights_of(x)[row].to(x.dtype) @ window.inputs).double()
    assert float(generic.keys.weight.sum()) == pytest.approx(0, abs=1e-12)
    assert relative(at_once.values.second, generic.values.second) < 1e-10
    assert relative(at_once.values.first, generic.values.first) < 1e-10
    assert relative(at_once.values.weight, generic.values.weight) < 1e-6
    assert relative(at_once.input_mean, generic.input_mean) < 1e-10
    assert at_once.tokens == 0  # they say nothing about keys


def test_text_that_is_too_short_or_not_finite_is_refused() -> None:
    layer = source()
    short = LayerStatistics(layer)
    x = text(layer, batch=1, length=4)
    short.update(x, weights_of(x))
    with pytest.raises(UnsupportedError, match="fewer than a head has channels"):
        short.check()
    broken = LayerStatistics(layer)
    x = text(layer)
    x[0, 3, 0] = torch.nan
    broken.update(x, weights_of(x))
    with pytest.raises(UnsupportedError, match="not finite"):
        broken.check()


def test_stride_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        LayerStatistics(source(), stride=0)


@pytest.mark.parametrize(
    ("windows", "length", "stride"),
    [(1, 16, 1), (16, 512, 2), (32, 512, 4), (64, 512, 8), (4096, 512, 8), (2, 512, 2), (2, 1024, 4), (1, 8192, 8)],
)
def test_short_text_is_looked_at_more_closely(windows: int, length: int, stride: int) -> None:
    assert stride_for(torch.zeros(windows, length)) == stride
