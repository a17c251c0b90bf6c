"""Where a long pass keeps the steps it has finished, so that it can go on after a crash."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from attnopt.rewriter.weights import Inline, Value


class StepStore(ABC):
    """Finished steps by name; each has arrays and a record of plain data. `attnopt.staging` keeps them on disk."""

    @abstractmethod
    def save(self, step: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> Mapping[str, Value]:
        """Keep a step's results; returns its arrays as lazy values."""

    @abstractmethod
    def load(self, step: str) -> tuple[Mapping[str, Value], dict[str, Any]]:
        """Arrays and record of a saved step; KeyError if it was not saved."""

    @abstractmethod
    def steps_done(self) -> tuple[str, ...]:
        """Names of the saved steps, sorted."""

    def save_layer(
        self, layer: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]
    ) -> Mapping[str, Value]:
        """`save` for layer number `layer`."""
        return self.save(f"layer-{layer:04d}", tensors, record)

    def load_layer(self, layer: int) -> tuple[Mapping[str, Value], dict[str, Any]]:
        """`load` for layer number `layer`."""
        return self.load(f"layer-{layer:04d}")

    def layers_done(self) -> tuple[int, ...]:
        """Numbers of the layers saved so far, ascending."""
        return tuple(int(step[6:]) for step in self.steps_done() if step.startswith("layer-"))


class MemorySteps(StepStore):
    """Steps kept in memory, for runs that need not survive a crash."""

    def __init__(self) -> None:
        self._steps: dict[str, tuple[dict[str, Value], dict[str, Any]]] = {}

    def save(self, step: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> Mapping[str, Value]:
        values: dict[str, Value] = {name: Inline(tensor.detach().clone()) for name, tensor in tensors.items()}
        self._steps[step] = (values, dict(record))
        return values

    def load(self, step: str) -> tuple[Mapping[str, Value], dict[str, Any]]:
        values, record = self._steps[step]
        return values, dict(record)

    def steps_done(self) -> tuple[str, ...]:
        return tuple(sorted(self._steps))


class ScopedSteps(StepStore):
    """The steps of one pass among those of several: names get a prefix that the pass does not see."""

    def __init__(self, inner: StepStore, prefix: str) -> None:
        self._inner = inner
        self._prefix = prefix

    def save(self, step: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> Mapping[str, Value]:
        return self._inner.save(self._prefix + step, tensors, record)

    def load(self, step: str) -> tuple[Mapping[str, Value], dict[str, Any]]:
        return self._inner.load(self._prefix + step)

    def steps_done(self) -> tuple[str, ...]:
        steps = (step for step in self._inner.steps_done() if step.startswith(self._prefix))
        return tuple(step.removeprefix(self._prefix) for step in steps)
