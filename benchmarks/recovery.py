"""What recovery brings: ln(perplexity ratio) after the method, after a refit, and after so many distilled tokens.

    python benchmarks/recovery.py MODEL --text wiki.valid.txt --method "to-mla{kv-keep=0.5}" --work DIR > recovery.json
    python benchmarks/recovery.py MODEL --text wiki.valid.txt --tokens 250000 --tokens 1000000 --plot recovery.html

The first half of the text calibrates and is learned from (or, with --calib self, text that the model writes), the
second half judges. Every stage is written as a model directory, loaded by its runtime in a fresh process and compared
there with the original, which is measured in the same process. Prints JSON, and writes a page with the curve (--plot).
A run that is cut off goes on where it was if it is started again with the same --work.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from judging import calibration, document, first_half, folder_of, judged, kept_row, parser

#: ln(perplexity ratio) to reach on SmolLM2-135M by pipeline: (refit, 250,000 tokens, 1,000,000 tokens).
FLOORS = {
    "to-mla{kv-keep=0.5}": (0.06, 0.04, 0.02),
    "to-mla{kv-keep=0.3333}": (0.15, 0.10, 0.06),
    "to-mla{kv-keep=0.25}": (0.30, 0.18, 0.10),
    "share{fraction=0.2333}": (0.12, 0.07, 0.04),
}


def stages(method: str, tokens: list[int], options: str) -> list[tuple[str, int, str]]:
    """(name, distilled tokens, pipeline text) of what is judged."""
    refitted = method[:-1] + " recover=refit}" if method.endswith("}") else method + "{recover=refit}"
    found = [("method", 0, method), ("refit", 0, refitted)]
    return found + [(f"distill-{n}", n, f"{refitted},distill{{tokens={n} {options}}}") for n in tokens]


def make(arguments: argparse.Namespace, pipeline: str, text: Path | None, out: Path) -> dict[str, Any]:
    """Write a stage; returns its row without the quality."""
    from attnopt import api
    from attnopt.conversion import RunOptions

    began, busy = time.perf_counter(), time.process_time()
    result = api.run_pipeline(
        arguments.model,
        pipeline,
        out,
        calibration=calibration(arguments, text),
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


def page(rows: list[dict[str, Any]]) -> str:
    """Quality against tokens and against CPU minutes."""
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=("by distilled tokens", "by CPU minutes"))
    for column, key in ((1, "tokens"), (2, "cpu_minutes")):
        shown = rows[1:] if key == "tokens" else rows
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
    options.add_argument("--calib", choices=("text", "self"), default="text")
    options.add_argument("--plot", type=Path, help="HTML page to write")
    arguments = options.parse_args()
    reach = dict(zip((0, 250_000, 1_000_000), FLOORS.get(arguments.method, ()), strict=False))
    rows, outs = [], []
    with folder_of(arguments) as folder:
        text = first_half(arguments.text, folder) if arguments.calib == "text" else None
        for stage, tokens, pipeline in stages(arguments.method, arguments.tokens or [250_000], arguments.distill):
            outs.append(folder / stage)
            row = kept_row(
                arguments,
                outs[-1],
                partial(make, arguments, pipeline, text),
                pipeline=pipeline,
                calib=arguments.calib,
            )
            wanted = None if stage == "method" else reach.get(tokens)
            rows.append({"stage": stage, "tokens": tokens, "pipeline": pipeline, "to_reach": wanted, **row})
        rows = judged(arguments, rows, outs)
    if arguments.plot:
        arguments.plot.write_text(page(rows), encoding="utf-8")
    print(document("recovery", arguments, rows, calib=arguments.calib, cpus=os.cpu_count()))


if __name__ == "__main__":
    main()
