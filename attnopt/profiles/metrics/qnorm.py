"""Sizes of queries: the signal that MoH's LLaMA form routes by (arXiv 2410.11842, section 3.3: top-k of ‖q_i‖).

    q_norm = E_t ‖q_h‖,  q_norm_variance = Var_t ‖q_h‖

after norm and rotation; a plain rotation keeps norms.
"""

from __future__ import annotations

from torch import Tensor

from attnopt.profiles.metric import Metric
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.settings import Settings


class QueryNorm(Metric):
    """Mean and variance of a head's query norms."""

    @classmethod
    def describe(cls, settings: Settings, bins: int) -> dict[str, MetricInfo]:
        head = ("site", "head")
        return {
            "q_norm": MetricInfo(1, head, "high_keep", "mean size of the queries", "arXiv 2410.11842, 3.3"),
            "q_norm_variance": MetricInfo(
                1, head, "", "variance of the size of the queries, over tokens", "arXiv 2410.11842, 3.3"
            ),
        }

    def result(self) -> dict[str, Tensor]:
        norms = self.view.call.q.double().norm(dim=-1)  # [N, H, T]
        return {"q_norm": norms.mean((0, 2)), "q_norm_variance": norms.var((0, 2), unbiased=False)}
