"""How quickly a model is distilled: processor seconds of a step, with attention run once and again for gradients.

    OMP_NUM_THREADS=1 python benchmarks/distill_speed.py MODEL --student CONVERTED --window 512 --window 2048

A step is one pass of 2,048 tokens through teacher and student and the gradient of the attention's weights, as
`distill` makes it by default; the two ways alternate. Prints JSON: medians and their ratio.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from typing import Any
from unittest import mock

#: Whether a fused attention is run once more in the backward pass.
WAYS = {"again": False, "once": True}


def training(teacher: Any, student: Any, window: int) -> Any:
    """What `distill` runs, on random tokens."""
    import torch

    from attnopt.passes.repair.parameters import select
    from attnopt.passes.repair.student import Model
    from attnopt.passes.repair.training import TOKENS_AT_ONCE, Settings, Training
    from attnopt.rewriter.passes import PassContext

    generator = torch.Generator().manual_seed(0)
    rows = TOKENS_AT_ONCE["cpu"] // window
    ids = torch.randint(1000, 20000, (rows, window), generator=generator)
    pool: Any = {}
    learner = Model(student, pool, select(student, "attention", None))
    settings = Settings(tokens=1 << 16, rate=1e-6)
    return Training(learner, Model(teacher, pool), ids, ids, settings, PassContext())


def step(run: Any) -> float:
    """Seconds of the processor for one step."""
    with run._precision():
        began = time.process_time()
        run._one_step()
        return time.process_time() - began


def noted(function: Any, calls: list[Any]) -> Any:
    """The function, with a note of every call."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        calls.append(function)
        return function(*args)

    return call


def measured(teacher: Any, student: Any, window: int, repeats: int) -> dict[str, Any]:
    """Both ways in one window length."""
    from attnopt.rewriter import subgraph
    from attnopt.rewriter.ops.autograd import IN_PLACE

    runs = {}
    for way, once in WAYS.items():
        calls: list[Any] = []
        taken = {op: noted(f, calls) for op, f in IN_PLACE.items()}
        others = {op: f for op, f in subgraph._IN_PLACE.items() if op not in IN_PLACE}
        with mock.patch.object(subgraph, "_IN_PLACE", {**others, **(taken if once else {})}):
            runs[way] = training(teacher, student, window)  # what is made here, and its first step, compile
            step(runs[way])
        if bool(calls) != once:
            raise RuntimeError(f"attention did not run {way}")
    times = [{way: step(run) for way, run in runs.items()} for _ in range(repeats)]
    seconds = {way: round(statistics.median(row[way] for row in times), 2) for way in WAYS}
    return {"window": window, "seconds": seconds, "times_as_fast": round(seconds["again"] / seconds["once"], 3)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory or .gguf file")
    parser.add_argument("--student", help="what was made of it; by default it learns from itself")
    parser.add_argument("--window", type=int, action="append", help="tokens in a window; repeatable")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    import torch

    from attnopt.rewriter.capture import capture
    from attnopt.rewriter.source import open_source

    teacher = capture(open_source(arguments.model))
    student = capture(open_source(arguments.student or arguments.model))
    rows = [measured(teacher, student, window, arguments.repeats) for window in arguments.window or [512, 2048]]
    print(json.dumps({"model": arguments.model, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
