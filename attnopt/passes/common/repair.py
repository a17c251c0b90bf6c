"""Repairs a rewritten program, layer by layer, so that it gives what the program before gave.

Both programs run side by side on the calibration text: the rewritten one on what its own, already repaired layers give,
the one before on its own. Closed form: each layer's output projection, its bias and what idle heads add are fitted by
least squares. Refit: after that all weights of the layer's attention by gradient steps (`attnopt.passes.common.refit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.passes.common.free import free_of
from attnopt.passes.common.reading import OutputNodes, output_nodes
from attnopt.passes.common.refit import Example, default_epochs, refit
from attnopt.passes.common.ridge import HeldOut, OutputFit
from attnopt.passes.common.stream import Batch, Stream
from attnopt.progress import bar
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.interpret import Env, LayerRunner, LoadedSegment
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.precision import quick_products
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite
from attnopt.rewriter.weights import Value, evaluate

Fill = Literal["lsq", "lsq-nobias", "mean", "none"]

#: Relative squared error below which there is nothing to repair: what 16-bit products leave.
NOISE = 1e-5


@dataclass(frozen=True)
class Settings:
    """How to repair.

    Attributes:
        fill: "lsq" fits output projection and bias, "lsq-nobias" the projection alone (for classes whose output
            projection has no bias), "mean" the bias alone, "none" nothing.
        refit: fit all weights of each changed layer after the closed form.
        epochs: passes over the text in a refit; None for as many as `default_epochs` says.
        follow: how far a layer's target leads back to the hidden state of the program before, from 0 (what that
            program's layer gives on the rewritten program's state) to 1 (whatever brings the state back).
        behind: repair the layers behind the first changed one as well.
        balance: weight of the load-balance loss of weighted gates in a refit.
        rate: largest relative step of a refit to begin with; None for what the error asks for.
        held_out: take nothing over that is worse than before on held-out text.
    """

    fill: Fill
    refit: bool = False
    epochs: int | None = None
    follow: float = 0.5
    behind: bool = True
    balance: float = 0.0
    rate: float | None = None
    held_out: bool = False

    @property
    def idle(self) -> bool:
        """True if there is nothing to do."""
        return self.fill == "none" and not self.refit


@dataclass(frozen=True)
class Repaired:
    """What a repair did.

    Attributes:
        weights: new weights of each layer by their names below the attention module.
        records: per-layer facts: errors relative to the target before, after the closed form and after the refit.
    """

    weights: Mapping[str, Mapping[str, Value]]
    records: Mapping[str, Mapping[str, Any]]


def repair(before: Program, after: Program, changed: set[str], settings: Settings, context: PassContext) -> Repaired:
    """Find weights that repair `after`.

    Args:
        before: the program before the pass.
        after: the same graph with some layers rewritten.
        changed: fqns of these.
        settings: how.
        context: calibration text, device, progress, and where finished layers are kept.
    """
    with quick_products(context.device):
        return _Repair(before, after, changed, settings, context).run()


class _Repair:
    def __init__(
        self, before: Program, after: Program, changed: set[str], settings: Settings, context: PassContext
    ) -> None:
        self.changed, self.settings, self.context = changed, settings, context
        self.old = LayerRunner(before, context.dtype, context.device)
        self.new = LayerRunner(after, context.dtype, context.device)
        self.done = set(context.workdir.steps_done()) if context.resume else set()

    def run(self) -> Repaired:
        text, settings = self.context.calibration, self.settings
        held_out = text.selection if settings.refit or settings.held_out else text.selection[:0]
        teacher = Stream(self.old, text.windows, held_out, self.context.dtype, spread=True)
        student = Stream(self.new, text.windows, held_out, self.context.dtype, spread=True)
        weights: dict[str, Mapping[str, Value]] = {}
        records: dict[str, Mapping[str, Any]] = {}
        reporter = self.context.reporter
        started = False
        with bar(reporter, "repairing", len(self.new.layers), "layers") as handle:
            for old_segment, new_segment in zip(self.old.layers, self.new.layers, strict=True):
                site = new_segment.site
                assert site is not None
                started = started or site.fqn in self.changed
                with self.old.load(old_segment) as old, self.new.load(new_segment) as new:
                    mine = site.fqn in self.changed or (settings.behind and site.o.layout == "linear")
                    if not started:
                        _advance_together(teacher, student, new, self.old)
                    elif not mine:
                        for stream, layer in ((teacher, old), (student, new)):
                            for batch in stream.batches:
                                stream.advance_unchanged(batch, layer)
                    else:
                        one = _LayerRepair(self, old, new, teacher, student)
                        weights[site.fqn], records[site.fqn] = one.run()
                reporter.advance(handle)
        return Repaired(weights, records)


def _advance_together(teacher: Stream, student: Stream, layer: LoadedSegment, old: LayerRunner) -> None:
    """Send the text through a layer that both programs have: it is computed once."""
    for mine, theirs in zip(student.batches, teacher.batches, strict=True):
        student.advance_unchanged(mine, layer)
        known = {**theirs.env.values, **mine.env.values}
        values = {name: known[name] for name in old.layers[layer.segment.index - 1].live_out}
        theirs.env = replace(mine.env, values=values)


class _LayerRepair:
    """The repair of one layer."""

    def __init__(self, job: _Repair, old: LoadedSegment, new: LoadedSegment, teacher: Stream, student: Stream) -> None:
        self.job, self.old, self.new, self.teacher, self.student = job, old, new, teacher, student
        assert new.segment.site is not None
        assert old.segment.site is not None
        self.site: AttentionSite = new.segment.site
        self.old_output = old.segment.site.nodes.output
        self.nodes: OutputNodes = output_nodes(job.new.program, new.segment)
        self.teacher_outputs: list[Tensor] = []

    def run(self) -> tuple[Mapping[str, Value], Mapping[str, Any]]:
        job = self.job
        step = f"layer-{self.site.layer:04d}"
        kept: list[Tensor] = []
        if step in job.done:
            values, record = job.context.workdir.load(step)
        else:
            weights, record, kept = self._fit()
            values = job.context.workdir.save(step, weights, record)
        self._advance({name: evaluate(value).clone() for name, value in values.items()}, kept)
        return values, record

    def _fit(self) -> tuple[dict[str, Tensor], dict[str, Any], list[Tensor]]:
        """(weights by name, record, features of every batch while only the output projection has changed)."""
        settings, site = self.job.settings, self.site
        w_o = self._output_matrix()
        fill = None if site.route is None or site.route.fill is None else self.new.weight(site.route.fill)
        start = w_o.T if fill is None else torch.cat([w_o.T, fill])
        fit = OutputFit(start, None if site.o.bias is None else self.new.weight(site.o.bias))
        kept, targets, importance = [], [], []
        for place, batch in enumerate(self.student.batches):
            z, target, weight = self._features(batch), *self._target(place)
            if not batch.held_out:
                fit.add(z, target, weight)
            kept.append(z)
            targets.append(target)
            importance.append(weight)
        fit.add_up()
        weight, bias = self._solve(fit)
        record = {"error_before": fit.error_before, "error_after": fit.error(weight, bias)}
        if settings.held_out:
            rows = zip(self.student.batches, kept, targets, importance, strict=True)
            judged = HeldOut([row[1:] for row in rows if row[0].held_out])
            before, after = judged.error(fit.weight, fit.bias), judged.error(weight, bias)
            if after > before:
                weight, bias, after = fit.weight, fit.bias, before
            record |= {"held_out_before": before, "held_out_after": after}
        found = self._named(weight.to(w_o.dtype), bias.to(w_o.dtype))
        if settings.refit and site.fqn in self.job.changed:
            found = self._refit(found, targets, importance, record)
            kept = []
        return found, record, kept

    def _solve(self, fit: OutputFit) -> tuple[Tensor, Tensor]:
        fill = self.job.settings.fill
        if fill == "none" or fit.error_before < NOISE:
            return fit.weight, fit.bias
        if free_of(self.job.new.program, self.site.o.weight, self._output_matrix()) is not None:
            return fit.weight, fit.bias  # pruned zeros stay
        if fill == "mean":
            return fit.means() if self.site.o.bias is not None else (fit.weight, fit.bias)
        return fit.solve(bias=self.site.o.bias is not None)

    def _named(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        """The fitted matrix [features, D] as the weights it stands for."""
        inputs = self.site.heads * self.site.d_v
        found = {"o_proj.weight": weight[:inputs].T.contiguous()}
        if self.site.o.bias is not None:
            found["o_proj.bias"] = bias
        if len(weight) > inputs:
            found["fill"] = weight[inputs:].contiguous()
        return found

    def _output_matrix(self) -> Tensor:
        """[D, H d_v]."""
        weight = self.new.weight(self.site.o.weight)
        return weight.T if self.site.o.layout == "conv1d" else weight

    def _features(self, batch: Batch) -> Tensor:
        """What the output is a linear function of: the heads' outputs, and for routed layers which units are idle."""
        nodes = self.nodes
        names = [nodes.context] if nodes.gates is None else [nodes.context, nodes.gates]
        found = self.new.evaluate_all(self.student.env(batch), names)
        context = found[nodes.context]
        if nodes.gates is None:
            return context
        return torch.cat([context, 1 - found[nodes.gates].reshape(*context.shape[:-1], -1)], -1)

    def _target(self, place: int) -> tuple[Tensor, Tensor]:
        """(what the layer should give for a batch, weights of its tokens)."""
        batch, ahead = self.student.batches[place], self.teacher.batches[place]
        env, reference = self.student.env(batch), self.teacher.env(ahead)
        theirs = self.old.evaluate(reference, self.old_output)
        self.teacher_outputs.append(theirs)
        beside = reference.with_hidden(env.hidden)
        if not self.nodes.added or theirs.shape != env.hidden.shape:
            own = self.old.evaluate(beside, self.old_output)
            return own, torch.full_like(own[..., 0], batch.count)
        follow = self.job.settings.follow
        target = back = reference.hidden + theirs - env.hidden
        if follow < 1:
            target = follow * back + (1 - follow) * self.old.evaluate(beside, self.old_output)
        return target, self.teacher.weights(ahead, theirs)

    def _refit(
        self, found: Mapping[str, Tensor], targets: list[Tensor], importance: list[Tensor], record: dict[str, Any]
    ) -> dict[str, Tensor]:
        site, settings = self.site, self.job.settings
        names = trained_weights(site)
        start = {short: found[short] if short in found else self.new.weight(name) for short, name in names.items()}

        def examples(place: int) -> list[Example]:
            batch = self.student.batches[place]
            env = self.student.env(batch)

            def output(weights: Mapping[str, Tensor]) -> Tensor:
                given = {names[short]: value for short, value in weights.items()}
                return self.new.evaluate_all(env, [site.nodes.output], weights=given)[site.nodes.output]

            return [Example(output, targets[place], importance[place], self._load(env))]

        pools: dict[bool, list[Any]] = {False: [], True: []}
        for place, batch in enumerate(self.student.batches):
            pools[batch.held_out].append(partial(examples, place))
        fixed = {short: free_of(self.job.new.program, names[short], value) for short, value in start.items()}
        fitted = refit(
            start,
            pools[False],
            pools[True],
            epochs=settings.epochs or default_epochs(self.job.context.calibration.windows.numel()),
            rate=settings.rate,
            seed=self.job.context.seed + site.layer,
            free={short: free for short, free in fixed.items() if free is not None},
        )
        record |= {"error_before_refit": fitted.before, "error_after_refit": fitted.after, "rate": fitted.rate}
        return dict(fitted.weights)

    def _load(self, env: Env) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
        """The load-balance loss of weighted gates: units * sum_u mean(p_u) mean(m_u) / active, 1 if spread evenly."""
        route = self.site.route
        if route is None or route.gate != "weighted" or not self.job.settings.balance:
            return None
        x, strength = self.new.evaluate(env, self.site.nodes.input), self.job.settings.balance

        def loss(weights: Mapping[str, Tensor]) -> Tensor:
            scores = torch.nn.functional.linear(x, weights["router.weight"], weights["router.bias"]).flatten(0, -2)
            chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, : route.active]
            works = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
            spread = (scores.softmax(-1).mean(0) * works.mean(0)).sum()
            return strength * scores.shape[-1] * spread / route.active

        return loss

    def _advance(self, weights: Mapping[str, Tensor], kept: list[Tensor]) -> None:
        """Send the text through both layers."""
        names = trained_weights(self.site)
        own = {names[short]: value for short, value in weights.items()}
        for place, batch in enumerate(self.student.batches):
            if kept:
                matrix = torch.cat([weights["o_proj.weight"].T, *([weights["fill"]] if "fill" in weights else [])])
                output = kept[place] @ matrix
                output = output + weights["o_proj.bias"] if "o_proj.bias" in weights else output
            else:
                found = self.new.evaluate_all(self.student.env(batch), [self.site.nodes.output], weights=own)
                output = found[self.site.nodes.output]
            self.student.advance(batch, self.new, output)
        for place, batch in enumerate(self.teacher.batches):
            if place < len(self.teacher_outputs):
                self.teacher.advance(batch, self.old, self.teacher_outputs[place])
            else:
                self.teacher.advance_unchanged(batch, self.old)


def trained_weights(site: AttentionSite) -> dict[str, str]:
    """Names of the weights that a repair may change, by their names below the attention module."""
    parts = {"q_proj": site.q, "k_proj": site.k, "v_proj": site.v, "o_proj": site.o}
    if site.latent is not None:
        parts |= {"q_proj": site.latent.q or site.q, "kv_a_proj": site.latent.kv_a, "kv_b_proj": site.latent.kv_b}
    names = {f"{short}.weight": p.weight for short, p in parts.items() if p is not None}
    names |= {f"{short}.bias": p.bias for short, p in parts.items() if p is not None and p.bias is not None}
    route = site.route
    if route is not None:
        found = {"fill": route.fill}
        if route.gate == "weighted":
            found |= {"router.weight": route.weight, "router.bias": route.bias}
            found |= {"router.share": route.shared_weight, "router.balance": route.balance}
        names |= {short: name for short, name in found.items() if name is not None}
    return names


def put(editor: Editor, site: AttentionSite, weights: Mapping[str, Value]) -> None:
    """Give a layer the weights that a repair found."""
    names = trained_weights(site)
    with editor.at(site.fqn):
        for short, value in weights.items():
            editor.set_weight(names[short], value, replace=True)
