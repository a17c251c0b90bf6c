"""What the tests of recovery share: a converted tiny model and a context with text to learn from."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from attnopt.profiles.calibration import Calibration, RecoveryText
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.program import Program
from attnopt.rewriter.steps import MemorySteps
from attnopt.rewriter.weights import Value
from tests import models
from tests.passes.helpers import apply, calibration, program_of

CONVERT = "to-mla{kv-lora-rank=10 qk-rope-head-dim=4}"


class KilledError(Exception):
    """The run was killed."""


class KilledSteps(MemorySteps):
    """Steps of a run that dies before it can save once more than so many times."""

    def __init__(self, saves: int) -> None:
        super().__init__()
        self.saves = saves

    def save(self, step: str, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> Mapping[str, Value]:
        if not self.saves:
            raise KilledError
        self.saves -= 1
        return super().save(step, tensors, record)


def text(windows: int = 17, context: int = 32, more: int = 24) -> Calibration:
    generator = torch.Generator().manual_seed(5)
    own = torch.randint(3, models.VOCAB, (more, context), generator=generator)
    given = calibration(windows, context)
    return replace(given, recovery=RecoveryText(own, given.windows, given.selection))


@functools.cache
def converted(family: str = "llama") -> tuple[Program, Program]:
    """(a tiny model of two layers, the same after to-mla)."""
    program = program_of(family, layers=2)
    return program, apply(program, CONVERT, PassContext(calibration=text())).program


def loss(original: Program, program: Program, batches: int = 4) -> float:
    """Mean divergence from the original on text that nothing was fitted to, in nats per token."""
    total = 0.0
    for seed in range(batches):
        batch = models.inputs("llama", 8, 32, seed=1000 + seed)
        ours, theirs = (run(p, **batch)["logits"].double().log_softmax(-1) for p in (program, original))
        total += float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    return total / batches


def context(original: Program, **changes: Any) -> PassContext:
    return PassContext(calibration=text(), original=original).replace(**changes)
