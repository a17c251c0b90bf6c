"""Pipeline: passes in order, with their conditions checked, analyses run on demand, and a callback in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attnopt.errors import OptionError, UnsupportedError, VerificationError
from attnopt.rewriter.options import parse
from attnopt.rewriter.passes import (
    Analysis,
    Item,
    Pass,
    PassContext,
    PassResult,
    Plan,
    SitePlan,
    plain,
    sites_differing,
)
from attnopt.rewriter.program import HistoryEntry, Program
from attnopt.rewriter.registry import Registry
from attnopt.rewriter.steps import ScopedSteps


@dataclass(frozen=True)
class Between:
    """What an instrument sees: once before the first pass (`text` and `result` None), then after each.

    Attributes:
        index: number of passes done.
        text: the pass just done, as pipeline text.
        before, after: the program before and after it; the same one at the start.
        result: what it reported.
        item: the pass.
        seconds: how long it took, analyses it needed included.
    """

    index: int
    text: str | None
    before: Program
    after: Program
    result: PassResult | None
    item: Pass | None
    seconds: float


#: What a plan file says: section of a pass -> fqn of a layer -> edit.
Given = Mapping[str, Mapping[str, Any]]

#: Step under which a pass's plan is kept once every choice is made.
PLAN_STEP = "plan"

#: An instrument; it returns True to stop the pipeline there.
Instrument = Callable[[Between], bool | None]


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline did.

    Attributes:
        program: the result, with its history.
        results: one per pass done.
        stopped: True if an instrument stopped it before its end.
    """

    program: Program
    results: tuple[PassResult, ...]
    stopped: bool

    @property
    def changed_sites(self) -> tuple[str, ...]:
        """Attention layers changed by any pass, in layer order."""
        changed = {fqn for result in self.results for fqn in result.changed_sites}
        return tuple(fqn for fqn in self.program.sites if fqn in changed)


@dataclass(frozen=True)
class Pipeline:
    """Passes and analyses in the order in which they run.

    Attributes:
        items: the passes and analyses.
        registry: where analyses that are required but not listed come from.
    """

    items: tuple[Item, ...]
    registry: Registry = field(compare=False)

    @classmethod
    def parse(cls, text: str, registry: Registry) -> Pipeline:
        """Read pipeline text; see `attnopt.rewriter.options` for its form.

        Raises:
            OptionError: if the text is malformed, or a pass, an option or a value is wrong.
        """
        return cls(tuple(registry.make(item.name, item.options) for item in parse(text)), registry).ordered()

    def to_text(self, *, full: bool = False) -> str:
        """The text that `parse` reads back; `full` writes options at their default too."""
        return ",".join(item.to_text(full=full) for item in self.items)

    def ordered(self) -> Pipeline:
        """The same items with every provider before those that require what it provides; otherwise the order is kept.

        Raises:
            OptionError: if items require each other, something that nothing provides, or an order that is not legal.
        """
        rest = list(self.items)
        done: list[Item] = []
        while rest:
            ready = next((item for item in rest if not self._waits(item, rest, done)), None)
            if ready is None:
                names = " and ".join(item.name for item in rest)
                raise OptionError(f"{names} require each other", "leave one of them out")
            rest.remove(ready)
            done.append(ready)
        for place, item in enumerate(done):
            for earlier in done[:place]:
                if earlier.name in item.not_after:
                    raise OptionError(
                        f"{item.name} cannot come after {earlier.name}: {item.not_after[earlier.name]}",
                        f"put {item.name} before {earlier.name}",
                    )
            for need in item.requires:
                if not any(need in other.provides for other in done[:place]):
                    self.registry.provider(need)
        return Pipeline(tuple(done), self.registry)

    @staticmethod
    def _waits(item: Item, rest: Sequence[Item], done: Sequence[Item]) -> bool:
        """True if the item requires something that only items still to be placed provide."""
        return any(
            any(need in other.provides for other in rest if other is not item)
            and not any(need in other.provides for other in done)
            for need in item.requires
        )

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The items that change the program."""
        return tuple(item for item in self.items if isinstance(item, Pass))

    def plan(
        self, program: Program, given: Given | None = None, profiles: Mapping[str, Any] | None = None
    ) -> list[tuple[Pass, Plan]]:
        """What each pass would do to `program` as it is now. No weights are read.

        Args:
            program: as captured.
            given: what a plan file says for each pass, by its section.
            profiles: what was measured before.

        Raises:
            UnsupportedError: if a pass cannot work on it.
            OptionError: if what the plan file says is not legal.
        """
        plans: list[tuple[Pass, Plan]] = []
        for item in self.passes:
            item.check(program)
            if given is not None and plans:
                # What the file says for later passes is about a program that is not there yet: checked when it is.
                later = given.get(item.section, {})
                cached = {fqn: (program.sites[fqn].cached_numbers_per_token,) * 2 for fqn in later}
                edits = tuple(SitePlan(fqn, edit, cached[fqn]) for fqn, edit in later.items())
                plans.append((item, Plan(edits)))
            else:
                plans.append((item, _plan_of(item, program, given, profiles or {})))
        return plans

    def run(
        self,
        program: Program,
        context: PassContext,
        instruments: Sequence[Instrument] = (),
        given: Given | None = None,
    ) -> PipelineResult:
        """Run every item on `program`.

        Args:
            program: what to change.
            context: what the passes run in.
            instruments: called between them.
            given: what a plan file says for each pass, by its section; otherwise they decide for themselves.

        Raises:
            UnsupportedError: if a pass cannot work on the program, or changed nothing though it should.
            VerificationError: if a pass broke a promise or its report does not agree with what it did.
        """
        context = context.replace(original=context.original or program)
        profiles: dict[str, Any] = dict(context.profiles)
        established: dict[str, Any] = {}
        results: list[PassResult] = []
        stopped = _call(instruments, Between(0, None, program, program, None, None, 0.0))
        for place, item in enumerate(self.items):
            if stopped:
                break
            began = time.perf_counter()
            scoped = context.replace(workdir=ScopedSteps(context.workdir, f"{place:02d}-{item.name}."))
            self._provide(item, program, scoped, profiles)
            scoped = scoped.replace(profiles=dict(profiles))
            if isinstance(item, Analysis):
                profiles.update(dict.fromkeys(item.provides, item.run(program, scoped)))
                program = _with_history(program, item, {})
            elif isinstance(item, Pass):
                result = _run_pass(item, program, scoped, given)
                results.append(result)
                if result.changed_sites:  # what was measured on the old program no longer holds
                    profiles = {what: profiles[what] for what in profiles if what in (*item.preserves, *established)}
                established.update(dict.fromkeys(item.provides, result.summary))
                profiles.update(established)
                after = _with_history(result.program, item, result.summary)
                seconds = time.perf_counter() - began
                stopped = _call(
                    instruments, Between(len(results), item.to_text(), program, after, result, item, seconds)
                )
                program = after
        return PipelineResult(program, tuple(results), stopped)

    def _provide(self, item: Item, program: Program, context: PassContext, profiles: dict[str, Any]) -> None:
        """Run the analyses an item requires and that have no valid result."""
        for need in item.requires:
            if need in profiles:
                continue
            listed = [i for i in self.items if isinstance(i, Analysis) and need in i.provides]
            analysis = listed[-1] if listed else self.registry.provider(need)
            self._provide(analysis, program, context, profiles)
            value = analysis.run(program, context.replace(profiles=dict(profiles)))
            profiles.update(dict.fromkeys(analysis.provides, value))


def _call(instruments: Sequence[Instrument], event: Between) -> bool:
    """Every instrument sees every event; True if one wants to stop."""
    stop = False
    for instrument in instruments:
        stop = bool(instrument(event)) or stop
    return stop


def _with_history(program: Program, item: Item, summary: Mapping[str, Any]) -> Program:
    entry = HistoryEntry(item.to_text(full=True), dict(summary))
    return program.replace(history=(*program.history, entry))


def _plan_of(item: Pass, program: Program, given: Given | None, profiles: Mapping[str, Any]) -> Plan:
    if given is None:
        return item.plan(program, profiles)
    return item.given(program, given.get(item.section, {}))


def _decided(item: Pass, program: Program, plan: Plan, context: PassContext) -> Plan:
    """The plan with every choice made, from an unfinished run if there is one."""
    if context.resume and PLAN_STEP in context.workdir.steps_done():
        _, record = context.workdir.load(PLAN_STEP)
        edits = tuple(SitePlan(e["site"], e["edit"], tuple(e["cached"])) for e in record["edits"])
        return replace(plan, edits=edits)
    decided = item.decide(program, plan, context)
    if decided is not plan:
        made = [{"site": e.site, "edit": plain(e.edit), "cached": e.cached_numbers_per_token} for e in decided.edits]
        context.workdir.save(PLAN_STEP, {}, {"edits": made})
    return decided


def _run_pass(item: Pass, program: Program, context: PassContext, given: Given | None = None) -> PassResult:
    item.check(program)
    plan = _decided(item, program, _plan_of(item, program, given, context.profiles), context)
    result = replace(item.apply(program, plan, context), plan=plan)
    if not result.changed_sites and not item.may_change_nothing:
        misses = [*result.misses, *plan.misses]
        nearest = f"; the nearest miss: {misses[0].reason}" if misses else ""
        raise UnsupportedError(f"{item.name} changed no attention layer{nearest}", "attnopt inspect shows the layers")
    differing = sites_differing(program, result.program)
    if set(differing) != set(result.changed_sites):
        raise VerificationError(
            [
                f"{item.name} reports changes at {', '.join(result.changed_sites) or 'no site'}, "
                f"but the program differs at {', '.join(differing) or 'no site'}"
            ]
        )
    broken = item.ensures(program, result.program)
    if broken:
        raise VerificationError([f"{item.name} promised: {line}" for line in broken])
    return result


def replay(program: Program, history: Sequence[HistoryEntry], registry: Registry, context: PassContext) -> Program:
    """Apply a history to a program it was not applied to yet; with equal context the result is equal.

    Raises:
        OptionError: if the history names passes that no longer exist.
    """
    text = ",".join(entry.text for entry in history)
    return Pipeline.parse(text, registry).run(program, context).program if text else program
