"""Finds attention calls in a Dynamo graph, and the un-repeated keys and values behind them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

SDPA = torch.nn.functional.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS: Mapping[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
#: Names of functions that compute attention in other ways; graphs that hold one are told about.
_OTHERS = ("flex_attention", "baddbmm", "multi_head_attention_forward")


@dataclass(frozen=True)
class Call:
    """One attention call.

    Attributes:
        node: the call.
        layer: place in the order of calls.
        q, k, v: operands, heads of k and v un-repeated where they were repeated.
        mask: node or None. causal, scale: as the call has them.
        heads, groups: numbers of heads.
        dropout: probability.
    """

    node: fx.Node
    layer: int
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float
    heads: int
    groups: int
    dropout: float


def find_calls(graph: fx.Graph) -> tuple[list[Call], list[tuple[fx.Node, str]]]:
    """Attention calls in order, and those that cannot be read, with the reason."""
    calls: list[Call] = []
    odd: list[tuple[fx.Node, str]] = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not SDPA:
            continue
        found = _read(node, len(calls) + len(odd))
        if isinstance(found, str):
            odd.append((node, found))
        else:
            calls.append(found)
    return calls, odd


def nearest_miss(graph: fx.Graph) -> str:
    """What comes closest to attention in a graph that holds none."""
    names = [
        str(getattr(n.target, "__name__", n.target)) for n in graph.nodes if n.op in ("call_function", "call_method")
    ]
    for other in _OTHERS:
        if other in names:
            return f"it calls {other}, which attnopt does not read"
    if "softmax" in names:
        return "it calls softmax, but not scaled_dot_product_attention; use attn_implementation='sdpa'"
    return "it holds no attention"


def value_of(node: Any) -> torch.Tensor | None:
    """The fake tensor that stands for a node's value."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _read(node: fx.Node, layer: int) -> Call | str:
    given = {**_DEFAULTS, **dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    q, k, v = given["query"], given["key"], given["value"]
    values = [value_of(x) for x in (q, k, v)]
    if any(value is None or value.ndim != 4 for value in values):
        return "its operands are not known to be [batch, heads, length, width]"
    if not isinstance(given["is_causal"], bool):
        return "is_causal is decided while it runs"
    if given["scale"] is not None and not isinstance(given["scale"], (int, float)):
        return "its scale is computed while it runs"
    mask = given["attn_mask"]
    if mask is not None and (value_of(mask) is None or value_of(mask).ndim != 4):  # type: ignore[union-attr]
        return "its mask is not [batch, heads, queries, keys]"
    heads = int(values[0].shape[1])  # type: ignore[union-attr]
    source_k, source_v = unrepeated(k), unrepeated(v)
    groups = int(value_of(source_k).shape[1])  # type: ignore[union-attr]
    if groups != int(value_of(source_v).shape[1]) or heads % groups:  # type: ignore[union-attr]
        source_k, source_v, groups = k, v, int(values[1].shape[1])  # type: ignore[union-attr]
    width = int(values[0].shape[3])  # type: ignore[union-attr]
    scale = float(given["scale"]) if given["scale"] is not None else width**-0.5
    dropout = float(given["dropout_p"] or 0.0)
    return Call(node, layer, q, source_k, source_v, mask, given["is_causal"], scale, heads, groups, dropout)


def unrepeated(node: fx.Node) -> fx.Node:
    """What a tensor repeats head by head: x[:, :, None].expand(...).reshape(...) as transformers writes it; or itself.

    The shapes decide: [B, G, T, d] -> [B, G, n, T, d] -> [B, G n, T, d] with an expanded third dimension can be nothing
    else, whatever the calls are called.
    """
    chain = [node]
    current = node
    while len(chain) < 6 and current.op in ("call_method", "call_function") and current.args:
        source = current.args[0]
        if not isinstance(source, fx.Node):
            break
        chain.append(source)
        current = source
    outer = value_of(node)
    for place, candidate in enumerate(chain):
        if candidate.target not in ("reshape", "contiguous", "expand", operator.getitem, torch.reshape):
            chain = chain[: place + 1]
            break
    expanded = next((n for n in chain if n.target == "expand"), None)
    if expanded is None or outer is None:
        return node
    wide, source = value_of(expanded), chain[-1]
    inner = value_of(source)
    if wide is None or inner is None or wide.ndim != 5 or inner.ndim != 4:
        return node
    indexed = [n for n in chain if n.target is operator.getitem]
    one = slice(None, None, None)
    if len(indexed) != 1 or tuple(indexed[0].args[1]) != (one, one, None, one, one):  # type: ignore[arg-type]
        return node
    groups, repeats = inner.shape[1], wide.shape[2]
    fits = wide.shape[1] == groups and outer.shape[1] == groups * repeats and outer.shape[3] == inner.shape[3]
    return source if fits else node
