"""The `verify` document and its gates. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

#: Share of the original's passkey accuracy to be kept where a gate is asked for and no other share is given.
PASSKEY_SHARE = 0.95


def apply_gate(texts: Sequence[Mapping[str, Any]], gate: float | None) -> dict[str, Any] | None:
    """Judge the worst perplexity ratio of all texts; None if no gate was asked for."""
    if gate is None:
        return None
    return {"ratio": gate, **_worst([text["perplexity"]["ratio"] for text in texts], gate)}


def _worst(ratios: Sequence[float], limit: float) -> dict[str, Any]:
    """Every ratio must be at most the limit. One that is no number fails, and so does having none."""
    worst = max((math.inf if math.isnan(ratio) else ratio for ratio in ratios), default=math.inf)
    return {"worst": worst, "passed": bool(worst <= limit)}


def _judge_passkey(lengths: Sequence[Mapping[str, Any]], share: float) -> dict[str, Any]:
    """At every length, at least this share of the original's accuracy. Lengths at which the original finds nothing tell
    nothing about a conversion; if there are no others, the gate is missed."""
    judged = [row for row in lengths if row["accuracy"]["original"] > 0]
    kept = [row["accuracy"]["converted"] / row["accuracy"]["original"] for row in judged]
    worst = min(kept, default=0.0)
    skipped = [row["length"] for row in lengths if row not in judged]
    return {"worst": worst, "not_judged": skipped, "passed": bool(worst >= share)}


def apply_gates(document: Mapping[str, Any], gate: float | None, passkey_gate: float | None) -> dict[str, Any] | None:
    """Judge a `verify` document.

    Args:
        document: with `texts` and, if measured, `long_context` and `passkey`.
        gate: largest perplexity ratio allowed, of every text and of every position bucket; None for no gate on them.
        passkey_gate: share of the original's passkey accuracy to be kept at every length. By default `PASSKEY_SHARE` if
            there is a gate, otherwise no gate on it.

    Returns:
        None if no gate was asked for. Otherwise `passed`; `ratio` and `worst` of the texts (None without `gate`);
        `checks`, one for everything judged, with `of`, `limit`, `worst` and `passed`.
    """
    if gate is not None and passkey_gate is None:
        passkey_gate = PASSKEY_SHARE
    texts = apply_gate(document["texts"], gate)
    checks = []
    if gate is not None and texts is not None:
        checks.append({"of": "perplexity", "limit": gate, "worst": texts["worst"], "passed": texts["passed"]})
        if "long_context" in document:
            ratios = [b["perplexity"]["ratio"] for text in document["long_context"] for b in text["buckets"]]
            checks.append({"of": "perplexity by position", "limit": gate, **_worst(ratios, gate)})
    if passkey_gate is not None and "passkey" in document:
        judged = _judge_passkey(document["passkey"]["lengths"], passkey_gate)
        checks.append({"of": "passkey", "limit": passkey_gate, **judged})
    if not checks:
        return None
    outer = texts or {"ratio": None, "worst": None}
    return {**outer, "passed": all(check["passed"] for check in checks), "checks": checks}


def verify_report(
    report: Mapping[str, Any], gate: float | None = None, passkey_gate: float | None = None
) -> dict[str, Any]:
    """The `verify` document of the command line from a measuring process's report on two models.

    Args:
        report: result of `evaluate` on a job whose models are the original and the converted one.
        gate, passkey_gate: see `apply_gates`.
    """
    original, converted = report["models"]
    name = converted["name"]

    def both(key: str) -> dict[str, Any]:
        return {"original": original[key], "converted": converted[key]}

    document = {
        "schema": "attnopt.verify/1",
        "reloaded_as": converted["reloaded_as"],
        "runtime": converted["runtime"],
        "dtype": report["dtype"],
        "texts": [
            {key: text[key] for key in ("file", "windows", "window", "tokens")} | text["converted"][name]
            for text in report["texts"]
        ],
        "cached_numbers_per_token": both("cached_numbers_per_token"),
        "cache_bytes_per_token": both("cache_bytes_per_token"),
        "decode_error": both("decode_error"),
        "parameters": both("parameters"),
        "samples": both("sample"),
        "tokens_per_second": both("tokens_per_second"),
        "seconds": report["seconds"],
        "peak_rss_bytes": report["peak_rss_bytes"],
    }
    if "long_context" in report:
        document["long_context"] = [
            {key: text[key] for key in ("file", "windows", "window")} | text["converted"][name]
            for text in report["long_context"]
        ]
    if "passkey" in report:
        document["passkey"] = report["passkey"][name]
    if "tasks" in report:
        document["tasks"] = report["tasks"][name]
        document["lm_eval_version"] = report["lm_eval_version"]
    judged = apply_gates(document, gate, passkey_gate)
    return document if judged is None else {**document, "gate": judged}
