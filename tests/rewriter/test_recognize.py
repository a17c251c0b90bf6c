"""Recognition measures the graph: what it cannot represent becomes a Miss that names the reason and the nodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from attnopt.rewriter.paths import _unwrap
from attnopt.rewriter.program import Program
from attnopt.rewriter.recognize import recognize
from attnopt.rewriter.weights import Inline
from tests import models

aten = torch.ops.aten


def insert(program: Program, place: int, make: Callable[[fx.Graph, fx.Node], fx.Node]) -> Program:
    """A copy in which operand `place` of the first attention op is replaced by make(graph, operand)."""
    clone = program.clone()
    anchor = clone.node(clone.site_list[0].nodes.attention)
    operand = anchor.args[place]
    assert isinstance(operand, fx.Node)
    with clone.graph.inserting_before(anchor):
        made = make(clone.graph, operand)
    made.meta = dict(operand.meta)
    anchor.update_arg(place, made)
    return clone


def first_miss(program: Program) -> str:
    sites, misses = recognize(program)
    assert len(misses) == 1
    assert len(sites) == len(program.sites) - 1
    assert misses[0].nodes
    assert set(misses[0].nodes) <= {n.name for n in program.graph.nodes}
    return misses[0].reason


@pytest.fixture
def program() -> Program:
    return models.captured("llama")[1]


def test_recognizing_again_gives_the_same_sites(program: Program) -> None:
    sites, misses = recognize(program.replace(sites={}))
    assert tuple(sites) == program.site_list
    assert misses == []


def test_a_nonlinearity_on_the_query_is_a_miss(program: Program) -> None:
    changed = insert(program, 0, lambda g, n: g.call_function(aten.tanh.default, (n,)))
    assert "not a choice of projection channels" in first_miss(changed)


def test_a_scaled_value_is_a_miss(program: Program) -> None:
    changed = insert(program, 2, lambda g, n: g.call_function(aten.mul.Tensor, (n, 2.0)))
    assert "value is scaled" in first_miss(changed)


def test_a_scaled_query_goes_into_the_scale(program: Program) -> None:
    changed = insert(program, 0, lambda g, n: g.call_function(aten.mul.Tensor, (n, 0.5)))
    sites, misses = recognize(changed)
    assert not misses
    assert sites[0].scale == pytest.approx(0.5 * program.site_list[0].scale)
    assert sites[0].rope == program.site_list[0].rope


def test_reordered_heads_are_seen_in_the_rows(program: Program) -> None:
    changed = insert(program, 0, lambda g, n: g.call_function(aten.flip.default, (n, [1])))
    sites, _ = recognize(changed)
    assert sites[0].q is not None
    assert sites[0].q.rows == ((24, 32), (16, 24), (8, 16), (0, 8))


def test_reordered_dims_of_the_value_are_a_miss(program: Program) -> None:
    changed = insert(program, 2, lambda g, n: g.call_function(aten.flip.default, (n, [3])))
    assert "value is scaled or reordered" in first_miss(changed)


def test_a_learned_scale_is_a_miss(program: Program) -> None:
    def scaled(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(aten.mul.Tensor, (node, graph.get_attr("learned.scale")))

    changed = insert(program, 1, scaled)
    weights = changed.weights.with_values({"learned.scale": Inline(torch.ones(1))})
    assert "learned.scale" in first_miss(changed.replace(weights=weights))


def test_mixing_tokens_is_a_miss(program: Program) -> None:
    changed = insert(program, 1, lambda g, n: g.call_function(aten.cumsum.default, (n, 2)))
    assert "depends on the other tokens" in first_miss(changed)


def test_rotating_only_the_query_is_a_miss(program: Program) -> None:
    clone = program.clone()
    anchor = clone.node(clone.site_list[0].nodes.attention)
    value = anchor.args[2]
    anchor.update_arg(1, value)
    assert "only one of query and key is rotated" in first_miss(clone)


def test_a_gate_before_the_output_projection_is_a_miss(program: Program) -> None:
    clone = program.clone()
    anchor = clone.node(clone.site_list[0].nodes.attention)
    users = list(anchor.users)
    with clone.graph.inserting_after(anchor):
        gated = clone.graph.call_function(aten.sigmoid.default, (anchor,))
    gated.meta = dict(anchor.meta)
    for user in users:
        user.replace_input_with(anchor, gated)
    assert "acts between the attention output and the output projection" in first_miss(clone)


def test_queries_from_another_tensor_are_a_miss(program: Program) -> None:
    clone = program.clone()
    site = clone.site_list[0]
    assert site.q is not None
    (projection,) = (
        n for n in clone.graph.nodes if n.target is aten.linear.default and n.args[1].target == site.q.weight
    )
    stream = clone.node(site.nodes.input)
    with clone.graph.inserting_before(projection):
        other = clone.graph.call_function(aten.tanh.default, (stream,))
    other.meta = dict(stream.meta)
    projection.update_arg(0, other)
    assert "cross-attention" in first_miss(clone)


def test_a_bias_of_unknown_origin_is_a_miss(program: Program) -> None:
    clone = program.clone()
    anchor = clone.node(clone.site_list[0].nodes.attention)
    q = anchor.args[0]
    assert isinstance(q, fx.Node)
    with clone.graph.inserting_before(anchor):
        bias = clone.graph.call_function(aten.amax.default, (q, [-1], True))
    bias.meta = dict(q.meta)
    anchor.update_arg(3, bias)
    assert "bias of unknown origin" in first_miss(clone)


def test_a_norm_with_another_formula_is_a_miss() -> None:
    clone = models.captured("qwen3")[1].clone()
    anchor = clone.node(clone.site_list[0].nodes.attention)
    queue, seen = [anchor.args[0]], set()
    while queue:
        node = queue.pop(0)
        assert isinstance(node, fx.Node)
        if node.target is aten.pow.Tensor_Scalar:
            node.update_arg(1, 4)
            break
        queue += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    assert "is not the rms norm it looks like" in first_miss(clone)


def test_frequencies_are_measured_where_no_table_is_stored() -> None:
    """Angles at powers of two give each frequency, however slow, to float precision."""
    table = torch.tensor([1.0, 0.3, 1e-2, 3e-4, 2.5e-6], dtype=torch.float64)
    positions = torch.tensor([0.0, *(2.0**k for k in range(18))], dtype=torch.float64)
    turns = positions[:, None] * table
    angle = torch.atan2(turns.sin(), turns.cos())
    torch.testing.assert_close(torch.tensor(_unwrap(angle), dtype=torch.float64), table, rtol=1e-9, atol=0)


def test_frequencies_are_the_stored_ones_where_a_table_is_stored(program: Program) -> None:
    rope = program.site_list[0].rope
    assert rope is not None
    assert rope.inv_freq == tuple(program.weights.get("model.rotary_emb.inv_freq").tolist())
