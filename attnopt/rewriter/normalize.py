"""Turns every spelling of attention that capture can meet into the dialect's one op, or a relative that says more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attnopt.rewriter import anchor as _anchor  # noqa: F401 - registers requested_mask
from attnopt.rewriter.gates import find_gates
from attnopt.rewriter.program import walk_back
from attnopt.rewriter.site import AttentionSite

aten = torch.ops.aten
ATTENTION = torch.ops.attnopt.attention.default
SHARED = torch.ops.attnopt.shared_attention.default
ROUTED = torch.ops.attnopt.routed_attention.default
REQUESTED = torch.ops.attnopt.requested_mask.default

_SDPA = aten.scaled_dot_product_attention.default
_SDPA_ARGS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_SDPA_DEFAULTS: Mapping[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def normalize(graph: fx.Graph) -> None:
    """Rewrite `scaled_dot_product_attention` into `attnopt::attention`, in place, and number the layers.

    The op's result is [B, S, H, dv] where SDPA's is [B, H, S, dv]; a transpose behind SDPA is taken into it.
    """
    layer = 0
    for node in list(graph.nodes):
        if node.target is ATTENTION:
            node.update_arg(10, layer)
            layer += 1
        elif node.target is _SDPA and _representable(_arguments(node)):
            _rewrite(graph, node, layer)
            layer += 1
    graph.eliminate_dead_code()


def specialize(graph: fx.Graph, sites: Iterable[AttentionSite]) -> list[AttentionSite]:
    """Give layers that read another's map, or switch their heads, the ops for that, in place.

    Args:
        graph: normalised.
        sites: recognised in it, in order.

    Returns:
        the sites, with the new nodes.
    """
    nodes = {node.name: node for node in graph.nodes}
    result: dict[str, AttentionSite] = {}
    for site in sites:
        anchor, share = nodes[site.nodes.attention], site.share
        if share is not None and share.edge == "map":
            owner = result[share.source].layer
            new = _replaced(graph, anchor, anchor, SHARED, (*anchor.args[:10], owner, site.layer))
        elif site.route is not None and site.latent is None:
            gates = find_gates(anchor)
            assert gates is not None
            args = (*anchor.args[:3], gates.heads, *anchor.args[3:10], site.layer)
            new = _replaced(graph, gates.result, anchor, ROUTED, args)
        else:
            new = anchor
        result[site.fqn] = replace(site, nodes=replace(site.nodes, attention=new.name))
    graph.eliminate_dead_code()
    return list(result.values())


def _replaced(graph: fx.Graph, node: fx.Node, anchor: fx.Node, op: Any, args: tuple[Any, ...]) -> fx.Node:
    """A call of an op in the place of a node, as part of the module that the anchor is part of."""
    with graph.inserting_before(node):
        new = graph.create_node("call_function", op, args, name=op.name().split("::")[1].split(".")[0])
    new.meta = dict(anchor.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _arguments(node: fx.Node) -> dict[str, Any]:
    return {**_SDPA_DEFAULTS, **dict(zip(_SDPA_ARGS, node.args, strict=False)), **node.kwargs}


def _representable(call: dict[str, Any]) -> bool:
    if call["dropout_p"]:
        return False
    mask = call["attn_mask"]
    if mask is None or mask.target is REQUESTED:
        return True
    # A mask the model built or changed itself: what it hides would have to be guessed.
    return mask.meta["val"].dtype != torch.bool and not any(n.target is REQUESTED for n in walk_back(mask))


def _rewrite(graph: fx.Graph, node: fx.Node, layer: int) -> None:
    call = _arguments(node)
    query, key, value = call["query"], call["key"], call["value"]
    scale = call["scale"] if call["scale"] is not None else float(query.meta["val"].shape[-1]) ** -0.5
    bias, causal, window = call["attn_mask"], bool(call["is_causal"]), 0
    if bias is not None and bias.target is REQUESTED:
        causal, window, bias = True, bias.args[3], None
    with graph.inserting_before(node):
        key, value = _unrepeat(graph, key), _unrepeat(graph, value)
        anchor = graph.call_function(
            ATTENTION, (query, key, value, bias, None, scale, causal, window, 0.0, None, layer)
        )
        back = graph.call_function(aten.transpose.int, (anchor, 1, 2))
    anchor.meta, back.meta = dict(node.meta), dict(node.meta)
    anchor.meta["val"] = node.meta["val"].transpose(1, 2)
    for user in list(node.users):
        swaps = user.target is aten.transpose.int and set(user.args[1:]) == {1, 2}
        if swaps or (user.target is aten.permute.default and list(user.args[1:]) == [[0, 2, 1, 3]]):
            user.replace_all_uses_with(anchor)
            graph.erase_node(user)
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _unrepeat(graph: fx.Graph, operand: fx.Node) -> fx.Node:
    """The operand with one of each run of equal heads, if it was made by repeating heads; else the operand."""
    repeats = _repeats(operand)
    if repeats == 1:
        return operand
    heads = int(operand.meta["val"].shape[1])
    node = graph.call_function(aten.slice.Tensor, (operand, 1, 0, heads, repeats))
    node.meta = dict(operand.meta)
    node.meta["val"] = operand.meta["val"][:, ::repeats]
    return node


def _repeats(operand: fx.Node) -> int:
    """How often each head is repeated: look for an expansion of a dimension of size 1 on the way to the operand."""
    node = operand
    while node.op == "call_function" and isinstance(node.args[0] if node.args else None, fx.Node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target is aten.expand.default:
            before, after = source.meta["val"].shape, node.meta["val"].shape
            grown = [int(b) for a, b in zip(before, after, strict=True) if isinstance(a, int) and a == 1 and b != 1]
            return grown[0] if len(grown) == 1 and isinstance(grown[0], int) else 1
        node = source
        if torch.ops.aten.linear.default is node.target:
            break
    return 1
