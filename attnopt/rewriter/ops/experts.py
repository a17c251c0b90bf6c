"""`attnopt::expert_linear`: one of E matrices per row, the one data-dependent step of a mixture of experts.

Traced literally, a mixture is either a Python loop over the experts that were hit (not exportable) or a gather of one
weight matrix per token (hundreds of gigabytes for a Mixtral). As one op it is exact, exportable and needs no copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.rewriter.ops.autograd import register_reference_autograd


def expert_linear_reference(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y[i] = weight[expert[i]] x[i] + bias[expert[i]]. Differentiable plain torch.

    Args:
        x: [N, in].
        expert: int [N], each in [0, E).
        weight: [E, out, in].
        bias: [E, out] or None.

    Returns:
        [N, out].
    """
    order = torch.argsort(expert, stable=True)
    counts = torch.bincount(expert, minlength=weight.shape[0]).tolist()
    pieces = []
    for e, rows in enumerate(x[order].split(counts)):
        if rows.shape[0]:
            pieces.append(torch.nn.functional.linear(rows, weight[e], None if bias is None else bias[e]))
    if not pieces:
        return x.new_zeros(0, weight.shape[1])
    return torch.cat(pieces)[torch.argsort(order)]


@torch.library.custom_op("attnopt::expert_linear", mutates_args=())
def expert_linear(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`attnopt::expert_linear`; arguments and result as in `expert_linear_reference`."""
    return expert_linear_reference(x, expert, weight, bias)


@expert_linear.register_fake
def _(x: Tensor, expert: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


register_reference_autograd(expert_linear, expert_linear_reference)
