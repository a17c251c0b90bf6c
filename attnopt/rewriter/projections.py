"""Finds linear maps in a graph: which stored matrix, which rows of it, in which order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from attnopt.rewriter.probe import Mismatch, Probe
from attnopt.rewriter.site import Projection

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
}
_LAYOUT = VIEWS | {aten.transpose.int, aten.permute.default}
_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}


Layout = Literal["linear", "conv1d"]


@dataclass(frozen=True)
class LinearMap:
    """A product with a stored matrix.

    Attributes:
        node: its result, bias included, [..., out].
        x: its operand, [B, S, in], before any flattening.
        weight, bias: names.
        layout: as in `Projection`.
        in_features, out_features: sizes.
    """

    node: fx.Node
    x: fx.Node
    weight: str
    bias: str | None
    layout: Layout
    in_features: int
    out_features: int

    def projection(self, rows: Iterable[int] | None = None) -> Projection:
        """The part of the map given by these output channels, in order; all of it if None."""
        ranges: list[list[int]] = []
        for row in range(self.out_features) if rows is None else rows:
            if ranges and ranges[-1][1] == row:
                ranges[-1][1] = row + 1
            else:
                ranges.append([row, row + 1])
        pairs = tuple((start, stop) for start, stop in ranges)
        return Projection(self.weight, self.bias, pairs, self.in_features, self.layout)


def linear_map(node: fx.Node) -> LinearMap | None:
    """Read a node as a product with a stored matrix, or None if it is not one."""
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        x, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        return _make(node, x, weight, bias, "linear")
    if node.target is aten.addmm.default:
        bias, x, weight = node.args[:3]
        if isinstance(weight, fx.Node) and weight.target in _TRANSPOSES:
            return _make(node, x, weight.args[0], bias, "linear")
        return _make(node, x, weight, bias, "conv1d")
    if node.target in (aten.mm.default, aten.matmul.default):
        x, weight = node.args[:2]
        if not isinstance(weight, fx.Node):
            return None
        layout: Layout = "conv1d"
        if weight.target in _TRANSPOSES:
            weight, layout = weight.args[0], "linear"
        users = list(node.users)
        if len(users) == 1 and users[0].target is aten.add.Tensor:
            other = users[0].args[1] if users[0].args[0] is node else users[0].args[0]
            if isinstance(other, fx.Node) and other.op == "get_attr":
                return _make(users[0], x, weight, other, layout)
        return _make(node, x, weight, None, layout)
    return None


def _make(node: fx.Node, x: object, weight: object, bias: object, layout: Layout) -> LinearMap | None:
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or not isinstance(x, fx.Node):
        return None
    if bias is not None and (not isinstance(bias, fx.Node) or bias.op != "get_attr"):
        return None
    if weight.meta["val"].ndim != 2:
        return None  # a matrix per head, see `head_map`
    out_features, in_features = weight.meta["val"].shape
    if layout == "conv1d":
        out_features, in_features = in_features, out_features
    while x.target in VIEWS and isinstance(x.args[0], fx.Node) and x.meta["val"].ndim == 2:
        x = x.args[0]
    name = str(bias.target) if isinstance(bias, fx.Node) else None
    return LinearMap(node, x, str(weight.target), name, layout, int(in_features), int(out_features))


@dataclass(frozen=True)
class HeadMap:
    """A product with a stored matrix of each head's own.

    Attributes:
        node: its result by tokens, [B, S, H, out].
        x: its operand, [B, H, S, in].
        weight: name of the matrices, [H, out, in].
    """

    node: fx.Node
    x: fx.Node
    weight: str


def head_map(nodes: Iterable[fx.Node]) -> HeadMap | None:
    """The first product with a matrix per head among some nodes, if there is one."""
    for node in nodes:
        if node.target is not aten.matmul.default:
            continue
        x, weight = node.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight.target not in _TRANSPOSES:
            continue
        stored, users = weight.args[0], list(node.users)
        if not isinstance(stored, fx.Node) or stored.op != "get_attr" or stored.meta["val"].ndim != 3:
            continue
        if len(users) == 1 and users[0].target is aten.transpose.int and users[0].args[1:] == (1, 2):
            return HeadMap(users[0], x, str(stored.target))
    return None


def feeding_maps(node: fx.Node) -> list[LinearMap]:
    """The nearest linear maps that a value is computed from."""
    found: dict[fx.Node, LinearMap] = {}
    seen = {node}
    stack = [node]
    while stack:
        current = stack.pop()
        match = linear_map(current)
        if match is None and current.target is aten.add.Tensor:
            # A bias added after a matrix product is part of the map.
            maps = [m for m in (linear_map(n) for n in current.all_input_nodes) if m is not None and m.node is current]
            match = maps[0] if maps else None
        if match is not None:
            found[match.node] = match
            continue
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return list(found.values())


def output_map(anchor: fx.Node, probe: Probe) -> tuple[LinearMap, fx.Node]:
    """The output projection behind the outputs of heads [B, S, H, dv], and the node holding its result as [B, S, D].

    Raises:
        Mismatch: if something other than a change of layout lies between, or heads are not concatenated in order.
    """
    node = anchor
    match: LinearMap | None = None
    while match is None:
        users = list(node.users)
        if len(users) != 1:
            raise Mismatch(f"the attention output is used {len(users)} times before a projection", anchor, *users)
        node = users[0]
        match = linear_map(node)
        if match is None and node.target not in _LAYOUT:
            raise Mismatch(f"{node.target} acts between the attention output and the output projection", node)
    source = node.args[1] if node.target is aten.addmm.default else node.args[0]
    assert isinstance(source, fx.Node)
    batch, length = 2, 3
    shape = probe.shape(anchor, batch, length)
    counting = torch.arange(shape[2] * shape[3], dtype=torch.float32).view(1, 1, *shape[2:]).expand(shape)
    (seen,) = probe.evaluate([source], {anchor: counting.contiguous()}, batch, length)
    if seen.shape[-1] != match.in_features or not torch.equal(
        seen, torch.arange(match.in_features, dtype=seen.dtype).expand(seen.shape)
    ):
        raise Mismatch("heads are not concatenated in order before the output projection", source)
    result = match.node
    while result.meta["val"].ndim == 2 and len(result.users) == 1 and next(iter(result.users)).target in VIEWS:
        result = next(iter(result.users))
    return match, result
