"""The pass that fits a rewritten model's attention to its original's, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from attnopt.errors import UnsupportedError
from attnopt.passes.common.moments import check_text
from attnopt.passes.common.peaks import with_peaks
from attnopt.passes.common.repair import Settings, put, repair
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.passes import Pass, PassContext, PassResult, Plan, SitePlan, option, sites_differing
from attnopt.rewriter.program import Program


@dataclass(frozen=True)
class Refit(Pass):
    """Fit the attention layer by layer to the original's, on the stream that the rewritten layers really give.

    First in closed form: output projections and biases by least squares. Then all weights of each changed layer by
    gradient steps; their length follows from the error, and where they first raise it on held-out text shorter ones
    are tried as well. No layer ends worse there than it began.
    """

    name: ClassVar[str] = "refit"
    section: ClassVar[str] = "refit"
    may_change_nothing: ClassVar[bool] = True

    epochs: int | None = option(None, help="passes over the text; as many as fit 131,072 tokens, at most 8", minimum=1)
    rate: float | None = option(
        None, help="largest step, relative to the size of each weight; what a layer's error asks for if none", minimum=0
    )
    follow: float = option(
        0.5, help="how far targets lead back to the original's hidden states", minimum=0.0, maximum=1.0
    )
    layers: Literal["all", "changed"] = option(
        "all", help="which output projections are fitted; weights besides them only in layers that have changed"
    )
    gradients: bool = option(True, help="take gradient steps after the closed form")

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        """Every layer; which of them the passes before have changed is not known yet."""
        edit = {"fit": "all" if self.gradients else "output"}
        cached = {site.fqn: (site.cached_numbers_per_token,) * 2 for site in program.site_list}
        return Plan(tuple(SitePlan(fqn, edit, pair) for fqn, pair in cached.items()))

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        """Fit every changed layer.

        Raises:
            OptionError: there is no text.
            UnsupportedError: a layer's output is no linear function of what its heads give.
        """
        check_text(program, context, "refit")
        original = context.original if context.original is not None else program
        changed = set(sites_differing(original, program))
        wanted = {edit.site for edit in plan.edits}
        if not changed & wanted:
            return PassResult(program, (), summary={"refitted": 0})
        settings = Settings(
            fill="lsq", refit=self.gradients, epochs=self.epochs, follow=self.follow, behind=self.layers == "all",
            rate=self.rate, held_out=True,
        )  # fmt: skip
        with torch.no_grad():
            try:
                found = repair(original, program, changed & wanted, settings, context)
            except LookupError as error:
                raise UnsupportedError(f"refit cannot read this model: {error}", "distill does not need to") from error
        editor = Editor(program, self.to_text())
        for fqn, weights in found.weights.items():
            put(editor, program.sites[fqn], weights)
        after = with_peaks(editor.finish(), editor.changed_sites, context.calibration.windows, context)
        layers = [
            {"site": fqn, "layer": program.sites[fqn].layer, **record}
            for fqn, record in found.records.items()
            if fqn in editor.changed_sites
        ]
        summary = {"refitted": len(editor.changed_sites), "follow": self.follow}
        return PassResult(after, sites_differing(program, after), (), summary, tuple(layers))
