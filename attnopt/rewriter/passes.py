"""Pass and Analysis: what a transformation of a Program is, and what it may rely on and must promise.

A pass is a frozen dataclass whose fields, made with `option`, are its options on the command line and in pipeline text.

    @dataclass(frozen=True)
    class ToMla(Pass):
        '''One line on what it does.'''
        name: ClassVar[str] = "to-mla"
        requires: ClassVar[tuple[str, ...]] = ("statistics",)
        kv_keep: float = option(0.5, help="fraction of the cache to keep", minimum=0.01, maximum=1)

        def plan(self, program, profiles): ...
        def apply(self, program, plan, context): ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from attnopt.errors import OptionError
from attnopt.progress import Reporter, Silent
from attnopt.rewriter.edit import Editor, weight_names
from attnopt.rewriter.options import Options, option
from attnopt.rewriter.program import Program
from attnopt.rewriter.recognize import Miss
from attnopt.rewriter.segments import layer_path
from attnopt.rewriter.steps import MemorySteps, StepStore

__all__ = ["Analysis", "Item", "LearningText", "Pass", "PassContext", "PassResult", "Plan", "SitePlan", "option"]


@dataclass(frozen=True)
class SitePlan:
    """What a pass intends for one attention layer.

    Attributes:
        site: its fqn.
        edit: what will be done, as plain data.
        cached_numbers_per_token: cached numbers per token before and after.
    """

    site: str
    edit: Mapping[str, Any]
    cached_numbers_per_token: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What a pass intends: printed by `--dry-run`, carried out by `apply`.

    Attributes:
        edits: one per attention layer that will change, in layer order.
        misses: layers left alone, with the reason.
        notes: anything else worth knowing, one line each.
        memory: bytes it will need at its peak; 0 if it needs next to nothing.
    """

    edits: tuple[SitePlan, ...]
    misses: tuple[Miss, ...] = ()
    notes: tuple[str, ...] = ()
    memory: int = 0

    def edit_of(self, site: str) -> Mapping[str, Any] | None:
        """What is intended for a layer, or None if it is left alone."""
        return next((edit.edit for edit in self.edits if edit.site == site), None)


@dataclass(frozen=True)
class PassResult:
    """What a pass did. Made with `of`, so that `changed_sites` comes from the Editor's journal.

    Attributes:
        program: the result.
        changed_sites: attention layers that changed, in layer order.
        misses: layers left alone, with the reason.
        summary: facts about the run, as plain data; kept in the program's history and the manifest.
        layers: per-layer facts, as plain data.
        plan: what was carried out, every choice made; set by the pipeline.
    """

    program: Program
    changed_sites: tuple[str, ...]
    misses: tuple[Miss, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Mapping[str, Any], ...] = ()
    plan: Plan | None = None

    @classmethod
    def of(
        cls,
        editor: Editor,
        *,
        misses: Iterable[Miss] = (),
        summary: Mapping[str, Any] | None = None,
        layers: Iterable[Mapping[str, Any]] = (),
    ) -> PassResult:
        """Finish an editor and report what it changed."""
        program = editor.finish()
        return cls(program, editor.changed_sites, tuple(misses), dict(summary or {}), tuple(layers))


@dataclass(frozen=True)
class PassContext:
    """What a pass may use while it runs.

    Attributes:
        workdir: keeps finished steps (see `StepStore`); in memory if the run need not survive a crash.
        calibration: calibration text (`attnopt.profiles.calibration.Calibration`), or None.
        device, dtype: where and in what to compute.
        seed: for everything random.
        reporter: takes progress.
        resume: whether finished steps in `workdir` may be used instead of being repeated.
        profiles: results of analyses by the name they are provided under.
        memory_budget: bytes the pass should stay below, or None.
        original: the program as it was before the first pass; set by the pipeline.
        tokenizer: gives the model's tokenizer, or None if it has none.
    """

    workdir: StepStore = field(default_factory=MemorySteps)
    calibration: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    seed: int = 0
    reporter: Reporter = field(default_factory=Silent)
    resume: bool = False
    profiles: Mapping[str, Any] = field(default_factory=dict)
    memory_budget: int | None = None
    original: Program | None = None
    tokenizer: Callable[[], Any] | None = None

    def replace(self, **changes: Any) -> PassContext:
        """A context with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class LearningText:
    """Text that a pass learns from, beside the calibration text.

    Attributes:
        tokens: how much; 0 for a pass that does not learn.
        author: directory or id of the model that writes what files lack; None for the one that is changed.
        again: whether files with too little text are read again instead.
        window: tokens in a window of it, if it and the model's reach allow; windows of calibration text are the least.
    """

    tokens: int = 0
    author: str | None = None
    again: bool = False
    window: int = 0


class Item(Options, ABC):
    """What can stand in a pipeline: a Pass or an Analysis.

    Attributes:
        name: in pipeline text.
        requires: names of what must have been provided before, by an earlier item or an analysis run on demand.
        provides: names of what is available after it.
        not_after: items that may not come before it, each with the rule that says why.
    """

    name: ClassVar[str]
    not_after: ClassVar[Mapping[str, str]] = {}
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def summary(cls) -> str:
        """The first line of its docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]


class Analysis(Item):
    """Measures a Program without changing it. Its result is provided under each name in `provides`."""

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> Any:
        """Compute the result; what it requires is in `context.profiles`."""


class Pass(Item):
    """Turns a Program into another one.

    Attributes:
        preserves: names of provided results that stay valid after it although it changed the program.
        may_change_nothing: True if changing no attention layer is a legal outcome.
        bound: largest relative change of the output the pass may cause (see `NumericCheck`); None if it is lossy.
        section: where a plan file keeps what the pass intends for a layer.
    """

    section: ClassVar[str] = ""
    preserves: ClassVar[tuple[str, ...]] = ()
    may_change_nothing: ClassVar[bool] = False
    bound: ClassVar[float | None] = None

    def check(self, program: Program) -> None:
        """Refuse a program the pass cannot work on.

        Raises:
            UnsupportedError: naming the obstacle.
        """

    @abstractmethod
    def plan(self, program: Program, profiles: Mapping[str, Any]) -> Plan:
        """What would be done: pure and cheap, without reading weights. `profiles` may be empty (`--dry-run`)."""

    def reshapes(self) -> bool:
        """Whether it changes more than values: sizes, or what a layer computes. Known before any work is done."""
        return True

    def unfit(self, target: str) -> str | None:
        """Why a class cannot hold what this pass makes with its options, whatever the model; None if it may."""
        return None

    def wants_text(self, plan: Plan) -> bool:
        """Whether carrying out a plan reads calibration text."""
        return True

    @property
    def learns_from(self) -> LearningText:
        """Text that it learns from, beside the calibration text."""
        return LearningText()

    def given(self, program: Program, sections: Mapping[str, Any]) -> Plan:
        """The plan that a plan file spells out: only the layers it names, as it says.

        A pass whose plans cannot be edited takes them back only as it would make them itself, for all or some layers.

        Args:
            program: as the pass will find it.
            sections: what the file says for each layer, by fqn.

        Raises:
            OptionError: if that is not legal.
        """
        own = self.plan(program, {})
        for fqn, section in sections.items():
            edit = own.edit_of(fqn)
            if edit is None or plain(edit) != plain(section):
                raise OptionError(
                    f"the plan's {self.section or self.name} of {fqn} is not what {self.to_text()} would do",
                    f"change the options of {self.name} in the plan's pipeline, or leave layers out",
                )
        return replace(own, edits=tuple(edit for edit in own.edits if edit.site in sections))

    def decide(self, program: Program, plan: Plan, context: PassContext) -> Plan:
        """Make the choices that a plan has left open, by measuring. What is chosen can be applied again without it.

        Raises:
            OptionError: if what is needed for that was not given (calibration text, a profile).
        """
        return plan

    @abstractmethod
    def apply(self, program: Program, plan: Plan, context: PassContext) -> PassResult:
        """Do it, through an Editor. `context.profiles` holds what is required."""

    def ensures(self, before: Program, after: Program) -> list[str]:
        """Promises about the result that are broken, one line each; checked by the pipeline."""
        return []


def plain(value: Any) -> Any:
    """Plain data as JSON knows it: mappings as dicts, sequences as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def sites_differing(before: Program, after: Program) -> tuple[str, ...]:
    """Layers of `after` that have other facts, weights (MLP included) or nodes than in `before`, in their order."""
    old_nodes = {node.name for node in before.graph.nodes}
    made_for = {
        node.meta["attnopt"]["site"]
        for node in after.graph.nodes
        if node.op != "get_attr" and node.name not in old_nodes and "attnopt" in node.meta
    }
    read, known = set(after.weight_names), set(before.weights.names())
    changed = [n for n, value in after.weights.items() if n in read and n in known and before.weights[n] != value]
    result = []
    for fqn, site in after.sites.items():
        beside = any(name.startswith(f"{layer_path(fqn)}.") for name in changed)
        values = [(n, after.weights[n]) for n in weight_names(site) if n in after.weights]
        kept = all(name in before.weights and before.weights[name] == value for name, value in values)
        if before.sites.get(fqn) != site or not kept or beside or fqn in made_for:
            result.append(fqn)
    return tuple(result)
