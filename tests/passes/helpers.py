"""What the tests of passes share: random calibration text, a run of a pipeline, and how much it changed."""

from __future__ import annotations

import functools
from typing import Any

import torch

from attnopt.passes.registry import REGISTRY
from attnopt.profiles.calibration import Calibration, divide
from attnopt.rewriter.capture import capture_module
from attnopt.rewriter.instruments import Verify
from attnopt.rewriter.interpret import run
from attnopt.rewriter.passes import PassContext
from attnopt.rewriter.pipeline import Pipeline, PipelineResult
from attnopt.rewriter.program import Program
from attnopt.rewriter.weights import Inline
from tests import models


def calibration(windows: int = 9, context: int = 40, seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    return divide(torch.randint(3, models.VOCAB, (windows, context), generator=generator), "random", seed)


@functools.cache
def program_of(family: str, layers: int = 4, heads: int = 4, kv_heads: int = 2, **changes: Any) -> Program:
    """The Program of a tiny model of given sizes; heads are 8 wide."""
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "num_attention_heads": heads}
    if family not in ("bert", "vit"):
        sizes |= {"num_key_value_heads": kv_heads, "head_dim": 8}
    return capture_module(models.build(family, **sizes, **changes))


def apply(program: Program, pipeline: str, context: PassContext | None = None, **options: Any) -> PipelineResult:
    """Run a pipeline with the verifier between its passes."""
    context = context or PassContext(calibration=calibration())
    return Pipeline.parse(pipeline, REGISTRY).run(program, context, [Verify()], **options)


def change(before: Program, after: Program, family: str = "llama", length: int = 17, **how: Any) -> float:
    """Relative change of the first output on text that was not calibrated on."""
    batch = models.inputs(family, 2, length, seed=77)
    name = before.outputs[0]
    return models.relative_error(run(after, **batch, **how)[name], run(before, **batch, **how)[name])


def with_weights(program: Program, values: dict[str, torch.Tensor]) -> Program:
    """The program with other weights."""
    return program.replace(weights=program.weights.with_values({n: Inline(t) for n, t in values.items()}))
