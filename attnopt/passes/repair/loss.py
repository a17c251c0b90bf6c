"""How far a student's output is from its teacher's, summed over tokens, without keeping outputs of all tokens at once.

Logits are as wide as the vocabulary: 2,048 tokens of a model with 50,000 words take 400 MB, several times.
Here a few hundred tokens' logits exist at a time; their gradients go into those of the hidden states at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnopt.passes.common.difference import Kind, difference
from attnopt.passes.repair.student import Head

#: Logits that exist at a time take about this many bytes.
LOGIT_BYTES = 64 << 20


def divergence(student: Head, teacher: Head, kind: Kind) -> Tensor:
    """Sum over all tokens of the difference between two models on one batch.

    Args:
        student: differentiated in its hidden states and weights.
        teacher: on the same batch; not differentiated.
        kind: of difference (`passes.common.difference`).
    """
    tokens = student.lead[0] * student.lead[1]
    apart = student.by_token and teacher.by_token
    if not apart:
        chunk = tokens
    else:
        with torch.no_grad():
            width = teacher([x[:1, :1] for x in teacher.inputs], teacher.weights).shape[-1]
        chunk = max(16, LOGIT_BYTES // (4 * width))
    names, count = tuple(student.weights), len(student.inputs)

    def run(tensors: Sequence[Tensor]) -> Tensor:
        return student(tensors[:count], dict(zip(names, tensors[count:], strict=True)))

    def target(inputs: Sequence[Tensor]) -> Tensor:
        return teacher(inputs, teacher.weights)

    task = _Task(run, target, kind, count, tokens, chunk, apart, teacher.inputs)
    result: Tensor = _Divergence.apply(task, *student.inputs, *student.weights.values())
    return result


@dataclass(frozen=True)
class _Task:
    """What to compute.

    Attributes:
        run: the student's head on inputs and weights.
        target: the teacher's head on inputs.
        kind: of difference.
        count: number of inputs.
        tokens, chunk: how many there are, and how many to take at a time.
        apart: whether inputs [B, S, D] may be cut into tokens.
        reference: the teacher's inputs.
    """

    run: Callable[[Sequence[Tensor]], Tensor]
    target: Callable[[Sequence[Tensor]], Tensor]
    kind: Kind
    count: int
    tokens: int
    chunk: int
    apart: bool
    reference: tuple[Tensor, ...]

    def cut(self, x: Tensor, start: int) -> Tensor:
        """Some tokens of an input."""
        return x.flatten(0, 1)[None, start : start + self.chunk] if self.apart else x


class _Divergence(torch.autograd.Function):
    """The sum and, while the logits of a chunk exist, its gradients."""

    @staticmethod
    def forward(ctx: Any, task: _Task, *tensors: Tensor) -> Tensor:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        sums = {i: torch.zeros_like(tensors[i], memory_format=torch.contiguous_format) for i in wanted}
        total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
        for start in range(0, task.tokens, task.chunk):
            with torch.no_grad():
                aim = task.target([task.cut(x, start) for x in task.reference])
            leaves = [x.detach() for x in tensors]
            leaves[: task.count] = [task.cut(x, start) for x in leaves[: task.count]]
            for i in wanted:
                leaves[i].requires_grad_()
            with torch.enable_grad():
                found = task.run(leaves)
            loss, slope = difference(found.detach(), aim, task.kind)
            total += loss
            if not wanted:
                continue
            grads = torch.autograd.grad(found, [leaves[i] for i in wanted], slope.to(found.dtype), allow_unused=True)
            for i, grad in zip(wanted, grads, strict=True):
                if grad is not None:
                    where = sums[i] if i >= task.count else task.cut(sums[i], start)
                    where += grad
        ctx.gradients = sums
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        found, count = ctx.gradients, len(ctx.needs_input_grad) - 1
        return (None, *(found[i] * upstream[0].to(found[i].dtype) if i in found else None for i in range(count)))
