"""Makes a traced graph functional by rewriting its writes, which saves tracing it a second time.

torch.export records what a model does to tensors in place. Its own way to a functional graph, `run_decompositions`,
traces the graph twice more and takes longer than the export. Nearly all models write into nothing, or into a tensor
they have just made, so the few writes are rewritten here. What is not provably safe is left to torch.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten

# Views into which a write can be carried back, and the op that does so: (base, part, *arguments of the view) -> base.
_CARRY_BACK: dict[Any, OpOverload] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}
# Return their operand itself, though their schemas say otherwise.
_ALIAS_UNANNOUNCED = {aten.dropout.default, aten.feature_dropout.default, aten._unsafe_view.default}


def make_functional(graph: fx.Graph) -> bool:
    """Replace writes into tensors by ops that return the new value, in place.

    Only writes into tensors made in the graph are replaced, directly or through slices, of which no older view is read
    afterwards.

    Args:
        graph: ATen with `meta["val"]`, as torch.export makes it.

    Returns:
        whether the graph is functional now. If not, it still computes what it did.
    """
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output"):
            continue
        if node.op != "call_function":
            return False
        if not isinstance(node.target, OpOverload):
            if not _is_arithmetic(node.target):
                return False  # a higher-order op has a graph of its own
        elif node.target is aten.detach_.default:  # writes no values
            node.target = aten.detach.default
        elif node.target._schema.is_mutable and not _rewrite(graph, node):
            return False
    return True


def _is_arithmetic(target: Any) -> bool:
    """Whether a call is arithmetic on sizes or takes one of several results."""
    return target is operator.getitem or getattr(target, "__module__", "") in ("_operator", "math", "torch")


def _rewrite(graph: fx.Graph, node: fx.Node) -> bool:
    """Rewrite one write, unless another name for the written memory is read later."""
    written = node.args[0] if node.args else None
    twin = _twin(node)
    if twin is None or not isinstance(written, fx.Node):
        return False
    views: list[fx.Node] = []  # from the written one to the one next to the base
    base = written
    while base.target in _CARRY_BACK:
        views.append(base)
        base = base.args[0]  # type: ignore[assignment]  # a view's first argument is a node
    if not _is_new(base) or any(_outlives(user, node) for user in base.users if user not in (*views, node)):
        return False
    for inner, view in zip([node, *views], views, strict=False):
        if set(view.users) != {inner}:
            return False
    if views and node.users:
        return False
    # What is copied into a part of something can be carried back as it is; `aten.copy` has no gradient.
    plain = bool(views) and node.target is aten.copy_.default and _alike(written, node.args[1])
    node.target = twin
    value, last = node.args[1] if plain else node, node
    for view in views:
        with graph.inserting_after(last):
            last = graph.call_function(_CARRY_BACK[view.target], (view.args[0], value, *view.args[1:]), view.kwargs)
        last.meta = {**node.meta, "val": view.args[0].meta["val"]}  # type: ignore[union-attr]
        value = last
    readers = [user for user in base.users if user > last]
    for reader in readers:
        reader.replace_input_with(base, last)
    if plain:
        graph.erase_node(node)
    return True


def _alike(one: fx.Node, other: Any) -> bool:
    """Whether two tensors are of the same type and size, whatever the sizes of the inputs."""
    if not isinstance(other, fx.Node):
        return False
    a, b = one.meta["val"], other.meta["val"]
    same = a.dtype == b.dtype and a.device == b.device and a.ndim == b.ndim
    return same and all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))


def _twin(node: fx.Node) -> OpOverload | None:
    """The op that returns what `node` writes into its first operand, if that is all that it does."""
    target = node.target
    assert isinstance(target, OpOverload)
    name = target._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None)
    twin: OpOverload | None = getattr(packet, target._overloadname, None)
    first, *rest = (bool(a.alias_info and a.alias_info.is_write) for a in target._schema.arguments)
    if not name.endswith("_") or not first or any(rest) or twin is None or twin._schema.is_mutable:
        return None
    ours, theirs = ([(a.name, str(a.type)) for a in op._schema.arguments] for op in (target, twin))
    if ours != theirs:
        return None
    # A write keeps the type of what is written into; an op of its own would return the wider type.
    into = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    others = (n.meta["val"] for n in node.all_input_nodes)
    keeps = target is aten.copy_.default or all(
        torch.promote_types(into, v.dtype) == into for v in others if isinstance(v, torch.Tensor)
    )
    return twin if keeps else None


def _is_new(node: fx.Node) -> bool:
    """Whether an op made this tensor, in memory that no other tensor had then."""
    if node.target is operator.getitem:  # one of several results
        source, place = node.args
        assert isinstance(source, fx.Node)
        return _is_new(source) and [user.args[1] for user in source.users].count(place) == 1
    return isinstance(node.target, OpOverload) and not _is_alias(node)


def _is_alias(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its operands."""
    if not isinstance(node.target, OpOverload):
        return True
    announced = any(result.alias_info is not None for result in node.target._schema.returns)
    return announced or node.target in _ALIAS_UNANNOUNCED


def _outlives(reader: fx.Node, write: fx.Node) -> bool:
    """Whether `reader`, made before the write, shares memory with its operand and is read after the write."""
    if reader > write or not _is_alias(reader):
        return False
    return any(user > write or _outlives(user, write) for user in reader.users)
