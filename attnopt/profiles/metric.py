"""Metric: one measurement of a layer's heads. One file each in `attnopt.profiles.metrics`.

A metric object lives for one layer and one prompt: it is made from a `LayerView`, may look at the blocks of the map as
they pass, and gives its values at the end. Means and spreads over prompts are taken outside, the same way for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from attnopt.profiles.profile import MetricInfo, spread
from attnopt.profiles.settings import Settings
from attnopt.profiles.view import LayerView, RowBlock
from attnopt.rewriter.site import AttentionSite


class Metric(ABC):
    """A measurement of one layer on one prompt.

    Attributes:
        uses_map: whether `update` wants the blocks of the map.
        uses_gradient: whether it belongs to the backward pass, where `view.grad` is set.
    """

    uses_map: ClassVar[bool] = False
    uses_gradient: ClassVar[bool] = False

    def __init__(self, view: LayerView) -> None:
        self.view = view

    @classmethod
    @abstractmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        """What it gives, by name; `prompts` is filled in later."""

    @classmethod
    def obstacle(cls, site: AttentionSite) -> str | None:
        """Why it makes no sense for a layer, in one clause; None if it does."""
        return None

    def update(self, block: RowBlock) -> None:  # noqa: B027 - many metrics need no map
        """Look at some rows of the map; every row passes once."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """Its values by name, with the axes described but the site's."""


def measured(kinds: Iterable[type[Metric]], view: LayerView) -> Iterator[tuple[Metric, dict[str, Tensor]]]:
    """The metrics that make sense for a layer, with their values; its map passes once for all, in blocks of rows."""
    metrics = [kind(view) for kind in kinds if kind.obstacle(view.site) is None]
    with_map = [metric for metric in metrics if metric.uses_map]
    for first, weights in view.call.blocks():
        block = RowBlock(view, first, weights)
        for metric in with_map:
            metric.update(block)
    return ((metric, metric.result()) for metric in metrics)


class SiteMetric(ABC):
    """A measurement of one layer on a pool of prompts together, for what a single prompt is too short for.

    Two pools are measured, so that there is a spread.

    Args:
        site: the layer.
        read: gives its weights by name.
    """

    def __init__(self, site: AttentionSite, read: Callable[[str], Tensor]) -> None:
        self.site = site
        self.read = read

    @classmethod
    @abstractmethod
    def describe(cls) -> dict[str, MetricInfo]:
        """What it gives, by name; `prompts` is filled in later."""

    @classmethod
    @abstractmethod
    def obstacle(cls, site: AttentionSite) -> str | None:
        """Why it makes no sense for a layer, in one clause; None if it does."""

    @abstractmethod
    def update(self, x: Tensor, view: LayerView) -> None:
        """Add a prompt: the attention's input [N, T, D], and the layer on it."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """Its values by name, with the axes described but the site's."""


class RowMean:
    """Mean over the counted rows of all windows, in float64.

    Attributes:
        total: sum so far, None before the first block.
        count: rows so far.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Add values [N, H, R, ...] of R counted rows."""
        if values.shape[2] == 0:
            return
        summed = values.double().sum((0, 2))
        self.total = summed if self.total is None else self.total + summed
        self.count += values.shape[0] * values.shape[2]

    def mean(self) -> Tensor:
        """[H, ...].

        Raises:
            ValueError: if nothing was added.
        """
        if self.total is None:
            raise ValueError("no row was counted")
        return self.total / self.count


class Collected:
    """Values of metrics by prompt and layer, on their way to arrays.

    Args:
        layers: how many there are.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._values: dict[str, dict[tuple[int, int], Tensor]] = {}

    def add(self, prompt: int, layer: int, values: Mapping[str, Tensor]) -> None:
        """Keep the values of one layer on one prompt."""
        for name, value in values.items():
            self._values.setdefault(name, {})[prompt, layer] = value.detach().double().cpu()

    def names(self) -> tuple[str, ...]:
        """What there are values of."""
        return tuple(self._values)

    def array(self, name: str) -> Tensor:
        """[n, layers, ...] for the n prompts that have values; NaN where a layer has none or is smaller."""
        values = self._values[name]
        prompts = sorted({prompt for prompt, _ in values})
        widths = [max(sizes) for sizes in zip(*(v.shape for v in values.values()), strict=True)]
        result = torch.full((len(prompts), self.layers, *widths), torch.nan, dtype=torch.float64)
        for (prompt, layer), value in values.items():
            place = result[prompts.index(prompt), layer]
            place[tuple(slice(0, size) for size in value.shape)] = value
        return result


def arrays(described: Mapping[str, MetricInfo], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of a profile, by "METRIC/PART", from values by prompt [n, ...] (or [...] for 0 prompts)."""
    result = {}
    for name, value in values.items():
        if described[name].prompts == 0:
            result[f"{name}/mean"] = value
            continue
        result[f"{name}/mean"] = value.nanmean(0)
        result[f"{name}/std"] = spread(value)
        result[f"{name}/per_prompt"] = value
    return result


def describe_all(metrics: Iterable[type[Metric]], settings: Settings, bins: int) -> dict[str, MetricInfo]:
    """What several metrics give."""
    result: dict[str, MetricInfo] = {}
    for metric in metrics:
        result |= metric.describe(settings, bins)
    return result
