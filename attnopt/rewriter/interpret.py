"""Runs a Program segment by segment: prelude, one segment per attention layer, head.

Weights of a segment are read when it is loaded and dropped when it is left, so peak memory is one layer plus the
hidden states that are kept. All batches can go through layer i before layer i + 1 is read (layer-major order).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.errors import OptionError, UnsupportedError
from attnopt.rewriter.memory import give_back
from attnopt.rewriter.program import Program
from attnopt.rewriter.segments import Segment, segment_graph
from attnopt.rewriter.subgraph import Subgraph, compile_subgraph


@dataclass(frozen=True)
class Env:
    """Values that are live between two segments, by node name. Immutable; the tensors must not be written into.

    Attributes:
        values: tensors, and integers for sizes.
        stream: name of the residual stream entering the next segment, or None if it is not unique.
    """

    values: Mapping[str, Any]
    stream: str | None

    @property
    def hidden(self) -> Tensor:
        """The residual stream entering the next segment, [B, S, D].

        Raises:
            LookupError: if the segment reads several tensors that could be it.
        """
        if self.stream is None:
            raise LookupError(f"no single residual stream among {', '.join(self.values)}")
        return self.values[self.stream]

    def with_hidden(self, hidden: Tensor) -> Env:
        """The same with another residual stream."""
        if self.stream is None:
            raise LookupError(f"no single residual stream among {', '.join(self.values)}")
        return Env({**self.values, self.stream: hidden}, self.stream)


class LoadedSegment:
    """A segment whose weights are kept in memory once read. Made by `LayerRunner.load`."""

    def __init__(self, runner: LayerRunner, segment: Segment) -> None:
        self._runner = runner
        self.segment = segment
        self._weights: dict[str, Tensor] = {}

    def weight(self, name: str) -> Tensor:
        """The weight of that name, in the runner's type and on its device; read once, do not write into it."""
        if name not in self._weights:
            self._weights[name] = self._runner._read(name)
        return self._weights[name]

    def evaluate(self, env: Env, name: str, overrides: Mapping[str, Tensor] | None = None) -> Tensor:
        """The value of one node of this segment, computing only what it needs.

        Args:
            env: what is live before the segment.
            name: name of the node.
            overrides: values to use in place of nodes.

        Raises:
            KeyError: if the segment has no such node.
        """
        return self.evaluate_all(env, [name], overrides)[name]

    def evaluate_all(
        self,
        env: Env,
        names: Sequence[str],
        overrides: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The values of several nodes at once; shared work is done once.

        Args:
            env, overrides: as for `evaluate`.
            names: of the nodes.
            weights: values to use in place of stored weights, e.g. ones to be trained.
        """
        values = {**env.values, **(overrides or {})}
        missing = [name for name in names if name not in values]
        plan = self._runner._plan(self.segment, tuple(missing), tuple(values))
        given = weights or {}
        read = (lambda name: given[name] if name in given else self.weight(name)) if given else self.weight
        found = plan.run(values, read) if missing else {}
        return {name: found[name] if name in found else values[name] for name in names}

    def advance(self, env: Env, overrides: Mapping[str, Tensor] | None = None) -> Env:
        """Run the rest of the segment.

        Args:
            env: what is live before the segment.
            overrides: values to use in place of nodes, e.g. another output for the attention; what only they would
                need is not computed.

        Returns:
            what is live after it.
        """
        values = self.evaluate_all(env, self.segment.live_out, overrides)
        return Env(values, self._runner._stream_after(self.segment))

    def free(self) -> None:
        """Drop the weights."""
        self._weights.clear()


class LayerRunner:
    """Evaluates a Program one segment at a time.

    Args:
        program: what to run.
        dtype: float32 or float64; weights are cast to it. Rotary angles stay float32, as in the source model.
        device: where to run.

    Raises:
        OptionError: for another dtype (programs are captured in float32; half precision would skip upcasts).
    """

    def __init__(
        self, program: Program, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise OptionError(f"a program runs in float32 or float64, not {dtype}", "use --dtype float32")
        self.program = program
        self.dtype = dtype
        self.device = torch.device(device)
        self._order = {node: i for i, node in enumerate(program.graph.nodes)}
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._constants = {str(n.target) for n in self._order if n.op == "get_attr" and n.meta.get("buffer")}
        self._plans: dict[tuple[int, tuple[str, ...], tuple[str, ...]], Subgraph] = {}
        segments = segment_graph(program)
        self.prelude, self.layers, self.head = segments[0], segments[1:-1], segments[-1]
        self._segments = segments
        self._outer: LoadedSegment | None = None

    def start(self, inputs: Mapping[str, Tensor]) -> Env:
        """Run the prelude (embeddings, rotary tables, masks) on one batch.

        Its weights stay loaded until a layer is loaded, so that several batches can start at the price of one read.

        Args:
            inputs: by name; `position_ids` default to 0 ... S-1, `attention_mask` to ones, `token_type_ids` to zeros.

        Raises:
            UnsupportedError: if an input is missing or not an input of the program.
        """
        given = self.complete(inputs)
        loaded = self._open(self.prelude)
        values = loaded.evaluate_all(Env(given, None), self.prelude.live_out)
        return Env(values, self._stream_after(self.prelude))

    def reads(self, segment: Segment, targets: Sequence[str] | None = None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What a segment reads: (names of nodes that are live before it or inputs, names of weights).

        Args:
            segment: of this program.
            targets: nodes to evaluate; by default all that is live after it.
        """
        given = tuple(self.program.inputs) if segment is self.prelude else segment.live_in
        wanted = tuple(name for name in targets or segment.live_out if name not in given)
        passed = tuple(name for name in targets or segment.live_out if name in given)
        plan = self._plan(segment, wanted, given)
        return tuple(dict.fromkeys((*plan.inputs, *passed))), plan.weights

    def output_names(self) -> tuple[str, ...]:
        """Names of the nodes that the program returns, in the order of its outputs."""
        return tuple(node.name for node in self._output_nodes())

    def is_constant(self, weight: str) -> bool:
        """Whether a weight is a constant (a rotary table, an index), which keeps its type and is no parameter."""
        return weight in self._constants

    @contextmanager
    def load(self, segment: Segment) -> Iterator[LoadedSegment]:
        """Hold a layer's weights for the length of the block; then freed memory goes back to the system."""
        self.close()
        loaded = LoadedSegment(self, segment)
        try:
            yield loaded
        finally:
            loaded.free()
            give_back()

    def finish(self, env: Env) -> Tensor:
        """Run the head (final norm, logits) on one batch and return the first output.

        Its weights stay loaded until a layer is loaded or `close` is called.
        """
        return self.finish_all(env)[self.program.outputs[0]]

    def finish_all(self, env: Env) -> dict[str, Tensor]:
        """Run the head on one batch and return every output by its name."""
        nodes = self._output_nodes()
        values = self._open(self.head).evaluate_all(env, [node.name for node in nodes])
        return {name: values[node.name] for name, node in zip(self.program.outputs, nodes, strict=True)}

    def close(self) -> None:
        """Drop the weights of the prelude or the head."""
        if self._outer is not None:
            self._outer.free()
            self._outer = None

    def _open(self, segment: Segment) -> LoadedSegment:
        if self._outer is None or self._outer.segment is not segment:
            self.close()
            self._outer = LoadedSegment(self, segment)
        return self._outer

    def _output_nodes(self) -> list[fx.Node]:
        (output,) = (node for node in self._order if node.op == "output")
        return list(output.args[0])

    def complete(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All inputs of the program, on its device; those left out get their defaults, see `start`."""
        unknown = sorted(set(inputs) - set(self.program.inputs) - {"position_ids", "attention_mask"})
        if unknown:
            raise UnsupportedError(
                f"the program has no input {', '.join(unknown)}", f"its inputs are {', '.join(self.program.inputs)}"
            )
        given = {name: value.to(self.device) for name, value in inputs.items() if name in self.program.inputs}
        given = {n: v.to(self.dtype) if v.is_floating_point() else v for n, v in given.items()}
        ids = given.get("input_ids")
        for name in self.program.inputs:
            if name in given:
                continue
            if ids is None or name not in ("position_ids", "attention_mask", "token_type_ids"):
                raise UnsupportedError(f"input {name!r} is missing", f"inputs are {', '.join(self.program.inputs)}")
            if name == "position_ids":
                given[name] = torch.arange(ids.shape[1], device=self.device).expand(ids.shape[0], -1)
            else:
                given[name] = torch.full_like(ids, 1 if name == "attention_mask" else 0)
        return given

    def _read(self, name: str) -> Tensor:
        tensor = self.program.weights.get(name)
        if tensor.is_floating_point() and name not in self._constants:
            tensor = tensor.to(self.dtype)
        return tensor.to(self.device)

    def _plan(self, segment: Segment, targets: tuple[str, ...], given: tuple[str, ...]) -> Subgraph:
        key = (segment.index, targets, given)
        if key not in self._plans:
            nodes = self._nodes
            self._plans[key] = compile_subgraph(
                [nodes[t] for t in targets], [nodes[g] for g in given if g in nodes], self._order, self.device
            )
        return self._plans[key]

    def _stream_after(self, segment: Segment) -> str | None:
        place = self._segments.index(segment) + 1
        return self._segments[place].stream_in if place < len(self._segments) else None


def run(
    program: Program, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **inputs: Tensor
) -> dict[str, Tensor]:
    """Run a whole program on one batch.

    Args:
        program: what to run.
        dtype, device: as for `LayerRunner`.
        inputs: as for `LayerRunner.start`.

    Returns:
        every output by its name.
    """
    runner = LayerRunner(program, dtype, device)
    env = runner.start(inputs)
    for segment in runner.layers:
        with runner.load(segment) as layer:
            env = layer.advance(env)
    outputs = runner.finish_all(env)
    runner.close()
    return outputs
