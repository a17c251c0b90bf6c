"""Finds, in a graph, what a layer's output projection reads, and whether its result goes straight into the stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from attnopt.rewriter.program import Program, walk_back
from attnopt.rewriter.segments import Segment

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class OutputNodes:
    """Names of the nodes around an output projection.

    Attributes:
        context: what it reads, the heads side by side: H d_v numbers per token.
        gates: gates of the routed units [B, S, units], None without a fill for idle ones.
        added: whether its result is added to the residual stream as it is, so that an error of the stream can be made
            up for in it. Norms that come after attention forbid that.
    """

    context: str
    gates: str | None
    added: bool


def output_nodes(program: Program, segment: Segment) -> OutputNodes:
    """Find them.

    Args:
        program: the program.
        segment: the layer's part of it.
    """
    site = segment.site
    assert site is not None
    nodes = {node.name: node for node in program.graph.nodes}
    context = _reader(nodes[site.nodes.output], site.o.weight)
    gates = None
    if site.route is not None and site.route.fill is not None:
        idle = _reader(nodes[site.nodes.output], site.route.fill)
        assert isinstance(idle.args[0], fx.Node)
        gates = idle.args[0].name  # idle = 1 - gates
    return OutputNodes(context.name, gates, _is_added(nodes[site.nodes.output], segment.stream_in))


def _reader(output: fx.Node, weight: str) -> fx.Node:
    """The activation that a stored matrix is multiplied with, on the way to a layer's output."""
    for node in walk_back(output, through_sizes=False):
        if node.target in (_ATEN.linear.default, _ATEN.mm.default, _ATEN.matmul.default):
            x, matrix = node.args[:2]
        elif node.target is _ATEN.addmm.default:
            x, matrix = node.args[1:3]
        else:
            continue
        while isinstance(matrix, fx.Node) and matrix.op != "get_attr" and matrix.all_input_nodes:
            matrix = matrix.all_input_nodes[0]
        if isinstance(matrix, fx.Node) and matrix.op == "get_attr" and matrix.target == weight:
            assert isinstance(x, fx.Node)
            return x
    raise LookupError(f"nothing reads {weight}")


_LAYOUT = {
    _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default, _ATEN.clone.default,
    _ATEN.contiguous.default, _ATEN.dropout.default,
}  # fmt: skip


def _is_added(output: fx.Node, stream: str | None) -> bool:
    node = output
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is _ATEN.add.Tensor:
            other = user.args[1] if user.args[0] is node else user.args[0]
            return isinstance(other, fx.Node) and other.name == stream
        if user.target not in _LAYOUT:
            return False
        node = user
    return False
