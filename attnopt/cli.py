"""The command line: parse, call `api`, render. No logic.

Exit codes: 0 done, 1 the user can fix it, 2 a bug in attnopt, 3 finished but a quality gate that was asked for is
missed. Results go to stdout, talk and progress to stderr.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import attnopt
from attnopt import cli_measure as measure
from attnopt import cli_options as options
from attnopt.cli_common import (
    Budget,
    Calib,
    CalibTokens,
    CheckEach,
    Context,
    Device,
    DryRun,
    Dtype,
    Json,
    Model,
    Output,
    Overwrite,
    Quiet,
    Resume,
    Seed,
    Trust,
    Verbose,
    example,
)
from attnopt.demo import CALIB_TOKENS
from attnopt.session import INTERRUPTED, Session, report_failure

app = typer.Typer(
    name="attnopt",
    help="A compiler for attention: finds, measures and rewrites the attention layers of a trained model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its boxes cost 0.2 s of imports
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"attnopt {attnopt.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and leave")
    ] = False,
) -> None:
    """A compiler for attention: finds, measures and rewrites the attention layers of a trained model."""


@app.command(epilog=example("attnopt inspect ./SmolLM2-135M", "attnopt inspect model.gguf --json"))
def inspect(
    model: Model, json: Json = False, quiet: Quiet = False, verbose: Verbose = False, trust_remote_code: Trust = False
) -> int:
    """Show a model's attention layers and what they cache. Weights are not read."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from attnopt import api

        return session.show(api.inspect(model, trust_remote_code=trust_remote_code, reporter=session.reporter))


app.command(
    epilog=example(
        "attnopt profile ./SmolLM2-135M -o ./SmolLM2-135M-profile --calib words.txt",
        "attnopt profile ./vit -o ./vit-profile --calib ./pictures",
    )
)(measure.profile)


@app.command(
    epilog=example(
        "attnopt convert ./SmolLM2-135M --to mla --kv-keep 0.5 -o ./SmolLM2-135M-mla",
        "attnopt convert ./SmolLM2-135M --to mla --kv-keep 0.5 --dry-run",
        "attnopt convert ./SmolLM2-135M --to prune --keep-heads 0.67 --dry-run --measure --json > plan.json",
        "attnopt convert ./SmolLM2-135M --plan plan.json -o ./SmolLM2-135M-pruned",
    )
)
def convert(
    model: Model,
    to: Annotated[
        str | None, typer.Option("--to", metavar="METHOD", help="the method; 'attnopt passes' lists them")
    ] = None,
    output: Output = None,
    kv_keep: Annotated[
        float | None,
        typer.Option(help="fraction of the cached numbers per token to keep"),
    ] = None,
    kv_lora_rank: Annotated[int | None, typer.Option(help="width of the latent, instead of --kv-keep")] = None,
    qk_rope_head_dim: Annotated[int | None, typer.Option(help="width of the rotary key, with --kv-lora-rank")] = None,
    sizes: Annotated[
        options.SizesOf | None,
        typer.Option(help="mla: give all layers the same, or more to those that need more", show_default="equal"),
    ] = None,
    recover: Annotated[
        options.Recover | None,
        typer.Option(help="after the closed form: nothing, fit each layer to the original, or also learn from it"),
    ] = None,
    recover_tokens: Annotated[
        int | None, typer.Option(help="tokens to learn from with --recover distill", show_default="250000")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="mla: convert even if the cache grows")] = False,
    layers: options.Layers = None,
    fraction: options.Fraction = None,
    edge: options.EdgeKind = None,
    active: options.Active = None,
    shared_heads: options.SharedHeads = None,
    router: options.Router = None,
    gate: options.Gate = None,
    keep_heads: options.KeepHeads = None,
    unit: options.UnitKind = None,
    groups: options.Groups = None,
    importance: options.Importance = None,
    fill: options.Fill = None,
    sparsity: options.Sparsity = None,
    structured: options.Structured = False,
    emit: options.EmitAs = options.Emit.auto,
    calib: Calib = None,
    calib_tokens: CalibTokens = 32768,
    context: Context = 512,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    profile: options.ProfileDir = None,
    plan: options.PlanFile = None,
    dry_run: DryRun = False,
    measure: options.Measure = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    check_each: CheckEach = False,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Rewrite a model by a method. The result is a new model directory."""
    method_options = {
        "kv-keep": kv_keep,
        "kv-lora-rank": kv_lora_rank,
        "qk-rope-head-dim": qk_rope_head_dim,
        "sizes": sizes,
        "recover": recover,
        "recover-tokens": recover_tokens,
        "force": force or None,
        "layers": layers,
        "fraction": fraction,
        "edge": edge,
        "active": active,
        "shared-heads": int(shared_heads) if shared_heads and shared_heads.isdigit() else shared_heads,
        "router": router,
        "gate": gate,
        "keep-heads": keep_heads,
        "unit": unit,
        "groups": groups,
        "importance": importance,
        "fill": fill,
        "sparsity": sparsity,
        "structured": structured or None,
    }
    method_options = {name: getattr(value, "value", value) for name, value in method_options.items()}
    with Session(json=json, quiet=quiet, verbose=verbose, tokens=calib_tokens) as session:
        from attnopt import api

        pipeline = api.requested_pipeline(to, method_options, plan)
        result = api.run_pipeline(
            model,
            pipeline,
            output,
            calibration=api.CalibrationOptions.parse(calib, calib_tokens, context, seed),
            options=api.RunOptions(
                emit=emit.value,
                device=device,
                dtype=dtype,
                memory_budget=memory_budget,
                dry_run=dry_run,
                measure=measure,
                plan=plan,
                profile=profile,
                resume=resume,
                overwrite=overwrite,
                check_each=check_each,
                trust_remote_code=trust_remote_code,
            ),
            reporter=session.reporter,
        )
        return session.show(result)


@app.command(epilog=example('attnopt run ./SmolLM2-135M -p "to-mla{kv-keep=0.5}" -o ./SmolLM2-135M-mla'))
def run(
    model: Model,
    pipeline: Annotated[
        str | None,
        typer.Option("--pipeline", "-p", metavar="TEXT", help="passes and their options, separated by commas"),
    ] = None,
    output: Output = None,
    emit: options.EmitAs = options.Emit.auto,
    calib: Calib = None,
    calib_tokens: CalibTokens = 32768,
    context: Context = 512,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory_budget: Budget = None,
    profile: options.ProfileDir = None,
    plan: options.PlanFile = None,
    dry_run: DryRun = False,
    measure: options.Measure = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    check_each: CheckEach = False,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Run a pipeline of passes on a model. The result is a new model directory."""
    with Session(json=json, quiet=quiet, verbose=verbose, tokens=calib_tokens) as session:
        from attnopt import api

        result = api.run_pipeline(
            model,
            pipeline,
            output,
            calibration=api.CalibrationOptions.parse(calib, calib_tokens, context, seed),
            options=api.RunOptions(
                emit=emit.value,
                device=device,
                dtype=dtype,
                memory_budget=memory_budget,
                dry_run=dry_run,
                measure=measure,
                plan=plan,
                profile=profile,
                resume=resume,
                overwrite=overwrite,
                check_each=check_each,
                trust_remote_code=trust_remote_code,
            ),
            reporter=session.reporter,
        )
        return session.show(result)


app.command(
    epilog=example(
        "attnopt verify ./SmolLM2-135M-mla",
        "attnopt verify OUT --text wiki.txt --text code.txt --gate 1.1",
        "attnopt verify OUT --long-context 8192 --passkey 512,2048 --gate 1.1 --passkey-gate 0.9",
        "attnopt verify OUT --lm-eval arc_easy,hellaswag --lm-eval-limit 200",
    )
)(measure.verify)


app.command(epilog=example("attnopt bench ./SmolLM2-135M-mla --context 1024,4096,16384 --batch 1,8"))(measure.bench)


app.command(
    epilog=example(
        "attnopt export ./SmolLM2-135M-mla --format onnx -o ./SmolLM2-135M-mla-onnx",
        "attnopt export ./SmolLM2-135M-mla --format triton --target sm_90 -o ./SmolLM2-135M-mla-triton",
    )
)(measure.export)


@app.command(epilog=example("attnopt passes"))
def passes(json: Json = False, quiet: Quiet = False, verbose: Verbose = False) -> int:
    """List passes and methods, with their options."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from attnopt import api

        return session.show(api.list_passes())


@app.command(epilog=example("attnopt demo", "attnopt demo --kv-keep 0.75 -o ./demo --overwrite"))
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="directory to write; the demo's own is replaced")
    ] = Path("attnopt-demo"),
    kv_keep: Annotated[float, typer.Option(help="fraction of the cached numbers per token to keep")] = 0.5,
    calib_tokens: Annotated[
        int, typer.Option("--calib-tokens", help="text sampled from the model, in tokens")
    ] = CALIB_TOKENS,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Convert a real model and compare, in minutes. From nothing but packages, to half the cache."""
    with Session(json=json, quiet=quiet, verbose=verbose, tokens=calib_tokens) as session:
        from attnopt.demo import run_demo

        return session.show(
            run_demo(output, kv_keep=kv_keep, calib_tokens=calib_tokens, seed=seed, reporter=session.reporter)
        )


def main(arguments: list[str]) -> int:
    """Run one command line.

    Args:
        arguments: what follows the program's name.

    Returns:
        the exit code.
    """
    try:
        code: Any = app(args=arguments, prog_name="attnopt", standalone_mode=False)
        if code == INTERRUPTED:  # typer has caught it
            raise KeyboardInterrupt
    except BaseException as error:
        return report_failure(error, json="--json" in arguments, verbose=bool({"-v", "--verbose"} & set(arguments)))
    return code if isinstance(code, int) else 0
