"""From times to what is reported: medians, ratios to the original, the byte model beside them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA = "attnopt.bench/1"


def bench_report(result: Mapping[str, Any]) -> dict[str, Any]:
    """The document `attnopt.bench/1`.

    Per context and batch, for every model: tokens per second of prefill and decoding (medians), bytes of the cache, and
    the bytes that the byte model says one decoding step moves (all weights once, and the cache). Where there are two
    models, `ratio` holds converted / original: of the measured speeds as the median over pairs of neighbouring
    measurements, and of the speed of decoding that the byte model predicts.
    """
    cases = []
    for case in result["cases"]:
        rows = case["models"]
        entry: dict[str, Any] = {"context": case["context"], "batch": case["batch"], "models": {}}
        for described, row in zip(result["models"], rows, strict=True):
            entry["models"][described["name"]] = row
        if len(rows) == 2:
            entry["ratio"] = _ratios(*rows)
        cases.append(entry)
    return {
        "schema": SCHEMA,
        "models": {described["name"]: described for described in result["models"]},
        "cases": cases,
        "machine": result["machine"],
    }


def _ratios(original: Mapping[str, Any], converted: Mapping[str, Any]) -> dict[str, float]:
    return {
        "prefill_speed": _speed(original["prefill_seconds"], converted["prefill_seconds"]),
        "decode_speed": _speed(original["decode_seconds"], converted["decode_seconds"]),
        "predicted_decode_speed": original["predicted_bytes_per_step"] / converted["predicted_bytes_per_step"],
        "cache_bytes": converted["cache_bytes"] / original["cache_bytes"],
    }


def _speed(original: list[float], converted: list[float]) -> float:
    return median(a / b for a, b in zip(original, converted, strict=True))


def bench_view(document: Mapping[str, Any], *, quiet: bool) -> RenderableType:
    """A table with a line per case; only the worst ratio of decoding speeds if quiet, or the speeds of one model."""
    from rich.console import Group

    from attnopt.render import gigabytes, table

    names, cases = list(document["models"]), document["cases"]
    if quiet:
        if len(names) == 2:
            return f"{min(case['ratio']['decode_speed'] for case in cases):.3f}"
        return "\n".join(f"{case['models'][names[0]]['decode_tokens_per_second']:.1f}" for case in cases)
    rows = []
    for case in cases:
        measured = [case["models"][name] for name in names]
        row = [f"{case['context']:,}", str(case["batch"])]
        for key, text in (
            ("prefill_tokens_per_second", "{:,.0f}"),
            ("decode_tokens_per_second", "{:,.1f}"),
        ):
            row += [text.format(one[key]) for one in measured]
            if len(names) == 2:
                row.append(f"{case['ratio'][key.split('_')[0] + '_speed']:.2f}")
        if len(names) == 2:
            row.append(f"{case['ratio']['predicted_decode_speed']:.2f}")
        rows.append([*row, *(gigabytes(one["cache_bytes"]) for one in measured)])
    both = len(names) == 2
    ratio, predicted = (["ratio"], ["predicted"]) if both else ([], [])
    short = ["", "converted"] if both else [""]
    columns = [
        *("context", "batch"),
        *([f"prefill {n}".strip() for n in short] + ratio),
        *([f"decode {n}".strip() for n in short] + ratio + predicted),
        *(f"cache {n}".strip() for n in short),
    ]
    machine = document["machine"]
    lines: list[RenderableType] = [table("tokens per second", columns, rows, numbers=range(len(columns)))]
    for name, described in document["models"].items():
        lines.append(
            f"{name}: {described['loaded_as']} in {described['dtype']}, {gigabytes(described['weight_bytes'])} of "
            f"weights, at most {gigabytes(described['peak_bytes'])} of memory in the largest case"
        )
    if both:
        lines.append("predicted: what the bytes that one step reads (weights and cache) would give")
    lines.append(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}")
    return Group(*lines)
