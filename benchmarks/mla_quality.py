"""What a conversion to MLA costs in quality: ln(perplexity ratio) by cache size, recovery and calibration text.

    python benchmarks/mla_quality.py MODEL --text wiki.valid.txt > quality.json
    python benchmarks/mla_quality.py MODEL --text wiki.valid.txt --keep 0.5 --recover none --calib text --work DIR

The first half of the text calibrates, the second half judges; "self" calibrates on text sampled from the model. Every
result is written as the stock class, loaded by stock transformers in a fresh process and compared there with the
original, which is measured in the same process. Prints JSON; rows not yet judged go to stderr as they are made. With
`--work`, conversions are kept there, and those of the same settings that are there already are only judged.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: ln(perplexity ratio) to reach on SmolLM2-135M, by fraction of the cache: (recover none, recover refit).
FLOORS = {0.75: (0.03, 0.015), 0.5: (0.16, 0.08), 0.3333: (0.48, 0.22), 0.25: (0.80, 0.40)}
#: How much worse self-sampled calibration text may be.
SELF_FACTOR = 1.25
MARKS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))


def first_half(text: Path, folder: Path) -> Path:
    """The first half of a WikiText file, cut at a line's end, marks undone."""
    content = text.read_text(encoding="utf-8")
    cut = content.index("\n", len(content) // 2) + 1
    content = content[:cut]
    for mark, plain in MARKS:
        content = content.replace(mark, plain)
    path = folder / "calibration.txt"
    path.write_text(content, encoding="utf-8")
    return path


def converted(
    arguments: argparse.Namespace, keep: float, recover: str, calib: Path | None, out: Path
) -> dict[str, Any]:
    """The row of a conversion that is there already, or else of one that is made now."""
    settings = {n: getattr(arguments, n) for n in ("model", "calib_tokens", "context", "seed")}
    note = out.parent / f"{out.name}.json"
    if note.exists() and out.exists():
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            row: dict[str, Any] = kept["row"]
            return row
    row = convert(arguments, keep, recover, calib, out)
    note.write_text(json.dumps({"settings": settings, "row": row}), encoding="utf-8")
    return row


def convert(arguments: argparse.Namespace, keep: float, recover: str, calib: Path | None, out: Path) -> dict[str, Any]:
    """One conversion; returns a row of the table without the quality."""
    from attnopt import api
    from attnopt.conversion import CalibrationOptions, RunOptions

    began = time.perf_counter()
    files = () if calib is None else (calib,)
    result = api.convert(
        arguments.model,
        out,
        method_options={"kv-keep": keep, "recover": recover},
        calibration=CalibrationOptions(files, arguments.calib_tokens, arguments.context, arguments.seed),
        options=RunOptions(emit="deepseek_v3", overwrite=True),
    )
    (summary,) = result.details["summary"].values()
    floor = FLOORS.get(keep, (None, None))[recover == "refit"]
    return {
        "kept": keep,
        "recover": recover,
        "calibration": "self" if calib is None else "text",
        "emitted_as": result.emitted_as,
        "kv_lora_rank": summary["kv_lora_rank"],
        "qk_rope_head_dim": summary["qk_rope_head_dim"],
        "cached_numbers_per_token": {"before": result.cached_before, "after": result.cached_after},
        "calibration_tokens": result.details["calibration"]["tokens"],
        "seconds": round(time.perf_counter() - began, 1),
        "to_reach": floor * (SELF_FACTOR if calib is None else 1) if floor else None,
    }


def measure(arguments: argparse.Namespace, outs: list[Path]) -> list[dict[str, Any]]:
    """Perplexity of written directories beside the original's, on the second half of the text."""
    from attnopt.evaluate import Job, ModelSpec, TextSpec, evaluate

    job = Job(
        models=(ModelSpec("original", arguments.model), *(ModelSpec(out.name, str(out)) for out in outs)),
        texts=(TextSpec(str(arguments.text), wikitext=True, start=0.5),),
        window=arguments.window,
        windows=arguments.windows,
        sample_tokens=1,
    )
    report = evaluate(job)
    (text,) = report["texts"]
    rows = []
    for out in outs:
        found = text["converted"][out.name]
        rows.append(
            {
                "perplexity": found["perplexity"],
                "ln_ratio": found["ln_ratio"],
                "standard_error": found["standard_error"]["paired_difference"],
                "kl": found["kl"],
                "top1_agreement": found["top1_agreement"],
                "windows": text["windows"],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory or .gguf file")
    parser.add_argument("--text", type=Path, required=True, help="a WikiText file with its marks")
    parser.add_argument("--keep", type=float, action="append", help="fraction of the cache; may be repeated")
    parser.add_argument("--recover", choices=("none", "refit"), action="append")
    parser.add_argument("--calib", choices=("text", "self"), action="append")
    parser.add_argument("--calib-tokens", type=int, default=65536)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="directory in which to keep conversions, and to find them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attnopt-quality-") as name:
        folder = arguments.work or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        half = first_half(arguments.text, folder)
        rows, outs = [], []
        for calib in arguments.calib or ("text", "self"):
            for keep in arguments.keep or tuple(FLOORS):
                for recover in arguments.recover or ("none", "refit"):
                    outs.append(folder / f"{calib}-{keep:g}-{recover}")
                    rows.append(converted(arguments, keep, recover, half if calib == "text" else None, outs[-1]))
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        rows = [{**row, **quality} for row, quality in zip(rows, measure(arguments, outs), strict=True)]
    settings = {n: getattr(arguments, n) for n in ("calib_tokens", "context", "window", "windows", "seed")}
    print(json.dumps({"schema": "attnopt.mla_quality/1", "model": arguments.model, **settings, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
