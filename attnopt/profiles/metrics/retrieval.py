"""Retrieval (copy) score on synthetic needles.

A prompt of random tokens holds a needle x_1 ... x_n, whose tokens occur nowhere else, and repeats it at its end. While
the model is fed the repetition, a copying head looks from x_k at where x_{k+1} stood:

    retrieval_h = share of k with argmax_j a_tj = place of x_{k+1},  t the second place of x_k
    copy_mass_h = E_k a_tj of that place

Retrieval heads (Wu et al., arXiv 2404.15574, equation 1) are found by the same condition while decoding an answer; fed
the answer, every k counts instead of the successful runs only, nothing has to be decoded, and base models that follow
no instruction are measured as well. ">= 0.1 = retrieval head" in that paper; "high = keep dense".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.view import LayerView

DESCRIBED = {
    "retrieval": MetricInfo(1, ("site", "head"), "high_keep", "share of needle tokens it copies", "arXiv 2404.15574"),
    "copy_mass": MetricInfo(1, ("site", "head"), "high_keep", "attention on the token to copy", "arXiv 2404.15574"),
}


@dataclass(frozen=True)
class Needle:
    """A synthetic prompt.

    Attributes:
        ids: [1, T] token ids.
        queries: second places of x_1 ... x_{n-1}.
        targets: first places of x_2 ... x_n.
    """

    ids: Tensor
    queries: Tensor
    targets: Tensor


def make_needles(vocabulary: int, count: int, length: int, context: int, seed: int) -> list[Needle]:
    """Prompts of random tokens with a needle at a random place.

    Args:
        vocabulary: token ids are below this.
        count: prompts.
        length: n, tokens in a needle.
        context: tokens in a prompt, at least 3 n.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        order = torch.randperm(vocabulary, generator=generator)
        needle, others = order[:length], order[length:]
        ids = others[torch.randint(len(others), (context,), generator=generator)]
        start = int(torch.randint(1, context - 2 * length, (1,), generator=generator))
        ids[start : start + length] = needle
        ids[context - length :] = needle
        steps = torch.arange(length - 1)
        result.append(Needle(ids[None], context - length + steps, start + 1 + steps))
    return result


def copying(view: LayerView, needle: Needle) -> dict[str, Tensor]:
    """Scores of a layer's heads on one needle, [H] each."""
    rows = view.call.rows(needle.queries)[0]  # [H, n - 1, T]
    at = torch.arange(len(needle.queries))
    return {
        "retrieval": (rows.argmax(-1) == needle.targets).double().mean(1),
        "copy_mass": rows[:, at, needle.targets].double().mean(1),
    }
