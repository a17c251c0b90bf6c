"""From per-window numbers to what is reported: pooled perplexity, spread, paired differences, gates. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class WindowScores:
    """What was measured for one model on one text, one entry per window.

    Attributes:
        nll: mean negative log-likelihood of the window's predictions, in nats.
        kl: mean KL(original || model) in nats, per window and quarter of the window.
        agree: share of positions where both have the same most likely token, per window and quarter.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[list[float]] = field(default_factory=list)
    agree: list[list[float]] = field(default_factory=list)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))


def compare(original: WindowScores, converted: WindowScores) -> dict[str, Any]:
    """One text, one converted model beside the original.

    Every window has the same number of predictions, so the pooled loss is the mean of the windows' means. `ln_ratio` is
    ln(converted / original perplexity), the mean of the paired differences.
    """
    differences = [b - a for a, b in zip(original.nll, converted.nll, strict=True)]
    before, after = math.exp(mean(original.nll)), math.exp(mean(converted.nll))
    quarters = range(len(converted.kl[0]))
    return {
        "perplexity": {"original": before, "converted": after, "ratio": after / before},
        "ln_ratio": mean(differences),
        "kl": mean([mean(row) for row in converted.kl]),
        "top1_agreement": mean([mean(row) for row in converted.agree]),
        "by_quarter": [
            {"kl": mean([row[q] for row in converted.kl]), "top1_agreement": mean([row[q] for row in converted.agree])}
            for q in quarters
        ],
        "nll": {"original": original.nll, "converted": converted.nll},
        "standard_error": {
            "original": standard_error(original.nll),
            "converted": standard_error(converted.nll),
            "paired_difference": standard_error(differences),
        },
    }


def apply_gate(texts: Sequence[Mapping[str, Any]], gate: float | None) -> dict[str, Any] | None:
    """Judge the worst perplexity ratio of all texts; None if no gate was asked for."""
    if gate is None:
        return None
    worst = max((text["perplexity"]["ratio"] for text in texts), default=math.inf)
    return {"ratio": gate, "worst": worst, "passed": bool(worst <= gate)}


def verify_report(report: Mapping[str, Any], gate: float | None = None) -> dict[str, Any]:
    """The `verify` document of the command line from a measuring process's report on two models.

    Args:
        report: result of `evaluate` on a job whose models are the original and the converted one.
        gate: largest perplexity ratio allowed, or None.
    """
    original, converted = report["models"]
    texts = [
        {key: text[key] for key in ("file", "windows", "window", "tokens")} | text["converted"][converted["name"]]
        for text in report["texts"]
    ]
    cached = {"original": original["cached_numbers_per_token"], "converted": converted["cached_numbers_per_token"]}
    document = {
        "schema": "attnopt.verify/1",
        "reloaded_as": converted["reloaded_as"],
        "runtime": converted["runtime"],
        "texts": texts,
        "cached_numbers_per_token": cached,
        "decode_error": {"original": original["decode_error"], "converted": converted["decode_error"]},
        "parameters": {"original": original["parameters"], "converted": converted["parameters"]},
        "samples": {"original": original["sample"], "converted": converted["sample"]},
        "tokens_per_second": {
            "original": original["tokens_per_second"],
            "converted": converted["tokens_per_second"],
        },
        "seconds": report["seconds"],
        "peak_rss_bytes": report["peak_rss_bytes"],
    }
    judged = apply_gate(texts, gate)
    return document if judged is None else {**document, "gate": judged}
