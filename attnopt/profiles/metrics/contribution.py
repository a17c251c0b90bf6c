"""How much each head adds to the layer's output.

    c_h = ctx_h W_O^h                                       the head's term of y = sum_h c_h + b_O
    contribution            E_t ‖c_h‖                       and its variance over tokens
    kv_contribution         E_t ‖sum of c_h over a KV group‖
    act_l2                  l2 over the head's channels of E_t |ctx_c|     Minitron, arXiv 2407.14679, section 2.2
    contribution_cosine     cosine of c_h and c_h', E over tokens

‖c_h‖² = ctx (W_O^h W_O^hᵀ) ctxᵀ, so no [T, H, D] tensor is made. "high = keep"; a dead head scores 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.profiles.metric import Metric
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.settings import Settings

#: Tokens on which contributions of heads are compared with each other.
COMPARED = 64


class Contribution(Metric):
    """Sizes of the heads' terms, and how alike they are."""

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        head = ("site", "head")
        return {
            "contribution": MetricInfo(1, head, "high_keep", "mean size of what the head adds", "definition"),
            "contribution_variance": MetricInfo(
                1, head, "", "variance of what the head adds, over tokens", "definition"
            ),
            "kv_contribution": MetricInfo(
                1, ("site", "kv_head"), "high_keep", "mean size of what the KV group adds", "definition"
            ),
            "act_l2": MetricInfo(1, head, "high_keep", "size of the head's mean activations", "arXiv 2407.14679, 2.2"),
            "contribution_cosine": MetricInfo(
                1, ("site", "head", "head"), "", "cosine of what two heads add", "definition"
            ),
        }

    def result(self) -> dict[str, Tensor]:
        view = self.view
        context = view.context.flatten(0, 1)  # [tokens, H, dv]
        sizes, groups = view.head_norms(context), view.group_norms(context)
        return {
            "contribution": sizes.mean(0),
            "contribution_variance": sizes.var(0, unbiased=False),
            "kv_contribution": groups.mean(0),
            "act_l2": context.double().abs().mean(0).norm(dim=-1),
            "contribution_cosine": self._cosines(context),
        }

    def _cosines(self, context: Tensor) -> Tensor:
        at = torch.linspace(0, len(context) - 1, min(COMPARED, len(context))).round().long()
        added = torch.einsum("thv,hvd->htd", context[at.to(context.device)], self.view.w_o)
        added = torch.nn.functional.normalize(added.double(), dim=-1)
        return torch.einsum("htd,gtd->hg", added, added) / len(at)
