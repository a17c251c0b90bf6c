"""The pass over the layers: every prompt goes through a layer, everything is measured there, then the next is read.

One forward pass over the prompts plus the maps, recomputed in blocks of rows and never kept. Synthetic needles travel
along, so that weights are read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.profiles.layers import LayerReader, Opened
from attnopt.profiles.metric import Collected, Metric, SiteMetric, measured
from attnopt.profiles.metrics.block_influence import BlockInfluence
from attnopt.profiles.metrics.contribution import Contribution
from attnopt.profiles.metrics.entropy import Entropy
from attnopt.profiles.metrics.lamp import lamp_scores
from attnopt.profiles.metrics.mass import Mass
from attnopt.profiles.metrics.patterns import RetainedMass
from attnopt.profiles.metrics.qnorm import QueryNorm
from attnopt.profiles.metrics.retrieval import Needle, copying
from attnopt.profiles.metrics.streaming import Streaming
from attnopt.profiles.metrics.thumbnail import Thumbnail
from attnopt.profiles.pairs.compare import LayerComparison
from attnopt.profiles.pairs.rows import affordable
from attnopt.profiles.prompts import Prompts
from attnopt.progress import Reporter, bar
from attnopt.rewriter.interpret import Env, LayerRunner, LoadedSegment
from attnopt.rewriter.memory import give_back

#: Measured on every prompt.
FORWARD: tuple[type[Metric], ...] = (
    Entropy,
    Mass,
    RetainedMass,
    Streaming,
    Contribution,
    QueryNorm,
    BlockInfluence,
)
#: Measured on the first prompt only.
FIRST_ONLY: tuple[type[Metric], ...] = (Thumbnail,)


@dataclass(frozen=True)
class Measured:
    """What the pass found.

    Attributes:
        forward: values of `FORWARD` by prompt and layer.
        first: of `FIRST_ONLY`.
        needles: of the retrieval score; empty where there are no needles.
        weights: scores from weights alone, as if of one prompt.
        sites: values of site metrics, one "prompt" per pool.
        pairs: arrays of the comparison of layers, [prompts, ...].
        tokens: how many attended to each other in each layer, on the longest prompt.
    """

    forward: Collected
    first: Collected
    needles: Collected
    weights: Collected
    sites: Collected
    pairs: dict[str, Tensor]
    tokens: list[int]


class ForwardPass:
    """The pass; see the module.

    Args:
        runner: of the program.
        reader: opens its layers.
        prompts: what to measure on.
        needles: synthetic prompts; empty where the model reads no tokens or does not go from left to right.
        site_metrics: measured on pools of prompts.
        reporter: told of the layers done.
    """

    def __init__(
        self,
        runner: LayerRunner,
        reader: LayerReader,
        prompts: Prompts,
        needles: Sequence[Needle],
        site_metrics: Sequence[type[SiteMetric]],
        reporter: Reporter,
    ) -> None:
        self.runner, self.reader, self.prompts, self.needles = runner, reader, prompts, needles
        self.site_metrics, self.reporter = site_metrics, reporter
        layers = len(runner.layers)
        forward, first, needle, weights, sites = (Collected(layers) for _ in range(5))
        self.found = Measured(forward, first, needle, weights, sites, {}, [0] * layers)
        self.comparison: LayerComparison | None = None

    @torch.inference_mode()
    def run(self) -> Measured:
        """Measure everything."""
        envs = [self.runner.start(inputs) for inputs in self.prompts.inputs]
        probes = [self.runner.start({"input_ids": needle.ids}) for needle in self.needles]
        with bar(self.reporter, "measuring heads", len(self.runner.layers), "layers") as handle:
            for index, segment in enumerate(self.runner.layers):
                with self.runner.load(segment) as layer:
                    self._layer(index, layer, envs, probes)
                self.reporter.advance(handle)
        if self.comparison is not None:
            self.found.pairs.update(self.comparison.result())
            self.comparison = None  # what it kept of every layer is the largest thing in memory
            give_back()
        return self.found

    def _layer(self, index: int, layer: LoadedSegment, envs: list[Env], probes: list[Env]) -> None:
        site = layer.segment.site
        assert site is not None
        self.found.weights.add(0, index, lamp_scores(site, layer.weight))
        pools = [metric(site, layer.weight) for metric in self.site_metrics if metric.obstacle(site) is None]
        halves = [[*pools], [type(pool)(site, layer.weight) for pool in pools]]
        for place, env in enumerate(envs):
            opened = self.reader.open(layer, env)
            self._measure(index, place, opened)
            self._compare(place, opened)
            if place < self.reader.settings.spectrum_prompts:
                for pool in halves[place % 2]:
                    pool.update(opened.x, opened.view)
            envs[place] = layer.advance(env, {site.nodes.output: opened.y})
        if self.comparison is not None:
            self.comparison.end_layer()
        for half, pool_metrics in enumerate(halves):
            for pool in pool_metrics:
                self.found.sites.add(half, index, pool.result())
        for place, (env, needle) in enumerate(zip(probes, self.needles, strict=True)):
            opened = self.reader.open(layer, env)
            self.found.needles.add(place, index, copying(opened.view, needle))
            probes[place] = layer.advance(env, {site.nodes.output: opened.y})

    def _measure(self, index: int, place: int, opened: Opened) -> None:
        view = opened.view
        self.found.tokens[index] = max(self.found.tokens[index], view.geometry.length)
        kinds = FORWARD + (FIRST_ONLY if place == 0 else ())
        for metric, values in measured(kinds, view):
            of = self.found.first if isinstance(metric, FIRST_ONLY) else self.found.forward
            of.add(place, index, values)

    def _compare(self, place: int, opened: Opened) -> None:
        if self.comparison is None and place == 0:
            layers = len(self.runner.layers)
            count = affordable(self.reader.settings, len(self.prompts), opened.view, layers)
            self.comparison = LayerComparison(layers, count)
        assert self.comparison is not None
        if place < self.comparison.prompts:
            self.comparison.add(opened.view)
