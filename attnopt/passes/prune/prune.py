"""The pass that removes heads or key/value groups, for good: smaller projections, smaller cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.common.heads import take_heads
from attnopt.passes.common.lower import obstacle
from attnopt.passes.common.moments import measure_moments
from attnopt.passes.common.profile import head_scores
from attnopt.passes.common.repairing import Repairing
from attnopt.passes.common.transform import transform
from attnopt.passes.prune.select import Elimination, Order, counts_for_budget, order_of_scores, removal_order
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.passes import PassContext, PassResult, Plan, SitePlan, option
from attnopt.rewriter.program import Program
from attnopt.rewriter.recognize import Miss
from attnopt.rewriter.site import AttentionSite

#: Importance that is measured here, and not read from a profile: the squared error that removal causes.
MEASURED = "error"


@dataclass(frozen=True)
class Prune(Repairing):
    """Remove heads or key/value groups, and make up for them by least squares on what is left."""

    name: ClassVar[str] = "prune"
    section: ClassVar[str] = "heads"
    not_after: ClassVar[Mapping[str, str]] = {
        "moh": "routers are made for the heads there are",
        "dimap": "the repair would fill its zeros again",
    }

    keep_heads: float = option(0.75, help="fraction of the units to keep", minimum=0.01, maximum=1)
    unit: Literal["kv-group", "head"] = option(
        "kv-group", help="what is removed: key/value groups, which shrink the cache, or query heads"
    )
    groups: Literal["even", "free"] = option(
        "even", help="query heads: as many in each key/value group (stock classes need that), or any"
    )
    layers: Literal["uniform", "free"] = option(
        "uniform", help="as many units in each layer (stock classes need that), or where they are missed least"
    )
    importance: str = option(
        MEASURED, help="error (of the removal, measured on the calibration text), or a metric of the profile"
    )

    def check(self, program: Program) -> None:
        """Refuse a program of which no layer can lose heads.

        Raises:
            UnsupportedError: with the reasons.
        """
        reasons = {site.fqn: self._obstacle(program, site) for site in program.site_list}
        if all(reasons.values()):
            distinct = dict.fromkeys(reason for reason in reasons.values() if reason)
            raise UnsupportedError(
                "no heads can be removed: " + "; ".join(distinct), "attnopt inspect shows the layers"
            )

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        """How many heads each layer keeps; which ones is decided by measuring, or from the profile."""
        sites = self._prunable(program)
        edits = []
        for site in sites:
            kept = self._kept_heads(site)
            if kept < site.heads:
                edits.append(SitePlan(site.fqn, {"count": kept}, (site.cached_numbers_per_token, self._cache(site))))
        plan = Plan(tuple(edits), self._misses(program), self._notes(sites))
        return self._decided(program, plan, self._scored(program, profiles)) if self._from_profile(profiles) else plan

    def wants_text(self, plan: Plan) -> bool:
        """For the repair, and for choosing heads by their measured error."""
        chosen = all("keep" in edit.edit for edit in plan.edits)
        return not self.settings.idle or (not chosen and self.importance == MEASURED)

    def given(self, program: Program, sections: Mapping[str, Any]) -> Plan:
        """Layers keep the heads that the file lists, by their numbers in the original model.

        Raises:
            OptionError: a number that is none, an empty list, or layers that share maps losing different heads.
        """
        edits: list[SitePlan | None] = []
        for fqn, section in sections.items():
            site = program.sites[fqn]
            kept = _kept_list(site, section)
            if kept is None:
                if not isinstance(section.get("count"), int) or not 0 < section["count"] <= site.heads:
                    raise OptionError(f"the plan's heads of {fqn} say neither which to keep nor how many")
                edits.append(SitePlan(fqn, {"count": section["count"]}, (site.cached_numbers_per_token,) * 2))
                continue
            reason = self._obstacle(program, site)
            if reason and len(kept) < site.heads:
                raise OptionError(f"the plan removes heads of {fqn}, but {reason}", "leave that layer out of the plan")
            edits.append(_closed(site, kept))
        plan = Plan(tuple(edit for edit in edits if edit is not None), self._misses(program))
        for family in _families(program).values():
            if len({_positions(plan, site) for site in family}) > 1:
                names = ", ".join(site.fqn for site in family)
                raise OptionError(
                    f"the plan removes different heads of layers that share one another's maps: {names}",
                    "remove the same heads, by their place in the layer, from all of them or from none",
                )
        return plan

    def decide(self, program: Program, plan: Plan, context: PassContext) -> Plan:
        """Choose the heads, unless the plan names them."""
        if all("keep" in edit.edit for edit in plan.edits):
            return plan
        if self.importance != MEASURED:
            return self._decided(program, plan, self._scored(program, context.profiles))
        return self._decided(program, plan, self._measured(program, plan, context))

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        """Remove them and repair what is left.

        Raises:
            OptionError: a repair was asked for without calibration text.
        """
        editor = Editor(program, self.to_text())
        facts: dict[str, AttentionSite] = {}
        for edit in plan.edits:
            site = program.sites[edit.site]
            kept = [site.original_heads.index(h) for h in edit.edit["keep"]]
            if len(kept) < site.heads:
                facts[site.fqn] = take_heads(editor, program, site, kept)
        facts = {fqn: _without_shared(program.sites[fqn], site) for fqn, site in facts.items()}
        removed = sum(program.sites[fqn].heads - site.heads for fqn, site in facts.items())
        groups = sum(program.sites[fqn].kv_heads - site.kv_heads for fqn, site in facts.items() if site.latent is None)
        records = {
            fqn: {"heads": {"before": program.sites[fqn].heads, "after": site.heads}, "keep": list(site.original_heads)}
            for fqn, site in facts.items()
        }
        summary = {"heads_removed": removed, "kv_heads_removed": groups, "fill": self.fill, "recover": self.recover}
        return transform(
            program, editor, facts, self.settings, context, self.to_text(),
            misses=plan.misses, summary=summary, records=records,
        )  # fmt: skip

    def ensures(self, before: Program, after: Program) -> list[str]:
        """Heads that are gone are gone from the weights."""
        broken = []
        for fqn, site in after.sites.items():
            old = before.sites[fqn]
            if (
                site.heads < old.heads
                and after.weights.meta(site.o.weight).numel >= before.weights.meta(old.o.weight).numel
            ):
                broken.append(f"{fqn} has fewer heads but as many weights")
        return broken

    # -- which layers, how many heads

    def _obstacle(self, program: Program, site: AttentionSite) -> str | None:
        family = _families(program)[site.share.source if site.share else site.fqn]
        reasons = [obstacle(member) for member in family]
        if any(reasons):
            return next(reason for reason in reasons if reason)
        if site.route is not None:
            return "its heads are routed, and routers are made for the heads there are"
        units, _ = self._units(site)
        return "it has only one unit to remove" if len(units) < 2 else None

    def _prunable(self, program: Program) -> list[AttentionSite]:
        return [site for site in program.site_list if self._obstacle(program, site) is None]

    def _misses(self, program: Program) -> tuple[Miss, ...]:
        return tuple(
            Miss(f"{site.fqn}: {reason}", (site.nodes.attention,))
            for site in program.site_list
            if (reason := self._obstacle(program, site)) is not None
        )

    def _units(self, site: AttentionSite) -> tuple[list[tuple[int, ...]], list[int]]:
        """(heads of each unit, class of each unit); removals keep classes even."""
        groups: dict[int, list[int]] = {}
        for head, group in enumerate(site.kv_head_of):
            groups.setdefault(group, []).append(head)
        if self.unit == "kv-group" and site.latent is None:
            return [tuple(group) for group in groups.values()], [0] * len(groups)
        even = self.groups == "even" and site.latent is None and not site.kv_of and site.kv_heads < site.heads
        return [(h,) for h in range(site.heads)], [site.kv_head_of[h] if even else 0 for h in range(site.heads)]

    def _kept_units(self, site: AttentionSite) -> int:
        units, classes = self._units(site)
        kinds = len(set(classes))
        return max(1, round(self.keep_heads * len(units) / kinds)) * kinds

    def _kept_heads(self, site: AttentionSite) -> int:
        units, _ = self._units(site)
        return self._kept_units(site) * len(units[0])

    def _cache(self, site: AttentionSite) -> int:
        """Cached numbers afterwards, as far as that is known: whole groups shrink it for sure."""
        if site.latent is not None or self.unit == "head":
            return site.cached_numbers_per_token
        return site.cached_numbers_per_token * self._kept_units(site) // len(self._units(site)[0])

    def _notes(self, sites: Sequence[AttentionSite]) -> tuple[str, ...]:
        notes = []
        if any(site.latent is not None for site in sites):
            notes.append("fewer heads of latent attention save weights and compute, not cache: the latent stays whole")
        elif self.unit == "head" and any(site.kv_heads < site.heads for site in sites):
            notes.append("query heads save weights and compute; the cache shrinks only where a whole group goes")
        if any(site.share is not None for site in sites):
            notes.append("layers that share maps or keys and values lose the same heads together")
        return tuple(notes)

    # -- which heads

    def _from_profile(self, profiles: Mapping[str, Any]) -> bool:
        return self.importance != MEASURED and bool(profiles)

    def _scored(self, program: Program, profiles: Mapping[str, Any]) -> dict[str, Order]:
        orders = {}
        for fqn, family in _families(program).items():
            if all(self._obstacle(program, site) is None for site in family):
                scores = sum(head_scores(profiles, self.importance, site) for site in family)
                orders[fqn] = order_of_scores(scores, *self._units(family[0]))  # type: ignore[arg-type]  # not empty
        return orders

    def _measured(self, program: Program, plan: Plan, context: PassContext) -> dict[str, Order]:
        families = _families(program)
        waiting: dict[str, list[Elimination]] = {}
        orders = {}
        planned = {edit.site for edit in plan.edits}
        for site, moments in measure_moments(program, context, "choosing heads"):
            source = site.share.source if site.share else site.fqn
            family = families[source]
            if not planned & {member.fqn for member in family}:
                continue
            waiting.setdefault(source, []).append(Elimination(moments, self.fill))
            if site.fqn == family[-1].fqn:
                widths = [member.d_v for member in family]
                orders[source] = removal_order(waiting.pop(source), widths, *self._units(family[0]))
        return orders

    def _decided(self, program: Program, plan: Plan, orders: Mapping[str, Order]) -> Plan:
        families = {source: family for source, family in _families(program).items() if source in orders}
        counts = {edit.site: edit.edit["count"] for edit in plan.edits if "count" in edit.edit}
        gone: dict[str, int] = {}
        for source, family in families.items():
            order = orders[source]
            gone[source] = len(order.units) - max(1, round(counts.get(source, family[0].heads) / len(order.units[0])))
        if self.layers == "free":
            steps = [len(orders[s].units[0]) * len(families[s]) for s in families]
            total = sum(gone[s] * step for s, step in zip(families, steps, strict=True))
            gone = dict(zip(families, counts_for_budget([orders[s] for s in families], steps, total), strict=True))
        edits = {edit.site: edit for edit in plan.edits if "keep" in edit.edit}
        for source, family in families.items():
            order = orders[source]
            removed = {h for unit in order.removed[: gone[source]] for h in order.units[unit]}
            for site in family:
                closed = _closed(site, [h for h in range(site.heads) if h not in removed])
                if closed is not None:
                    edits[site.fqn] = closed
        return replace(plan, edits=tuple(edits[fqn] for fqn in program.sites if fqn in edits))


def _closed(site: AttentionSite, kept: Sequence[int]) -> SitePlan | None:
    """The edit that keeps these heads, given by their place in the layer; None if it keeps all."""
    if len(kept) == site.heads:
        return None
    groups = len({site.kv_head_of[h] for h in kept})
    cached = site.cached_numbers_per_token
    after = cached if site.latent is not None else cached * groups // site.kv_heads
    return SitePlan(site.fqn, {"keep": [site.original_heads[h] for h in kept]}, (cached, after))


def _kept_list(site: AttentionSite, section: Any) -> list[int] | None:
    """Places of the heads that a section of a plan keeps; None if it only says how many."""
    if not isinstance(section, Mapping) or set(section) - {"keep", "count"} or not section:
        raise OptionError(f"the plan's heads of {site.fqn} are not of the form {{'keep': [0, 2, ...]}}")
    if "keep" not in section:
        return None
    ids = section["keep"]
    known = isinstance(ids, (list, tuple)) and all(type(i) is int and i in site.original_heads for i in ids)
    if not known or not ids or len(set(ids)) < len(ids):
        raise OptionError(
            f"the plan keeps heads {ids} of {site.fqn}, which has the heads {list(site.original_heads)}",
            "give at least one of them, each once, by its number in the original model",
        )
    return sorted(site.original_heads.index(i) for i in ids)


def _families(program: Program) -> dict[str, list[AttentionSite]]:
    """Layers that must lose the same heads: a source and those that read its maps or keys and values."""
    families: dict[str, list[AttentionSite]] = {}
    for site in program.site_list:
        families.setdefault(site.share.source if site.share else site.fqn, []).append(site)
    return families


def _positions(plan: Plan, site: AttentionSite) -> tuple[int, ...]:
    edit = plan.edit_of(site.fqn)
    if edit is None or "keep" not in edit:
        return tuple(range(site.heads))
    return tuple(sorted(site.original_heads.index(i) for i in edit["keep"]))


def _without_shared(before: AttentionSite, site: AttentionSite) -> AttentionSite:
    """The facts of a layer that shares, as far as `take_heads` could not know them."""
    if before.share is None or before.share.edge == "map":
        return site
    return replace(site, cache=before.cache)
