"""Finds the matrices of a model by what they do: queries, keys and values (qkv), output projections (prj), MLPs (mlp).

Everything else is auxiliary and is never pruned: norms, biases, embeddings, patch merging, bias tables, the classifier.
An MLP is found as two linear maps with nothing but pointwise arithmetic between them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

import attnopt.rewriter.ops  # noqa: F401 (registers expert_linear)
from attnopt.rewriter.program import Program
from attnopt.rewriter.projections import LinearMap, linear_map
from attnopt.rewriter.segments import assign_segments
from attnopt.rewriter.site import AttentionSite

_ATEN = torch.ops.aten
_EXPERTS = torch.ops.attnopt.expert_linear.default

MODULES = ("qkv", "prj", "mlp")

_LAYOUT = {
    _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default, _ATEN.clone.default,
    _ATEN.contiguous.default, _ATEN.dropout.default, _ATEN.unsqueeze.default, _ATEN.squeeze.dim,
}  # fmt: skip
_PARTS = {_ATEN.split.Tensor, _ATEN.chunk.default, _ATEN.slice.Tensor, _ATEN.split_with_sizes.default, operator.getitem}


@dataclass(frozen=True)
class RankedLayer:
    """Matrices that are ranked against each other as one.

    Attributes:
        module: "qkv", "prj" or "mlp".
        site: fqn of the attention layer beside which they stand.
        weights: their names; a name with three axes stands for as many matrices, one for each expert.
        expert: which of these is meant; None for a plain matrix.
    """

    module: str
    site: str
    weights: tuple[str, ...]
    expert: int | None = None


@dataclass(frozen=True)
class Mlp:
    """A pair of linear maps with pointwise arithmetic between them.

    Attributes:
        site: fqn of the attention layer beside which it stands.
        into: the maps into the hidden channels (two where one is a gate).
        out: the map out of them.
        pointwise: the nodes between, in order.
    """

    site: str
    into: tuple[LinearMap, ...]
    out: LinearMap
    pointwise: tuple[fx.Node, ...]


def ranked_layers(program: Program, granularity: str) -> list[RankedLayer]:
    """Every prunable matrix.

    Args:
        program: whose.
        granularity: "fused" ranks the queries, keys and values of a layer as one matrix, as in the original Swin, where
            they are; "split" ranks each stored matrix by itself.
    """
    found: list[RankedLayer] = []
    for site in program.site_list:
        inputs = list(dict.fromkeys(_inputs(site)))
        found += _grouped("qkv", site.fqn, inputs, granularity == "fused")
        found.append(RankedLayer("prj", site.fqn, (site.o.weight,)))
    for fqn, names in _mlp_weights(program).items():
        for name in names:
            shape = program.weights.meta(name).shape
            experts = range(shape[0]) if len(shape) == 3 else [None]
            found += [RankedLayer("mlp", fqn, (name,), expert) for expert in experts]
    return found


def _grouped(module: str, fqn: str, names: list[str], together: bool) -> list[RankedLayer]:
    groups = [tuple(names)] if together and names else [(name,) for name in names]
    return [RankedLayer(module, fqn, group) for group in groups]


def _inputs(site: AttentionSite) -> list[str]:
    parts = [site.q, site.k, site.v]
    if site.latent is not None:
        parts += [site.latent.q_a, site.latent.q_b, site.latent.q, site.latent.kv_a, site.latent.kv_b]
    return [p.weight for p in parts if p is not None]


def _mlp_weights(program: Program) -> dict[str, list[str]]:
    """Names of the matrices of MLPs, by the attention layer beside which they stand."""
    found: dict[str, list[str]] = {}
    for mlp in find_mlps(program):
        found.setdefault(mlp.site, []).extend([*(m.weight for m in mlp.into), mlp.out.weight])
    place = assign_segments(program)
    for node in program.graph.nodes:
        if node.target is _EXPERTS and 1 <= place[node] <= len(program.sites):
            weight = node.args[2]
            while isinstance(weight, fx.Node) and weight.op != "get_attr":
                (weight,) = weight.all_input_nodes
            found.setdefault(program.site_list[place[node] - 1].fqn, []).append(str(weight.target))
    return {fqn: list(dict.fromkeys(names)) for fqn, names in found.items()}


def find_mlps(program: Program) -> list[Mlp]:
    """The MLPs of a program; those whose hidden channels are cut up in between have no `pointwise` nodes."""
    place = assign_segments(program)
    maps = {node: found for node in program.graph.nodes if (found := linear_map(node)) is not None}
    attention = {p.weight for site in program.site_list for p in (site.q, site.k, site.v, site.o) if p is not None}
    result = []
    for node, out in maps.items():
        segment = place.get(node, 0)
        if not 1 <= segment <= len(program.sites) or out.weight in attention:
            continue
        between = _between(out, maps)
        if between is None:
            continue
        sources, pointwise = between
        into = tuple(maps[source] for source in sources)
        if any(m.weight in attention for m in into):
            continue
        whole = all(m.out_features == out.in_features for m in into)
        result.append(Mlp(program.site_list[segment - 1].fqn, into, out, pointwise if whole else ()))
    return result


def _between(out: LinearMap, maps: dict[fx.Node, LinearMap]) -> tuple[list[fx.Node], tuple[fx.Node, ...]] | None:
    """(linear maps, nodes) that a map's operand is computed from by pointwise arithmetic; None if by anything else."""
    start = out.node.args[1] if out.node.target is _ATEN.addmm.default else out.node.args[0]
    if out.node.target is _ATEN.add.Tensor:  # a bias added after the product
        start = out.x
    sources: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [start]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node in maps:
            sources.append(node)
        elif node.op == "get_attr" or node.op == "placeholder" or not _is_pointwise(node):
            return None
        else:
            stack += [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | tuple | list)]
    order = {node: i for i, node in enumerate(out.node.graph.nodes)}
    inner = sorted((n for n in seen if n not in sources), key=order.__getitem__)
    return (sorted(sources, key=order.__getitem__), tuple(inner)) if sources else None


def _is_pointwise(node: fx.Node) -> bool:
    if node.target in _LAYOUT or node.target in _PARTS:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
