"""One of several processes: runs recovery on a tiny model with its share of the text; the first one writes the results.

python -m tests.passes.repair.job FILE, with the variables that torchrun sets.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from attnopt.rewriter import parallel
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.steps import MemorySteps
from tests import models
from tests.passes.helpers import apply, program_of
from tests.passes.repair.helpers import text

CLOSED = "to-mla{kv-lora-rank=10 qk-rope-head-dim=4}"
SIZES = "to-mla{kv-keep=0.5 sizes=measured}"
DISTILL = "distill{tokens=1280 batch=128 rate=0.003 checks=2 checkpoint-minutes=0 parameters=all}"
REFIT = "refit{epochs=1 rate=0.0015}"
SHARE = 'share{layers="1" fill=lsq}'


def results() -> dict[str, Any]:
    """Logits after each pipeline, and the curve of the distillation."""
    program = program_of("llama", layers=2)
    found: dict[str, Any] = {}
    for name, pipeline in (
        ("closed", CLOSED),
        ("sizes", SIZES),
        ("distill", f"{CLOSED},{DISTILL}"),
        ("ridge", SHARE),
        ("refit", f"{CLOSED},{REFIT}"),
    ):
        steps = parallel.FirstSteps(MemorySteps())
        done = apply(program, pipeline, PassContext(calibration=text(), workdir=steps))
        after = done.program
        found[name] = run(after, **models.inputs("llama", 4, 24, seed=9))["logits"]
        if name == "distill":
            found["curve"] = done.results[-1].summary["curve"]
            again = PassContext(calibration=text(), workdir=steps, resume=True)
            found["resumed"] = apply(program, pipeline, again).results[-1].summary["curve"]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.joined(torch.device("cpu")):
        made = results()
        if parallel.rank() == 0:
            torch.save(made, Path(sys.argv[1]))
