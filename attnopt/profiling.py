"""The work behind `profile`: open, capture, prompts, measure, write, move into place."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import attnopt
from attnopt.conversion import CalibrationOptions, capture_model, open_model, resolve_device
from attnopt.errors import OptionError, UnsupportedError
from attnopt.progress import Reporter
from attnopt.results import Profiled

if TYPE_CHECKING:
    import torch

    from attnopt.profiles.prompts import Prompts
    from attnopt.rewriter.program import Program
    from attnopt.rewriter.source import ModelSource

#: Pictures that an image model is profiled on.
PICTURES = 16


@dataclass(frozen=True)
class ProfileOptions:
    """How to profile.

    Attributes:
        gradients: also measure what needs a backward pass.
        device: "auto", "cpu" or "cuda[:N]".
        overwrite: replace an existing output.
        trust_remote_code: run Python code that the model directory brings.
    """

    gradients: bool = True
    device: str = "auto"
    overwrite: bool = False
    trust_remote_code: bool = False


def profile_model(
    model: str | Path,
    output: Path,
    calibration: CalibrationOptions,
    options: ProfileOptions,
    reporter: Reporter,
) -> Profiled:
    """Profile a model and write the result."""
    from attnopt.artifact import MANIFEST_NAME, Staging, resume_key, write_json
    from attnopt.evaluate import peak_rss_bytes
    from attnopt.passes.mla.spectra import Spectra
    from attnopt.passes.registry import REGISTRY
    from attnopt.profiles.build import Options, profile_program, require_finite
    from attnopt.profiles.report.page import REPORT_NAME, write_report
    from attnopt.profiles.settings import Settings

    began = time.perf_counter()
    device = resolve_device(options.device)
    source = open_model(model, options.trust_remote_code, reporter)
    settings = Settings(seed=calibration.seed)
    key = resume_key(source.identity, "profile", {"seed": calibration.seed})
    paths = [source.path, *([Path(model)] if Path(model).exists() else [])]
    with Staging(output, key=key, overwrite=options.overwrite, sources=paths) as staging:
        program = capture_model(source, reporter)
        prompts = make_prompts(source, program, calibration, device, reporter)
        reporter.say(f"measuring {len(program.site_list)} attention layers on {len(prompts)} prompts")
        profile = profile_program(
            program,
            prompts,
            settings,
            Options(gradients=options.gradients, device=device),
            identity=source.identity,
            site_metrics=(Spectra,),
            reporter=reporter,
        )
        require_finite(profile)
        profile.save(staging.path)
        name = str(Path(model).resolve() if Path(model).exists() else model)
        write_report(profile, staging.path / REPORT_NAME, model=name, methods=tuple(REGISTRY.methods))
        manifest = {
            "schema": "attnopt.manifest/1",
            "attnopt_version": attnopt.__version__,
            "source": dict(source.identity),
            "pipeline": "profile",
            "options": {"calibration": prompts.to_json(), "gradients": options.gradients, "device": device.type},
            "run": {"model": name},
        }
        write_json(staging.path / MANIFEST_NAME, manifest)
        staging.finish()
    return Profiled(
        output=str(output),
        model=source.name,
        profile=profile,
        seconds=time.perf_counter() - began,
        peak_rss_bytes=peak_rss_bytes(),
    )


def make_prompts(
    source: ModelSource,
    program: Program,
    calibration: CalibrationOptions,
    device: torch.device,
    reporter: Reporter,
) -> Prompts:
    """What to profile on: files, or text that the model writes; English text that Python ships for encoders.

    Raises:
        OptionError: an image model, and no pictures are given.
        SourceError: a file cannot be read.
    """
    from attnopt.profiles.calibration import from_files, together
    from attnopt.profiles.images import image_prompts
    from attnopt.profiles.prompts import Prompts
    from attnopt.profiles.writing import self_sampled

    if "pixel_values" in program.inputs:
        if calibration.own:
            raise OptionError(f"{source.name} reads images and writes no text", "leave out --calib self")
        return image_prompts(source, program, calibration.files, PICTURES, calibration.seed)
    if "input_ids" not in program.inputs:
        raise UnsupportedError(f"{source.name} reads neither text nor images, so there is nothing to profile it on")
    calibration = within_positions(program, calibration)
    calibration.check_shares()
    context, seed = calibration.context, calibration.seed
    text = None
    if calibration.files:
        of_files = calibration.of_files(calibration.tokens)
        text = from_files(source.tokenizer(), calibration.files, of_files, context, seed)
    if calibration.own or (text is None and source.model_class.can_generate()):
        tokens = calibration.of_model(calibration.tokens)
        reporter.say(f"the model writes {tokens:,} tokens to be profiled on")
        written = self_sampled(source, tokens, context, seed, device=str(device), reporter=reporter)
        text = written if text is None else together(text, written)
    if text is None:
        from attnopt.evaluate.text import PYTHON_TOPICS, write_python_topics

        with tempfile.TemporaryDirectory(prefix="attnopt-profile-") as folder:
            topics = [write_python_topics(Path(folder))]
            text = from_files(source.tokenizer(), topics, calibration.tokens, context, seed)
        text = replace(text, source=PYTHON_TOPICS)
    return Prompts.of_calibration(text)


def within_positions(program: Program, calibration: CalibrationOptions) -> CalibrationOptions:
    """Shorter prompts for models that know fewer positions, as encoders do; the number of tokens stays."""
    known = program.config.get("max_position_embeddings")
    padding = program.config.get("pad_token_id") if program.model_type in ("roberta", "xlm-roberta") else None
    if not isinstance(known, int):
        return calibration
    usable = known - (padding + 1 if isinstance(padding, int) else 0)  # RoBERTa counts positions from there
    if usable >= calibration.context:
        return calibration
    if usable < 8:
        raise OptionError(f"the model knows {usable} positions only", "profile a model that reads text")
    return replace(calibration, context=usable)
