"""How far one model's output is from another's, summed over tokens, and the slope of that."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["kl", "squared"]


def kind_for(outputs: tuple[str, ...]) -> Kind:
    """The difference that suits a program's outputs."""
    return "kl" if outputs[0] == "logits" else "squared"


def difference(found: Tensor, aim: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """(sum over all tokens, its slope in `found`), computed in float32 at least.

    "kl" is the forward Kullback-Leibler divergence sum_w p_aim(w) (ln p_aim(w) - ln p_found(w)) in nats, for logits;
    "squared" is ||found - aim||^2 / ||aim||^2, for vectors.

    Args:
        found, aim: [.., n, width].
        kind: of difference.
    """
    found, aim = _wide(found), _wide(aim)
    if kind == "squared":
        size = aim.pow(2).sum(-1, keepdim=True).clamp(min=1e-12)
        error = (found - aim) / size
        return ((found - aim) * error).sum(dtype=torch.float64), 2 * error
    ours, theirs = found.log_softmax(-1), aim.log_softmax(-1)
    share = theirs.exp()
    total = (share * (theirs - ours)).sum(dtype=torch.float64)
    return total, ours.exp_().sub_(share)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
