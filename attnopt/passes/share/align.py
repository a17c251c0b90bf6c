"""Which head of one layer stands for which head of another: layers may hold the same heads in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

#: Keys left out of the comparison: every head looks at the first tokens, whatever else it does.
SINK = 4
#: Rows before this one are similar by construction: they have few keys to spread over.
FIRST_ROW = 32
#: Rows compared per window.
ROWS = 64


def attention_rows(q: Tensor, k: Tensor, rest: Sequence[object], group_of: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some rows of the attention maps of one window.

    Args:
        q, k: [H, S, d] and [K, S, d], rotated.
        rest: scale, causal, window and softcap of the attention.
        group_of: key head of each query head.

    Returns:
        ([H, rows, S], bool [rows, S] which keys a row may see).
    """
    scale, causal, window, softcap = rest
    length = q.shape[1]
    first = min(FIRST_ROW, length - 1)
    at = torch.linspace(first, length - 1, min(ROWS, length - first), device=q.device).round().long()
    logits = (q[:, at] @ k[list(group_of)].mT).float() * float(scale)  # type: ignore[arg-type]
    if softcap:
        logits = torch.tanh(logits / float(softcap)) * float(softcap)  # type: ignore[arg-type]
    keys = torch.arange(length, device=q.device)
    seen = torch.ones(len(at), length, dtype=torch.bool, device=q.device)
    if causal:
        seen &= keys <= at[:, None]
    if window:
        seen &= keys > at[:, None] - int(window)  # type: ignore[call-overload]
    return logits.masked_fill(~seen, -torch.inf).softmax(-1), seen


def row_correlation(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """Mean correlation of the rows of two sets of maps, without the keys that every head looks at.

    Sink columns are removed, rows renormalised and their mean over the visible keys subtracted, so that unrelated maps
    give about 0; plain cosines of flattened maps are inflated by sinks and by causality.

    Args:
        a, b: [H, rows, S] and [H', rows, S].
        seen: [rows, S].

    Returns:
        [H, H'], 1 for equal maps.
    """
    allowed = seen.clone()
    allowed[:, :SINK] = False
    count = allowed.sum(-1).clamp(min=1)

    def centred(maps: Tensor) -> Tensor:
        inside = maps * allowed
        inside = inside / inside.sum(-1, keepdim=True).clamp(min=1e-12)
        inside = (inside - (inside.sum(-1) / count)[..., None]) * allowed
        return inside / inside.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    return torch.einsum("hrs,grs->hg", centred(a), centred(b)) / a.shape[1]


def align_heads(cost: Tensor, groups: int) -> list[int]:
    """The assignment of heads with the least total cost that keeps groups together.

    Args:
        cost: [H, H], of letting head h of the consumer read the map of head h' of the source.
        groups: key/value heads of either; heads are evenly divided among them.

    Returns:
        head of the source for each head of the consumer. Heads of one group go to heads of one group.
    """
    heads = len(cost)
    size = heads // groups
    matrix = cost.double().cpu().numpy()
    inner: dict[tuple[int, int], list[int]] = {}
    total = torch.zeros(groups, groups, dtype=torch.float64).numpy()
    for g in range(groups):
        for other in range(groups):
            block = matrix[g * size : (g + 1) * size, other * size : (other + 1) * size]
            rows, columns = linear_sum_assignment(block)
            inner[g, other] = columns.tolist()
            total[g, other] = block[rows, columns].sum()
    _, partner = linear_sum_assignment(total)
    return [int(partner[g]) * size + place for g in range(groups) for place in inner[g, int(partner[g])]]


def consumer_order(head_map: Sequence[int]) -> list[int]:
    """The consumer's heads in the order of the source heads that they read: place p reads head p."""
    order = [0] * len(head_map)
    for head, source in enumerate(head_map):
        order[source] = head
    return order
