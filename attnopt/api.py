"""One function per verb. Each returns one of `attnopt.results` and raises `AttnoptError` for what a user can fix.

Nothing heavy is imported until a function is called.
"""

from __future__ import annotations

import difflib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from attnopt.conversion import CalibrationOptions, RunOptions, convert_model, open_and_capture, preview
from attnopt.errors import AttnoptError, OptionError
from attnopt.exporting import Export, ExportOptions, export_model
from attnopt.profiling import ProfileOptions, profile_model
from attnopt.progress import Reporter, Silent
from attnopt.results import Bench, Conversion, Inspection, PassList, PlanPreview, Profiled
from attnopt.verification import Verification


def inspect(model: str | Path, *, trust_remote_code: bool = False, reporter: Reporter | None = None) -> Inspection:
    """Find the attention layers of a model. Weights are not read.

    Args:
        model: a Hugging Face model directory, a `.gguf` file or a hub id.
        trust_remote_code: run Python code that the directory brings.
        reporter: told what goes on.

    Raises:
        SourceError: the model cannot be read.
        UnsupportedError: one of its attention layers cannot be represented.
    """
    source, program = open_and_capture(model, trust_remote_code, reporter or Silent())
    return Inspection(
        model=source.name,
        model_type=program.model_type,
        parameters=program.parameters,
        sites=program.site_list,
        identity=source.identity,
    )


def profile(
    model: str | Path,
    output: str | Path,
    *,
    calibration: CalibrationOptions | None = None,
    options: ProfileOptions | None = None,
    reporter: Reporter | None = None,
) -> Profiled:
    """Measure every head and every pair of layers of a model and write a profile and a report.

    Args:
        model: a Hugging Face model directory, a `.gguf` file or a hub id.
        output: the directory to write `profile.json`, `profile.safetensors` and `report.html` into.
        calibration: what to profile on; by default text that the model writes itself.
        options: how.
        reporter: told of progress.

    Raises:
        SourceError: the model, a text or a picture cannot be read.
        UnsupportedError: one of its attention layers cannot be taken apart.
        AttnoptError: the output exists or cannot be written.
    """
    return profile_model(
        model,
        Path(output),
        calibration or CalibrationOptions(tokens=16384, context=1024),
        options or ProfileOptions(),
        reporter or Silent(),
    )


def convert(
    model: str | Path,
    output: str | Path,
    *,
    to: str = "mla",
    method_options: Mapping[str, Any] | None = None,
    calibration: CalibrationOptions | None = None,
    options: RunOptions | None = None,
    reporter: Reporter | None = None,
) -> Conversion:
    """Rewrite a model by a method and write the result as a new model directory.

    Args:
        model: a Hugging Face model directory, a `.gguf` file or a hub id.
        output: the directory to write.
        to: the method; `list_passes` knows them.
        method_options: options of its pass as in pipeline text, e.g. {"kv-keep": 0.5}.
        calibration, options, reporter: see `run_pipeline`.

    Raises:
        AttnoptError: as `run_pipeline`.
    """
    result = run_pipeline(
        model,
        method_pipeline(to, method_options or {}),
        output,
        calibration=calibration,
        options=replace(options or RunOptions(), dry_run=False),
        reporter=reporter,
    )
    assert isinstance(result, Conversion)
    return result


def requested_pipeline(method: str | None, options: Mapping[str, Any], plan: Path | None) -> str | None:
    """The pipeline text of a method, or None where a plan names the pipeline.

    Args:
        method, options: as for `method_pipeline`.
        plan: the plan file, if there is one.

    Raises:
        OptionError: as `method_pipeline`; or a plan is given together with options of a method.
    """
    given = [name for name, value in options.items() if value is not None]
    if method is None and plan is not None:
        if given:
            raise OptionError(f"--{given[0]} has no effect beside --plan", "edit the plan's pipeline instead")
        return None
    if method is None:
        from attnopt.passes.registry import REGISTRY

        raise OptionError("no method is given", f"give --to with one of {', '.join(REGISTRY.methods)}, or --plan FILE")
    return method_pipeline(method, options)


def method_pipeline(method: str, options: Mapping[str, Any]) -> str:
    """The pipeline text that a method stands for.

    Args:
        method: its name, e.g. "mla".
        options: of its pass, by their names in pipeline text; those that are None are left at their defaults. Besides,
            "recover" may be "distill" (a refit, then the pass distill), and "recover-tokens" is how much that reads.

    Raises:
        OptionError: there is no such method, or an option is wrong.
    """
    from attnopt.passes.registry import REGISTRY
    from attnopt.rewriter.options import option_specs, parse

    if method not in REGISTRY.methods:
        near = difflib.get_close_matches(method, list(REGISTRY.methods), n=1, cutoff=0.4)
        raise OptionError(
            f"there is no method {method!r}",
            f"did you mean {near[0]}?" if near else f"there are: {', '.join(REGISTRY.methods)}",
        )
    items = parse(REGISTRY.methods[method][0])
    given = {name: value for name, value in options.items() if value is not None}
    recover, tokens = given.pop("recover", None), given.pop("recover-tokens", None)
    if tokens is not None and recover != "distill":
        raise OptionError(
            "--recover-tokens is for --recover distill", "--calib-tokens says how much text a refit reads"
        )
    after = []
    if recover is not None:
        # A method's own pass refits while it works; after those that do not, the pass of that name does.
        if "recover" in {spec.name for spec in option_specs(REGISTRY.load(items[-1].name))}:
            given["recover"] = "none" if recover == "none" else "refit"
        elif recover != "none":
            after.append(REGISTRY.make("refit", {}))
        if recover == "distill":
            after.append(REGISTRY.make("distill", {} if tokens is None else {"tokens": tokens}))
    # A method's options are those of its last pass; the passes before it prepare.
    made = [REGISTRY.make(item.name, item.options) for item in items[:-1]]
    made.append(REGISTRY.make(items[-1].name, {**items[-1].options, **given}))
    return ",".join(item.to_text() for item in (*made, *after))


def run_pipeline(
    model: str | Path,
    pipeline: str | None,
    output: str | Path | None,
    *,
    calibration: CalibrationOptions | None = None,
    options: RunOptions | None = None,
    reporter: Reporter | None = None,
) -> Conversion | PlanPreview:
    """Run a pipeline of passes on a model and write the result as a new model directory.

    Args:
        model: a Hugging Face model directory, a `.gguf` file or a hub id.
        pipeline: its text, e.g. "to-mla{kv-keep=0.5}"; None takes that of `options.plan`.
        output: the directory to write; not needed for `options.dry_run`.
        calibration: what to calibrate on; by default text that the model writes itself.
        options: how to run; with `dry_run` the plan is returned and nothing is read or written.
        reporter: told of progress.

    Raises:
        OptionError: the pipeline or an option is wrong.
        SourceError: the model or a text cannot be read.
        UnsupportedError: a pass cannot work on this model, or no target can hold the result.
        AttnoptError: the output exists or cannot be written, or memory will not do.
    """
    from attnopt.passes.registry import REGISTRY
    from attnopt.rewriter.pipeline import Pipeline

    calibration, options, reporter = calibration or CalibrationOptions(), options or RunOptions(), reporter or Silent()
    if options.plan is not None:
        from attnopt.rewriter.planfile import PlanFile

        planned = PlanFile.load(options.plan).pipeline
        if pipeline is not None and Pipeline.parse(pipeline, REGISTRY) != Pipeline.parse(planned, REGISTRY):
            raise OptionError(
                f"the plan is for the pipeline {planned}, not for {pipeline}",
                "leave the method and its options out: the plan names them",
            )
        pipeline = planned
    if pipeline is None:
        raise OptionError("neither a pipeline nor a plan is given", "name a method with --to, or give --plan FILE")
    parsed = Pipeline.parse(pipeline, REGISTRY)
    if options.dry_run:
        return preview(model, parsed, calibration, options, reporter)
    if output is None:
        raise OptionError("no output directory given", "give one with -o OUT, or --dry-run to see what would be done")
    return convert_model(model, parsed, Path(output), calibration, options, reporter)


def export(
    model: str | Path, output: str | Path, options: ExportOptions, *, reporter: Reporter | None = None
) -> Export:
    """Lower a model, converted or not, for a target, check what was written and say what could not be lowered.

    Args:
        model: a Hugging Face model directory, a `.gguf` file or a hub id.
        output: the directory to write.
        options: format, target and so on.
        reporter: told what goes on.

    Raises:
        OptionError: there is no such format or target.
        SourceError: the model cannot be read.
        UnsupportedError: the format cannot hold the model, or the result fails its check.
        AttnoptError: the output exists or cannot be written.
    """
    return export_model(model, Path(output), options, reporter or Silent())


def list_passes() -> PassList:
    """Every pass and method, with options and what they need."""
    from dataclasses import MISSING

    from attnopt.passes.registry import REGISTRY
    from attnopt.rewriter.options import option_specs

    passes = []
    for name, entry in REGISTRY.items.items():
        cls = REGISTRY.load(name)
        options = [
            {
                "name": spec.name,
                "type": spec.kind,
                "default": None if spec.default is MISSING else spec.default,
                "required": spec.default is MISSING,
                "help": spec.help,
            }
            for spec in option_specs(cls)
        ]
        needs = {"requires": list(cls.requires), "provides": list(cls.provides)}
        passes.append({"name": name, "summary": entry.summary, "options": options, **needs})
    methods = [
        {"name": name, "pipeline": pipeline, "summary": summary}
        for name, (pipeline, summary) in REGISTRY.methods.items()
    ]
    return PassList(tuple(passes), tuple(methods))


def verify(
    output: str | Path,
    *,
    against: str | Path | None = None,
    texts: Sequence[str | Path] = (),
    window: int = 1024,
    windows: int = 16,
    wikitext: bool = False,
    long_context: int | None = None,
    long_windows: int = 4,
    passkey: Sequence[int] = (),
    passkey_depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    passkey_trials: int = 4,
    lm_eval: Sequence[str] = (),
    lm_eval_limit: int | None = None,
    lm_eval_folder: str | None = None,
    gate: float | None = None,
    passkey_gate: float | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "float32",
    prompt: str | None = None,
    sample_tokens: int = 40,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Verification:
    """Reload a written model in a fresh process through its stock runtime and compare it with the original.

    Args:
        output: the directory written.
        against: the original; by default the one its manifest names.
        texts: held-out text files; by default the English text that Python ships.
        window: tokens in a window, of which window - 1 are predicted.
        windows: at most this many windows per text.
        wikitext: undo WikiText's marks in the texts.
        long_context: tokens of long windows of the same texts, of which perplexity is told by position; None for none.
        long_windows: at most this many of them per text.
        passkey: lengths, in tokens, at which a number told inside a long text has to be found again.
        passkey_depths: where it is told, as fractions of the text.
        passkey_trials: prompts per length and depth.
        lm_eval: tasks of the lm-eval harness (the extra `lm-eval`).
        lm_eval_limit: at most so many examples of each.
        lm_eval_folder: definitions of more tasks.
        gate: largest allowed ratio of perplexities, of every text and at every position measured; the result's exit
            code is 3 if a gate is missed. It implies a passkey gate of 0.95 where passkeys are asked for.
        passkey_gate: share of the original's accuracy that has to be kept at every length.
        seed: of the passkey prompts.
        device: "auto", "cpu" or "cuda[:N]".
        dtype: type both models compute in.
        prompt: text that both models continue greedily, or None.
        sample_tokens: how far they continue it.
        trust_remote_code: run Python code that the directories bring.
        reporter: told of the tokens measured.

    Raises:
        OptionError: an option is wrong, or a length is more than a model promises to read.
        AttnoptError: a model or text cannot be read, the text is too short, or lm-eval is not installed.
    """
    from attnopt.evaluate import HarnessSpec, Job, ModelSpec, PasskeySpec, TextSpec, evaluate, verify_report
    from attnopt.evaluate.text import PYTHON_TOPICS, write_python_topics

    if gate is not None and not 0 < gate < math.inf:
        raise OptionError(f"a gate of {gate} is no ratio of perplexities", "give a number above 0, e.g. --gate 1.1")
    if passkey_gate is not None and not 0 <= passkey_gate <= 1:
        raise OptionError(f"a passkey gate of {passkey_gate} is no share", "give a number from 0 to 1")
    if passkey_gate is not None and not passkey:
        raise OptionError("a passkey gate needs a passkey test", "give lengths with --passkey, e.g. --passkey 512,2048")

    if not Path(output).is_dir():
        raise AttnoptError(f"{output} is not a directory", "give the directory that attnopt convert wrote")
    original = str(against) if against is not None else _original_of(Path(output))
    with tempfile.TemporaryDirectory(prefix="attnopt-verify-") as folder:
        files = [str(text) for text in texts] or [str(write_python_topics(Path(folder)))]
        job = Job(
            models=(
                ModelSpec("original", original, trust_remote_code),
                ModelSpec("converted", str(output), trust_remote_code),
            ),
            texts=tuple(TextSpec(file, wikitext=wikitext) for file in files),
            window=window,
            windows=windows,
            long_context=long_context,
            long_windows=long_windows,
            passkey=PasskeySpec(tuple(passkey), tuple(passkey_depths), passkey_trials, seed=seed) if passkey else None,
            harness=HarnessSpec(tuple(lm_eval), lm_eval_limit, lm_eval_folder) if lm_eval else None,
            dtype=dtype,
            device=device,
            prompt=prompt,
            sample_tokens=sample_tokens,
        )
        document = verify_report(evaluate(job, reporter), gate, passkey_gate)
    if not texts:
        for told in (*document["texts"], *document.get("long_context", ())):
            told["file"] = PYTHON_TOPICS
    return Verification(document)


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    contexts: Sequence[int] = (1024, 4096),
    batches: Sequence[int] = (1,),
    steps: int = 16,
    runs: int = 3,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Bench:
    """Time prefill and decoding of a model, beside its original where there is one, in fresh processes.

    Args:
        model: a directory or GGUF file; if attnopt wrote it and its original is still there, that is the original.
        against: another original.
        contexts: prompt lengths, in tokens.
        batches: sequences at once.
        steps: tokens decoded behind every prompt.
        runs: times that every prompt is read.
        dtype: type to compute in; "auto" for that of the weights.
        device: "auto", "cpu" or "cuda[:N]".
        trust_remote_code: run Python code that the directories bring.
        reporter: told of the tokens done.

    Raises:
        AttnoptError: a model cannot be read or does not take such prompts, or the memory does not suffice.
    """
    from attnopt.conversion import resolve_device
    from attnopt.evaluate import ModelSpec
    from attnopt.timing import BenchJob, bench_report
    from attnopt.timing import bench as measure

    if not Path(model).exists():
        raise AttnoptError(f"there is no {model}", "give a model directory or a .gguf file")
    if against is None:
        with suppress(AttnoptError):
            named = Path(_original_of(Path(model)))
            against = named if named.exists() else None
    models = [ModelSpec(Path(model).name if against is None else "converted", str(model), trust_remote_code)]
    if against is not None:
        models.insert(0, ModelSpec("original", str(against), trust_remote_code))
    job = BenchJob(tuple(models), tuple(contexts), tuple(batches), steps, runs, dtype, str(resolve_device(device)))
    return Bench(bench_report(measure(job, reporter)))


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers separated by commas.

    Raises:
        OptionError: naming `option`, if it is anything else.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError(f"{option} {text!r} is no list of whole numbers", f"write {option} 1024,4096") from error


def _original_of(output: Path) -> str:
    """The model that a directory's manifest says it was made from."""
    from attnopt.staging import MANIFEST_NAME

    path = output / MANIFEST_NAME
    hint = "name the original with --against MODEL"
    try:
        original = json.loads(path.read_text(encoding="utf-8"))["run"]["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AttnoptError(f"{path} does not say what {output} was made from", hint) from error
    return str(original)
