"""What recovery brings: ln(perplexity ratio) after the method, after a refit, and after so many distilled tokens.

    python benchmarks/recovery.py MODEL --text wiki.valid.txt --method "to-mla{kv-keep=0.5}" --work DIR > recovery.json
    python benchmarks/recovery.py MODEL --text wiki.valid.txt --tokens 250000 --tokens 1000000 --plot recovery.html
    python benchmarks/recovery.py MODEL --text wiki.valid.txt --only refit --passkey 2048 --long-context 8192

The first half of the text calibrates and is learned from (or, with --calib self, text that the model writes; with
--calib both as much of each), the second half judges, and so does other text that the original writes. Distilled stages
learn from the files of --learn-from, too, as much from each. Every stage is written as a model directory, loaded by its
runtime in a fresh process and compared there with the original, which is measured in the same process.
Distillation goes on from the directory of the refit, with the original as `teacher`; its minutes count the refit's.
With --passkey and --long-context also retrieval in long texts and perplexity by position. Prints JSON, and writes a
page with the curve (--plot). A run that is cut off goes on where it was if it is started again with the same --work.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from judging import (
    add_only,
    asked_for,
    calibration,
    document,
    first_half,
    folder_of,
    judged,
    kept_row,
    models_of,
    parser,
)

#: ln(perplexity ratio) to reach on SmolLM2-135M by pipeline: (refit, 250,000 tokens, 1,000,000 tokens).
FLOORS = {
    "to-mla{kv-keep=0.5}": (0.06, 0.04, 0.02),
    "to-mla{kv-keep=0.3333}": (0.15, 0.10, 0.06),
    "to-mla{kv-keep=0.25}": (0.30, 0.18, 0.10),
    "share{fraction=0.2333}": (0.12, 0.07, 0.04),
}


class Stage(NamedTuple):
    """What is judged: its name, distilled tokens, pipeline text, and whether it goes on from the refit's directory."""

    name: str
    tokens: int
    pipeline: str
    goes_on: bool = False


def stages(arguments: argparse.Namespace) -> list[Stage]:
    """The method alone, with a refit, and that distilled."""
    method = arguments.method
    refitted = method[:-1] + " recover=refit}" if method.endswith("}") else method + "{recover=refit}"
    found = [Stage("method", 0, method), Stage("refit", 0, refitted)]
    for n in arguments.tokens or [250_000]:
        text = f"distill{{tokens={n} teacher={json.dumps(str(arguments.model))} {arguments.distill}}}"
        found.append(Stage(f"distill-{n}", n, text, goes_on=True))
    return found


def make(
    arguments: argparse.Namespace, model: str, pipeline: str, text: Path, beside: list[Path], out: Path
) -> dict[str, Any]:
    """Write a stage; returns its row without the quality."""
    from attnopt import api
    from attnopt.conversion import RunOptions

    began, busy = time.perf_counter(), time.process_time()
    result = api.run_pipeline(
        model,
        pipeline,
        out,
        calibration=calibration(arguments, text, arguments.calib, beside),
        options=RunOptions(overwrite=True, resume=True),
    )
    found = result.to_json()
    wanted = ("held_out_before", "held_out_after", "tokens", "curve")
    summary = list(found["summary"].values())[-1]
    return {
        "emitted_as": found["emitted_as"],
        "cached_numbers_per_token": found["cached_numbers_per_token"],
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "cpu_minutes": round((time.process_time() - busy) / 60, 2),
        "peak_rss_bytes": found["peak_rss_bytes"],
        "recovery": {key: summary[key] for key in wanted if key in summary},
    }


def written(arguments: argparse.Namespace, folder: Path) -> Path:
    """Text that the original writes, other than any that is learned from."""
    path = folder / "written.txt"
    if not path.exists():
        from attnopt.profiles.writing import Writer
        from attnopt.rewriter.source import open_source

        source = open_source(arguments.model)
        ids = Writer.of(source).write(arguments.windows, arguments.window, arguments.seed + 1)
        path.write_text("\n".join(source.tokenizer().batch_decode(ids, skip_special_tokens=True)), encoding="utf-8")
    return path


def far(arguments: argparse.Namespace, outs: list[Path]) -> list[dict[str, Any]]:
    """For each directory what long texts tell: passkeys found by length, and ln(perplexity ratio) by position."""
    from attnopt.evaluate import Job, PasskeySpec, TextSpec, evaluate

    if not (arguments.passkey or arguments.long_context):
        return [{} for _ in outs]
    job = Job(
        models=models_of(arguments, outs),
        texts=(TextSpec(str(arguments.text), wikitext=True, start=0.5),) if arguments.long_context else (),
        windows=1,
        long_context=arguments.long_context,
        long_windows=arguments.long_windows,
        passkey=PasskeySpec(tuple(arguments.passkey)) if arguments.passkey else None,
        sample_tokens=1,
    )
    report = evaluate(job)
    found: list[dict[str, Any]] = []
    for out in outs:
        row: dict[str, Any] = {}
        if arguments.passkey:
            row["passkey"] = report["passkey"][out.name]["lengths"]
        if arguments.long_context:
            buckets = report["long_context"][0]["converted"][out.name]["buckets"]
            row["by_position"] = [
                {key: b[key] for key in ("from", "to", "ln_ratio", "kl", "standard_error")} for b in buckets
            ]
        found.append(row)
    return found


def page(rows: list[dict[str, Any]]) -> str:
    """Quality against tokens and against CPU minutes."""
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=("by distilled tokens", "by CPU minutes"))
    for column, key in ((1, "tokens"), (2, "cpu_minutes")):
        shown = [row for row in rows if row["stage"] != "method"] if key == "tokens" else rows
        figure.add_scatter(
            x=[row[key] for row in shown],
            y=[row["ln_ratio"] for row in shown],
            error_y={"array": [row["standard_error"] for row in shown]},
            text=[row["stage"] for row in shown],
            name=key,
            mode="lines+markers",
            row=1,
            col=column,
        )
    figure.update_layout(yaxis_title="ln(perplexity ratio)", showlegend=False, template="plotly_white")
    html: str = figure.to_html(include_plotlyjs=True, full_html=True, div_id="recovery")
    return html


def main() -> None:
    options = parser(__doc__, context=512)
    options.add_argument("--method", default="to-mla{kv-keep=0.5}", help="pipeline text of one pass with a refit")
    options.add_argument("--tokens", type=int, action="append", help="to distil; may be repeated")
    options.add_argument("--distill", default="", help="more options of distill, as in pipeline text")
    options.add_argument("--calib", choices=("text", "self", "both"), default="text")
    options.add_argument(
        "--learn-from", type=Path, action="append", default=[], help="more files to distil on; repeatable"
    )
    options.add_argument("--passkey", type=int, action="append", help="tokens of a text to find a number in")
    options.add_argument("--long-context", type=int, help="perplexity by position in windows of so many tokens")
    options.add_argument("--long-windows", type=int, default=4, help="of --long-context")
    options.add_argument("--plot", type=Path, help="HTML page to write")
    add_only(options)
    arguments = options.parse_args()
    floors = FLOORS.get(arguments.method.replace(" sizes=measured", ""), ())
    reach = dict(zip((0, 250_000, 1_000_000), floors, strict=False))
    rows, outs = [], []
    with folder_of(arguments) as folder:
        text = first_half(arguments.text, folder)
        refit: dict[str, Any] = {}
        for stage in stages(arguments):
            # What is distilled goes on from the refit, which is made for that if it is not asked for.
            if not asked_for(arguments, stage.name) and stage.name != "refit":
                continue
            out = folder / stage.name
            model = str(folder / "refit") if stage.goes_on else arguments.model
            beside = arguments.learn_from if stage.goes_on else []
            make_it = partial(make, arguments, model, stage.pipeline, text, beside)
            settings = {"pipeline": stage.pipeline, "calib": arguments.calib}
            if beside:
                settings["learn_from"] = [str(file) for file in beside]
            row = kept_row(arguments, out, make_it, **settings)
            if stage.name == "refit":
                refit = row
            if stage.goes_on:
                row |= {key: round(row[key] + refit[key], 2) for key in ("minutes", "cpu_minutes")}
            if not asked_for(arguments, stage.name):
                continue
            wanted = None if stage.name == "method" else reach.get(stage.tokens)
            outs.append(out)
            rows.append(
                {"stage": stage.name, "tokens": stage.tokens, "pipeline": stage.pipeline, "to_reach": wanted, **row}
            )
        rows = judged(arguments, rows, outs, own_text=written(arguments, folder))
        rows = [{**row, **more} for row, more in zip(rows, far(arguments, outs), strict=True)]
    if arguments.plot:
        arguments.plot.write_text(page(rows), encoding="utf-8")
    print(document("recovery", arguments, rows, calib=arguments.calib, cpus=os.cpu_count()))


if __name__ == "__main__":
    main()
