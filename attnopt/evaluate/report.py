"""From per-window numbers to what is compared: pooled perplexity, spread, paired differences, retrieval. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from attnopt.evaluate.job import PasskeySpec


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


def position_buckets(length: int) -> tuple[tuple[int, int], ...]:
    """Parts of a long window, (first token, token after the last), each as long as all before it together.

    The first has 512 tokens, or a quarter of a short window: 0-512, 512-1024, 1024-2048, 2048-4096 and so on.
    """
    edges = [0, min(512, max(2, length // 4))]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return tuple(pairwise(edges))


def by_position(
    buckets: Sequence[tuple[int, int]], original: Sequence[WindowScores], converted: Sequence[WindowScores]
) -> list[dict[str, Any]]:
    """Loss by position of the predicted token: one entry of `compare` per bucket, without the windows' own numbers."""
    told = []
    for (start, stop), before, after in zip(buckets, original, converted, strict=True):
        compared = compare(before, after)
        kept = ("perplexity", "ln_ratio", "kl", "top1_agreement", "standard_error")
        tokens = len(before.nll) * (stop - max(start, 1))
        told.append({"from": start, "to": stop, "tokens": tokens, **{key: compared[key] for key in kept}})
    return told


def retrieval(
    spec: PasskeySpec,
    cells: Sequence[tuple[int, float]],
    original: Sequence[tuple[bool, float]],
    converted: Sequence[tuple[bool, float]],
) -> dict[str, Any]:
    """Passkey retrieval of two models.

    Args:
        spec: the test.
        cells: length and depth of every prompt.
        original, converted: of every prompt, whether the answer was right, and its tokens' mean loss in nats.

    Returns:
        `cells` (per length and depth) and `lengths` (all depths together): `accuracy` and `nll` of both models.
    """
    right = {"original": [float(a) for a, _ in original], "converted": [float(a) for a, _ in converted]}
    loss = {"original": [b for _, b in original], "converted": [b for _, b in converted]}

    def average(chosen: Sequence[int]) -> dict[str, Any]:
        return {
            "prompts": len(chosen),
            "accuracy": {name: mean([values[i] for i in chosen]) for name, values in right.items()},
            "nll": {name: mean([values[i] for i in chosen]) for name, values in loss.items()},
        }

    def where(length: int, depth: float | None = None) -> list[int]:
        return [i for i, (n, d) in enumerate(cells) if n == length and depth in (None, d)]

    return {
        "digits": spec.digits,
        "trials": spec.trials,
        "seed": spec.seed,
        "lengths": [{"length": n, **average(where(n))} for n in spec.lengths],
        "cells": [{"length": n, "depth": d, **average(where(n, d))} for n in spec.lengths for d in spec.depths],
    }


def task_scores(original: Sequence[Mapping[str, Any]], converted: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the lm-eval harness, both models in one; `difference` is converted - original."""
    names = ("task", "metric", "filter")
    found = {tuple(row[name] for name in names): row for row in converted}
    rows = []
    for before in original:
        after = found[tuple(before[name] for name in names)]
        rows.append(
            {
                **{name: before[name] for name in (*names, "examples", "higher_is_better")},
                "original": before["value"],
                "converted": after["value"],
                "difference": after["value"] - before["value"],
                "standard_error": {"original": before["standard_error"], "converted": after["standard_error"]},
            }
        )
    return rows
