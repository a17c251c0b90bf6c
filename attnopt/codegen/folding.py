"""Turns parts of a lowered graph that depend on weights alone into weights of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from attnopt.rewriter.program import Program
from attnopt.rewriter.subgraph import Subgraph, compile_subgraph
from attnopt.rewriter.weights import TensorMeta


@dataclass(frozen=True)
class Folded:
    """A constant part of a graph.

    Attributes:
        part: computes it from weights.
        program: whose weights.
    """

    part: Subgraph
    program: Program

    def compute(self) -> torch.Tensor:
        """Its value, in float32."""
        (value,) = self.part.run({}, lambda name: as_float32(self.program.weights.get(name))).values()
        return value.contiguous()

    def meta(self) -> TensorMeta:
        """Its shape and type, without reading anything."""

        def fake(name: str) -> torch.Tensor:
            stored = self.program.weights.meta(name)
            dtype = torch.float32 if stored.dtype.is_floating_point else stored.dtype
            return torch.empty(stored.shape, dtype=dtype, device="meta")

        (value,) = self.part.run({}, fake).values()
        return TensorMeta(tuple(value.shape), value.dtype)


def as_float32(tensor: torch.Tensor) -> torch.Tensor:
    """A floating-point tensor in float32, any other as it is."""
    return tensor.float() if tensor.is_floating_point() else tensor


def fold_constants(graph: fx.Graph, program: Program, role: Callable[[fx.Node], str]) -> dict[str, Folded]:
    """Replace constant parts, in place, by `get_attr` nodes; they are computed when they are written.

    A part is left as it is if a weight below it is also read as it is: it would then be in the file twice.

    Args:
        graph: a lowered graph of `program`.
        role: what to call the part that ends in a node; its weight's name is put before.

    Returns:
        the parts by the names of the new weights.
    """
    constant: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            inputs = node.all_input_nodes
            constant[node] = bool(inputs) and all(constant[n] for n in inputs)
        else:
            constant[node] = node.op == "get_attr"
    order = {node: place for place, node in enumerate(graph.nodes)}
    found: dict[str, Folded] = {}
    for node in list(graph.nodes):
        if not constant[node] or node.op != "call_function" or all(constant[user] for user in node.users):
            continue
        sources = _sources(node)
        learned = [source for source in sources if not source.meta.get("buffer")]
        if not learned or any(not constant[user] for source in sources for user in source.users):
            continue
        if not isinstance(node.meta.get("val", torch.empty(0)), torch.Tensor):
            continue
        name = f"{learned[0].target}__{role(node)}"
        found[name] = Folded(compile_subgraph([node], [], order), program)
        with graph.inserting_before(node):
            new = graph.create_node("get_attr", name, name=f"folded_{node.name}")
        new.meta = {key: value for key, value in node.meta.items() if key == "nn_module_stack"}
        node.replace_all_uses_with(new)
        order[new] = order[node]
        constant[new] = True
    graph.eliminate_dead_code()
    return found


def _sources(node: fx.Node) -> list[fx.Node]:
    stack, seen, found = [node], {node}, []
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            found.append(current)
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return found
