"""How large the inputs of every matrix are, as noise tells it: no text and no image is read.

An entry W_ij changes output i by W_ij x_j, in the mean square by W_ij^2 E[x_j^2]. The score of `lamp` takes all inputs
of a matrix for equally large. They are not: a norm gives each channel its own gain, and hidden channels of an MLP see
weights and biases of their own. So every layer is run once with noise in place of its residual stream, whose size the
norms take away again, and E[x_j^2] is what comes out in front of each matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

import attnopt.rewriter.ops  # noqa: F401 (registers expert_linear)
from attnopt.rewriter.probe import Probe
from attnopt.rewriter.program import Program
from attnopt.rewriter.projections import linear_map
from attnopt.rewriter.segments import Segment, assign_segments, segment_graph

_EXPERTS = torch.ops.attnopt.expert_linear.default

#: Rows of noise and, for text, tokens of each.
ROWS, TOKENS = 8, 64


def input_sizes(program: Program, seed: int = 0) -> dict[str, Tensor]:
    """Root mean squares of the inputs of matrices in attention layers, by the matrix's name.

    Args:
        program: whose.
        seed: of the noise.

    Returns:
        float64 tensors that multiply the matrix of that name: [in] for one stored as [.., out, in], [in, 1] for one
        stored as [in, out]. Matrices of a layer that no single residual stream enters are missing.
    """
    place, probe = assign_segments(program), Probe(program)
    nodes = {node.name: node for node in program.graph.nodes}
    found: dict[str, Tensor] = {}
    for segment in segment_graph(program)[1:-1]:
        operands = {
            name: operand
            for node in program.graph.nodes
            if place.get(node) == segment.index
            for name, operand in _operands(node).items()
        }
        if segment.stream_in is not None:
            found |= _sizes(probe, segment, nodes[segment.stream_in], operands, seed)
    return found


def _operands(node: fx.Node) -> dict[str, tuple[fx.Node, bool]]:
    """(operand, whether the matrix is stored as [in, out]) of a node that multiplies by a matrix, by its name."""
    if node.target is _EXPERTS:
        weight = node.args[2]
        while isinstance(weight, fx.Node) and weight.op != "get_attr":
            (weight,) = weight.all_input_nodes
        assert isinstance(weight, fx.Node)
        assert isinstance(node.args[0], fx.Node)
        return {str(weight.target): (node.args[0], False)}
    one = linear_map(node)
    return {} if one is None else {one.weight: (one.x, one.layout == "conv1d")}


def _sizes(
    probe: Probe, segment: Segment, stream: fx.Node, operands: dict[str, tuple[fx.Node, bool]], seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed * 65_537 + segment.index)
    noise = torch.randn(probe.shape(stream, ROWS, TOKENS), generator=generator)
    targets = list(dict.fromkeys(operand for operand, _ in operands.values()))
    if not targets:
        return {}
    positions = torch.arange(TOKENS)[None]
    values = probe.evaluate(targets, {stream: noise}, ROWS, TOKENS, positions, probe.program.weights.get)
    squares = {t: v.double().flatten(0, -2).pow(2).mean(0) for t, v in zip(targets, values, strict=True)}
    found = {}
    for name, (operand, turned) in operands.items():
        size = squares[operand].sqrt()
        matrix = probe.program.weights.meta(name).shape
        if bool(torch.isfinite(size).all()) and matrix[-2 if turned else -1] == len(size):
            found[name] = size[:, None] if turned else size
    return found
