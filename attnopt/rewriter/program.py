"""Program: a model as one graph, its attention sites, its weights and the passes that made it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from attnopt.rewriter.site import AttentionSite
from attnopt.rewriter.weights import WeightStore, meta_of


@dataclass(frozen=True)
class HistoryEntry:
    """One pass that was applied.

    Attributes:
        text: the pass as pipeline text, e.g. "to-mla{kv-keep=0.5}".
        summary: plain facts the pass recorded (JSON values only).
    """

    text: str
    summary: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A model captured without a cache, in float32.

    Attributes:
        graph: functional ATen plus dialect ops. Placeholders are the runtime inputs; weights and buffers are
            `get_attr` nodes whose target is the name in `weights`; the output is a tuple in the order of `outputs`.
            `meta["buffer"]` of a `get_attr` node says that it is not a parameter. Every node's `meta["val"]` holds a
            fake tensor of its shape where capture knew it, and `meta["nn_module_stack"]` the modules it came from.
        weights: the values of the weights, never modified.
        sites: attention layers by fqn, in layer order.
        config: the model's configuration as plain data.
        model_type: its architecture's name in transformers.
        inputs: names of the placeholders.
        outputs: names of the outputs; the first is the one that matters (logits, or the last hidden state).
        history: the passes applied so far, oldest first.
    """

    graph: fx.Graph
    weights: WeightStore
    sites: Mapping[str, AttentionSite]
    config: Mapping[str, Any]
    model_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    history: tuple[HistoryEntry, ...] = ()

    @property
    def site_list(self) -> tuple[AttentionSite, ...]:
        """The attention sites in layer order."""
        return tuple(self.sites.values())

    @property
    def cached_numbers_per_token(self) -> int:
        """Numbers kept per token while decoding, all layers together."""
        return sum(site.cached_numbers_per_token for site in self.sites.values())

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the weights and buffers the graph reads, in order of first use."""
        return tuple(dict.fromkeys(str(n.target) for n in self.graph.nodes if n.op == "get_attr"))

    @property
    def parameters(self) -> int:
        """Number of floating-point numbers in the weights the graph reads; tied ones count once, buffers do not."""
        nodes = (n for n in self.graph.nodes if n.op == "get_attr" and not n.meta.get("buffer"))
        distinct = {self.weights[str(n.target)] for n in nodes}
        return sum(meta.numel for meta in map(meta_of, distinct) if meta.dtype.is_floating_point)

    def node(self, name: str) -> fx.Node:
        """The graph node of that name.

        Raises:
            KeyError: if there is none.
        """
        for node in self.graph.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def clone(self) -> Program:
        """A Program with its own copy of the graph (node names kept); everything else is immutable and shared."""
        return replace(self, graph=copy_graph(self.graph))

    def replace(self, **changes: Any) -> Program:
        """A Program with some fields changed; the rest is shared."""
        return replace(self, **changes)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with the same node names and metadata (the metadata's values are shared)."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = copied = new.node_copy(node, lambda n: env[n])
        if copied.name != node.name:
            copied._rename(node.name)
        copied.meta = copy.copy(node.meta)
    return new


def walk_back(node: fx.Node, through_sizes: bool = True, stop: Collection[fx.Node] = ()) -> Iterator[fx.Node]:
    """The node and everything it is computed from, each once.

    Args:
        stop: nodes to leave out, with what only they are computed from.
        through_sizes: False leaves out what only a tensor's size was taken from.
    """
    seen = {node}
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        if not through_sizes and current.target is torch.ops.aten.sym_size.int:
            continue
        for source in current.all_input_nodes:
            if source not in seen and source not in stop:
                seen.add(source)
                stack.append(source)


def fake_value(node: fx.Node) -> torch.Tensor:
    """The fake tensor that stands for a node's value (shape may hold symbols).

    Raises:
        KeyError: if capture recorded none.
    """
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise KeyError(f"node {node.name} is not a tensor")
    return value
