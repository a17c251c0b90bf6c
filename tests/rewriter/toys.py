"""Small passes and analyses for the tests of the pass infrastructure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from attnopt.errors import UnsupportedError
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.passes import Analysis, Pass, PassContext, PassResult, Plan, SitePlan, option
from attnopt.rewriter.program import Program
from attnopt.rewriter.recognize import Miss
from attnopt.rewriter.registry import Entry, Registry
from attnopt.rewriter.weights import Derived

CALLS: list[str] = []


@dataclass(frozen=True)
class Norms(Analysis):
    """Norm of every output projection."""

    name: ClassVar[str] = "norms"
    provides: ClassVar[tuple[str, ...]] = ("norms",)
    power: float = option(2.0, help="which norm", minimum=1)

    def run(self, program: Program, context: PassContext) -> dict[str, float]:
        CALLS.append(f"norms({self.power})")
        return {s.fqn: float(program.weights.get(s.o.weight).norm(p=self.power)) for s in program.site_list}


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply what the attention layers put out."""

    name: ClassVar[str] = "scale"
    requires: ClassVar[tuple[str, ...]] = ("norms",)
    provides: ClassVar[tuple[str, ...]] = ("scaled",)
    bound: ClassVar[float | None] = 0.5
    factor: float = option(1.5, help="the factor", minimum=-8, maximum=8)
    layers: tuple[int, ...] | Literal["all"] = option("all", help="which layers", minimum=0)

    def check(self, program: Program) -> None:
        if not program.sites:
            raise UnsupportedError("no attention")

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        chosen = [s for s in program.site_list if self.layers == "all" or s.layer in self.layers]
        edits = [SitePlan(s.fqn, {"factor": self.factor}, (s.cached_numbers_per_token,) * 2) for s in chosen]
        return Plan(tuple(edits), notes=(f"{len(profiles)} profiles",))

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        CALLS.append(f"scale({self.factor}) seeing {sorted(context.profiles)}")
        editor = Editor(program, self.to_text())
        for edit in plan.edits:
            site = program.sites[edit.site]
            with editor.at(site.fqn):
                scaled = Derived.of("scale", program.weights[site.o.weight], factor=self.factor)
                editor.set_weight(site.o.weight, scaled, replace=self.factor != 1)
        return PassResult.of(editor, misses=[Miss("asked to leave it alone", ())], summary={"factor": self.factor})


@dataclass(frozen=True)
class Negate(Pass):
    """Negate the attention output twice in the graph, which changes nothing numerically."""

    name: ClassVar[str] = "negate"
    preserves: ClassVar[tuple[str, ...]] = ("norms",)
    bound: ClassVar[float | None] = 1e-5

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        return Plan(tuple(SitePlan(s.fqn, {}, (0, 0)) for s in program.site_list))

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        editor = Editor(program, self.to_text())
        for edit in plan.edits:
            output = editor.node(program.sites[edit.site].nodes.output)
            with editor.at(edit.site, output.next):
                twice = editor.call(torch.ops.aten.neg.default, editor.call(torch.ops.aten.neg.default, output))
                editor.redirect(output, twice)
        context.workdir.save_layer(0, {"x": torch.ones(1)}, {"by": self.name})
        return PassResult.of(editor)


@dataclass(frozen=True)
class Nothing(Pass):
    """Do nothing."""

    name: ClassVar[str] = "nothing"

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        return Plan((), misses=(Miss("the moon is not full", ("attention",)),))

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        return PassResult.of(Editor(program, self.to_text()))


@dataclass(frozen=True)
class MayDoNothing(Nothing):
    """Do nothing, legally."""

    name: ClassVar[str] = "may-do-nothing"
    may_change_nothing: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("scaled",)


@dataclass(frozen=True)
class Liar(Scale):
    """Change two layers and report one."""

    name: ClassVar[str] = "liar"
    requires: ClassVar[tuple[str, ...]] = ()

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        result = super().apply(program, plan, context)
        return replace(result, changed_sites=result.changed_sites[:1])


@dataclass(frozen=True)
class Breaker(Scale):
    """Leave a site whose facts are wrong, or break its own promise."""

    name: ClassVar[str] = "breaker"
    requires: ClassVar[tuple[str, ...]] = ()
    promise: bool = option(False, help="break its promise instead of the rules")

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        editor = Editor(program, self.to_text())
        site = program.site_list[-1]
        with editor.at(site.fqn):
            editor.set_site(replace(site, scale=2.0 if self.promise else -1.0))
        return PassResult.of(editor)

    def ensures(self, before: Program, after: Program) -> list[str]:
        return ["the scale stays as it was"] if self.promise else []


@dataclass(frozen=True)
class Everything(Pass):
    """An option of every type."""

    name: ClassVar[str] = "everything"
    needed: int = option(help="has no default")
    count: int = option(3, help="a count", minimum=-5, maximum=99)
    ratio: float = option(0.5, help="a ratio")
    flag: bool = option(False, help="a flag")
    label: str = option("x", help="a label")
    maybe: str | None = option(None, help="a label or nothing")
    mode: Literal["fast", "slow", "none"] = option("fast", help="a mode")
    items: tuple[int, ...] = option((), help="whole numbers")
    names: tuple[str, ...] | None = option(None, help="labels or nothing")
    two_words: int | float = option(1, help="either kind of number")

    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        return Plan(())

    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        return PassResult.of(Editor(program, self.to_text()))


@dataclass(frozen=True)
class First(MayDoNothing):
    """Requires what Second provides."""

    name: ClassVar[str] = "first"
    requires: ClassVar[tuple[str, ...]] = ("second",)
    provides: ClassVar[tuple[str, ...]] = ("first",)


@dataclass(frozen=True)
class Second(MayDoNothing):
    """Requires what First provides."""

    name: ClassVar[str] = "second"
    requires: ClassVar[tuple[str, ...]] = ("first",)
    provides: ClassVar[tuple[str, ...]] = ("second",)


_CLASSES = (Norms, Scale, Negate, Nothing, MayDoNothing, Liar, Breaker, Everything, First, Second)
REGISTRY = Registry(
    {cls.name: Entry(f"{__name__}:{cls.__name__}", cls.summary()) for cls in _CLASSES},
    {"twice": ("scale{factor=2}", "double it")},
)
