"""What the model loses when one layer alone is converted, at several sizes: measured at its output, on held-out text.

Errors of a layer's own output do not tell it: in SmolLM2 the same relative error costs several times as much in one
layer as in another. So held-out text goes to the model's end behind every trial, all side by side, layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.passes.common.difference import difference, kind_for
from attnopt.passes.common.stream import Batch, Stream
from attnopt.passes.mla.budget import Split, quick_form, split_at
from attnopt.passes.mla.slots import slot_energies
from attnopt.passes.mla.statistics import LayerStatistics
from attnopt.progress import Reporter, bar
from attnopt.rewriter import parallel
from attnopt.rewriter.interpret import Env, LoadedSegment
from attnopt.rewriter.precision import quick_products
from attnopt.rewriter.site import AttentionSite

#: Tokens that go to the end behind each trial, as far as the hidden states of all trials fit in so many bytes.
TRIAL_TOKENS, TRIAL_BYTES = 2048, 1 << 30


def trial_bytes(layers: int, sizes: int, width: int) -> int:
    """Bytes that hidden states of `width` float32 numbers take at most, for so many layers tried at so many sizes."""
    return min(TRIAL_BYTES, layers * sizes * TRIAL_TOKENS * width * 4)


@dataclass(eq=False)
class _Trial:
    """One layer converted to one split, and what is live behind it for each batch."""

    fqn: str
    split: Split
    envs: list[Env]


class Trials:
    """Trials on their way through the source model.

    Args:
        stream: of the source model, before its first layer; held-out windows of it are used.
        sizes: budgets at which each layer is tried.
        lane: whether one latent channel is the constant.
        layers: how many layers will be tried; memory is divided by it.
    """

    def __init__(self, stream: Stream, sizes: Sequence[int], lane: bool, layers: int) -> None:
        self.stream, self.sizes, self.lane = stream, sizes, lane
        self.batches: list[Batch] = []
        room, tokens = TRIAL_BYTES // max(1, layers * len(sizes)), TRIAL_TOKENS
        for batch in stream.batches:
            size = batch.env.hidden.nbytes
            if batch.held_out and not batch.lone and (not self.batches or (tokens > 0 and room >= size)):
                self.batches.append(batch)
                tokens -= batch.positions.numel()
                room -= size
        self._trials: list[_Trial] = []

    def begin(self, site: AttentionSite, loaded: LoadedSegment, stats: LayerStatistics, share: float) -> None:
        """Send the text through a layer, converted to each size; the stream stands before it.

        Args:
            site, loaded: the layer.
            stats: of it.
            share: of a size that is rope width.
        """
        inputs = [loaded.evaluate(self.stream.env(batch), site.nodes.input) for batch in self.batches]
        energies = slot_energies(stats)
        for size in self.sizes:
            split = split_at(site, size, share, self.lane)
            layer = quick_form(stats, energies, split, self.lane)
            envs = []
            for x, batch in zip(inputs, self.batches, strict=True):
                output = layer.attend(stats.layer, x, positions=batch.positions)
                envs.append(self._kept(loaded.advance(self.stream.env(batch), overrides={site.nodes.output: output})))
            self._trials.append(_Trial(site.fqn, split, envs))

    def advance(self, loaded: LoadedSegment) -> None:
        """Send the text of all trials begun before through the next layer as it is."""
        for trial in self._trials:
            trial.envs = [self._kept(loaded.advance(self._wide(env))) for env in trial.envs]

    def losses(self, reporter: Reporter) -> dict[str, dict[Split, float]]:
        """Mean difference of the outputs, by layer and split, once the stream has gone through all layers.

        It is the Kullback-Leibler divergence from the source model in nats per token; for models without logits the
        squared difference relative to the output's square (`passes.common.difference`).

        Args:
            reporter: told of the outputs compared.
        """
        runner = self.stream.runner
        kind = kind_for(runner.program.outputs)
        sums = [0.0] * len(self._trials)
        total = len(self.batches) * len(self._trials)
        with quick_products(runner.device), bar(reporter, "comparing outputs", total, "trials") as handle:
            for place, batch in enumerate(self.batches):
                aim = runner.finish(self.stream.env(batch))
                for index, trial in enumerate(self._trials):
                    found = runner.finish(self._wide(trial.envs[place]))
                    # Window by window: logits are large, and a difference needs several copies of them.
                    pairs = zip(found, aim, strict=True)
                    sums[index] += sum(float(difference(ours, theirs, kind)[0]) for ours, theirs in pairs)
                    reporter.advance(handle)
        runner.close()
        tokens, *sums = parallel.sum_of(sum(batch.positions.numel() for batch in self.batches), *sums)
        result: dict[str, dict[Split, float]] = {}
        for trial, loss in zip(self._trials, sums, strict=True):
            result.setdefault(trial.fqn, {})[trial.split] = loss / tokens
        return result

    def _kept(self, env: Env) -> Env:
        return env.with_hidden(env.hidden.to(self.stream.keep))

    def _wide(self, env: Env) -> Env:
        return env.with_hidden(env.hidden.to(self.stream.runner.dtype))
