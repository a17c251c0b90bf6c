"""What a profile suggests, in plain words, with the commands that try it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.profiles.predict import STREAMS_BELOW
from attnopt.profiles.profile import Profile

#: From this score on a head counts as a retrieval head (Wu et al., arXiv 2404.15574).
RETRIEVES_FROM = 0.1

#: Fractions of the cache that are considered for MLA, and the energy that may be lost on average.
KEEPS = (0.25, 0.33, 0.5, 0.67, 0.75)
LOST_ENERGY = 0.02

#: Share of the attention on sinks from which it is worth a word.
INFLATES_FROM = 0.1

#: A KV group that adds less than this share of its layer's mean is weak.
WEAK = 0.25


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing.

    Attributes:
        text: a sentence or two.
        command: what tries it; empty if nothing follows.
        method: the method of the command.
    """

    text: str
    command: str = ""
    method: str = ""


def findings(profile: Profile, model: str = "MODEL", methods: Collection[str] | None = None) -> list[Finding]:
    """What the profile suggests, most useful first.

    Args:
        profile: the measurements.
        model: what to call the model in commands.
        methods: methods that exist; commands of others are left out. None for all.
    """
    found = [
        *_low_rank(profile, model),
        *_sharing(profile, model),
        *_pruning(profile, model),
        *_routing(profile, model),
        *_streaming(profile),
        *_retrieval(profile),
        *_sinks(profile),
        *_duplicates(profile),
    ]
    if methods is None:
        return found
    return [f if not f.method or f.method in methods else Finding(f.text) for f in found]


def _low_rank(profile: Profile, model: str) -> list[Finding]:
    if "spectrum_joint_rope" not in profile.metrics:
        return []
    left = profile.metric("spectrum_joint_rope").nanmean(0)
    cached = max(int(site["cached_numbers_per_token"]) for site in profile.sites)
    for keep in KEEPS:
        # About a third of what is kept is the rotary key; the rest is rank.
        rank = min(int(keep * cached * 0.64), len(left) - 1)
        if float(left[rank]) <= LOST_ENERGY:
            return [
                Finding(
                    f"Keys and values are of low rank: a latent of {rank} channels with a rotary key beside it, "
                    f"{keep:.0%} of the cache, keeps {1 - float(left[rank]):.1%} of their energy on average.",
                    f"attnopt convert {model} --to mla --kv-keep {keep:g} -o OUT",
                    "mla",
                )
            ]
    return [
        Finding(
            f"Keys and values are of high rank: even {KEEPS[-1]:.0%} of the cache loses more than {LOST_ENERGY:.0%} of "
            "their energy. Converting to MLA will cost quality."
        )
    ]


def _sharing(profile: Profile, model: str) -> list[Finding]:
    if not profile.groups:
        if "map_reuse_error_aligned" not in profile.metrics or len(profile.sites) < 2:
            return []
        errors = profile.metric("map_reuse_error_aligned").nan_to_num(torch.inf).fill_diagonal_(torch.inf)
        source, consumer = divmod(int(errors.argmin()), len(errors))
        return [
            Finding(
                "No layer can read the attention maps of the layer before it as they are; of all pairs, layer "
                f"{consumer} with the maps of layer {source} loses least ({float(errors.min()):.1%}, NMSE)."
            )
        ]
    runs = "; ".join(group.named for group in profile.groups)
    shared = sum(len(group.layers) - 1 for group in profile.groups)
    layers = (
        "1 layer can read the attention maps of one" if shared == 1 else f"{shared} layers can read the maps of one"
    )
    worst = max(group.error for group in profile.groups)
    return [
        Finding(
            f"{layers} before them (groups {runs}); an output then changes by at most {worst:.1%} (NMSE, measured).",
            f"attnopt convert {model} --to share --edge map -o OUT",
            "share",
        )
    ]


def _pruning(profile: Profile, model: str) -> list[Finding]:
    sizes = profile.metric("kv_contribution")
    weak = sizes < WEAK * sizes.nanmean(1, keepdim=True)
    total = int((~sizes.isnan()).sum())
    if not bool(weak.any()):
        return []
    keep = 1 - int(weak.sum()) / total
    where = ", ".join(f"{int(layer)}.{int(head)}" for layer, head in weak.nonzero()[:8])
    return [
        Finding(
            f"{int(weak.sum())} of {total} KV groups add less than a quarter of what their layer's groups add on "
            f"average (layer.group: {where}{', ...' if int(weak.sum()) > 8 else ''}).",
            f"attnopt convert {model} --to prune --keep-heads {keep:.2f} -o OUT",
            "prune",
        )
    ]


def _routing(profile: Profile, model: str) -> list[Finding]:
    sizes = profile.metric("contribution").nan_to_num(0)
    ordered = sizes.sort(1, descending=True).values
    most = ordered[:, : max(1, round(0.75 * sizes.shape[1]))].sum() / ordered.sum().clamp(min=1e-300)
    if float(most) < 0.95:
        return []
    return [
        Finding(
            f"Heads are unequal: three quarters of each layer's heads make up {float(most):.0%} of what its heads add, "
            "so that tokens may skip the rest.",
            f"attnopt convert {model} --to moh --active 0.75 -o OUT",
            "moh",
        )
    ]


def _streaming(profile: Profile) -> list[Finding]:
    if "streaming_error" not in profile.metrics:
        return []
    errors = profile.metric("streaming_error")
    real = int((~errors.isnan()).sum())
    stream = int((errors <= STREAMS_BELOW).sum())
    window = int(profile.numeric["recent"]) + int(profile.numeric["sink"])
    return [
        Finding(
            f"{stream} of {real} KV heads change their layer's output by at most {STREAMS_BELOW:.0%} (NMSE) if they "
            f"see only {window} tokens (sinks and recent)."
        )
    ]


def _retrieval(profile: Profile) -> list[Finding]:
    if "retrieval" not in profile.metrics:
        return []
    scores = profile.metric("retrieval")
    strong = _named(scores, scores >= RETRIEVES_FROM)
    if not strong:
        return [Finding("No head copies from synthetic needles.")]
    return [
        Finding(
            f"{int((scores >= RETRIEVES_FROM).sum())} heads copy from synthetic needles (layer.head: {strong}). "
            "Keep them dense."
        )
    ]


def _sinks(profile: Profile) -> list[Finding]:
    if "sink_mass" not in profile.metrics:
        return []
    mass = profile.metric("sink_mass")
    share, heavy, real = float(mass.nanmean()), int((mass > 0.5).sum()), int((~mass.isnan()).sum())
    if share < INFLATES_FROM:
        return []
    return [
        Finding(
            f"{share:.0%} of all attention is on the sinks; {heavy} of {real} heads give them more than half. Plain "
            "similarity of maps is inflated by that; map_correlation and measured errors are not."
        )
    ]


def _duplicates(profile: Profile) -> list[Finding]:
    if "head_redundancy" not in profile.metrics:
        return []
    alike = profile.metric("head_redundancy").clone()
    alike[:, torch.ones(alike.shape[1:], dtype=torch.bool).tril()] = torch.nan
    pairs = (alike > 0.95).nonzero().tolist()
    if not pairs:
        return []
    named = ", ".join(f"{layer}.{a} = {layer}.{b}" for layer, a, b in pairs[:6])
    what = "pair of heads of a layer has" if len(pairs) == 1 else "pairs of heads of a layer have"
    return [Finding(f"{len(pairs)} {what} nearly the same maps (layer.head: {named}).")]


def _named(values: Tensor, chosen: Tensor, most: int = 8) -> str:
    """The chosen heads as "layer.head", largest values first."""
    places = chosen.nonzero().tolist()
    places.sort(key=lambda place: -float(values[tuple(place)]))
    named = ", ".join(".".join(map(str, place)) for place in places[:most])
    return named + (", ..." if len(places) > most else "")
