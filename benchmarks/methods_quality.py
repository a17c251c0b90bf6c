"""What share, moh and prune cost in quality on a causal model, and what they save; the original is an arm of every run.

    python benchmarks/methods_quality.py MODEL --text wiki.valid.txt > methods.json
    python benchmarks/methods_quality.py MODEL --text wiki.valid.txt --only share --decode

The first half of the text calibrates, the second half judges. Every result is written; all are loaded in one fresh
process and compared there with the original. `--decode` measures tokens per second of both models, turn by turn in one
process. Prints JSON; rows not yet judged go to stderr as they are made. With `--work`, conversions are kept there, and
those of the same settings that are there already are only judged.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mla_quality import first_half, measure

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


def converted(arguments: argparse.Namespace, name: str, calib: Path, out: Path) -> dict[str, Any]:
    """The row of a conversion that is there already, or else of one that is made now."""
    settings = {n: getattr(arguments, n) for n in ("model", "calib_tokens", "context", "seed")} | {
        "row": ROWS[name][:2]
    }
    note = out.parent / f"{out.name}.json"
    if note.exists() and out.exists():
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept["settings"] == json.loads(json.dumps(settings)):
            row: dict[str, Any] = kept["row"]
            return row
    row = convert(arguments, name, calib, out)
    note.write_text(json.dumps({"settings": settings, "row": row}), encoding="utf-8")
    return row


def convert(arguments: argparse.Namespace, name: str, calib: Path, out: Path) -> dict[str, Any]:
    """One conversion; a row without the quality."""
    from attnopt import api
    from attnopt.conversion import CalibrationOptions, RunOptions

    method, options, floor = ROWS[name]
    began = time.perf_counter()
    result = api.convert(
        arguments.model,
        out,
        to=method,
        method_options=options,
        calibration=CalibrationOptions((calib,), arguments.calib_tokens, arguments.context, arguments.seed),
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


def decode_speed(original: str, out: Path, context: int = 512, steps: int = 24, rounds: int = 5) -> dict[str, Any]:
    """Tokens per second of greedy decoding behind a prompt, median of rounds, the models taking turns."""
    import torch
    from transformers import AutoModelForCausalLM

    import attnopt  # noqa: F401 (registers our class)

    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in (("original", original), ("converted", str(out)))
    }
    ids = torch.randint(100, 20000, (1, context), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    cached = {}
    with torch.no_grad():
        for _ in range(rounds):
            for name, model in models.items():
                state = model(ids, use_cache=True).past_key_values
                token = ids[:, -1:]
                began = time.perf_counter()
                for _ in range(steps):
                    output = model(token, past_key_values=state, use_cache=True)
                    token = output.logits[:, -1:].argmax(-1)
                seconds[name].append((time.perf_counter() - began) / steps)
                cached[name] = sum(
                    part.numel() * part.element_size()
                    for layer in state.layers
                    if layer.is_initialized
                    for part in (layer.keys, layer.values)
                )
    speed = {name: 1 / statistics.median(times) for name, times in seconds.items()}
    return {
        "context": context,
        "threads": torch.get_num_threads(),
        "tokens_per_second": speed,
        "speed_ratio": speed["converted"] / speed["original"],
        "cache_bytes": cached,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory or .gguf file")
    parser.add_argument("--text", type=Path, required=True, help="a WikiText file with its marks")
    parser.add_argument("--only", action="append", help="rows whose name begins so; may be repeated")
    parser.add_argument("--decode", action="store_true", help="measure decoding speed as well")
    parser.add_argument("--calib-tokens", type=int, default=65536)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="directory in which to keep conversions, and to find them")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    outs: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="attnopt-methods-") as folder_name:
        folder = arguments.work or Path(folder_name)
        folder.mkdir(parents=True, exist_ok=True)
        half = first_half(arguments.text, folder)
        for name in ROWS:
            if arguments.only and not any(name.startswith(start) for start in arguments.only):
                continue
            outs.append(folder / re.sub(r"\W+", "-", name))
            rows.append(converted(arguments, name, half, outs[-1]))
            if arguments.decode:
                rows[-1]["decode"] = decode_speed(arguments.model, outs[-1])
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        rows = [{**row, **quality} for row, quality in zip(rows, measure(arguments, outs), strict=True)]
    settings = {n: getattr(arguments, n) for n in ("calib_tokens", "context", "window", "windows", "seed")}
    document = {"schema": "attnopt.methods_quality/1", "model": arguments.model, **settings, "rows": rows}
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
