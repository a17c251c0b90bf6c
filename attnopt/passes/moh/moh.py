"""The pass that turns attention into a mixture of heads, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.common.heads import set_fresh, take_heads
from attnopt.passes.common.lower import obstacle
from attnopt.passes.common.moments import Moments, check_text, measure_moments
from attnopt.passes.common.profile import head_scores
from attnopt.passes.common.repair import Settings
from attnopt.passes.common.repairing import Repairing
from attnopt.passes.common.transform import transform
from attnopt.passes.moh.router import Router, fit_routers
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.passes import PassContext, PassResult, Plan, SitePlan, option
from attnopt.rewriter.program import Program
from attnopt.rewriter.recognize import Miss
from attnopt.rewriter.site import AttentionSite, RouteSpec
from attnopt.rewriter.weights import Inline

#: Importance that is measured here: how much of the layer's output a head makes beyond its mean.
MEASURED = "contribution"
#: What the scores of a fitted router are multiplied with to start weighted gates close to 1.
SOFT = 0.05


@dataclass(frozen=True)
class MixtureOfHeads(Repairing):
    """Let each token choose its heads (MoH): shared heads always work, of the others the highest scored."""

    name: ClassVar[str] = "moh"
    section: ClassVar[str] = "route"
    not_after: ClassVar[Mapping[str, str]] = {"dimap": "the repair would fill its zeros again"}

    active: float = option(0.75, help="fraction of the heads that work on a token", minimum=0.01, maximum=1)
    shared_heads: int | Literal["auto"] = option(
        "auto", help="heads that always work; auto leaves twice as many to choose among as are idle", minimum=0
    )
    router: Literal["linear", "qnorm"] = option(
        "linear", help="scores by a linear map fitted to the loss of each head, or by the norm of the queries"
    )
    unit: Literal["head", "kv-group"] = option("head", help="what is switched: heads, or all heads of a key/value head")
    gate: Literal["binary", "weighted"] = option(
        "binary", help="working heads count in full, or by trained weights: the form that is fine-tuned (recover=refit)"
    )
    balance: float = option(0.01, help="weighted gates: weight of the load-balance loss in a refit", minimum=0.0)
    importance: str = option(
        MEASURED, help="what chooses the shared heads: contribution (measured), or a metric of the profile"
    )

    @property
    def settings(self) -> Settings:
        """How to repair."""
        return replace(super().settings, balance=self.balance)

    def check(self, program: Program) -> None:
        """Refuse a program of which no layer can be routed.

        Raises:
            UnsupportedError: with the reasons.
        """
        reasons = [self._obstacle(site) for site in program.site_list]
        if all(reasons):
            distinct = dict.fromkeys(reason for reason in reasons if reason)
            raise UnsupportedError("no heads can be routed: " + "; ".join(distinct), "attnopt inspect shows the layers")
        if self.gate == "weighted" and self.router != "linear":
            raise OptionError("weighted gates need a router that can be trained", "take router=linear, or binary gates")

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        """How many heads work per token; which of them always do is decided by measuring."""
        edits = []
        for site in self._routable(program):
            shared, active = self._counts(site)
            edit = {"type": self.router, "unit": self.unit, "shared_count": shared, "k": active, "gate": self.gate}
            edits.append(SitePlan(site.fqn, edit, (site.cached_numbers_per_token,) * 2))
        notes = ["idle heads save compute, not cache: keys and values of every token are kept"]
        if self.gate == "weighted" and self.recover == "none":
            notes.append("weighted gates start close to 1 and are worth something only after training: recover=refit")
        return Plan(tuple(edits), self._misses(program), tuple(notes))

    def wants_text(self, plan: Plan) -> bool:
        """For the repair, the routers, and for choosing the shared heads by what they contribute."""
        chosen = all("shared" in edit.edit for edit in plan.edits)
        fitted = not self.settings.idle or self.router == "linear"
        return fitted or (not chosen and self.importance == MEASURED)

    def given(self, program: Program, sections: Mapping[str, Any]) -> Plan:
        """Layers are routed as the file says: shared heads by their numbers in the original model, k units active.

        Raises:
            OptionError: numbers that do not fit the layer.
        """
        edits = []
        for fqn, section in sections.items():
            site = program.sites[fqn]
            reason = self._obstacle(site)
            if reason:
                raise OptionError(
                    f"the plan routes the heads of {fqn}, but {reason}", "leave that layer out of the plan"
                )
            self._check_section(site, section)
            edits.append(SitePlan(fqn, dict(section), (site.cached_numbers_per_token,) * 2))
        return Plan(tuple(edits), self._misses(program))

    def decide(self, program: Program, plan: Plan, context: PassContext) -> Plan:
        """Choose the heads that always work."""
        open_sites = {edit.site for edit in plan.edits if "shared" not in edit.edit}
        if not open_sites:
            return plan
        scores: dict[str, list[float]] = {}
        if self.importance == MEASURED:
            for site, moments in measure_moments(program, context, "choosing shared heads"):
                if site.fqn in open_sites:
                    scores[site.fqn] = _contributions(site, moments)
        else:
            for fqn in open_sites:
                scores[fqn] = head_scores(context.profiles, self.importance, program.sites[fqn]).tolist()
        edits = []
        for edit in plan.edits:
            if edit.site in scores:
                site = program.sites[edit.site]
                shared = self._top(site, scores[edit.site], edit.edit["shared_count"])
                rest = {key: value for key, value in edit.edit.items() if key != "shared_count"}
                edit = replace(edit, edit={**rest, "shared": [site.original_heads[h] for h in shared]})
            edits.append(edit)
        return replace(plan, edits=tuple(edits))

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        """Fit the routers, put them in and repair.

        Raises:
            OptionError: calibration text is needed and was not given.
        """
        if self.router == "linear" or self.fill != "none":
            check_text(program, context, "fitting routers")
        editor = Editor(program, self.to_text())
        facts = {}
        for edit in plan.edits:
            site = program.sites[edit.site]
            route = RouteSpec(
                edit.edit["type"],
                tuple(sorted(site.original_heads.index(h) for h in edit.edit["shared"])),
                edit.edit["k"],
                edit.edit["unit"],
                gate=edit.edit["gate"],
            )
            if route.active < len(replace(site, route=route).routed_units):
                facts[site.fqn] = replace(take_heads(editor, program, site, range(site.heads)), route=route)
        routers: dict[str, Router] = {}
        if context.calibration is not None and facts:
            units = {fqn: (site.routed_units, site.route.active) for fqn, site in facts.items() if site.route}
            with torch.no_grad():
                routers = fit_routers(program, units, context)
        facts = {fqn: self._with_weights(editor, site, routers.get(fqn)) for fqn, site in facts.items()}
        records = {fqn: _record(site, routers.get(fqn)) for fqn, site in facts.items()}
        summary = {"router": self.router, "unit": self.unit, "fill": self.fill, "recover": self.recover}
        return transform(
            program, editor, facts, self.settings, context, self.to_text(),
            misses=plan.misses, summary=summary, records=records,
        )  # fmt: skip

    def ensures(self, before: Program, after: Program) -> list[str]:
        """As many heads work on every token as the routes say, and the cache is as before."""
        return [
            f"{fqn} caches other numbers than before"
            for fqn, site in after.sites.items()
            if site.cache != before.sites[fqn].cache
        ]

    def _with_weights(self, editor: Editor, site: AttentionSite, router: Router | None) -> AttentionSite:
        route = site.route
        assert route is not None
        if self.fill != "none":
            assert router is not None
            route = replace(route, fill=set_fresh(editor, site.fqn, "fill", Inline(router.mean.cpu())))
        if route.router == "linear":
            assert router is not None
            # The order of the scores is kept, and with it which heads work; only weighted gates see their size.
            size = SOFT if route.gate == "weighted" else 1.0
            weight = set_fresh(editor, site.fqn, "router.weight", Inline(size * router.weight.cpu()))
            bias = set_fresh(editor, site.fqn, "router.bias", Inline(size * router.bias.cpu()))
            route = replace(route, weight=weight, bias=bias)
        if route.gate == "weighted":
            route = _weighted(editor, site, route)
        return replace(site, route=route)

    def _obstacle(self, site: AttentionSite) -> str | None:
        if site.route is not None:
            return "its heads are routed already"
        reason = obstacle(site)
        if reason:
            return reason
        if self.unit == "kv-group" and site.latent is not None:
            return "its heads share one latent: there are no groups to switch"
        return "it has only one unit" if len(self._units(site)) < 2 else None

    def _routable(self, program: Program) -> list[AttentionSite]:
        return [site for site in program.site_list if self._obstacle(site) is None]

    def _misses(self, program: Program) -> tuple[Miss, ...]:
        return tuple(
            Miss(f"{site.fqn}: {reason}", (site.nodes.attention,))
            for site in program.site_list
            if (reason := self._obstacle(site)) is not None
        )

    def _units(self, site: AttentionSite) -> tuple[tuple[int, ...], ...]:
        return replace(site, route=RouteSpec("qnorm", (), 0, self.unit)).routed_units

    def _counts(self, site: AttentionSite) -> tuple[int, int]:
        """(units that always work, units chosen per token)."""
        units = len(self._units(site))
        working = max(1, round(self.active * units))
        if self.shared_heads == "auto":
            shared = max(2 * working - units, working // 4)
        else:
            shared = self.shared_heads // (len(self._units(site)[0]))
            if shared > working:
                raise OptionError(
                    f"shared-heads={self.shared_heads} are more than the {working} units that work on a token",
                    "take fewer shared heads or a larger active",
                )
        if self.gate == "weighted" and shared == working < units:
            raise OptionError(
                f"shared-heads={self.shared_heads} leaves nothing to route, and weighted gates need a routed unit",
                "take fewer shared heads, or binary gates",
            )
        return shared, working - shared

    def _top(self, site: AttentionSite, scores: Sequence[float], count: int) -> list[int]:
        """Heads of the `count` units of highest score; ties go to the lower number."""
        units = self._units(site)
        ranked = sorted(units, key=lambda unit: (-sum(scores[h] for h in unit), unit))
        return sorted(h for unit in ranked[:count] for h in unit)

    def _check_section(self, site: AttentionSite, section: Any) -> None:
        wanted = {"type": str, "unit": str, "k": int, "gate": str}
        good = isinstance(section, Mapping) and set(section) - set(wanted) in ({"shared"}, {"shared_count"})
        if not good or any(type(section.get(name)) is not kind for name, kind in wanted.items()):
            raise OptionError(f"the plan's route of {site.fqn} needs type, unit, shared, k and gate")
        if (section["type"], section["unit"], section["gate"]) != (self.router, self.unit, self.gate):
            raise OptionError(f"the plan's route of {site.fqn} has another type, unit or gate than {self.to_text()}")
        shared = section.get("shared", [])
        if not isinstance(shared, (list, tuple)) or len(set(shared) & set(site.original_heads)) < len(shared):
            raise OptionError(f"the plan shares heads {shared} of {site.fqn}, which has {list(site.original_heads)}")
        places = tuple(sorted(site.original_heads.index(h) for h in shared))
        units = len(replace(site, route=RouteSpec("qnorm", places, 0, self.unit)).routed_units)
        if not 0 <= section["k"] <= units - section.get("shared_count", 0) or not (shared or section["k"]):
            raise OptionError(f"the plan lets {section['k']} of {units} units of {site.fqn} work on a token")
        if self.gate == "weighted" and section["k"] == 0:
            raise OptionError(f"the plan lets no routed unit of {site.fqn} work, and weighted gates need one")


def _weighted(editor: Editor, site: AttentionSite, route: RouteSpec) -> RouteSpec:
    """The route with what weighted gates have besides the router: zeros, which give gates of 1."""
    shared, width = len(route.shared), site.o.out_features
    if shared > 1:
        name = set_fresh(editor, site.fqn, "router.share", Inline(torch.zeros(shared, width)))
        route = replace(route, shared_weight=name)
    if shared:
        route = replace(route, balance=set_fresh(editor, site.fqn, "router.balance", Inline(torch.zeros(2, width))))
    return route


def _contributions(site: AttentionSite, moments: Moments) -> list[float]:
    """E ||(z_h - mean) W_h||^2 of each head."""
    found = []
    for h in range(site.heads):
        at = slice(h * site.d_v, (h + 1) * site.d_v)
        rows = moments.weight[at]
        found.append(float((rows * (moments.covariance[at, at] @ rows)).sum()))
    return found


def _record(site: AttentionSite, router: Router | None) -> dict[str, Any]:
    assert site.route is not None
    record: dict[str, Any] = {
        "shared": [site.original_heads[h] for h in site.route.shared],
        "active_heads": len(site.route.shared) + sum(len(u) for u in site.routed_units[: site.route.active]),
        "heads": site.heads,
    }
    if router is not None:
        record["agreement"] = router.agreement if site.route.router == "linear" else router.agreement_qnorm
    return record
