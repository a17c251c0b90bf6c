"""The first look: some windows through the source model, for what must be known before any layer is converted.

Stock model classes have one rope table for all layers, so the frequencies of the slots are chosen on all layers
together; so is the split of the budget between rope and rank. Where layers may differ in size, each has a split of its
own, and every layer is tried alone at several sizes, down to the model's output (`trials.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.passes.common.positions import reach_of
from attnopt.passes.common.stream import Stream
from attnopt.passes.mla.budget import HeldOut, Split, allocate, best_split, split_at, split_errors, step_of
from attnopt.passes.mla.slots import choose_table, slot_energies
from attnopt.passes.mla.source_layer import read_source
from attnopt.passes.mla.statistics import LayerStatistics
from attnopt.passes.mla.trials import Trials
from attnopt.progress import Reporter
from attnopt.rewriter.interpret import LayerRunner
from attnopt.rewriter.site import AttentionSite

#: Tokens of each pool that are looked at.
FITTED_TOKENS, HELD_OUT_TOKENS = 6144, 4096
#: Layers, spread over the depth, on which splits are tried.
MEASURED_LAYERS = 6


@dataclass(frozen=True)
class Probe:
    """What was seen.

    Attributes:
        energies: slot energies [F, G] of each layer that will be converted, by site.
        errors: error of each split tried, summed over the layers measured; empty if the split was given.
        losses: what the model loses when a layer alone is converted to a split, by site; empty if sizes are equal.
    """

    energies: Mapping[str, Tensor]
    errors: Mapping[Split, float]
    losses: Mapping[str, Mapping[Split, float]]

    def table(self, split: Split) -> tuple[int, ...]:
        """Frequencies of the slots, for all layers."""
        return choose_table(list(self.energies.values()), split.rope // 2)

    def own_table(self, fqn: str, split: Split) -> tuple[int, ...]:
        """Frequencies of the slots of one layer."""
        return choose_table([self.energies[fqn]], split.rope // 2)

    def allocated(self, sites: Mapping[str, AttentionSite], total: int, lane: bool) -> dict[str, Split]:
        """A split of its own for each layer tried, so that what the model loses is least for `total` on average."""
        losses = [{split.total: loss for split, loss in found.items()} for found in self.losses.values()]
        step = step_of(sites[next(iter(self.losses))].cached_numbers_per_token)
        sizes = allocate(losses, total * len(losses), step)
        result = {}
        for (fqn, tried), size in zip(self.losses.items(), sizes, strict=True):
            share = next(split.rope / total for split in tried if split.total == total)
            result[fqn] = split_at(sites[fqn], size, share, lane)
        return result


def some_of(windows: Tensor, tokens: int) -> Tensor:
    """Windows spread evenly over the text, together about `tokens` long, at least one."""
    count = min(len(windows), max(1, round(tokens / windows.shape[1])))
    return windows[[(2 * i + 1) * len(windows) // (2 * count) for i in range(count)]] if count else windows


def look(
    runner: LayerRunner,
    sites: Sequence[str],
    windows: Tensor,
    selection: Tensor,
    splits: Sequence[Split],
    *,
    lane: bool,
    stride: int,
    pooled: bool,
    keep: torch.dtype,
    reporter: Reporter,
    sizes: Sequence[int] = (),
) -> Probe:
    """Send some windows through the source model.

    Args:
        runner: of the source program.
        sites: the layers that will be converted.
        windows, selection: calibration text to fit on and to judge by.
        splits: splits to try; with fewer than two nothing is measured.
        lane, stride, pooled: as in the conversion.
        keep: type of the kept hidden states.
        reporter: told of the layers done.
        sizes: budgets to try every layer alone at; none if all layers get the same.
    """
    measured = set(sites) if sizes else set(spread(list(sites), MEASURED_LAYERS)) if len(splits) > 1 else set()
    held = some_of(selection, HELD_OUT_TOKENS) if measured else selection[:0]
    stream = Stream(runner, some_of(windows, FITTED_TOKENS), held, keep, spread=True, reach=reach_of(runner.program))
    trials = Trials(stream, sizes, lane, len(sites)) if sizes else None
    energies: dict[str, Tensor] = {}
    errors: list[dict[Split, float]] = []
    for site, loaded in stream.layers(reporter, "looking at the layers"):
        if trials is not None:
            trials.advance(loaded)
        if site.fqn not in sites:
            continue
        source = read_source(site, loaded.weight)
        stats = LayerStatistics(source, stride, pooled)
        samples, outputs = [], []
        for batch in stream.batches:
            x = loaded.evaluate(stream.env(batch), site.nodes.input)
            output = source.attend(x, batch.positions)
            weights = stream.weights(batch, output)
            outputs.append(output)
            if batch.held_out:
                samples.append(HeldOut(x, output, weights, batch.count, batch.positions))
            else:
                stats.update(x, weights, batch.positions)
        stats.add_up()
        stats.check()
        energies[site.fqn] = slot_energies(stats)
        if site.fqn in measured:
            errors.append(split_errors(stats, samples, splits, lane))
        if trials is not None:
            best = best_split(errors[-1])
            trials.begin(site, loaded, stats, best.rope / best.total)
        for batch, output in zip(stream.batches, outputs, strict=True):
            stream.advance(batch, loaded, output)
    totals = {split: sum(layer[split] for layer in errors) for split in splits} if errors else {}
    return Probe(energies, totals, {} if trials is None else trials.losses(reporter))


def spread(items: list[str], count: int) -> list[str]:
    """At most `count` items spread evenly."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
