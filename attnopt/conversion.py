"""The work behind `convert` and `run`: open, capture, plan, calibrate, run the passes, write, move into place."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.errors import OptionError, UnsupportedError
from attnopt.planning import (
    file_hashes,
    given_plan,
    needs_text,
    plan_done,
    plan_notes,
    predict_memory,
    read_profile,
    refuse_beyond_budget,
)
from attnopt.progress import Reporter, Silent
from attnopt.results import Conversion, PlanPreview
from attnopt.texts import Author, describe, from_files, to_learn_from

if TYPE_CHECKING:
    import torch

    from attnopt.profiles.calibration import Calibration
    from attnopt.rewriter.instruments import NumericCheck
    from attnopt.rewriter.passes import Pass, PassContext, Plan
    from attnopt.rewriter.pipeline import Given, Instrument, Pipeline, PipelineResult
    from attnopt.rewriter.program import Program
    from attnopt.rewriter.source import ModelSource
    from attnopt.rewriter.steps import StepStore

#: Types weights can be written in; "auto" is the source's.
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class CalibrationOptions:
    """What to calibrate on.

    Attributes:
        files: plain text files; the model writes the text itself if empty.
        tokens: how much, in tokens, the part kept for choosing included.
        context: tokens in a window.
        seed: of the sampling and of everything else random.
        own: whether the model writes some of the text beside the files, as much as each of them gives.
    """

    files: tuple[Path, ...] = ()
    tokens: int = 32768
    context: int = 512
    seed: int = 0
    own: bool = False

    @property
    def writes(self) -> bool:
        """Whether the model writes calibration text."""
        return self.own or not self.files

    def of_files(self, tokens: int) -> int:
        """What files give of so many tokens."""
        return tokens * len(self.files) // (len(self.files) + int(self.writes))

    def of_model(self, tokens: int) -> int:
        """What the model writes of so many tokens."""
        return tokens - self.of_files(tokens)

    @classmethod
    def parse(cls, calib: Sequence[str] | None, tokens: int, context: int, seed: int) -> CalibrationOptions:
        """From what is given to `--calib`: "self" (or nothing), files, or both."""
        given = list(calib or [])
        files = tuple(Path(name) for name in given if name != "self")
        return cls(files, tokens, context, seed, own=bool(files) and "self" in given)

    def check_shares(self) -> None:
        """Refuse to share too little, once `context` is what the model reads.

        Raises:
            OptionError: files and the model share too few tokens for two windows each.
        """
        shares = self.of_files(self.tokens), self.of_model(self.tokens)
        if self.own and min(shares) < 2 * self.context:
            raise OptionError(
                f"of {self.tokens} calibration tokens {shares[0]} are the files' and {shares[1]} are the model's; "
                f"each needs two windows of {self.context}",
                "raise --calib-tokens, lower --context or leave out --calib self",
            )


@dataclass(frozen=True)
class RunOptions:
    """How to run and what to write.

    Attributes:
        emit: "auto", "deepseek_v3", "source" or "attnopt".
        device: "auto", "cpu" or "cuda[:N]".
        dtype: type of the written weights, one of `DTYPES`.
        memory_budget: gigabytes; what is predicted to need more is refused.
        dry_run: only plan.
        measure: with `dry_run`, run the passes and plan every choice; otherwise what is measured stays open.
        plan: a plan file that says what the passes do.
        profile: directory of a profile that passes may read.
        resume: go on with an unfinished run.
        overwrite: replace an existing output.
        check_each: compare the logits before and after every pass.
        trust_remote_code: run Python code that the model directory brings.
    """

    emit: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    memory_budget: float | None = None
    dry_run: bool = False
    measure: bool = False
    plan: Path | None = None
    profile: Path | None = None
    resume: bool = False
    overwrite: bool = False
    check_each: bool = False
    trust_remote_code: bool = False


def preview(
    model: str | Path, pipeline: Pipeline, calibration: CalibrationOptions, options: RunOptions, reporter: Reporter
) -> PlanPreview:
    """What a conversion would do. Nothing is written, and weights are read only if choices are to be measured."""
    from attnopt.rewriter.planfile import PlanFile

    source, program = open_and_capture(model, options.trust_remote_code, reporter)
    given, profiles = given_plan(source, program, pipeline, options), read_profile(program, options)
    plans = pipeline.plan(program, given, profiles)
    if options.measure:
        plans = _measured(source, program, pipeline, calibration, options, reporter, given, profiles, plans)
    after = program.cached_numbers_per_token
    for _, plan in plans:
        after += sum(edit.cached_numbers_per_token[1] - edit.cached_numbers_per_token[0] for edit in plan.edits)
    file = PlanFile.of(source.identity, pipeline.to_text(), plans, calibration.seed)
    layers = [
        {
            "pass": item.to_text(),
            "site": edit.site,
            **edit.edit,
            "cached_numbers_per_token": dict(zip(("before", "after"), edit.cached_numbers_per_token, strict=True)),
        }
        for item, plan in plans
        for edit in plan.edits
    ]
    return PlanPreview(
        model=source.name,
        pipeline=pipeline.to_text(),
        notes=plan_notes([plan for _, plan in plans]),
        layers=tuple(layers),
        cached_before=program.cached_numbers_per_token,
        cached_after=after,
        memory_bytes=predict_memory(program, [plan for _, plan in plans], calibration),
        document=file.to_json(),
    )


def _measured(
    source: ModelSource,
    program: Program,
    pipeline: Pipeline,
    calibration: CalibrationOptions,
    options: RunOptions,
    reporter: Reporter,
    given: Given | None,
    profiles: Mapping[str, Any],
    plans: Sequence[tuple[Pass, Plan]],
) -> list[tuple[Pass, Plan]]:
    """The plans of passes that were run, with every choice made; what they made is dropped."""
    from attnopt.rewriter.passes import PassContext
    from attnopt.rewriter.steps import MemorySteps

    device, learned = resolve_device(options.device), to_learn_from(pipeline.passes)
    text = from_files(source, calibration, learned) if calibration.files else None
    author = Author(source, learned, calibration, options, device, MemorySteps(), reporter)
    text = author.complete(text, needs_text(plans))
    context = PassContext(calibration=text, device=device, seed=calibration.seed, reporter=reporter, profiles=profiles)
    results = pipeline.run(program, context, given=given).results
    return [(item, result.plan) for item, result in zip(pipeline.passes, results, strict=True) if result.plan]


def open_and_capture(model: str | Path, trust_remote_code: bool, reporter: Reporter) -> tuple[ModelSource, Program]:
    """A model and its Program. Weights are not read."""
    source = open_model(model, trust_remote_code, reporter)
    return source, capture_model(source, reporter)


def open_model(model: str | Path, trust_remote_code: bool, reporter: Reporter) -> ModelSource:
    """Open a model and pass its warnings on."""
    from attnopt.rewriter.source import open_source

    reporter.say(f"opening {model}")
    source = open_source(model, trust_remote_code=trust_remote_code)
    for warning in source.warnings:
        reporter.warn(warning)
    return source


def capture_model(source: ModelSource, reporter: Reporter) -> Program:
    """Capture an opened model."""
    from attnopt.rewriter.capture import capture

    reporter.say("capturing its graph")
    return capture(source)


class Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last call on a phase."""
        now = time.perf_counter()
        self.seconds[phase] = now - self._last
        self._last = now


def convert_model(
    model: str | Path,
    pipeline: Pipeline,
    output: Path,
    calibration: CalibrationOptions,
    options: RunOptions,
    reporter: Reporter,
) -> Conversion:
    """Run a pipeline on a model and write the result. Of several processes that torchrun started, the first writes."""
    from attnopt.rewriter import parallel

    with parallel.joined(resolve_device(options.device)) as device:
        if parallel.rank():
            reporter = Silent()
        return _convert(model, pipeline, output, calibration, options, reporter, device)


def _convert(
    model: str | Path,
    pipeline: Pipeline,
    output: Path,
    calibration: CalibrationOptions,
    options: RunOptions,
    reporter: Reporter,
    device: torch.device,
) -> Conversion:
    from attnopt.artifact import Manifest
    from attnopt.codegen.hf.emit import check_source, emit
    from attnopt.curve import curve_of, write_curve
    from attnopt.evaluate import peak_rss_bytes
    from attnopt.rewriter import parallel
    from attnopt.staging import Staging, resume_key

    clock = Clock()
    dtype, learned = resolve_dtype(options.dtype), to_learn_from(pipeline.passes)
    source = open_model(model, options.trust_remote_code, reporter)
    clock.lap("open")
    text = from_files(source, calibration, learned) if calibration.files else None
    settings = {
        "calibration": describe(calibration, text),
        "emit": options.emit,
        "dtype": options.dtype,
        "device": device.type,
        "seed": calibration.seed,
        **file_hashes(options),
    }
    key = resume_key(source.identity, pipeline.to_text(full=True), settings)
    paths = [source.path, *([Path(model)] if Path(model).exists() else [])]
    if parallel.rank():
        return _follow(source, pipeline, calibration, options, device, text)
    with Staging(output, key=key, overwrite=options.overwrite, resume=options.resume, sources=paths) as staging:
        program = capture_model(source, reporter)
        latent = any("mla" in item.provides for item in pipeline.passes)
        latent |= any(site.latent is not None for site in program.site_list)
        check_source(program, options.emit, latent, any(item.reshapes() for item in pipeline.passes))
        for item in pipeline.passes:
            if reason := item.unfit(options.emit):
                raise UnsupportedError(
                    f"{options.emit} cannot hold what {item.to_text()} makes: {reason}", "use --emit auto, or attnopt"
                )
        given, profiles = given_plan(source, program, pipeline, options), read_profile(program, options)
        plans = pipeline.plan(program, given, profiles)
        refuse_beyond_budget(program, plans, calibration, options)
        clock.lap("capture")
        author = Author(source, learned, calibration, options, device, staging, reporter)
        text = author.complete(text, needs_text(plans))
        settings["calibration"] = describe(calibration, text)
        text = parallel.from_first(text)
        clock.lap("calibration text")
        reporter.say(f"running {pipeline.to_text()}" + (f" on {text.tokens:,} tokens" if text is not None else ""))
        context = _context(source, text, calibration, device, options, staging, reporter, profiles)
        result, check = _run_passes(program, pipeline, context, options, given)
        clock.lap("passes")
        emitted = emit(result.program, source, staging, options.emit, dtype=dtype, reporter=reporter)
        cached = (program.cached_numbers_per_token, emitted.cached_numbers_per_token)
        parameters = (program.parameters, emitted.parameters)
        curve = curve_of(result.program.history)
        Manifest(
            source=source.identity,
            pipeline=pipeline.to_text(),
            options=settings,
            emitted_as=emitted.target,
            sites_changed=len(result.changed_sites),
            cached_numbers_per_token=cached,
            parameters=parameters,
            layers=[layer for one in result.results for layer in one.layers],
            plan=plan_done(source, pipeline, result, calibration.seed),
            recovery=curve,
            run={"model": str(Path(model).resolve() if Path(model).exists() else model)},
        ).write(staging.path)
        write_curve(staging.path, curve)
        staging.finish()
    clock.lap("write")
    notes = [*emitted.notes, *(f"left alone: {miss.reason}" for one in result.results for miss in one.misses)]
    if emitted.refused is not None:
        notes.append(f"written for attnopt's own class because {emitted.refused}")
    if check is not None:
        notes += [f"{change.text} changed the logits by {change.relative:.2e} (relative)" for change in check.changes]
    done = Conversion(
        output=str(output),
        emitted_as=emitted.target,
        sites_changed=len(result.changed_sites),
        cached_before=cached[0],
        cached_after=cached[1],
        parameters_before=parameters[0],
        parameters_after=parameters[1],
        pipeline=pipeline.to_text(),
        seconds=sum(clock.seconds.values()),
        peak_rss_bytes=peak_rss_bytes(),
        notes=tuple(notes),
        details={
            "architecture": emitted.architecture,
            "phases": clock.seconds,
            "calibration": settings["calibration"],
            "summary": {entry.text: dict(entry.summary) for entry in result.program.history},
        },
    )
    return parallel.from_first(done)


def _follow(
    source: ModelSource,
    pipeline: Pipeline,
    calibration: CalibrationOptions,
    options: RunOptions,
    device: torch.device,
    text: Calibration | None,
) -> Conversion:
    """Run the passes beside the first process, which reads and writes for all; returns what it returns."""
    from attnopt.rewriter import parallel
    from attnopt.rewriter.steps import MemorySteps

    program = capture_model(source, Silent())
    given, profiles = given_plan(source, program, pipeline, options), read_profile(program, options)
    text = parallel.from_first(text)
    context = _context(source, text, calibration, device, options, MemorySteps(), Silent(), profiles)
    _run_passes(program, pipeline, context, options, given)
    done: Any = parallel.from_first(None)
    assert isinstance(done, Conversion)
    return done


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, or the processor.

    Raises:
        OptionError: there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"there is no device {name!r}", "give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"device {name!r} is not supported", "give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(f"this machine has no {name}", "give --device cpu, or auto to take what there is")
    return device


def resolve_dtype(name: str) -> torch.dtype | None:
    """The type weights are written in; None stands for the source's.

    Raises:
        OptionError: weights are not written in such a type.
    """
    import torch

    if name not in DTYPES:
        raise OptionError(f"weights cannot be written as {name!r}", f"give one of {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, name)


def _context(
    source: ModelSource,
    text: Calibration | None,
    calibration: CalibrationOptions,
    device: torch.device,
    options: RunOptions,
    steps: StepStore,
    reporter: Reporter,
    profiles: Mapping[str, Any],
) -> PassContext:
    from attnopt.rewriter import parallel
    from attnopt.rewriter.passes import PassContext

    return PassContext(
        workdir=parallel.FirstSteps(steps) if parallel.world() > 1 else steps,
        calibration=text,
        device=device,
        seed=text.seed if text is not None else calibration.seed,
        reporter=reporter,
        resume=options.resume,
        profiles=profiles,
        memory_budget=int(options.memory_budget * 1e9) if options.memory_budget else None,
        tokenizer=source.tokenizer if source.has_tokenizer else None,
    )


def _run_passes(
    program: Program, pipeline: Pipeline, context: PassContext, options: RunOptions, given: Given | None
) -> tuple[PipelineResult, NumericCheck | None]:
    from attnopt.rewriter.instruments import NumericCheck, Verify

    check = None
    if options.check_each:
        if context.calibration is None:
            raise OptionError("--check-each compares on calibration text", "give text with --calib")
        check = NumericCheck({"input_ids": context.calibration.selection[:1]}, device=context.device)
    instruments: list[Instrument] = [Verify()]
    if check is not None:
        instruments.append(check)
    return pipeline.run(program, context, instruments, given), check
