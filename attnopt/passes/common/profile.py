"""What passes read of a profile, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnopt.errors import OptionError

if TYPE_CHECKING:
    from attnopt.rewriter.site import AttentionSite

#: What heads can be chosen by: a number for each query head, or for each key/value head and so for all that read it.
_AXES = (("site", "head"), ("site", "kv_head"))
_SIGN = {"high_keep": 1.0, "low_keep": -1.0}

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
    values = profile.metric(metric)[site.layer]
    info = profile.metrics[metric]
    usable = [n for n, i in profile.metrics.items() if tuple(i.axes) in _AXES and i.direction in _SIGN]
    hint = f"metrics that can are {', '.join(usable)}"
    if tuple(info.axes) not in _AXES:
        raise OptionError(f"the metric {metric!r} is not one of heads: its axes are {', '.join(info.axes)}", hint)
    if info.direction not in _SIGN:
        raise OptionError(f"the metric {metric!r} only describes heads, it does not say which to keep", hint)
    at = torch.tensor(site.original_heads)
    if info.axes[1] == "kv_head":
        before = profile.sites[site.layer]
        at = at * before["kv_heads"] // before["heads"]
    scores = values[at].double()
    if not bool(torch.isfinite(scores).all()):
        raise OptionError(f"the profile's {metric!r} holds no number for heads of {site.fqn}", "choose another metric")
    return _SIGN[info.direction] * scores


def sharing_groups(profiles: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Layers that a profile says can read the maps of the first of them; empty without a profile."""
    profile = profiles.get(PROFILE)
    return [] if profile is None else [tuple(group.layers) for group in profile.groups]
