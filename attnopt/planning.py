"""What comes before a conversion's first pass: plan files and profiles given, predictions of text and memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import AttnoptError, OptionError

if TYPE_CHECKING:
    from attnopt.conversion import CalibrationOptions, RunOptions
    from attnopt.rewriter.passes import Pass, Plan
    from attnopt.rewriter.pipeline import Given, Pipeline, PipelineResult
    from attnopt.rewriter.program import Program
    from attnopt.rewriter.source import ModelSource


def needs_text(plans: Sequence[tuple[Pass, Plan]]) -> bool:
    """Whether carrying out the plans reads calibration text."""
    return any(item.wants_text(plan) for item, plan in plans)


def given_plan(source: ModelSource, program: Program, pipeline: Pipeline, options: RunOptions) -> Given | None:
    """What the plan file says, if there is one."""
    from attnopt.rewriter.planfile import PlanFile

    if options.plan is None:
        return None
    return PlanFile.load(options.plan).given(source.identity, program, pipeline.passes)


def read_profile(program: Program, options: RunOptions) -> dict[str, Any]:
    """The profile that was given, by the name passes look for it under."""
    if options.profile is None:
        return {}
    from attnopt.profiles.profile import Profile

    profile = Profile.load(options.profile)
    profile.require(program)
    return {"profile": profile}


def plan_notes(plans: Sequence[Plan]) -> tuple[str, ...]:
    """What the plans have to say, layers left alone included."""
    notes = [note for plan in plans for note in plan.notes]
    return (*notes, *(f"left alone: {miss.reason}" for plan in plans for miss in plan.misses))


def plan_done(source: ModelSource, pipeline: Pipeline, result: PipelineResult, seed: int) -> dict[str, Any]:
    """The plan that was carried out, every choice made, as a plan file has it."""
    from attnopt.rewriter.planfile import PlanFile

    plans = [(i, one.plan) for i, one in zip(pipeline.passes, result.results, strict=False) if one.plan is not None]
    return PlanFile.of(source.identity, pipeline.to_text(), plans, seed).to_json()


def file_hashes(options: RunOptions) -> dict[str, str]:
    """Hashes of the files that decide what a run does; none are named if there are none."""
    found = {}
    profile = options.profile
    if profile is not None and profile.name != "profile.json":
        profile = profile / "profile.json"
    for name, path in (("plan", options.plan), ("profile", profile)):
        if path is not None:
            try:
                found[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                raise OptionError(f"the {name} {path} cannot be read: {error.strerror}", "check the path") from error
    return found


def predict_memory(program: Program, plans: Sequence[Plan], calibration: CalibrationOptions) -> int:
    """Bytes at the peak: this process, one layer in float32, the hidden states of the text, and what a pass asks for.

    If the model writes its calibration text itself, it is in memory as a whole before; the larger phase counts.
    """
    from attnopt.profiles.writing import SAMPLING_CACHE_BYTES, sampling_dtype
    from attnopt.rewriter.segments import assign_segments

    segments = assign_segments(program)
    weights: dict[int, set[str]] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            for user in node.users:
                weights.setdefault(segments.get(user, 0), set()).add(str(node.target))
    largest = max(sum(program.weights.meta(name).numel for name in names) for names in weights.values())
    width = max(site.o.out_features for site in program.site_list)
    hidden = 2 * 4 * calibration.tokens * width
    layerwise = 4 * largest + hidden + max((plan.memory for plan in plans), default=0)
    itemsize = sampling_dtype("cpu").itemsize
    cached = min(SAMPLING_CACHE_BYTES, calibration.tokens * program.cached_numbers_per_token * itemsize)
    sampling = program.parameters * itemsize + cached if calibration.writes else 0
    return resident_bytes() + max(layerwise, sampling)


def resident_bytes() -> int:
    """Resident size of this process now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    import resource

    return pages * resource.getpagesize()


def refuse_beyond_budget(
    program: Program, plans: Sequence[tuple[Pass, Plan]], calibration: CalibrationOptions, options: RunOptions
) -> None:
    """Plan before anything is computed: what a pass cannot do, or memory cannot hold, is refused now."""
    if options.memory_budget is None:
        return
    needed = predict_memory(program, [plan for _, plan in plans], calibration)
    if needed > options.memory_budget * 1e9:
        raise AttnoptError(
            f"this needs about {needed / 1e9:.1f} GB of memory, more than the budget of {options.memory_budget:g} GB",
            "use fewer --calib-tokens, give text with --calib FILE (then the model is not held as a whole), "
            "or raise --memory-budget",
        )
