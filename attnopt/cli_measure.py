"""The verbs that measure and lower models, see `cli`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnopt import cli_options as options
from attnopt import cli_verify as judge
from attnopt.cli_common import (
    Calib,
    CalibTokens,
    Context,
    Device,
    Json,
    Model,
    Overwrite,
    Quiet,
    Seed,
    Trust,
    Verbose,
)
from attnopt.session import Session


def profile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="directory to write")],
    calib: Calib = None,
    calib_tokens: CalibTokens = 16384,
    context: Context = 1024,
    seed: Seed = 0,
    gradients: Annotated[bool, typer.Option(help="also measure what needs a backward pass")] = True,
    device: Device = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Measure every head and every pair of layers. Writes profile.json, profile.safetensors and report.html."""
    with Session(json=json, quiet=quiet, verbose=verbose, tokens=calib_tokens) as session:
        from attnopt import api

        result = api.profile(
            model,
            output,
            calibration=api.CalibrationOptions.parse(calib, calib_tokens, context, seed),
            options=api.ProfileOptions(
                gradients=gradients, device=device, overwrite=overwrite, trust_remote_code=trust_remote_code
            ),
            reporter=session.reporter,
        )
        return session.show(result)


def verify(
    output: Annotated[str, typer.Argument(metavar="OUT", help="a directory that attnopt wrote")],
    against: judge.Against = None,
    text: judge.Text = None,
    window: judge.Window = 1024,
    windows: judge.Windows = 16,
    wikitext: judge.Wikitext = False,
    long_context: judge.LongContext = None,
    long_windows: judge.LongWindows = 4,
    passkey: judge.Passkey = None,
    passkey_trials: judge.PasskeyTrials = 4,
    lm_eval: judge.LmEval = None,
    lm_eval_limit: judge.LmEvalLimit = None,
    lm_eval_folder: judge.LmEvalFolder = None,
    gate: judge.Gate = None,
    passkey_gate: judge.PasskeyGate = None,
    seed: judge.Seed = 0,
    device: Device = "auto",
    dtype: judge.Dtype = "float32",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Compare a written model with its original. It is reloaded in a fresh process and judged on held-out text."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from attnopt import api

        result = api.verify(
            output,
            against=against,
            texts=text or [],
            window=window,
            windows=windows,
            wikitext=wikitext,
            long_context=long_context,
            long_windows=long_windows,
            passkey=api.numbers(passkey, "--passkey") if passkey is not None else (),
            passkey_trials=passkey_trials,
            lm_eval=lm_eval.split(",") if lm_eval is not None else (),
            lm_eval_limit=lm_eval_limit,
            lm_eval_folder=lm_eval_folder,
            gate=gate,
            passkey_gate=passkey_gate,
            seed=seed,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            reporter=session.reporter,
        )
        return session.show(result)


def bench(
    model: Model,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="the original; by default where MODEL was made from, if there")
    ] = None,
    context: Annotated[str, typer.Option(metavar="N,N,...", help="prompt lengths, in tokens")] = "1024,4096",
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="sequences at once")] = "1",
    steps: Annotated[int, typer.Option(help="tokens decoded behind every prompt")] = 16,
    runs: Annotated[int, typer.Option(help="times that every prompt is read")] = 3,
    dtype: Annotated[
        str, typer.Option("--dtype", help="type to compute in: auto (the weights'), float32, ...")
    ] = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Time prefill and decoding, and count cache and memory."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from attnopt import api

        return session.show(
            api.bench(
                model,
                against=against,
                contexts=api.numbers(context, "--context"),
                batches=api.numbers(batch, "--batch"),
                steps=steps,
                runs=runs,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                reporter=session.reporter,
            )
        )


def export(
    model: Model,
    format: Annotated[options.Format, typer.Option("--format", help="what to write")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="directory to write")],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            metavar="cpu|sm_80|sm_89|sm_90|sm_100|gfx942",
            help="machine to write it for; cpu for onnx and sm_90 for triton by default",
        ),
    ] = None,
    attention: Annotated[
        options.Attention,
        typer.Option("--attention", help="in ONNX: matrix products, the Attention operator, or what suits the target"),
    ] = options.Attention.auto,
    dtype: Annotated[
        str, typer.Option("--dtype", help="in Triton: type of weights and cache: auto (the source's), bfloat16, ...")
    ] = "auto",
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> int:
    """Lower a model for a runtime and a machine. What was written is checked from the saved files."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from attnopt import api

        how = api.ExportOptions(
            format=format.value,
            target=target,
            attention=attention.value,
            dtype=dtype,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )
        return session.show(api.export(model, output, how, reporter=session.reporter))
