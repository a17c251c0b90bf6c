"""The pass that prunes by weights alone: single weights, or heads and MLP channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.common.heads import take_heads
from attnopt.passes.common.lower import lower, obstacle
from attnopt.passes.common.weights import channels, columns, matrix, pick
from attnopt.passes.dimap.lamp import exact_count, group_scores, keep_largest, kept_counts
from attnopt.passes.dimap.modules import MODULES, Mlp, RankedLayer, find_mlps, ranked_layers
from attnopt.passes.dimap.structured import channel_norms, shrink
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.passes import Pass, PassContext, PassResult, Plan, SitePlan, option
from attnopt.rewriter.program import Program
from attnopt.rewriter.recognize import Miss
from attnopt.rewriter.site import AttentionSite
from attnopt.rewriter.weights import Derived, Value, evaluate


@dataclass(frozen=True)
class Dimap(Pass):
    """Prune by weights alone (DIMAP): sizes relative to their layer, ranked over QKV, projection and MLP modules."""

    name: ClassVar[str] = "dimap"
    section: ClassVar[str] = "weights"

    sparsity: float = option(
        0.5, help="fraction of the weights (or heads and channels) to remove", minimum=0, maximum=0.99
    )
    qkv: float | None = option(None, help="another fraction for queries, keys and values", minimum=0, maximum=0.99)
    prj: float | None = option(None, help="another fraction for output projections", minimum=0, maximum=0.99)
    mlp: float | None = option(None, help="another fraction for MLPs", minimum=0, maximum=0.99)
    structured: bool = option(False, help="remove whole heads and MLP channels for good, instead of zeroing weights")
    shares: Literal["joint", "equal"] = option(
        "joint", help="how much each module loses: what distorts least, one threshold for all, or the same (the paper)"
    )
    granularity: Literal["fused", "split"] = option(
        "split", help="rank queries, keys and values of a layer each by itself or as one matrix (the paper)"
    )

    def check(self, program: Program) -> None:
        """Refuse a program in which there is nothing to prune.

        Raises:
            UnsupportedError: structured, and no layer has heads or channels that can be removed.
        """
        if self.structured and not self._prunable(program) and not _whole(find_mlps(program)):
            reasons = dict.fromkeys(obstacle(site) or "it has one unit" for site in program.site_list)
            raise UnsupportedError("no heads or channels can be removed: " + "; ".join(reasons))

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        """Which layers are touched; how much each loses is decided from its weights."""
        what = "structured" if self.structured else "zeros"
        edit = {"kind": what, **{module: self._ratio(module) for module in MODULES}}
        if not self.structured:  # heads and channels have thresholds of their own
            edit["shares"] = self.shares
        sites = [site.fqn for site in program.site_list]
        if self.structured:
            touched = {site.fqn for site in self._prunable(program)} | {m.site for m in _whole(find_mlps(program))}
            sites = [fqn for fqn in sites if fqn in touched]
        edits = tuple(SitePlan(fqn, edit, (program.sites[fqn].cached_numbers_per_token,) * 2) for fqn in sites)
        notes = ["no text or image is read"]
        if not self.structured:
            notes.append("zeros keep shapes, speed and memory as they are; --structured removes heads and channels")
        return Plan(edits, self._misses(program), tuple(notes))

    def reshapes(self) -> bool:
        """Zeros do not."""
        return self.structured

    def wants_text(self, plan: Plan) -> bool:
        """Never: thresholds depend on the weights alone."""
        return False

    def given(self, program: Program, sections: Mapping[str, Any]) -> Plan:
        """What the file says layers keep: entries of each matrix, or heads and channels.

        Raises:
            OptionError: names or numbers that do not fit.
        """
        open_plan = self.plan(program, {})
        edits = []
        for fqn, section in sections.items():
            own = open_plan.edit_of(fqn)
            if own is None or not isinstance(section, Mapping) or section.get("kind") != own["kind"]:
                raise OptionError(f"the plan's weights of {fqn} are not what {self.to_text()} can do")
            if "keep" in section or "heads" in section or "channels" in section:
                self._check_section(program, fqn, section)
            elif dict(section) != dict(own):
                raise OptionError(
                    f"the plan's weights of {fqn} differ from the options of dimap", "change the pipeline"
                )
            edits.append(SitePlan(fqn, dict(section), (program.sites[fqn].cached_numbers_per_token,) * 2))
        return replace(open_plan, edits=tuple(edits))

    def decide(self, program: Program, plan: Plan, context: PassContext) -> Plan:
        """Read the weights and set the thresholds."""
        if not any("qkv" in edit.edit for edit in plan.edits):
            return plan
        planned = {edit.site for edit in plan.edits}
        chosen = self._choose_groups(program, planned) if self.structured else self._choose_weights(program, planned)
        edits = [replace(edit, edit=chosen[edit.site]) for edit in plan.edits if edit.site in chosen]
        if self.structured:
            edits = [replace(edit, cached_numbers_per_token=_cache(program, edit)) for edit in edits]
        return replace(plan, edits=tuple(edits))

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        """Set weights to zero, or remove heads and channels."""
        editor = Editor(program, self.to_text())
        if self.structured:
            summary = self._remove(editor, program, plan)
        else:
            summary = self._zero(editor, program, plan)
        layers = [{"site": edit.site, "layer": program.sites[edit.site].layer, **edit.edit} for edit in plan.edits]
        return PassResult.of(editor, misses=plan.misses, summary=summary, layers=layers)

    # -- single weights

    def _ratio(self, module: str) -> float:
        given = getattr(self, module)
        return self.sparsity if given is None else float(given)

    def _rankings(self) -> list[tuple[tuple[str, ...], float]]:
        """Modules that are ranked together and what they lose; one with its own fraction is ranked alone."""
        alone = [m for m in MODULES if self.shares == "equal" or getattr(self, m) is not None]
        together = tuple(m for m in MODULES if m not in alone)
        return [((m,), self._ratio(m)) for m in alone] + ([(together, self.sparsity)] if together else [])

    def _choose_weights(self, program: Program, planned: set[str]) -> dict[str, dict[str, Any]]:
        chosen: dict[str, dict[str, Any]] = {}
        for modules, ratio in self._rankings():
            layers = [
                one for one in ranked_layers(program, self.granularity) if one.module in modules and one.site in planned
            ]
            readers = [_reader(program, one) for one in layers]
            total = sum(_size(program, one) for one in layers)
            counts = kept_counts(readers, exact_count(total, ratio)) if layers else []
            for one, count in zip(layers, counts, strict=True):
                keep = chosen.setdefault(one.site, {"kind": "zeros", "keep": {}})["keep"]
                for name, part in _divided(program, one, count).items():
                    keep.setdefault(name, []).append(part)
        return chosen

    def _zero(self, editor: Editor, program: Program, plan: Plan) -> dict[str, Any]:
        zeros, sizes = dict.fromkeys(MODULES, 0), dict.fromkeys(MODULES, 0)
        modules = {name: one.module for one in ranked_layers(program, self.granularity) for name in one.weights}
        for edit in plan.edits:
            with editor.at(edit.site):
                for name, counts in edit.edit["keep"].items():
                    numel = program.weights.meta(name).numel
                    sizes[modules[name]] += numel
                    zeros[modules[name]] += numel - sum(counts)
                    if sum(counts) < numel:
                        value = Derived.of(keep_largest.__name__, program.weights[name], counts=tuple(counts))
                        editor.set_weight(name, value, replace=True)
        return {
            "zeroed": zeros,
            "sparsity": {m: zeros[m] / sizes[m] if sizes[m] else 0.0 for m in MODULES},
            "parameters_removed": 0,
        }

    # -- heads and channels

    def _prunable(self, program: Program) -> list[AttentionSite]:
        shared = {site.share.source for site in program.site_list if site.share is not None}
        return [
            site
            for site in program.site_list
            if obstacle(site) is None and site.share is None and site.fqn not in shared and site.route is None
            and len(_units(site)) > 1
        ]  # fmt: skip

    def _misses(self, program: Program) -> tuple[Miss, ...]:
        if not self.structured:
            return ()
        kept = {site.fqn for site in self._prunable(program)}
        reason = "its heads are shared, routed or too few to remove any"
        return tuple(
            Miss(f"{site.fqn}: {obstacle(site) or reason}", (site.nodes.attention,))
            for site in program.site_list
            if site.fqn not in kept
        )

    def _choose_groups(self, program: Program, planned: set[str]) -> dict[str, dict[str, Any]]:
        sites = [site for site in self._prunable(program) if site.fqn in planned]
        heads = [group_scores(_unit_norms(program, site)) for site in sites]
        ratio = self.sparsity if self.qkv is None else self.qkv
        chosen: dict[str, dict[str, Any]] = {fqn: {"kind": "structured"} for fqn in planned}
        for site, kept in zip(sites, _over_threshold(heads, ratio), strict=True):
            units = _units(site)
            ids = sorted(site.original_heads[h] for u in kept for h in units[u])
            if len(ids) < site.heads:
                chosen[site.fqn]["heads"] = ids
        mlps = [mlp for mlp in _whole(find_mlps(program)) if mlp.site in planned]
        norms = [group_scores(channel_norms(program, mlp)) for mlp in mlps]
        for mlp, kept in zip(mlps, _over_threshold(norms, self._ratio("mlp")), strict=True):
            if len(kept) < mlp.out.in_features:
                chosen[mlp.site].setdefault("channels", {})[mlp.out.weight] = kept
        return {fqn: edit for fqn, edit in chosen.items() if len(edit) > 1}

    def _remove(self, editor: Editor, program: Program, plan: Plan) -> dict[str, Any]:
        facts = {}
        removed_heads = removed_channels = 0
        mlps = {mlp.out.weight: mlp for mlp in _whole(find_mlps(program))}
        for edit in plan.edits:
            site = program.sites[edit.site]
            if "heads" in edit.edit:
                kept = [site.original_heads.index(h) for h in edit.edit["heads"]]
                facts[site.fqn] = take_heads(editor, program, site, sorted(kept))
                removed_heads += site.heads - len(kept)
            for name, kept_channels in edit.edit.get("channels", {}).items():
                shrink(editor, program, mlps[name], kept_channels)
                removed_channels += mlps[name].out.in_features - len(kept_channels)
        lower(editor, program, facts)
        return {"heads_removed": removed_heads, "mlp_channels_removed": removed_channels, "zeroed": 0}

    def _check_section(self, program: Program, fqn: str, section: Mapping[str, Any]) -> None:
        site = program.sites[fqn]
        if self.structured:
            heads, mlps = section.get("heads", list(site.original_heads)), _whole(find_mlps(program))
            widths = {mlp.out.weight: mlp.out.in_features for mlp in mlps if mlp.site == fqn}
            good = set(section) <= {"kind", "heads", "channels"} and heads and set(heads) <= set(site.original_heads)
            for name, kept in section.get("channels", {}).items():
                good = good and name in widths and bool(kept) and kept == sorted(set(kept))
                good = good and kept[0] >= 0 and kept[-1] < widths[name]
        else:
            names = {n for one in ranked_layers(program, self.granularity) if one.site == fqn for n in one.weights}
            good = set(section) == {"kind", "keep"} and set(section["keep"]) <= names
            for name, counts in section["keep"].items() if good else ():
                parts = program.weights.meta(name).numel // len(counts)
                good = good and all(type(c) is int and 0 <= c <= parts for c in counts)
        if not good:
            raise OptionError(
                f"the plan's weights of {fqn} do not fit that layer", "take numbers that --dry-run prints"
            )


def _whole(mlps: Sequence[Mlp]) -> list[Mlp]:
    """MLPs whose channels can be removed: nothing cuts them up in between."""
    return [mlp for mlp in mlps if mlp.pointwise]


def _size(program: Program, layer: RankedLayer) -> int:
    return sum(_numel(program, layer, name) for name in layer.weights)


def _numel(program: Program, layer: RankedLayer, name: str) -> int:
    meta = program.weights.meta(name)
    return meta.numel if layer.expert is None else meta.numel // meta.shape[0]


def _reader(program: Program, layer: RankedLayer) -> Callable[[], Tensor]:
    def read() -> Tensor:
        return torch.cat([_entries(program, layer, name) for name in layer.weights])

    return read


def _entries(program: Program, layer: RankedLayer, name: str) -> Tensor:
    value = program.weights[name]
    if layer.expert is not None:
        value = Derived.of("rows", value, start=layer.expert, stop=layer.expert + 1)
    return evaluate(value).flatten().abs()


def _divided(program: Program, layer: RankedLayer, count: int) -> dict[str, int]:
    """How many of the `count` largest entries of a layer lie in each of its matrices."""
    if len(layer.weights) == 1:
        return {layer.weights[0]: count}
    entries = _reader(program, layer)()
    largest = entries.sort(descending=True, stable=True).indices[:count]
    sizes = torch.tensor([_numel(program, layer, name) for name in layer.weights])
    owner = torch.bucketize(largest, sizes.cumsum(0), right=True)
    counts = torch.bincount(owner, minlength=len(sizes)).tolist()
    return dict(zip(layer.weights, counts, strict=True))


def _units(site: AttentionSite) -> list[tuple[int, ...]]:
    """Heads that go together: all that read one key/value head; single ones for latent attention."""
    groups: dict[int, list[int]] = {}
    for head, group in enumerate(site.kv_head_of):
        groups.setdefault(group, []).append(head)
    return [tuple(group) for group in groups.values()]


def _unit_norms(program: Program, site: AttentionSite) -> Tensor:
    """Norm of all weights of each unit: rows of the queries, keys and values, columns of the output projection."""
    store, found = program.weights, []
    for group, unit in enumerate(_units(site)):
        parts: list[Value] = [columns(store, site.o, channels(unit, site.d_v))]
        if site.latent is not None:
            query = site.latent.q or site.q
            assert query is not None
            parts.append(matrix(store, query, channels(unit, query.out_features // site.heads)))
            parts.append(matrix(store, site.latent.kv_b, channels(unit, site.latent.d_nope + site.d_v)))
            if site.latent.q_map is not None:
                parts.append(pick(store[site.latent.q_map], list(unit), 0))
        else:
            assert site.q is not None
            assert site.k is not None
            assert site.v is not None
            parts.append(matrix(store, site.q, channels(unit, site.d_qk)))
            parts.append(matrix(store, site.k, channels([group], site.d_qk)))
            parts.append(matrix(store, site.v, channels([group], site.d_v)))
        found.append(sum(float(evaluate(part).double().pow(2).sum()) for part in parts) ** 0.5)
    return torch.tensor(found, dtype=torch.float64)


def _over_threshold(groups: Sequence[Tensor], ratio: float) -> list[list[int]]:
    """Numbers of the groups that stay in each layer when one threshold removes `ratio` of them all; never the best."""
    if not groups:
        return []
    every = torch.cat(list(groups))
    order = every.sort(descending=True, stable=True).indices
    kept = torch.zeros(len(every), dtype=torch.bool)
    kept[order[: max(len(groups), exact_count(len(every), ratio))]] = True
    return [part.nonzero().flatten().tolist() for part in kept.split([len(group) for group in groups])]


def _cache(program: Program, edit: SitePlan) -> tuple[int, int]:
    site = program.sites[edit.site]
    heads = edit.edit.get("heads", site.original_heads)
    groups = {site.kv_head_of[site.original_heads.index(h)] for h in heads}
    cached = site.cached_numbers_per_token
    return cached, cached if site.latent is not None else cached * len(groups) // site.kv_heads
