"""Asks small parts of a graph what they compute by feeding them numbers: recognition measures, it reads no names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from attnopt.rewriter.program import Program, walk_back
from attnopt.rewriter.subgraph import compile_subgraph


class Mismatch(Exception):
    """A part of the graph is not what recognition can represent.

    Args:
        reason: what was found, in one clause.
        nodes: the nodes to blame.
    """

    def __init__(self, reason: str, *nodes: fx.Node) -> None:
        super().__init__(reason)
        self.reason = reason
        self.nodes = tuple(node.name for node in nodes)


class Probe:
    """Evaluates parts of one program's graph on made-up values."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.order = {node: i for i, node in enumerate(program.graph.nodes)}
        self.placeholders = [node for node in self.order if node.op == "placeholder"]

    def shape(self, node: fx.Node, batch: int, length: int) -> tuple[int, ...]:
        """Shape of a node's value when the inputs have this batch and length."""
        symbols = {}
        for source in self.placeholders:
            for place, size in enumerate(source.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    symbols[size.node.expr] = batch if place == 0 else length
        return tuple(
            int(size.node.expr.subs(symbols)) if isinstance(size, torch.SymInt) else int(size)
            for size in node.meta["val"].shape
        )

    def evaluate(
        self,
        targets: Sequence[fx.Node],
        given: Mapping[fx.Node, Tensor],
        batch: int,
        length: int,
        positions: Tensor | None = None,
        weight: Callable[[str], Tensor] | None = None,
    ) -> list[Tensor]:
        """Values of `targets` when the `given` nodes have these values.

        Args:
            positions: int [batch, length]; 0 everywhere if None.
            weight: values of parameters; None means that none may be needed.

        Raises:
            Mismatch: if a parameter is needed that must not be.
        """
        values = {**self._inputs(batch, length, positions), **given}
        part = compile_subgraph(targets, values, self.order)
        constants = {str(n.target) for n in self.order if n.op == "get_attr" and n.meta.get("buffer")}
        learned = [name for name in part.weights if name not in constants]
        if learned and weight is None:
            raise Mismatch(f"learned tensors {', '.join(learned)} act between a projection and the scores", *targets)

        def read(name: str) -> Tensor:
            return self.program.weights.get(name) if name in constants or weight is None else weight(name)

        found = part.run({node.name: value for node, value in values.items()}, read)
        return [found[node.name] for node in targets]

    def _inputs(self, batch: int, length: int, positions: Tensor | None) -> dict[fx.Node, Tensor]:
        result = {}
        for node in self.placeholders:
            shape = self.shape(node, batch, length)
            dtype = node.meta["val"].dtype
            if node.target == "position_ids" and positions is not None:
                result[node] = positions.expand(shape)
            else:
                result[node] = torch.full(shape, 1 if node.target == "attention_mask" else 0, dtype=dtype)
        return result


def between(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on any path from `start` to `end`, both included; empty if there is no path."""
    reaching = set(walk_back(end))
    if start not in reaching:
        return set()
    found = {start}
    stack = [start]
    while stack:
        for user in stack.pop().users:
            if user in reaching and user not in found:
                found.add(user)
                stack.append(user)
    return found
