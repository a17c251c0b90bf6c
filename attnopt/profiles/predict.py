"""What each method would cost, per layer: cached numbers, and floating-point operations of one token.

With H query heads, K key/value heads, widths d and dv, hidden size D, and n tokens that a query sees (all before it, at
most a window; of a layer that is not causal, all that it was measured with):

    projections   2 D (H d + K d + K dv) + 2 H dv D
    attention     2 H n (d + dv)
    cache         n K (d + dv) numbers

Formulas, not measurements: what a method changes in these counts. Whether a machine gets faster by as much is for
`attnopt bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attnopt.profiles.profile import SharingGroup
from attnopt.rewriter.site import AttentionSite

#: Tokens that costs of causal models are given for.
CONTEXTS = (1024, 4096, 16384)

#: A KV head streams if its measured error is at most this (NMSE of its layer's output).
STREAMS_BELOW = 0.01

#: Share of an MLA layer's cache that its rotary key takes, about; the pass chooses it by measured error.
ROPE_SHARE = 0.36


@dataclass(frozen=True)
class Cost:
    """Counts of one layer.

    Attributes:
        keys, values: cached numbers per token that are kept for every token.
        window_numbers, window: cached numbers per token of streaming heads, and how many tokens they keep.
        projections: operations of the projections.
        per_key: operations of attention per cached token that all heads read.
        window_per_key: the same for streaming heads.
        reach: tokens that a query sees at most; None for all.
    """

    keys: float
    values: float
    projections: float
    per_key: float
    window_numbers: float = 0.0
    window: int = 0
    window_per_key: float = 0.0
    reach: int | None = None

    def cache(self, context: int) -> int:
        """Cached numbers at a context."""
        seen = self._seen(context)
        return round(seen * (self.keys + self.values) + min(seen, self.window) * self.window_numbers)

    def flops(self, context: int) -> int:
        """Operations of one token."""
        seen = self._seen(context)
        return round(self.projections + seen * self.per_key + min(seen, self.window) * self.window_per_key)

    def _seen(self, context: int) -> int:
        return context if self.reach is None else min(context, self.reach)


def original(site: AttentionSite, tokens: int) -> Cost:
    """A layer as it is.

    Args:
        site: the layer.
        tokens: that attended to each other when it was measured.
    """
    heads = site.heads
    if site.latent is not None:
        latent = site.latent
        reads = heads * (2 * latent.kv_lora_rank + latent.d_rope)
        parts = [latent.kv_a, latent.kv_b, site.o, *(p for p in (latent.q, latent.q_a, latent.q_b) if p)]
        projections = sum(2 * p.in_features * p.out_features for p in parts)
        return Cost(site.cached_numbers_per_token, 0, projections, 2 * reads)
    cached = {entry.name: entry.heads * entry.width for entry in site.cache.entries}
    own = [p for p in (site.q, site.k, site.v, site.o) if p is not None]
    reads_map = site.share is not None and site.share.edge == "map"
    return Cost(
        keys=cached.get("key", 0),
        values=cached.get("value", 0),
        projections=sum(2 * p.in_features * p.out_features for p in own),
        per_key=2 * heads * (site.d_v if reads_map else site.d_qk + site.d_v),
        reach=site.mask.window if site.mask.causal else tokens,
    )


def predictions(
    sites: Sequence[AttentionSite],
    groups: Sequence[SharingGroup],
    streaming: Tensor | None,
    window: int,
    tokens: Sequence[int],
) -> dict[str, Any]:
    """Costs of every method on every layer, as plain data.

    Args:
        sites: the layers.
        groups: layers that can share maps.
        streaming: streaming error by layer and KV head, or None.
        window: tokens that a streaming head keeps.
        tokens: that attended to each other in each layer, on the longest prompt.

    Returns:
        {"contexts": [...], "methods": {method: {"what": ..., "cached_numbers": {context: [layer, ...]},
        "decode_flops": {context: [layer, ...]}}}}
    """
    before = [original(site, count) for site, count in zip(sites, tokens, strict=True)]
    contexts = CONTEXTS if any(site.mask.causal for site in sites) else (max(tokens),)
    consumers = {layer for group in groups for layer in group.layers[1:]}
    methods: dict[str, tuple[str, list[Cost]]] = {"original": ("as it is", before)}

    def changed(change: Callable[[int, AttentionSite, Cost], Cost]) -> list[Cost]:
        pairs = enumerate(zip(sites, before, strict=True))
        return [replace(change(i, site, cost), reach=cost.reach) for i, (site, cost) in pairs]

    if any(site.cache.entries and site.latent is None for site in sites):
        methods["mla 0.5"] = ("--to mla --kv-keep 0.5", changed(_mla(0.5)))
        methods["mla 0.25"] = ("--to mla --kv-keep 0.25", changed(_mla(0.25)))
    if consumers:
        methods["share map"] = ("--to share --edge map, the groups found", changed(_share(consumers, False)))
        methods["share kv"] = ("--to share --edge kv, the groups found", changed(_share(consumers, True)))
    methods["prune 0.75"] = ("--to prune --keep-heads 0.75", changed(lambda i, s, c: _scaled(c, 0.75)))
    methods["moh 0.75"] = ("--to moh --active 0.75", changed(_moh(0.75)))
    if streaming is not None:
        methods["streaming"] = (
            f"KV heads with an error of at most {STREAMS_BELOW:g} keep {window} tokens",
            changed(_streaming(streaming, window)),
        )
    return {
        "contexts": list(contexts),
        "methods": {
            name: {
                "what": what,
                "cached_numbers": {str(n): [cost.cache(n) for cost in costs] for n in contexts},
                "decode_flops": {str(n): [cost.flops(n) for cost in costs] for n in contexts},
            }
            for name, (what, costs) in methods.items()
        },
    }


def _mla(keep: float) -> Callable[[int, AttentionSite, Cost], Cost]:
    def change(_: int, site: AttentionSite, cost: Cost) -> Cost:
        if site.latent is not None or site.share is not None or not site.cache.entries:
            return cost
        total = keep * (cost.keys + cost.values)
        rope = ROPE_SHARE * total
        rank, width, heads = total - rope, site.o.out_features, site.heads
        queries = width * heads * (site.d_qk + rope)
        absorbed = heads * rank * (site.d_qk + site.d_v)
        projections = 2 * (queries + width * total + absorbed + heads * site.d_v * width)
        return Cost(total, 0, projections, 2 * heads * (2 * rank + rope))

    return change


def _share(consumers: set[int], values_too: bool) -> Callable[[int, AttentionSite, Cost], Cost]:
    def change(layer: int, site: AttentionSite, cost: Cost) -> Cost:
        if layer not in consumers or site.latent is not None or site.share is not None:
            return cost
        width = site.o.out_features
        if values_too:
            saved = 2 * width * site.kv_heads * (site.d_qk + site.d_v)
            return replace(cost, keys=0, values=0, projections=cost.projections - saved)
        saved = 2 * width * (site.heads + site.kv_heads) * site.d_qk
        # The map is there already: only its product with the values is left.
        return replace(cost, keys=0, projections=cost.projections - saved, per_key=2 * site.heads * site.d_v)

    return change


def _scaled(cost: Cost, keep: float) -> Cost:
    return Cost(cost.keys * keep, cost.values * keep, cost.projections * keep, cost.per_key * keep)


def _moh(active: float) -> Callable[[int, AttentionSite, Cost], Cost]:
    def change(_: int, site: AttentionSite, cost: Cost) -> Cost:
        if site.route is not None:
            return cost
        width = site.o.out_features
        queries = 2 * width * site.heads * site.d_qk + 2 * site.heads * site.d_v * width
        router = 2 * width * site.heads
        projections = cost.projections - (1 - active) * queries + router
        return replace(cost, projections=projections, per_key=cost.per_key * active)

    return change


def _streaming(errors: Tensor, window: int) -> Callable[[int, AttentionSite, Cost], Cost]:
    def change(layer: int, site: AttentionSite, cost: Cost) -> Cost:
        found = errors[layer]
        real = int((~found.isnan()).sum())
        if real == 0:
            return cost
        share = int((found <= STREAMS_BELOW).sum()) / real
        dense = 1 - share
        return Cost(
            keys=cost.keys * dense,
            values=cost.values * dense,
            projections=cost.projections,
            per_key=cost.per_key * dense,
            window_numbers=(cost.keys + cost.values) * share,
            window=window,
            window_per_key=cost.per_key * share,
        )

    return change


def totals(predicted: Mapping[str, Any], context: int) -> dict[str, tuple[int, int]]:
    """(cached numbers, operations) of all layers together by method, from `predictions`."""
    return {
        name: (sum(entry["cached_numbers"][str(context)]), sum(entry["decode_flops"][str(context)]))
        for name, entry in predicted["methods"].items()
    }
