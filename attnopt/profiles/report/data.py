"""The numbers of a report, as plain data for the page's script."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from attnopt.profiles.predict import totals
from attnopt.profiles.profile import MetricInfo, Profile

#: Pictures of all heads are put into the page up to this many; of more heads only the typical ones.
MOST_PICTURES = 2048

#: The most typical head of a pattern is the one with the largest value of a metric (and entry of its last axis).
TYPICAL = (
    ("on the first tokens (sink)", "sink_mass", None),
    ("local", "local_mass", 0),
    ("far away", "distant_mass", None),
    ("copying", "copy_mass", None),
    ("spread evenly", "entropy", None),
    ("columns and diagonals", "retained_mass", "vertical_slash"),
    ("at a stride", "retained_mass", "strided"),
)

#: Metrics that the head map offers first.
FIRST = ("contribution", "michel", "distant_mass", "sink_mass", "entropy", "retrieval", "streaming_error")


def report_data(profile: Profile) -> dict[str, Any]:
    """Everything the page shows."""
    names = [name for name in FIRST if name in profile.metrics]
    names += [name for name in profile.metrics if name not in names]
    heads, pairs = [], []
    for name in names:
        info = profile.metrics[name]
        if info.axes[:2] in (("site", "head"), ("site", "kv_head")) and name != "map_thumbnail":
            heads += _slices(profile, name, info)
        elif info.axes == ("source", "consumer"):
            pairs.append(_entry(profile, name, info, profile.metric(name), profile.std(name)))
    return {
        "sites": [dict(site) for site in profile.sites],
        "heads": heads,
        "pairs": pairs,
        "groups": [{"layers": list(group.layers), "named": group.named} for group in profile.groups],
        "spectra": _spectra(profile),
        "pictures": _pictures(profile),
        "typical": _typical(profile),
        "costs": _costs(profile),
        "absent": dict(profile.absent),
    }


def _slices(profile: Profile, name: str, info: MetricInfo) -> list[dict[str, Any]]:
    """A [layer, head] map of a metric, or one for each entry of its last axis if that has labels."""
    mean, std = profile.metric(name), profile.std(name)
    if len(info.axes) == 2:
        return [_entry(profile, name, info, mean, std)]
    if not info.labels:
        return []
    return [
        _entry(profile, name, info, mean[..., i], std[..., i], f"{name} [{label}]")
        for i, label in enumerate(info.labels)
    ]


def _entry(
    profile: Profile, name: str, info: MetricInfo, mean: Tensor, std: Tensor, title: str | None = None
) -> dict[str, Any]:
    return {
        "name": title or name,
        "help": info.help,
        "source": info.source,
        "direction": info.direction,
        "prompts": info.prompts,
        "unit": info.axes[1],
        "values": rounded(mean),
        "spread": rounded(std),
    }


def _spectra(profile: Profile) -> dict[str, Any]:
    result = {}
    for name in ("spectrum_joint", "spectrum_joint_rope", "spectrum_key", "spectrum_value"):
        if name in profile.metrics:
            result[name] = {"help": profile.metrics[name].help, "left": rounded(profile.metric(name))}
    return result


def _pictures(profile: Profile) -> dict[str, Any]:
    """Pooled maps as bytes: 255 sqrt(mass / largest), base64, by layer and head."""
    if "map_thumbnail" not in profile.metrics:
        return {}
    maps = profile.metric("map_thumbnail").float()
    typical = {(layer, head) for _, layer, head, _ in _typical(profile)}
    everything = maps.shape[0] * maps.shape[1] <= MOST_PICTURES
    pictures = {}
    for layer in range(maps.shape[0]):
        for head in range(int(profile.sites[layer]["heads"])):
            if everything or (layer, head) in typical:
                side = int((~maps[layer, head, 0].isnan()).sum())
                pictures[f"{layer}.{head}"] = [side, _picture(maps[layer, head, :side, :side])]
    return pictures


def _picture(values: Tensor) -> str:
    scaled = (values / values.max().clamp(min=1e-30)).clamp(min=0).sqrt() * 255
    return base64.b64encode(scaled.round().to(torch.uint8).contiguous().numpy().tobytes()).decode()


def _typical(profile: Profile) -> list[tuple[str, int, int, float]]:
    """(pattern, layer, head, value) of the most typical heads, each head once."""
    found: list[tuple[str, int, int, float]] = []
    for title, name, entry in TYPICAL:
        if name not in profile.metrics:
            continue
        values = profile.metric(name)
        if isinstance(entry, str):
            values = values[..., profile.metrics[name].labels.index(entry)]
            # Where the pattern is needed: much of the mass is kept by it and not by sinks and recent keys.
            streaming = profile.metric(name)[..., profile.metrics[name].labels.index("sink_recent")]
            values = values - streaming
        elif entry is not None:
            values = values[..., entry]
        taken = {(layer, head) for _, layer, head, _ in found}
        order = values.nan_to_num(-math.inf).flatten().argsort(descending=True).tolist()
        places = (divmod(index, values.shape[1]) for index in order)
        layer, head = next((place for place in places if place not in taken), (0, 0))
        if float(values[layer, head]) > 0:
            found.append((title, layer, head, float(values[layer, head])))
    return found


def _costs(profile: Profile) -> list[dict[str, Any]]:
    if not profile.predictions:
        return []
    rows = []
    for context in profile.predictions["contexts"]:
        for name, (cached, flops) in totals(profile.predictions, context).items():
            what = profile.predictions["methods"][name]["what"]
            rows.append({"context": context, "method": name, "what": what, "cached": cached, "flops": flops})
    return rows


def rounded(tensor: Tensor) -> Any:
    """Nested lists with five significant digits and None for NaN: a report needs no more, and the file stays small."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(v) for v in value]
        return None if not math.isfinite(value) else float(f"{value:.5g}")

    return convert(tensor.double().tolist())
