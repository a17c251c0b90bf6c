"""Gradients of a dialect op by running its reference again in the backward pass.

Attention weights are S x T per head: recomputing them is cheaper than keeping them, and the formula is then the same
code as the forward, so it cannot drift from it. Where torch's own kernel does not keep them either, code that is run
and not captured takes the reference itself (`IN_PLACE`), and nothing is run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: What to run in place of an op where nothing is captured: the same result and the same gradient.
IN_PLACE: dict[Any, Callable[..., Tensor]] = {}


def register_reference_autograd(
    op: Any, reference: Callable[..., Tensor], lean: Callable[..., bool] | None = None
) -> None:
    """Make a custom op differentiable in all of its floating-point tensor inputs.

    Args:
        op: the `torch.library.custom_op`.
        reference: differentiable function of the same positional arguments.
        lean: of the same arguments, whether the derivative of `reference` keeps no more than tensors of the size of its
            inputs and output, so that it had better be taken directly; None means never.
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
    if lean is not None:

        def in_place(*args: Any) -> Tensor:
            result: Tensor = (reference if torch.is_grad_enabled() and lean(*args) else op)(*args)
            return result

        IN_PLACE[op._opoverload] = in_place
