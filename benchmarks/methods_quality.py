"""What share, moh and prune cost in quality on a causal model, and what they save; the original is an arm of every run.

    python benchmarks/methods_quality.py MODEL --text wiki.valid.txt > methods.json
    python benchmarks/methods_quality.py MODEL --text wiki.valid.txt --only "share*" --decode

The first half of the text calibrates, the second half judges. Every result is written; all are loaded in one fresh
process and compared there with the original. `--decode` measures tokens per second of both models, turn by turn in one
process, and the bytes of their caches. Prints JSON; rows not yet judged go to stderr as they are made. With `--work`,
conversions are kept there, and those of the same settings that are there already are only judged.
"""

from __future__ import annotations

import argparse
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

from judging import add_only, asked_for, calibration, document, first_half, folder_of, judged, kept_row, parser

#: name -> (method, options, ln(perplexity ratio) to reach; None where it is only reported). Figures are for
#: SmolLM2-135M: 30 layers of 9 query and 3 key/value heads.
ROWS: dict[str, tuple[str, dict[str, Any], float | None]] = {
    "share 7 of 30": ("share", {"fraction": 7 / 30}, 0.30),
    "share 7 of 30, refit": ("share", {"fraction": 7 / 30, "recover": "refit"}, 0.12),
    "share keys and values, 7 of 30": ("share", {"fraction": 7 / 30, "edge": "kv"}, None),
    "share 7 of 30, no repair": ("share", {"fraction": 7 / 30, "fill": "none"}, None),
    "moh 7 of 9": ("moh", {"active": 7 / 9}, 0.15),
    "moh 7 of 9, refit": ("moh", {"active": 7 / 9, "recover": "refit"}, 0.08),
    "moh 7 of 9, qnorm": ("moh", {"active": 7 / 9, "router": "qnorm"}, None),
    "moh 7 of 9, weighted gates, refit": ("moh", {"active": 7 / 9, "gate": "weighted", "recover": "refit"}, None),
    "prune to 6 of 9, any": ("prune", {"keep-heads": 2 / 3, "unit": "head", "groups": "free"}, 0.45),
    "prune to 6 of 9, even": ("prune", {"keep-heads": 2 / 3, "unit": "head"}, None),
    "prune to 6 of 9, any, means": (
        "prune",
        {"keep-heads": 2 / 3, "unit": "head", "groups": "free", "fill": "mean"},
        None,
    ),
    "prune to 2 of 3 groups": ("prune", {"keep-heads": 2 / 3}, None),
}


def convert(arguments: argparse.Namespace, name: str, text: Path, out: Path) -> dict[str, Any]:
    """One conversion; a row without the quality."""
    from attnopt import api
    from attnopt.conversion import RunOptions

    method, options, floor = ROWS[name]
    began = time.perf_counter()
    result = api.convert(
        arguments.model,
        out,
        to=method,
        method_options=options,
        calibration=calibration(arguments, text),
        options=RunOptions(overwrite=True),
    )
    return {
        "row": name,
        "pipeline": result.pipeline,
        "emitted_as": result.emitted_as,
        "cached_numbers_per_token": {"before": result.cached_before, "after": result.cached_after},
        "parameters": {"before": result.parameters_before, "after": result.parameters_after},
        "seconds": round(time.perf_counter() - began, 1),
        "to_reach": floor,
    }


def decoding(original: str, out: Path) -> dict[str, Any]:
    """Speed of decoding and bytes of the cache, the models taking turns."""
    from attnopt.evaluate import ModelSpec
    from attnopt.timing import BenchJob, bench, bench_report

    models = (ModelSpec("original", original), ModelSpec("converted", str(out)))
    (case,) = bench_report(bench(BenchJob(models, contexts=(512,), steps=64, dtype="float32")))["cases"]
    return dict(case)


def main() -> None:
    options = parser(__doc__)
    add_only(options)
    options.add_argument("--decode", action="store_true", help="measure decoding as well")
    arguments = options.parse_args()
    rows, outs = [], []
    with folder_of(arguments) as folder:
        half = first_half(arguments.text, folder)
        for name in ROWS:
            if not asked_for(arguments, name):
                continue
            outs.append(folder / re.sub(r"\W+", "-", name))
            rows.append(kept_row(arguments, outs[-1], partial(convert, arguments, name, half), row=ROWS[name][:2]))
        rows = judged(arguments, rows, outs)
        if arguments.decode:
            rows = [{**row, "decode": decoding(arguments.model, out)} for row, out in zip(rows, outs, strict=True)]
    print(document("methods_quality", arguments, rows))


if __name__ == "__main__":
    main()
