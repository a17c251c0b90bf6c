"""The conversion of a whole program: a first look, then layer after layer behind the layers already converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.passes.common.positions import reach_of
from attnopt.passes.common.refit import default_epochs
from attnopt.passes.common.stream import Batch, Stream
from attnopt.passes.mla.budget import Split, best_split
from attnopt.passes.mla.layer import LatentLayer, closed_form
from attnopt.passes.mla.probe import Probe, look
from attnopt.passes.mla.refit import Window, output_fit, refit, with_output
from attnopt.passes.mla.source_layer import SourceLayer, read_source
from attnopt.passes.mla.splice import Shape, splice
from attnopt.passes.mla.statistics import LayerStatistics, stride_for
from attnopt.passes.mla.weights import from_weights, to_weights
from attnopt.rewriter import parallel
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.interpret import LayerRunner, LoadedSegment
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite
from attnopt.rewriter.weights import Value, evaluate

#: Second moments of all groups of a layer may take this many bytes; beyond that groups share one.
MOMENT_BYTES = 256 << 20
PROBE_STEP = "probe"


@dataclass(frozen=True)
class Settings:
    """How to convert.

    Attributes:
        splits: the split, or those to choose from; all cache the same.
        sizes: budgets to try each layer at, if layers may differ in size; else none.
        lane: whether the last latent channel is the constant 1.
        refit: fit all weights of each layer after the closed form.
        epochs: passes over the text in a refit; None for as many as `default_epochs` says.
        follow: how far a layer's target leads back to the source model's own hidden state, from 0 (the source layer's
            output on the converted model's state) to 1 (whatever brings the state back to the source's).
        shared_table: one rope table for all layers.
    """

    splits: tuple[Split, ...]
    sizes: tuple[int, ...]
    lane: bool
    refit: bool
    epochs: int | None
    follow: float
    shared_table: bool


@dataclass(frozen=True)
class Outcome:
    """A converted program's editor and what is to be told about it.

    Attributes:
        editor: holds all changes.
        summary: facts about the run.
        layers: facts about each layer.
    """

    editor: Editor
    summary: Mapping[str, Any]
    layers: tuple[Mapping[str, Any], ...]


class Job:
    """One run of the conversion.

    Args:
        program: to convert.
        sites: fqns of the layers to convert.
        settings: how.
        context: calibration text, device, progress, and where finished layers are kept.
        by: text of the pass.
    """

    def __init__(
        self, program: Program, sites: Sequence[str], settings: Settings, context: PassContext, by: str
    ) -> None:
        self.program = program
        self.sites = tuple(sites)
        self.settings = settings
        self.context = context
        self.runner = LayerRunner(program, context.dtype, context.device)
        self.stride = stride_for(context.calibration.windows)
        self.keep = _kept_type(program, context.dtype)
        self.pooled = _moment_bytes(program.sites[self.sites[0]]) > MOMENT_BYTES
        self.editor = Editor(program, by)
        self.done = set(context.workdir.steps_done()) if context.resume else set()

    def run(self) -> Outcome:
        """Convert every layer."""
        windows, selection = self.context.calibration.windows, self.context.calibration.selection
        probe = self._probe(windows, selection)
        splits = self._chosen(probe)
        tables = self._tables(probe, splits)
        held_out = selection if self.settings.refit else selection[:0]
        reach = reach_of(self.program)
        stream = Stream(self.runner, windows, held_out, self.keep, spread=True, reach=reach)
        reference = None
        if self.settings.follow:
            reference = Stream(self.runner, windows, held_out, self.keep, spread=True, reach=reach)
        records = []
        for site, loaded in stream.layers(self.context.reporter, "converting"):
            if site.fqn in self.sites:
                # Not named: what it holds must be gone before the next layer is loaded.
                records.append(_LayerJob(self, loaded, site, stream, reference, splits[site.fqn]).run(tables[site.fqn]))
            elif reference is not None:
                for batch in reference.batches:
                    reference.advance_unchanged(batch, loaded)
        summary = {
            **self._sizes(splits, probe),
            "lane": self.settings.lane,
            "recover": "refit" if self.settings.refit else "none",
            "rope_frequencies": list(tables[self.sites[0]]) if self.settings.shared_table else "per layer",
            "calibration_sha256": self.context.calibration.sha256,
            "split_errors": [
                {"qk_rope_head_dim": s.rope, "kv_lora_rank": s.rank, "error": e} for s, e in probe.errors.items()
            ],
        }
        return Outcome(self.editor, summary, tuple(records))

    def _chosen(self, probe: Probe) -> Mapping[str, Split]:
        """The split of each layer."""
        settings = self.settings
        if settings.sizes:
            return probe.allocated(self.program.sites, settings.splits[0].total, settings.lane)
        return dict.fromkeys(self.sites, best_split(probe.errors) if probe.errors else settings.splits[0])

    def _tables(self, probe: Probe, splits: Mapping[str, Split]) -> Mapping[str, tuple[int, ...]]:
        """Frequencies of the slots of each layer."""
        if self.settings.shared_table:
            return dict.fromkeys(splits, probe.table(splits[self.sites[0]]))
        return {fqn: probe.own_table(fqn, split) for fqn, split in splits.items()}

    def _sizes(self, splits: Mapping[str, Split], probe: Probe) -> dict[str, Any]:
        """What is to be told of the sizes."""
        if not self.settings.sizes:
            split = splits[self.sites[0]]
            return {"kv_lora_rank": split.rank, "qk_rope_head_dim": split.rope}
        rows = [
            {
                "site": fqn,
                "kv_lora_rank": split.rank,
                "qk_rope_head_dim": split.rope,
                "losses": {str(tried.total): loss for tried, loss in probe.losses[fqn].items()},
            }
            for fqn, split in splits.items()
        ]
        return {"sizes": rows}

    def _probe(self, windows: Tensor, selection: Tensor) -> Probe:
        workdir = self.context.workdir
        if PROBE_STEP in self.done:
            values, record = workdir.load(PROBE_STEP)
            energies = {name: evaluate(value) for name, value in values.items()}
            losses: dict[str, dict[Split, float]] = {}
            for fqn, rope, rank, loss in record["losses"]:
                losses.setdefault(fqn, {})[Split(rope, rank)] = loss
            return Probe(energies, {Split(rope, rank): error for rope, rank, error in record["errors"]}, losses)
        probe = look(
            self.runner, self.sites, windows, selection, self.settings.splits,
            lane=self.settings.lane, stride=self.stride, pooled=self.pooled, keep=self.keep,
            reporter=self.context.reporter, sizes=self.settings.sizes,
        )  # fmt: skip
        record = {
            "errors": [[split.rope, split.rank, error] for split, error in probe.errors.items()],
            "losses": [[fqn, s.rope, s.rank, loss] for fqn, tried in probe.losses.items() for s, loss in tried.items()],
        }
        workdir.save(PROBE_STEP, {name: e.contiguous() for name, e in probe.energies.items()}, record)
        return probe


class _LayerJob:
    """The conversion of one layer."""

    def __init__(
        self,
        job: Job,
        loaded: LoadedSegment,
        site: AttentionSite,
        stream: Stream,
        reference: Stream | None,
        split: Split,
    ) -> None:
        self.job, self.loaded, self.site, self.split = job, loaded, site, split
        self.stream, self.reference = stream, reference
        self.source: SourceLayer = read_source(site, loaded.weight)
        self.rank = split.rank - int(job.settings.lane)
        self.outputs: list[Tensor] = []  # the source layer's, for each batch
        self.weights: list[Tensor] = []  # of the tokens of each batch
        self.reference_outputs: dict[int, Tensor] = {}
        self.mixed: dict[int, Tensor] = {}  # heads' outputs of the converted layer, while only w_o may still change

    def run(self, table: tuple[int, ...]) -> dict[str, Any]:
        """Convert the layer, or take it from an unfinished run, and send the text through it."""
        job, site = self.job, self.site
        step = f"layer-{site.layer:04d}"
        inv_freq = self.source.inv_freq[list(table)]
        if step in job.done:
            values, record = job.context.workdir.load(step)
        else:
            weights, record = self._convert(table)
            values = job.context.workdir.save(step, weights, record)
        layer = self._layer(values, inv_freq)
        self._advance(layer)
        shape = Shape(
            self.split.rank, layer.d_nope, layer.d_rope, job.settings.lane, tuple(inv_freq.tolist()), record["peak"]
        )
        splice(job.editor, site, shape, values)
        return record

    def _layer(self, values: Mapping[str, Value], inv_freq: Tensor) -> LatentLayer:
        # Cloned: memory freshly allocated is aligned alike in every run, so that arithmetic is repeated to the bit.
        weights = {name: evaluate(value).clone() for name, value in values.items()}
        return from_weights(weights, self.source, inv_freq, self.job.settings.lane)

    def _convert(self, table: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        settings, source = self.job.settings, self.source
        stats = LayerStatistics(source, self.job.stride, self.job.pooled)
        for batch in self.stream.batches:
            x = self._input(batch)
            output = source.attend(x, batch.positions)
            importance = self.stream.weights(batch, output)
            if not batch.held_out:
                stats.update(x, importance, batch.positions)
            self.outputs.append(output.to(self.job.keep))
            self.weights.append(importance)
        stats.add_up()
        stats.check()
        layer, predicted = closed_form(stats, table, self.rank)
        layer = self._rounded(layer)
        record: dict[str, Any] = {
            "site": self.site.fqn,
            "layer": self.site.layer,
            "kv_lora_rank": self.split.rank,
            "qk_rope_head_dim": self.split.rope,
            "low_rank_share": predicted.low_rank_share,
            "slot_share": predicted.slots / max(predicted.slots + predicted.low_rank, 1e-300),
        }
        if not predicted.exact:  # else there is nothing to repair, only rounding to fit
            layer = self._ridge(layer)
            if settings.refit:
                layer = self._ridge(self._rounded(self._refit(layer, record)))
        record["peak"] = self._peak(layer)
        weights = to_weights(layer, source, settings.lane)
        if not all(bool(torch.isfinite(w).all()) for w in weights.values()):
            raise UnsupportedError(
                f"the converted weights of {self.site.fqn} are not finite", "check the model and the calibration text"
            )
        return weights, record

    def _rounded(self, layer: LatentLayer) -> LatentLayer:
        """The layer with the weights that are written, so that a resumed run computes with the same."""
        lane = self.job.settings.lane
        return from_weights(to_weights(layer, self.source, lane), self.source, layer.inv_freq, lane)

    def _input(self, batch: Batch, stream: Stream | None = None) -> Tensor:
        """Attention input of a batch."""
        return self.loaded.evaluate((stream or self.stream).env(batch), self.site.nodes.input)

    def _target(self, place: int) -> Tensor:
        """What the layer should give for a batch."""
        follow, reference = self.job.settings.follow, self.reference
        own = self.outputs[place].to(self.job.context.dtype)
        if reference is None:
            return own
        ahead = reference.env(reference.batches[place]).hidden + self._reference_output(reference, place)
        back = ahead - self.stream.env(self.stream.batches[place]).hidden
        return (1 - follow) * own + follow * back

    def _reference_output(self, reference: Stream, place: int) -> Tensor:
        """The source layer's output on the source model's own stream."""
        if place not in self.reference_outputs:
            batch = reference.batches[place]
            output = self.source.attend(self._input(batch, reference), batch.positions)
            self.reference_outputs[place] = output.to(self.job.keep)
        return self.reference_outputs[place].to(self.job.context.dtype)

    def _ridge(self, layer: LatentLayer) -> LatentLayer:
        """Refit the output projection to the targets."""
        fit = output_fit(layer)
        for place, batch in enumerate(self.stream.batches):
            if not batch.held_out:
                self.mixed[place] = layer.mixed(self.source, self._input(batch), positions=batch.positions)
                fit.add(self.mixed[place], self._target(place), self.weights[place])
        return with_output(layer, fit)

    def _refit(self, layer: LatentLayer, record: dict[str, Any]) -> LatentLayer:
        """Fit all weights to the source layer's output on the converted model's stream.

        Not to the targets: what brings the stream back to the source's is mostly out of a layer's reach, and as noise
        in its gradients it would drown the rest.
        """
        train, held_out = (self._windows(held) for held in (False, True))
        seed = self.job.context.seed + self.site.layer
        epochs = self.job.settings.epochs or default_epochs(self.job.context.calibration.windows.numel())
        layer, fitted = refit(layer, self.source, train, held_out, epochs=epochs, seed=seed)
        record |= {"error_before_refit": fitted.before, "error_after_refit": fitted.after, "rate": fitted.rate}
        return layer

    def _peak(self, layer: LatentLayer) -> float:
        """Largest norm of the latent on the text."""
        norms = (layer.latent_norm(self.source, self._input(batch)) for batch in self.stream.batches)
        return parallel.largest_of(max(norms, default=0.0))

    def _windows(self, held_out: bool) -> list[Callable[[], list[Window]]]:
        """Each batch of windows, with its share of the first tokens."""
        batches = self.stream.batches
        texts = [place for place, b in enumerate(batches) if b.held_out == held_out and not b.lone]
        starts = [place for place, b in enumerate(batches) if b.held_out == held_out and b.lone]

        def window(place: int, rows: slice) -> Window:
            x = self._input(batches[place])[rows]
            target, weights = self.outputs[place][rows].to(x.dtype), self.weights[place][rows]
            return Window(x, target, weights, batches[place].positions[rows])

        def make(index: int) -> list[Window]:
            share = slice(index, None, len(texts))
            lone = [window(place, share) for place in starts if index < len(self.outputs[place])]
            return [window(texts[index], slice(None)), *lone]

        return [partial(make, index) for index in range(len(texts))]

    def _advance(self, layer: LatentLayer) -> None:
        for place, batch in enumerate(self.stream.batches):
            mixed = self.mixed.pop(place, None)
            if mixed is None:
                mixed = layer.mixed(self.source, self._input(batch), positions=batch.positions)
            self.stream.advance(batch, self.loaded, layer.project(mixed))
            if self.reference is not None:
                output = self._reference_output(self.reference, place)
                self.reference.advance(self.reference.batches[place], self.loaded, output)


def _kept_type(program: Program, compute: torch.dtype) -> torch.dtype:
    """Type of the hidden states between layers: bfloat16 for models stored in 16 bits, which had no more in them."""
    name = str(program.config.get("dtype") or program.config.get("torch_dtype") or "").removeprefix("torch.")
    return torch.bfloat16 if name in ("bfloat16", "float16") else compute


def working_bytes(site: AttentionSite) -> int:
    """Bytes that the statistics and the closed form of one layer take beside its weights, roughly."""
    assert site.q is not None
    rows, width = site.kv_heads * (site.d_qk + site.d_v), site.q.in_features
    inner = min(rows, width)
    return min(_moment_bytes(site), MOMENT_BYTES) + 8 * (6 * inner * inner + 3 * max(rows, inner) * inner)


def _moment_bytes(site: AttentionSite) -> int:
    """Bytes of the second moments of a layer, one for the keys and one for the values of every group."""
    assert site.q is not None
    width = min(site.cached_numbers_per_token, site.q.in_features)
    return 2 * site.kv_heads * width * width * 8
