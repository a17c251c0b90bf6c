"""Comparing layers: similarities and errors are those of whole maps, permuted heads are found, groups are structure."""

from __future__ import annotations

import itertools

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt.profiles.groups import sharing_graph, sharing_groups
from attnopt.profiles.pairs.align import align_heads
from attnopt.profiles.pairs.compare import LayerComparison, jensen_shannon
from attnopt.profiles.pairs.rows import Sample
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView
from tests.profiles.opening import dense_map, random_view

HEADS, GROUPS = 6, 2


def compared(*layers: LayerView) -> dict[str, Tensor]:
    comparison = LayerComparison(len(layers), 1)
    for view in layers:
        comparison.add(view)
        comparison.end_layer()
    return comparison.result()


def layer(seed: int, **changes: object) -> LayerView:
    return random_view(HEADS, GROUPS, 40, seed=seed, **changes)  # type: ignore[arg-type]


def rows_of(view: LayerView) -> Tensor:
    return Sample.of(view).rows


def test_errors_are_those_of_the_outputs() -> None:
    a, b = layer(0), layer(1)
    found = compared(a, b)
    rows = rows_of(b)
    borrowed = dense_map(a.call) @ b.call.per_head(b.call.v)
    output = torch.einsum("nhtv,hvd->ntd", borrowed, b.w_o)
    expected = (output - b.output)[:, rows].pow(2).sum() / b.output[:, rows].pow(2).sum()
    assert float(found["map_reuse_error"][0, 0, 1]) == pytest.approx(float(expected))
    call = b.call.with_keys(a.call.k, a.call.v)
    output = torch.einsum("nhtv,hvd->ntd", dense_map(call) @ call.per_head(call.v), b.w_o)
    expected = (output - b.output)[:, rows].pow(2).sum() / b.output[:, rows].pow(2).sum()
    assert float(found["kv_reuse_error"][0, 0, 1]) == pytest.approx(float(expected))
    for name in ("map_reuse_error", "kv_reuse_error"):
        assert found[name].isnan()[0].tolist() == [[False, False], [True, False]]


def test_similarities_are_those_of_the_maps() -> None:
    a, b = layer(0), layer(1)
    found = compared(a, b)
    rows = rows_of(b)
    left, right = dense_map(a.call)[:, :, rows], dense_map(b.call)[:, :, rows]
    cosine = torch.cosine_similarity(left.flatten(), right.flatten(), dim=0)
    assert float(found["map_cosine"][0, 0, 1]) == pytest.approx(float(cosine))
    middle = (left + right) / 2

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p).sum(-1)

    divergence = (entropy(middle) - (entropy(left) + entropy(right)) / 2).mean() / torch.tensor(2.0).log()
    assert float(found["map_js"][0, 0, 1]) == pytest.approx(float(divergence), rel=1e-5)
    keys = (a.call.k - b.call.k).transpose(1, 2).flatten(2).norm(dim=-1).mean()
    values = (a.call.v - b.call.v).transpose(1, 2).flatten(2).norm(dim=-1).mean()
    assert float(found["kv_distance"][0, 0, 1]) == pytest.approx(float(keys + values) / 2)
    for name in ("map_cosine", "map_correlation", "map_js", "kv_distance"):
        torch.testing.assert_close(found[name], found[name].mT)


def test_unrelated_maps_do_not_correlate_though_their_cosine_is_high() -> None:
    sharp = Settings(pair_rows=64)
    views = [random_view(8, 8, 256, seed=seed) for seed in range(2)]
    views = [type(view)(**{**vars(view), "settings": sharp}) for view in views]
    found = compared(*views)
    assert abs(float(found["map_correlation"][0, 0, 1])) < 0.02
    sink = torch.zeros(1, 1, 1, 256, dtype=torch.float64)
    sink[..., 0] = 10.0
    with_sink = [type(v)(**{**vars(v), "call": type(v.call)(**{**vars(v.call), "bias": sink})}) for v in views]
    found = compared(*with_sink)
    assert float(found["map_cosine"][0, 0, 1]) > 0.9
    assert abs(float(found["map_correlation"][0, 0, 1])) < 0.02


def test_the_same_layer_is_found_with_its_heads_in_another_order() -> None:
    a = layer(0)
    # Groups exchanged, and heads within them.
    order = torch.tensor([5, 3, 4, 1, 0, 2])
    groups = torch.tensor([1, 0])
    call = type(a.call)(**{**vars(a.call), "q": a.call.q[:, order], "k": a.call.k[:, groups], "v": a.call.v[:, groups]})
    b = type(a)(**{**vars(a), "call": call, "w_o": a.w_o[order], "context": a.context[:, :, order]})
    found = compared(a, b)
    assert found["head_alignment"][0, 1].tolist() == order.tolist()
    assert float(found["map_correlation_aligned"][0, 0, 1]) == pytest.approx(1)
    assert float(found["map_correlation"][0, 0, 1]) < 0.9
    assert float(found["map_reuse_error_aligned"][0, 0, 1]) == pytest.approx(0, abs=1e-20)
    assert float(found["map_reuse_error"][0, 0, 1]) > 0.01
    assert float(found["map_js_aligned"][0, 0, 1]) == pytest.approx(0, abs=1e-9)


def test_rows_without_shape_do_not_make_equal_layers_unlike() -> None:
    # Rows 3 and 4 have no key, or one, beside the four sinks.
    found = compared(layer(0), layer(0))
    assert float(found["map_correlation"][0, 0, 1]) == pytest.approx(1)


def test_layers_that_see_other_keys_are_not_compared() -> None:
    others = layer(1, window=5), random_view(4, 2, 40, seed=2)
    found = compared(layer(0), *others, layer(3))
    assert int(found["map_cosine"][0].isnan().sum()) == 10
    assert not bool(found["map_cosine"][0, 0, 3].isnan())
    assert set(compared(layer(0), *others)) == {"head_redundancy"}


def test_duplicate_heads_of_a_layer_are_redundant() -> None:
    a = layer(0)
    q = a.call.q.clone()
    q[:, 1] = q[:, 0]  # same group, same keys
    found = compared(type(a)(**{**vars(a), "call": type(a.call)(**{**vars(a.call), "q": q})}))
    assert float(found["head_redundancy"][0, 0, 0, 1]) == pytest.approx(1)
    assert float(found["head_redundancy"][0, 0, 0, 2]) < 0.9


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 3), size=st.integers(1, 3), seed=st.integers(0, 99))
def test_alignment_is_the_best_that_respects_groups(groups: int, size: int, seed: int) -> None:
    heads = groups * size
    similarity = torch.rand(heads, heads, generator=torch.Generator().manual_seed(seed))
    found = align_heads(similarity, groups)
    value = float(similarity[found, torch.arange(heads)].sum())
    best = 0.0
    for order in itertools.permutations(range(groups)):
        total = 0.0
        for j, i in enumerate(order):
            tile = similarity[i * size : (i + 1) * size, j * size : (j + 1) * size]
            total += max(float(tile[list(inner), range(size)].sum()) for inner in itertools.permutations(range(size)))
        best = max(best, total)
    assert value == pytest.approx(best, rel=1e-5)
    assert sorted(found.tolist()) == list(range(heads))
    assert len({(int(s) // size, j // size) for j, s in enumerate(found)}) == groups


def test_jensen_shannon_bounds() -> None:
    a, b = torch.eye(3, dtype=torch.float64)[None, None, :1], torch.eye(3, dtype=torch.float64)[None, None, 1:2]
    assert jensen_shannon(a, a) == 0
    assert jensen_shannon(a, b) == pytest.approx(1)


def graph_of(edges: dict[tuple[int, int], float], layers: int = 8) -> networkx.Graph:
    error = torch.full((layers, layers), 1.0)
    similarity = torch.full((layers, layers), 0.9)
    for (i, j), value in edges.items():
        error[i, j] = value
    return sharing_graph(similarity, error)


def test_groups_are_runs_whose_first_serves_all() -> None:
    groups = sharing_groups(graph_of({(1, 2): 0.01, (1, 3): 0.02, (2, 3): 0.01, (5, 6): 0.05, (3, 6): 0.01}))
    assert [group.layers for group in groups] == [(1, 2, 3), (5, 6)]
    assert groups[0].source == 1
    assert groups[0].named == "1-3"
    assert groups[0].error == pytest.approx(0.02)


def test_a_chain_without_its_first_edge_is_cut() -> None:
    # 1-2 and 2-3 share, 1-3 does not: 1 cannot serve 3.
    groups = sharing_groups(graph_of({(1, 2): 0.01, (2, 3): 0.05}))
    assert [group.layers for group in groups] == [(1, 2)]
    # Cutting so that most layers share beats the best single edge.
    groups = sharing_groups(graph_of({(0, 1): 0.05, (1, 2): 0.001, (2, 3): 0.05}))
    assert [group.layers for group in groups] == [(0, 1), (2, 3)]


def test_layers_of_another_kind_do_not_come_between() -> None:
    # Even layers are shifted, as in Swin: none of them can read an odd one's maps.
    error = torch.full((6, 6), torch.nan)
    for i, j in itertools.combinations(range(6), 2):
        if (j - i) % 2 == 0:
            error[i, j] = 0.01 if i % 2 == 0 else 1.0
    (group,) = sharing_groups(sharing_graph(torch.ones(6, 6), error))
    assert group.layers == (0, 2, 4)
    assert group.named == "0, 2, 4"


def test_layers_apart_do_not_group_and_bad_edges_do_not_count() -> None:
    assert sharing_groups(graph_of({(1, 4): 0.001})) == ()
    assert sharing_groups(graph_of({(1, 2): 0.5})) == ()
