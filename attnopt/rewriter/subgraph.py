"""Compiles a part of a graph into one Python function: only what the targets need, values freed after last use."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.rewriter.ops.autograd import IN_PLACE

# Equal layers give the same source text, so the functions are compiled once per kind of layer.
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {}


@dataclass(frozen=True)
class Subgraph:
    """A compiled part of a graph.

    Attributes:
        function: positional arguments are the values of `inputs`, then those of `weights`; returns a list.
        inputs: names of the given nodes it reads.
        weights: names of the weights it reads.
        targets: names of the nodes it returns, in order.
    """

    function: Callable[..., list[Any]]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    targets: tuple[str, ...]

    def run(self, values: Mapping[str, Any], weight: Callable[[str], torch.Tensor]) -> dict[str, Any]:
        """Evaluate the targets.

        Args:
            values: at least the values of `inputs`, by node name.
            weight: name -> tensor.

        Returns:
            value of each target by node name.
        """
        result = self.function(*(values[name] for name in self.inputs), *(weight(name) for name in self.weights))
        return dict(zip(self.targets, result, strict=True))


def compile_subgraph(
    targets: Sequence[fx.Node],
    given: Collection[fx.Node],
    order: Mapping[fx.Node, int],
    device: torch.device | None = None,
) -> Subgraph:
    """Compile what `targets` need, starting from the values of the nodes in `given`.

    Args:
        targets: nodes to evaluate.
        given: nodes whose values will be passed in; what only they need is not evaluated.
        order: place of every node in its graph.
        device: where constants are made; None keeps the graph's.

    Raises:
        KeyError: if a graph input is needed that is not given; the argument is its name.
    """
    known = set(given)
    needed: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if node not in known:
            if node.op == "placeholder":
                raise KeyError(str(node.target))
            stack.extend(node.all_input_nodes)
    ordered = sorted(needed, key=order.__getitem__)
    inputs = [node for node in ordered if node in known]
    weights = list(dict.fromkeys(str(n.target) for n in ordered if n.op == "get_attr" and n not in known))

    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {node: graph.placeholder(f"i{i}") for i, node in enumerate(inputs)}
    by_weight = {name: graph.placeholder(f"w{i}") for i, name in enumerate(weights)}
    count = 0
    for node in ordered:
        if node in env:
            continue
        if node.op == "get_attr":
            env[node] = by_weight[str(node.target)]
            continue
        args = fx.map_arg(node.args, lambda n: env[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
        if device is not None:
            kwargs = {k: device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
        target = _IN_PLACE.get(node.target, node.target)
        env[node] = graph.create_node(node.op, target, args, kwargs, name=f"n{count}")
        count += 1
    graph.output([env[node] for node in targets])
    return Subgraph(_function(graph), tuple(n.name for n in inputs), tuple(weights), tuple(n.name for n in targets))


def _copied(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`aten.copy`, which torch cannot differentiate: `source` in the shape and type of `x`."""
    return source.to(x.dtype).expand(x.shape)


#: What stands in for an op that has no derivative or a dear one, with the same result.
_IN_PLACE: dict[Any, Callable[..., Any]] = {torch.ops.aten.copy.default: _copied, **IN_PLACE}


def _function(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    key = (code.src, repr(sorted((name, repr(value)) for name, value in code.globals.items())))
    if key not in _FUNCTIONS:
        scope = dict(code.globals)
        exec(compile(code.src, "<attnopt subgraph>", "exec"), scope)
        forward = scope["forward"]
        _FUNCTIONS[key] = lambda *args: forward(None, *args)
    return _FUNCTIONS[key]
