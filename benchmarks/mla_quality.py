"""What a conversion to MLA costs in quality: ln(perplexity ratio) by cache size, recovery and calibration text.

    python benchmarks/mla_quality.py MODEL --text wiki.valid.txt > quality.json
    python benchmarks/mla_quality.py MODEL --text wiki.valid.txt --keep 0.5 --recover none --calib text --work DIR
    python benchmarks/mla_quality.py MODEL --text wiki.valid.txt --keep 0.25 --sizes equal --sizes measured

The first half of the text calibrates, the second half judges; "self" calibrates on text sampled from the model, "both"
on as much of each. Every result is written as the stock class (with layers of different sizes as attnopt's own), loaded
in a fresh process and compared there with the original, which is measured in the same process. Prints JSON; rows not
yet judged go to stderr as they are made. With `--work`, conversions are kept there, and those of the same settings that
are there already are only judged.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from judging import calibration, document, first_half, folder_of, judged, kept_row, parser

#: ln(perplexity ratio) to reach on SmolLM2-135M, by fraction of the cache: (recover none, recover refit).
FLOORS = {0.75: (0.03, 0.015), 0.5: (0.16, 0.08), 0.3333: (0.48, 0.22), 0.25: (0.80, 0.40)}
#: How much worse self-sampled calibration text may be.
SELF_FACTOR = 1.25


def convert(
    arguments: argparse.Namespace, keep: float, sizes: str, recover: str, calib: str, text: Path, out: Path
) -> dict[str, Any]:
    """One conversion; returns a row of the table without the quality."""
    from attnopt import api
    from attnopt.conversion import RunOptions

    began = time.perf_counter()
    result = api.convert(
        arguments.model,
        out,
        method_options={"kv-keep": keep, "sizes": sizes, "recover": recover},
        calibration=calibration(arguments, text, calib),
        options=RunOptions(emit="deepseek_v3" if sizes == "equal" else "attnopt", overwrite=True),
    )
    (summary,) = result.details["summary"].values()
    floor = FLOORS.get(keep, (None, None))[recover == "refit"]
    return {
        "kept": keep,
        "sizes": [[row["qk_rope_head_dim"], row["kv_lora_rank"]] for row in summary.get("sizes", [summary])],
        "recover": recover,
        "calibration": calib,
        "emitted_as": result.emitted_as,
        "cached_numbers_per_token": {"before": result.cached_before, "after": result.cached_after},
        "calibration_tokens": result.details["calibration"]["tokens"],
        "seconds": round(time.perf_counter() - began, 1),
        "to_reach": floor * (SELF_FACTOR if calib == "self" else 1) if floor else None,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--keep", type=float, action="append", help="fraction of the cache; may be repeated")
    options.add_argument("--sizes", choices=("equal", "measured"), action="append", help="equal unless given")
    options.add_argument("--recover", choices=("none", "refit"), action="append")
    options.add_argument("--calib", choices=("text", "self", "both"), action="append")
    arguments = options.parse_args()
    with folder_of(arguments) as folder:
        half = first_half(arguments.text, folder)
        rows, outs = [], []
        for calib in arguments.calib or ("text", "self"):
            kinds = product(
                arguments.keep or tuple(FLOORS), arguments.sizes or ("equal",), arguments.recover or ("none", "refit")
            )
            for keep, sizes, recover in kinds:
                outs.append(folder / f"{calib}-{keep:g}-{sizes}-{recover}")
                make = partial(convert, arguments, keep, sizes, recover, calib, half)
                rows.append(kept_row(arguments, outs[-1], make))
        print(document("mla_quality", arguments, judged(arguments, rows, outs)))


if __name__ == "__main__":
    main()
