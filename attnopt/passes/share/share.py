"""The pass that lets layers read an earlier layer's attention map, or its keys and values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.common.heads import take_heads
from attnopt.passes.common.lower import obstacle
from attnopt.passes.common.moments import check_text
from attnopt.passes.common.profile import sharing_groups
from attnopt.passes.common.repairing import Repairing
from attnopt.passes.common.transform import transform
from attnopt.passes.share.align import consumer_order
from attnopt.passes.share.measure import Edge, measure_edges
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.passes import PassContext, PassResult, Plan, SitePlan, option
from attnopt.rewriter.program import Program, fake_value
from attnopt.rewriter.recognize import Miss
from attnopt.rewriter.site import AttentionSite, CacheSpec, ShareSpec

#: Windows of calibration text that edges are measured on.
WINDOWS = 4


@dataclass(frozen=True)
class Share(Repairing):
    """Let layers read an earlier layer's attention map (EchoAtt), or its keys and values (KVSharer, CLA)."""

    name: ClassVar[str] = "share"
    section: ClassVar[str] = "share"
    not_after: ClassVar[Mapping[str, str]] = {
        "to-mla": "latent attention has no map or keys and values of its own to share",
        "moh": "a router leaves out heads whose maps others would read",
        "dimap": "the repair would fill its zeros again",
    }

    layers: str = option("auto", help='layers that read another\'s, e.g. "7,8,25-28" or "8:6" (8 reads 6), or auto')
    fraction: float | None = option(
        None, help="with layers=auto: fraction of all layers that read another's; 0.25", minimum=0.01, maximum=0.95
    )
    edge: Literal["map", "kv"] = option("map", help="what is read: the attention map, or keys and values")
    source: Literal["best", "nearest"] = option("best", help="which earlier layer: of least error, or the nearest")
    reach: int = option(4, help="how many layers back a source may lie", minimum=1)
    protect: int = option(1, help="layers at either end that stay as they are", minimum=0)
    align: bool = option(True, help="reorder heads to match the source's")
    max_error: float = option(0.9, help="largest repaired error of a layer's output, relative to its size", minimum=0)

    def check(self, program: Program) -> None:
        """Refuse options that contradict each other and programs of which no two layers can share.

        Raises:
            OptionError: for the options.
            UnsupportedError: with the reasons.
        """
        if self.layers != "auto":
            if self.fraction is not None:
                raise OptionError("layers and fraction exclude each other", "give one of them")
            self._listed(program)
        elif not any(self._candidates(program).values()):
            reasons = dict.fromkeys(miss.reason for miss in self._misses(program))
            raise UnsupportedError("no layer can read another's: " + "; ".join(reasons), "attnopt inspect shows them")

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        """The edges asked for; with layers=auto they are chosen by measuring."""
        notes = [] if self.edge == "kv" else ["a reused map saves query and key projections and the key cache"]
        if self.edge == "kv":
            notes = ["shared keys and values save their projections and the whole cache of the layer"]
        if self.layers == "auto":
            notes.append(f"{self._count(program)} of {len(program.sites)} layers are chosen by their measured error")
            return Plan((), self._misses(program), tuple(notes))
        edits = []
        for consumer, source in self._listed(program).items():
            if source is not None:
                edits.append(self._edit(program, consumer, source, None))
            else:
                names = [program.site_list[i].fqn for i in self._all_sources(program, consumer)]
                edits.append(SitePlan(program.site_list[consumer].fqn, {"among": names}, (0, 0)))
        return Plan(tuple(edits), (), tuple(notes))

    def wants_text(self, plan: Plan) -> bool:
        """For the repair, and for measuring edges."""
        chosen = bool(plan.edits) and all("head_map" in edit.edit for edit in plan.edits)
        return not self.settings.idle or not chosen

    def given(self, program: Program, sections: Mapping[str, Any]) -> Plan:
        """The edges that a file lists.

        Raises:
            OptionError: an edge that is malformed or not legal.
        """
        edits = []
        for fqn, section in sections.items():
            site = program.sites[fqn]
            key = f"{self.edge}_from"
            if not isinstance(section, Mapping) or set(section) - {key, "head_map"} or key not in section:
                raise OptionError(f"the plan's share of {fqn} is not of the form {{'{key}': layer, 'head_map': [...]}}")
            source = program.sites.get(section[key])
            if source is None:
                raise OptionError(f"the plan lets {fqn} read {section[key]!r}, which is no attention layer")
            reason = self._edge_obstacle(program, source, site)
            if reason is None and source.fqn in sections:
                reason = f"{source.fqn} reads another layer's itself"
            if reason is not None:
                raise OptionError(f"the plan lets {fqn} read {source.fqn}, but {reason}", "take that edge out")
            heads = section.get("head_map")
            if heads is not None and not _is_head_map(heads, source, site):
                raise OptionError(
                    f"the plan's head_map of {fqn} is not an order of {source.fqn}'s heads that keeps groups together",
                    f"give one of the heads {list(source.original_heads)} for each of its heads",
                )
            edits.append(self._edit(program, site.layer, source.layer, heads))
        order = list(program.sites)
        return Plan(tuple(sorted(edits, key=lambda edit: order.index(edit.site))), ())

    def decide(self, program: Program, plan: Plan, context: PassContext) -> Plan:
        """Choose edges and the order of heads by their measured error."""
        if plan.edits and all("head_map" in edit.edit for edit in plan.edits):
            return plan
        check_text(program, context, "measuring edges")
        if plan.edits:
            edges = measure_edges(program, self._wanted(program, plan), self.edge, self.align, context, WINDOWS)
            chosen = _best_each(edges, self.source, set())
        else:
            candidates = self._preferred(program, context)
            edges = measure_edges(program, candidates, self.edge, self.align, context, WINDOWS)
            chosen = _greedy(edges, self.source, self._count(program), self.max_error)
            if not chosen:
                least = min(edge.repaired for edge in edges)
                raise UnsupportedError(
                    f"no layer can read another's with an error below {self.max_error:g}; the least is {least:.3g}",
                    "raise max-error, or name the layers",
                )
        closed = []
        for one in sorted(chosen, key=lambda edge: edge.consumer):
            source = program.site_list[one.source]
            ids = [source.original_heads[h] for h in one.head_map]
            closed.append(self._edit(program, one.consumer, one.source, ids))
        notes = list(plan.notes)
        if len(chosen) < self._count(program) and self.layers == "auto":
            notes.append(
                f"only {len(chosen)} layers read another's: the rest would exceed max-error={self.max_error:g}"
            )
        notes += [
            f"layer {e.consumer} reads {e.source}: error {e.error:.3f}, repaired {e.repaired:.3f}" for e in chosen
        ]
        return replace(plan, edits=tuple(closed), notes=tuple(notes))

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        """Take the projections away and draw the edges, then repair."""
        editor = Editor(program, self.to_text())
        facts, records = {}, {}
        for edit in plan.edits:
            site, source = program.sites[edit.site], program.sites[edit.edit[f"{self.edge}_from"]]
            heads = [source.original_heads.index(h) for h in edit.edit["head_map"]]
            site_facts = take_heads(editor, program, site, consumer_order(heads))
            facts[site.fqn] = _consumer_facts(site_facts, source, self.edge)
            records[site.fqn] = {"share": {f"{self.edge}_from": source.fqn, "head_map": list(edit.edit["head_map"])}}
        summary = {"edge": self.edge, "consumers": len(facts), "fill": self.fill, "recover": self.recover}
        return transform(
            program, editor, facts, self.settings, context, self.to_text(),
            misses=plan.misses, summary=summary, records=records,
        )  # fmt: skip

    def ensures(self, before: Program, after: Program) -> list[str]:
        """What is shared has no projections of its own any more, in the facts and in the graph."""
        read = set(after.weight_names)
        broken = []
        for fqn, site in after.sites.items():
            old = before.sites[fqn]
            if site.share is None or old.share is not None:
                continue
            gone = (old.q, old.k) if site.share.edge == "map" else (old.k, old.v)
            kept = {p.weight for p in (site.q, site.k, site.v, site.o) if p is not None}
            if any(p is not None and p.weight in read - kept and p.rows == _all_rows(before, p) for p in gone):
                broken.append(f"{fqn} still computes what it shares")
        return broken

    # -- legality

    def _site_obstacle(self, site: AttentionSite) -> str | None:
        if site.latent is not None:
            return "it is latent attention"
        if site.route is not None:
            return "its heads are routed"
        return obstacle(replace(site, q_norm=None, k_norm=None)) if self.edge == "map" else obstacle(site)

    def _edge_obstacle(self, program: Program, source: AttentionSite, consumer: AttentionSite) -> str | None:
        """Why one layer cannot read another's, in one clause; None if it can."""
        for site in (source, consumer):
            reason = self._site_obstacle(site)
            if reason is not None:
                return f"{site.fqn}: {reason}"
        if source.layer >= consumer.layer:
            return f"{source.fqn} comes later"
        if source.share is not None:
            return f"{source.fqn} reads another layer's itself"
        if consumer.share is not None:
            return f"{consumer.fqn} reads another layer's already"
        if any(site.share is not None and site.share.source == consumer.fqn for site in program.site_list):
            return f"{consumer.fqn} is read by others"
        same = ["heads", "kv_heads", "d_qk", "kv_of", *(["d_v"] if self.edge == "kv" else [])]
        if any(getattr(source, name) != getattr(consumer, name) for name in same):
            return "their heads differ in number or width"
        plain = [replace(site.mask, bias=(), sinks=None) for site in (source, consumer)]
        if plain[0] != plain[1] or (source.mask.sinks is None) != (consumer.mask.sinks is None):
            return "their masks differ"
        ropes = [site.rope and (site.rope.inv_freq, site.rope.style, site.rope.offset) for site in (source, consumer)]
        if ropes[0] != ropes[1]:
            return "their positions turn differently"
        if _extent(program, source) != _extent(program, consumer):
            return "they see other parts of the input (another stage, or another shift of the windows)"
        return None

    def _candidates(self, program: Program) -> dict[int, list[int]]:
        """Sources that each layer may have, nearest first."""
        sites = program.site_list
        inner = range(self.protect, len(sites) - self.protect)
        return {
            j: [
                i
                for i in range(j - 1, max(-1, j - 1 - self.reach), -1)
                if self._edge_obstacle(program, sites[i], sites[j]) is None
            ]
            for j in inner
        }

    def _preferred(self, program: Program, context: PassContext) -> dict[int, list[int]]:
        """The candidates; where a profile names groups of layers alike, within these."""
        candidates = self._candidates(program)
        groups = sharing_groups(context.profiles)
        inside = {
            j: [i for i in sources if any(i in group and j in group for group in groups)]
            for j, sources in candidates.items()
        }
        enough = sum(bool(sources) for sources in inside.values()) >= self._count(program)
        return inside if groups and enough else candidates

    def _misses(self, program: Program) -> tuple[Miss, ...]:
        sites, candidates = program.site_list, self._candidates(program)
        found = []
        for j, sources in candidates.items():
            if j and not sources:
                reason = self._edge_obstacle(program, sites[j - 1], sites[j])
                found.append(Miss(f"{sites[j].fqn}: {reason}", (sites[j].nodes.attention,)))
        return tuple(found)

    def _count(self, program: Program) -> int:
        return max(1, round((self.fraction or 0.25) * len(program.sites)))

    def _listed(self, program: Program) -> dict[int, int | None]:
        """Consumers that `layers` names, with their sources where it names them."""
        listed = parse_layers(self.layers, len(program.sites))
        sites = program.site_list
        for consumer, source in listed.items():
            if source is not None:
                reason = self._edge_obstacle(program, sites[source], sites[consumer])
                if source in listed:
                    reason = f"layer {source} reads another layer's itself"
                if reason is not None:
                    raise OptionError(f"layer {consumer} cannot read layer {source}: {reason}")
            elif not [i for i in self._all_sources(program, consumer) if i not in listed]:
                raise OptionError(f"layer {consumer} has no earlier layer that it could read", "leave it out")
        return listed

    def _all_sources(self, program: Program, consumer: int) -> list[int]:
        sites = program.site_list
        return [i for i in range(consumer) if self._edge_obstacle(program, sites[i], sites[consumer]) is None]

    def _wanted(self, program: Program, plan: Plan) -> dict[int, list[int]]:
        """Edges to measure for layers that were named: the nearest sources that are no consumers."""
        wanted = {}
        consumers = {edit.site for edit in plan.edits}
        for edit in plan.edits:
            consumer = program.sites[edit.site].layer
            given = edit.edit.get(f"{self.edge}_from")
            if given is not None:
                wanted[consumer] = [program.sites[given].layer]
                continue
            sources = [i for i in self._all_sources(program, consumer) if program.site_list[i].fqn not in consumers]
            wanted[consumer] = sources[::-1][: self.reach]
        return wanted

    def _edit(self, program: Program, consumer: int, source: int, heads: Sequence[int] | None) -> SitePlan:
        site, other = program.site_list[consumer], program.site_list[source]
        edit: dict[str, Any] = {f"{self.edge}_from": other.fqn}
        if heads is not None:
            edit["head_map"] = list(heads)
        elif not self.align or site.kv_of:
            edit["head_map"] = list(other.original_heads)
        entries = _shared_cache(site, self.edge).numbers_per_token
        return SitePlan(site.fqn, edit, (site.cached_numbers_per_token, entries))


def parse_layers(text: str, layers: int) -> dict[int, int | None]:
    """Read "7,8:6,25-28": layer -> the layer it reads, None where that is left open.

    Raises:
        OptionError: the text is malformed, or names a layer that there is not.
    """
    found: dict[int, int | None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?(?::(\d+))?\s*", part)
        if match is None:
            raise OptionError(f"layers={text!r} is not a list of layers", 'write e.g. "7,8,25-28" or "8:6", or auto')
        first, last, source = (None if g is None else int(g) for g in match.groups())
        assert first is not None
        named = range(first, (last if last is not None else first) + 1)
        if not named or max(*named, source or 0, 0) >= layers:
            raise OptionError(f"layers={text!r} names layers that the model does not have", f"it has 0 to {layers - 1}")
        found |= dict.fromkeys(named, source)
    return dict(sorted(found.items()))


def _extent(program: Program, site: AttentionSite) -> tuple[Any, ...]:
    """What a layer sees: sizes of its queries, and whether its bias depends on the place in the image."""
    anchor = program.node(site.nodes.attention)
    sizes = tuple(str(size) for size in fake_value(anchor).shape)
    bias = anchor.args[3] if site.route is None else anchor.args[4]
    shape = None if bias is None else tuple(str(size) for size in fake_value(bias).shape)  # type: ignore[arg-type]
    return sizes, shape


def _shared_cache(site: AttentionSite, edge: str) -> CacheSpec:
    return CacheSpec(() if edge == "kv" else tuple(entry for entry in site.cache.entries if entry.name == "value"))


def _consumer_facts(site: AttentionSite, source: AttentionSite, edge: Literal["map", "kv"]) -> AttentionSite:
    common = replace(site, share=ShareSpec(source.fqn, edge), cache=_shared_cache(site, edge), k=None, k_norm=None)
    if edge == "kv":
        return replace(common, v=None)
    mask = replace(site.mask, bias=source.mask.bias, sinks=source.mask.sinks)
    return replace(common, q=None, q_norm=None, rope=None, mask=mask, scale=source.scale)


def _is_head_map(heads: Any, source: AttentionSite, consumer: AttentionSite) -> bool:
    if not isinstance(heads, (list, tuple)) or sorted(map(str, heads)) != sorted(map(str, source.original_heads)):
        return False
    size = consumer.heads // consumer.kv_heads
    groups = [source.kv_head_of[source.original_heads.index(h)] for h in heads]
    if consumer.kv_of:
        return list(heads) == list(source.original_heads)
    return all(len(set(groups[g : g + size])) == 1 for g in range(0, consumer.heads, size))


def _all_rows(program: Program, projection: Any) -> tuple[tuple[int, int], ...]:
    return ((0, program.weights.meta(projection.weight).shape[1 if projection.layout == "conv1d" else 0]),)


def _preference(edge: Edge, source: str) -> tuple[float, float]:
    return (-edge.source, edge.cost) if source == "nearest" else (edge.cost, -edge.source)


def _best_each(edges: Sequence[Edge], source: str, taken: set[int]) -> list[Edge]:
    """The best edge of every consumer."""
    best: dict[int, Edge] = {}
    for edge in edges:
        if edge.source in taken:
            continue
        if edge.consumer not in best or _preference(edge, source) < _preference(best[edge.consumer], source):
            best[edge.consumer] = edge
    return list(best.values())


def _greedy(edges: Sequence[Edge], source: str, count: int, max_error: float) -> list[Edge]:
    """Edges of least cost, one after the other; a layer that is read stays as it is, and one that reads is not read."""
    chosen: list[Edge] = []
    while len(chosen) < count:
        consumers, sources = {e.consumer for e in chosen}, {e.source for e in chosen}
        legal = [
            e for e in edges
            if e.consumer not in consumers | sources and e.source not in consumers and e.repaired <= max_error
        ]  # fmt: skip
        each = _best_each(legal, source, set())
        if not each:
            break
        chosen.append(min(each, key=lambda e: (e.cost, e.consumer)))
    return chosen
