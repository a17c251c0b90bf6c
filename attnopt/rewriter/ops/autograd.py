"""Gradients of a dialect op by running its reference again in the backward pass.

Attention weights are S x T per head: recomputing them is cheaper than keeping them, and the formula is then the same
code as the forward, so it cannot drift from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_reference_autograd(op: Any, reference: Callable[..., Tensor]) -> None:
    """Make a custom op differentiable in all of its floating-point tensor inputs.

    Args:
        op: the `torch.library.custom_op`.
        reference: differentiable function of the same positional arguments.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.tensor_at = [i for i, a in enumerate(inputs) if isinstance(a, Tensor)]
        ctx.rest = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensor_at))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.rest)
        wanted: dict[int, Tensor] = {}
        for i, saved in zip(ctx.tensor_at, ctx.saved_tensors, strict=True):
            args[i] = saved.detach()
            if saved.is_floating_point() and ctx.needs_input_grad[i]:
                args[i] = wanted[i] = saved.detach().requires_grad_()
        grads: list[Tensor | None] = [None] * len(args)
        if wanted:
            with torch.enable_grad():
                output = reference(*args)
            found = torch.autograd.grad(output, list(wanted.values()), grad, allow_unused=True)
            for i, value in zip(wanted, found, strict=True):
                grads[i] = value
        return tuple(grads)

    op.register_autograd(backward, setup_context=setup_context)
