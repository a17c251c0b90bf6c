"""Options that every pass with a repair has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnopt.passes.common.repair import Settings
from attnopt.rewriter.passes import Pass, option


@dataclass(frozen=True)
class Repairing(Pass):
    """A pass that makes up for what it takes away."""

    fill: Literal["lsq", "lsq-nobias", "mean", "none"] = option(
        "lsq",
        help="what makes up for the loss: least squares of the output projection (with a bias or not), means, or none",
    )
    recover: Literal["none", "refit"] = option(
        "none", help="fit the changed layers to their source on the calibration text"
    )
    epochs: int | None = option(
        None, help="passes over the text in a refit; 8, or fewer over more than 16,384 tokens", minimum=1
    )
    follow: float = option(
        0.5, help="how far targets lead back to the source model's hidden states", minimum=0.0, maximum=1.0
    )
    behind: bool = option(True, help="repair the layers behind the first changed one as well")

    @property
    def settings(self) -> Settings:
        """How to repair."""
        return Settings(
            fill=self.fill,
            refit=self.recover == "refit",
            epochs=self.epochs,
            follow=self.follow,
            behind=self.behind and self.fill in ("lsq", "lsq-nobias"),
        )
