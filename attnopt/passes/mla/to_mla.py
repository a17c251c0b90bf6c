"""The pass that turns grouped-query, multi-query and multi-head attention into Multi-head Latent Attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.mla.budget import Split, candidates, check_split, kept_numbers, sizes_to_try
from attnopt.passes.mla.job import Job, Settings, working_bytes
from attnopt.passes.mla.support import obstacle
from attnopt.passes.mla.trials import trial_bytes
from attnopt.rewriter.passes import Pass, PassContext, PassResult, Plan, SitePlan, option
from attnopt.rewriter.program import Program
from attnopt.rewriter.recognize import Miss
from attnopt.rewriter.site import AttentionSite

#: Of the cache, if nothing is asked for.
DEFAULT_KEEP = 0.5


@dataclass(frozen=True)
class ToMla(Pass):
    """Turn attention into Multi-head Latent Attention: cache one latent and one rotary key per token and layer."""

    name: ClassVar[str] = "to-mla"
    provides: ClassVar[tuple[str, ...]] = ("mla",)
    section: ClassVar[str] = "latent"
    not_after: ClassVar[Mapping[str, str]] = {
        "moh": "routers score queries that latent attention has not",
        "dimap": "the conversion would fill its zeros again",
    }

    kv_keep: float | None = option(
        None, help="fraction of the cached numbers to keep; 0.5 if no sizes are given", minimum=0.01, maximum=4
    )
    kv_lora_rank: int | None = option(None, help="width of the latent, the constant lane included", minimum=1)
    qk_rope_head_dim: int | None = option(None, help="width of the rotary key", minimum=2)
    recover: Literal["none", "refit"] = option("none", help="fit each layer to its source on the calibration text")
    epochs: int | None = option(
        None, help="passes over the text in a refit; 8, or fewer over more than 16,384 tokens", minimum=1
    )
    follow: float = option(
        0.5, help="how far targets lead back to the source model's hidden states", minimum=0.0, maximum=1.0
    )
    lane: bool | None = option(None, help="constant last latent channel, for stock classes; none lets attnopt decide")
    sizes: Literal["equal", "measured"] = option(
        "equal",
        help="of the layers; measured gives more of the cache to layers that need more, which stock classes cannot",
    )
    tables: Literal["shared", "per-layer"] | None = option(
        None, help="rope tables; stock classes have one for all layers; none lets attnopt decide"
    )
    force: bool = option(False, help="convert even if the cache grows")

    def check(self, program: Program) -> None:
        """Refuse a program of which no layer can be converted, and options that contradict each other.

        Raises:
            UnsupportedError: with the reason of each layer, or if the cache would not shrink.
            OptionError: for the options.
        """
        if (self.kv_lora_rank is None) != (self.qk_rope_head_dim is None):
            raise OptionError(
                "kv-lora-rank and qk-rope-head-dim belong together", "give both, or --kv-keep and neither of them"
            )
        if self.kv_lora_rank is not None and self.kv_keep is not None:
            raise OptionError("kv-keep and explicit sizes exclude each other", "give one of them")
        if self.sizes == "measured" and self.kv_lora_rank is not None:
            raise OptionError("sizes=measured finds the sizes itself", "give kv-keep instead of sizes")
        if self.sizes == "measured" and self.tables == "shared":
            raise OptionError("layers that differ in size share no rope table", "leave tables out with sizes=measured")
        reasons = {site.fqn: _obstacle(program, site) for site in program.site_list}
        if all(reasons.values()):
            distinct = dict.fromkeys(reason for reason in reasons.values() if reason)
            raise UnsupportedError(
                "no attention layer can be converted: " + ("; ".join(distinct) or "there is none"),
                "attnopt inspect shows the layers",
            )
        sites = _convertible(program)
        if "position_ids" not in program.inputs:
            raise UnsupportedError("the program takes no position ids", "capture a decoder that takes them")
        shapes = {(s.heads, s.kv_heads, s.d_qk, s.d_v, s.rope and s.rope.inv_freq) for s in sites}
        if len(shapes) > 1:
            raise UnsupportedError(
                "the attention layers that can be converted differ in heads or rotary angles",
                "only models with equal layers can be converted",
            )
        for split in self._splits(sites[0]):
            check_split(sites[0], split, self._lane(sites[0]), self.force)

    def unfit(self, target: str) -> str | None:
        """The stock class has one rope table, and normalises a latent that has no constant lane."""
        if target != "deepseek_v3":
            return None
        if self.sizes == "measured":
            return "its layers differ in size (sizes=measured)"
        if self.tables == "per-layer":
            return "its layers have rope tables of their own (tables=per-layer)"
        return "its latent has no constant lane (lane=false)" if self.lane is False else None

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        """Sizes of each layer; without explicit ones the split is chosen when calibration text is at hand."""
        sites = _convertible(program)
        splits = self._splits(sites[0])
        edit: dict[str, Any] = {"to": "mla", "lane": self._lane(sites[0])}
        if self.sizes == "measured":
            edit |= {"cached_on_average": splits[0].total}
        elif len(splits) == 1:
            edit |= {"kv_lora_rank": splits[0].rank, "qk_rope_head_dim": splits[0].rope}
        else:
            edit |= {"qk_rope_head_dim": [split.rope for split in splits], "cached": splits[0].total}
        edits = tuple(SitePlan(site.fqn, edit, (site.cached_numbers_per_token, splits[0].total)) for site in sites)
        misses = tuple(
            Miss(f"{site.fqn}: {reason}", (site.nodes.attention,))
            for site in program.site_list
            if (reason := _obstacle(program, site))
        )
        trials = trial_bytes(len(sites), len(self._tried(sites[0])), sites[0].o.out_features)
        memory = working_bytes(sites[0]) + trials
        return Plan(edits, misses, tuple(self._notes(sites[0], splits)), memory)

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        """Convert every planned layer.

        Raises:
            OptionError: without calibration text.
        """
        if context.calibration is None:
            raise OptionError("to-mla needs calibration text", "give text with --calib, or --calib self")
        sites = [edit.site for edit in plan.edits]
        first = program.sites[sites[0]]
        settings = Settings(
            splits=self._splits(first),
            sizes=self._tried(first),
            lane=self._lane(first),
            refit=self.recover == "refit",
            epochs=self.epochs,
            follow=self.follow,
            shared_table=self.tables != "per-layer" and self.sizes == "equal",
        )
        with torch.no_grad():
            outcome = Job(program, sites, settings, context, self.to_text()).run()
        return PassResult.of(outcome.editor, misses=plan.misses, summary=outcome.summary, layers=outcome.layers)

    def ensures(self, before: Program, after: Program) -> list[str]:
        """Every converted layer caches one latent and one rotary key, and fewer numbers unless forced."""
        broken = []
        for fqn, site in after.sites.items():
            if site == before.sites[fqn]:
                continue
            if site.kind != "mla":
                broken.append(f"{fqn} is {site.kind}, not mla")
            elif not self.force and site.cached_numbers_per_token >= before.sites[fqn].cached_numbers_per_token:
                broken.append(f"{fqn} caches no less than before")
        return broken

    def _lane(self, site: AttentionSite) -> bool:
        # Where no stock class holds the result (q/k norms, layers of different sizes) it would only cost a channel.
        stock = site.q_norm is None and site.k_norm is None and self.sizes == "equal"
        return stock if self.lane is None else self.lane

    def _tried(self, site: AttentionSite) -> tuple[int, ...]:
        """Sizes at which every layer is tried alone; none if all get the same."""
        return sizes_to_try(site, self._splits(site)[0].total) if self.sizes == "measured" else ()

    def _splits(self, site: AttentionSite) -> tuple[Split, ...]:
        """The split asked for, or those to choose from."""
        if self.kv_lora_rank is not None and self.qk_rope_head_dim is not None:
            return (Split(self.qk_rope_head_dim, self.kv_lora_rank),)
        total = kept_numbers(site, self.kv_keep or DEFAULT_KEEP)
        return candidates(site, total, self._lane(site))

    def _notes(self, site: AttentionSite, splits: tuple[Split, ...]) -> list[str]:
        notes = []
        if self.sizes == "measured":
            tried = ", ".join(map(str, self._tried(site)))
            notes.append(f"every layer is tried alone at {tried} cached numbers; they share what all may cache")
        if len(splits) > 1:
            widths = ", ".join(str(split.rope) for split in splits)
            notes.append(f"rope width is chosen among {widths} on held-out calibration text")
        split = splits[0]
        cost = (2 * split.rank + split.rope) / (site.d_qk + site.d_v)
        notes.append(f"absorbed decoding costs about {cost:.1f} times the attention arithmetic per cached token")
        return notes


def _convertible(program: Program) -> list[AttentionSite]:
    return [site for site in program.site_list if _obstacle(program, site) is None]


def _obstacle(program: Program, site: AttentionSite) -> str | None:
    if any(other.share is not None and other.share.source == site.fqn for other in program.site_list):
        return "other layers read its map, or its keys and values"
    return obstacle(site)
