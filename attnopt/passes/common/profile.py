"""What passes read of a profile, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt.errors import OptionError

if TYPE_CHECKING:
    from attnopt.rewriter.site import AttentionSite

#: Name under which a profile is found in a context's profiles.
PROFILE = "profile"


def head_scores(profiles: Mapping[str, Any], metric: str, site: AttentionSite) -> Tensor:
    """Scores of a layer's present heads, [H] float64, high: keep.

    Raises:
        OptionError: there is no profile, or it does not hold such a metric.
    """
    profile = profiles.get(PROFILE)
    if profile is None:
        raise OptionError(
            f"importance {metric!r} is read from a profile, and none was given",
            "give one with --profile DIR (attnopt profile makes it), or leave the importance out",
        )
    info = profile.metrics.get(metric)
    if info is not None and tuple(info.axes[:2]) != ("site", "head"):
        raise OptionError(f"the metric {metric!r} is not one of heads: its axes are {', '.join(info.axes)}")
    values = profile.metric(metric)[site.layer]
    scores = values[list(site.original_heads)].double()
    if not bool(torch.isfinite(scores).all()):
        raise OptionError(f"the profile's {metric!r} holds no number for heads of {site.fqn}", "choose another metric")
    return scores if info.direction != "low_keep" else -scores


def sharing_groups(profiles: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Layers that a profile says can read the maps of the first of them; empty without a profile."""
    profile = profiles.get(PROFILE)
    return [] if profile is None else [tuple(group.layers) for group in profile.groups]
