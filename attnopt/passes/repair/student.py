"""A Program as a module: one part per attention layer, with weights that can be trained and sharded.

The parts run the same functions that `LayerRunner` runs, on weights that are held in memory, so that a gradient can be
taken and `fully_shard` finds a module per layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnopt.passes.common.free import free_of
from attnopt.passes.repair.parameters import Changed, Fixed, Selection, owners
from attnopt.rewriter.interpret import Env, LayerRunner, LoadedSegment
from attnopt.rewriter.program import Program
from attnopt.rewriter.segments import Segment
from attnopt.rewriter.weights import Value

T = TypeVar("T")

#: Tensors in memory by what they are; teacher and student read most of their weights from here.
Pool = dict[tuple[Value, bool], Tensor]


class Part(nn.Module):
    """One segment.

    Args:
        runner: of the program.
        segment: the part of it.
        weights: its own ones by name; others are given to `forward`.
        targets: names of the nodes to evaluate; by default all that is live after it.
        recompute: keep only what enters it, and run it once more for the gradient.
    """

    def __init__(
        self,
        runner: LayerRunner,
        segment: Segment,
        weights: Mapping[str, nn.Module],
        targets: Sequence[str] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self._loaded = LoadedSegment(runner, segment)
        self.targets = tuple(targets or segment.live_out)
        self.reads, self.weight_names = runner.reads(segment, self.targets)
        self.names = tuple(weights)
        self.weights = nn.ModuleList(weights.values())
        self.recompute = recompute

    def forward(self, values: Mapping[str, Any], shared: Mapping[str, Tensor]) -> dict[str, Any]:
        """Values of the targets, from those that are live before the segment and weights of several segments."""
        given = {name: values[name] for name in self.reads}
        if self.recompute and torch.is_grad_enabled():
            found: dict[str, Any] = checkpoint(self._run, given, shared, use_reentrant=False)
            return found
        return self._run(given, shared)

    def own_weights(self) -> dict[str, Tensor]:
        """Its weights as they are now, by name."""
        return {name: weight() for name, weight in zip(self.names, self.weights, strict=True)}

    def _run(self, given: Mapping[str, Any], shared: Mapping[str, Tensor]) -> dict[str, Any]:
        weights = {**{name: shared[name] for name in self.weight_names if name in shared}, **self.own_weights()}
        return self._loaded.evaluate_all(Env(given, None), self.targets, weights=weights)


class Head:
    """The head of a program on what enters it for one batch, which can be run on some of the tokens at a time.

    Attributes:
        inputs: the tensors that enter it: the residual stream [B, S, D], and what else it reads.
        weights: that it reads, by name.
        by_token: whether tokens can be taken apart.
    """

    def __init__(self, part: Part, values: Mapping[str, Any], shared: Mapping[str, Tensor], stream: str) -> None:
        self._part = part
        self._sizes = {name: values[name] for name in part.reads if not isinstance(values[name], Tensor)}
        self._names = tuple(name for name in part.reads if name not in self._sizes)
        self.inputs: tuple[Tensor, ...] = tuple(values[name] for name in self._names)
        self.weights = {**{name: shared[name] for name in part.weight_names if name in shared}, **part.own_weights()}
        self.lead = values[stream].shape[:2]
        alike = all(x.dim() == 3 and x.shape[:2] == self.lead and x.is_floating_point() for x in self.inputs)
        self.by_token = alike and not self._sizes

    def __call__(self, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """The program's first output for other inputs and weights.

        Args:
            inputs: as the attribute, or [1, n, D] of any tokens if they can be taken apart.
            weights: by name.
        """
        env = Env({**self._sizes, **dict(zip(self._names, inputs, strict=True))}, None)
        (target,) = self._part.targets
        return self._part._loaded.evaluate_all(env, [target], weights=weights)[target]


class Model(nn.Module):
    """A whole program.

    Args:
        program: what to run.
        pool: tensors in memory; what is missing is read and added.
        trained: what to train; None for nothing.
        dtype, device: as for `LayerRunner`.
        recompute: run each layer once more for the gradient instead of keeping what is inside it.
        seed: of what is random in adapters.

    Raises:
        LookupError: the graph has no single residual stream before its head.
    """

    def __init__(
        self,
        program: Program,
        pool: Pool,
        trained: Selection | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        recompute: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.runner = runner = LayerRunner(program, dtype, device)
        self.trained = trained or Selection((), None)
        self._seed = seed
        head = runner.head
        if head.stream_in is None:
            raise LookupError("no single residual stream enters the head")
        self.stream = head.stream_in
        first = runner.output_names()[:1]
        segments = [runner.prelude, *runner.layers, head]
        owner = owners(program)
        reads = [runner.reads(s, first if s is head else None)[1] for s in segments]
        uses = Counter(owner[name] for names in reads for name in dict.fromkeys(names))
        several = {name for name, count in uses.items() if count > 1 and not runner.is_constant(name)}
        self._tied = {name: owner[name] for names in reads for name in names if owner[name] in several}
        self._shared_names = tuple(dict.fromkeys(self._tied.values()))
        self.shared = nn.ModuleList(self._weight(program, name, pool) for name in self._shared_names)
        parts = []
        for segment, names in zip(segments, reads, strict=True):
            own = {name: self._weight(program, name, pool) for name in names if name not in self._tied}
            parts.append(Part(runner, segment, own, first if segment is head else None, recompute))
        self.prelude, self.head = parts[0], parts[-1]
        self.layers = nn.ModuleList(parts[1:-1])

    def forward(self, inputs: Mapping[str, Tensor], then: Callable[[Head], T]) -> T:
        """Run everything but the head on a batch, and hand that to `then`.

        Args:
            inputs: as for `LayerRunner.start`.
            then: gets the head; its result is returned.
        """
        own = dict(zip(self._shared_names, (weight() for weight in self.shared), strict=True))
        shared = {name: own[owner] for name, owner in self._tied.items()}
        values = self.prelude(self.runner.complete(inputs), shared)
        for layer in self.layers:
            values = layer(values, shared)
        return then(Head(self.head, values, shared, self.stream))

    def changed(self) -> dict[str, Changed]:
        """The weights that are trained, by name."""
        parts = [self.prelude, *self.layers, self.head]
        pairs = [pair for part in parts for pair in zip(part.names, part.weights, strict=True)]
        pairs += zip(self._shared_names, self.shared, strict=True)
        return {name: weight for name, weight in pairs if isinstance(weight, Changed)}

    def _weight(self, program: Program, name: str, pool: Pool) -> nn.Module:
        constant = self.runner.is_constant(name)
        key = (program.weights[name], constant)
        if key not in pool:
            tensor = program.weights.get(name)
            if tensor.is_floating_point() and not constant:
                tensor = tensor.to(self.runner.dtype)
            # Cloned: memory freshly allocated is aligned alike in every run, so that arithmetic is repeated to the bit.
            pool[key] = tensor.to(self.runner.device).clone()
        if name not in self.trained.names:
            return Fixed(pool[key], constant)
        place = self.trained.names.index(name)
        return Changed(pool[key], free_of(program, name, pool[key]), self.trained.rank, self._seed * 65_537 + place)


def output_of(model: Model, inputs: Mapping[str, Tensor]) -> Tensor:
    """The program's first output on a batch."""

    def whole(head: Head) -> Tensor:
        return head(head.inputs, head.weights)

    result: Tensor = model(inputs, whole)
    return result
