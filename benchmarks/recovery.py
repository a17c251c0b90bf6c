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
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: ln(perplexity ratio) to reach on SmolLM2-135M by pipeline: (refit, 250,000 tokens, 1,000,000 tokens).
FLOORS = {
    "to-mla{kv-keep=0.5}": (0.06, 0.04, 0.02),
    "to-mla{kv-keep=0.3333}": (0.15, 0.10, 0.06),
    "to-mla{kv-keep=0.25}": (0.30, 0.18, 0.10),
    "share{fraction=0.2333}": (0.12, 0.07, 0.04),
}
MARKS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))


def first_half(text: Path, folder: Path) -> Path:
    """The first half of a WikiText file, cut at a line's end, marks undone."""
    content = text.read_text(encoding="utf-8")
    content = content[: content.index("\n", len(content) // 2) + 1]
    for mark, plain in MARKS:
        content = content.replace(mark, plain)
    path = folder / "calibration.txt"
    path.write_text(content, encoding="utf-8")
    return path


def stages(method: str, tokens: list[int], options: str) -> list[tuple[str, int, str]]:
    """(name, distilled tokens, pipeline text) of what is judged."""
    refitted = method[:-1] + " recover=refit}" if method.endswith("}") else method + "{recover=refit}"
    found = [("method", 0, method), ("refit", 0, refitted)]
    return found + [(f"distill-{n}", n, f"{refitted},distill{{tokens={n} {options}}}") for n in tokens]


def make(arguments: argparse.Namespace, pipeline: str, calib: Path | None, out: Path) -> dict[str, Any]:
    """Write a stage, or find it written."""
    from attnopt import api
    from attnopt.conversion import CalibrationOptions, RunOptions

    note = out.parent / f"{out.name}.json"
    settings = [pipeline, *(getattr(arguments, n) for n in ("model", "calib", "calib_tokens", "context", "seed"))]
    if note.exists() and out.exists():
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            row: dict[str, Any] = kept["row"]
            return row
    began, busy = time.perf_counter(), time.process_time()
    files = () if calib is None else (calib,)
    result = api.run_pipeline(
        arguments.model,
        pipeline,
        out,
        calibration=CalibrationOptions(files, arguments.calib_tokens, arguments.context, arguments.seed),
        options=RunOptions(overwrite=True, resume=True),
    )
    document = result.to_json()
    wanted = ("held_out_before", "held_out_after", "tokens", "curve")
    summary = list(document["summary"].values())[-1]
    row = {
        "emitted_as": document["emitted_as"],
        "cached_numbers_per_token": document["cached_numbers_per_token"],
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "cpu_minutes": round((time.process_time() - busy) / 60, 2),
        "peak_rss_bytes": document["peak_rss_bytes"],
        "recovery": {key: summary[key] for key in wanted if key in summary},
    }
    note.write_text(json.dumps({"settings": settings, "row": row}), encoding="utf-8")
    return row


def judge(arguments: argparse.Namespace, outs: list[Path]) -> list[dict[str, Any]]:
    """Quality of written directories on the second half of the text, the original beside."""
    from attnopt.evaluate import Job, ModelSpec, TextSpec, evaluate

    job = Job(
        models=(ModelSpec("original", arguments.model), *(ModelSpec(out.name, str(out)) for out in outs)),
        texts=(TextSpec(str(arguments.text), wikitext=True, start=0.5),),
        window=arguments.window,
        windows=arguments.windows,
        sample_tokens=1,
    )
    (text,) = evaluate(job)["texts"]
    found = [text["converted"][out.name] for out in outs]
    return [
        {
            "perplexity": one["perplexity"],
            "ln_ratio": one["ln_ratio"],
            "standard_error": one["standard_error"]["paired_difference"],
            "kl": one["kl"],
            "top1_agreement": one["top1_agreement"],
        }
        for one in found
    ]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory or .gguf file")
    parser.add_argument("--text", type=Path, required=True, help="a WikiText file with its marks")
    parser.add_argument("--method", default="to-mla{kv-keep=0.5}", help="pipeline text of one pass with a refit")
    parser.add_argument("--tokens", type=int, action="append", help="to distil; may be repeated")
    parser.add_argument("--distill", default="", help="more options of distill, as in pipeline text")
    parser.add_argument("--calib", choices=("text", "self"), default="text")
    parser.add_argument("--calib-tokens", type=int, default=65536)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="directory in which to keep what is made, and to find it")
    parser.add_argument("--plot", type=Path, help="HTML page to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attnopt-recovery-") as name:
        folder = arguments.work or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        calib = first_half(arguments.text, folder) if arguments.calib == "text" else None
        rows, outs = [], []
        floors = FLOORS.get(arguments.method, ())
        reach = dict(zip((0, 250_000, 1_000_000), floors, strict=False))
        for stage, tokens, pipeline in stages(arguments.method, arguments.tokens or [250_000], arguments.distill):
            outs.append(folder / stage)
            row = make(arguments, pipeline, calib, outs[-1])
            wanted = None if stage == "method" else reach.get(tokens)
            rows.append({"stage": stage, "tokens": tokens, "pipeline": pipeline, "to_reach": wanted, **row})
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "recovery"}), file=sys.stderr, flush=True)
        rows = [{**row, **quality} for row, quality in zip(rows, judge(arguments, outs), strict=True)]
    if arguments.plot:
        arguments.plot.write_text(page(rows), encoding="utf-8")
    settings = {n: getattr(arguments, n) for n in ("calib", "calib_tokens", "context", "window", "windows", "seed")}
    head = {"schema": "attnopt.recovery/1", "model": arguments.model, "cpus": os.cpu_count(), **settings}
    print(json.dumps({**head, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
