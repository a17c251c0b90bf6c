"""Starts the measuring processes: one that times all models, one per model for its memory."""

from __future__ import annotations

from typing import Any

from attnopt.evaluate.launch import in_fresh_process
from attnopt.progress import Reporter, Silent, bar
from attnopt.timing.job import BenchJob


def bench(job: BenchJob, reporter: Reporter | None = None) -> dict[str, Any]:
    """Carry out a job in fresh Python processes; returns what `measure.run` gives, with each model's `peak_bytes`.

    Times are taken with all models in one process, in turn, so that whatever else the machine does meets all of them.
    Memory cannot be told apart there: each model reads the largest case once more in a process of its own.

    Raises:
        AttnoptError, RuntimeError: see `in_fresh_process`.
    """
    reporter = reporter or Silent()
    alone = [job.largest(model) for model in job.models]
    with bar(reporter, "timing", job.tokens + sum(one.tokens for one in alone), "tokens") as handle:
        result = in_fresh_process("attnopt.timing", job.to_json(), lambda n: reporter.advance(handle, n))
        del result["peak_bytes"]
        for described, one in zip(result["models"], alone, strict=True):
            measured = in_fresh_process("attnopt.timing", one.to_json(), lambda n: reporter.advance(handle, n))
            described["peak_bytes"] = measured["peak_bytes"]
    return result
