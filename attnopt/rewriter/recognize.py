"""Graph -> attention sites. What cannot be understood is a Miss that says why and names the nodes to blame.

Facts are measured on the graph (see `paths`), not read off names or the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnopt.rewriter.gates import find_gates, read_fill, read_route
from attnopt.rewriter.mla import latent_site
from attnopt.rewriter.normalize import ATTENTION
from attnopt.rewriter.paths import Path, Rotation, read_choice, read_rotation
from attnopt.rewriter.probe import Mismatch, Probe
from attnopt.rewriter.program import Program, walk_back
from attnopt.rewriter.projections import LinearMap, feeding_maps, output_map
from attnopt.rewriter.segments import module_paths
from attnopt.rewriter.site import (
    AttentionSite,
    CacheEntry,
    CacheSpec,
    Kind,
    MaskSpec,
    RopeSpec,
    ShareSpec,
    SiteNodes,
)

_ARGUMENTS = ("q", "k", "v", "bias", "q_pos", "scale", "causal", "window", "softcap", "sinks", "layer")
#: What a layer computes of queries, keys and values if it takes something from an earlier one.
_OWN: Mapping[str | None, tuple[int, ...]] = {None: (0, 1, 2), "map": (2,), "kv": (0,)}


@dataclass(frozen=True)
class Miss:
    """Attention that was not understood.

    Attributes:
        reason: one clause.
        nodes: names of the graph nodes to blame.
    """

    reason: str
    nodes: tuple[str, ...]


def recognize(program: Program) -> tuple[list[AttentionSite], list[Miss]]:
    """Find every attention layer of a captured program.

    Args:
        program: its `sites` are ignored.

    Returns:
        the sites in forward order, and what was not understood.
    """
    probe = Probe(program)
    misses: list[Miss] = []
    found: dict[fx.Node, AttentionSite] = {}
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            misses.append(Miss("the model builds or changes its attention mask itself (ALiBi does so)", (node.name,)))
        if node.target is not ATTENTION:
            continue
        try:
            found[node] = _site(node, found, probe)
        except Mismatch as problem:
            owner = ([*module_paths(node)] or ["?"])[-1]
            misses.append(Miss(f"{owner}: {problem.reason}", problem.nodes))
    return list(found.values()), misses


def _site(anchor: fx.Node, earlier: Mapping[fx.Node, AttentionSite], probe: Probe) -> AttentionSite:
    gates = find_gates(anchor)
    context = anchor if gates is None else gates.result
    site = _unrouted_site(anchor, context, earlier, probe)
    if gates is None:
        return site
    x, q = probe.program.node(site.nodes.input), anchor.args[0]
    assert isinstance(q, fx.Node)
    starts = tuple(m.node for m in feeding_maps(q))
    route, works = read_route(gates, x, q, starts, site.kv_head_of, probe)
    added = read_fill(probe.program.node(site.nodes.output), works, x, probe)
    if added is None:
        return replace(site, route=route)
    fill, output = added
    return replace(site, route=replace(route, fill=fill), nodes=replace(site.nodes, output=output.name))


def _unrouted_site(
    anchor: fx.Node, context: fx.Node, earlier: Mapping[fx.Node, AttentionSite], probe: Probe
) -> AttentionSite:
    """The site of an attention op, whose output projection reads `context`, gates left aside."""
    call: dict[str, Any] = dict(zip(_ARGUMENTS, anchor.args, strict=True))
    fqn = ([*module_paths(anchor)] or [""])[-1]
    q, k, v = call["q"], call["k"], call["v"]
    maps_q, maps_k, maps_v = feeding_maps(q), feeding_maps(k), feeding_maps(v)
    mask = _mask(call)
    if len(maps_k) == 2 and len(maps_v) == 1:
        base = latent_site(anchor, context, call, maps_q, maps_k, maps_v[0], mask, fqn, probe)
        return replace(base, rope=_named(base.rope, probe.program, fqn, base.layer))
    for what, maps, node in (("query", maps_q, q), ("key", maps_k, k), ("value", maps_v, v)):
        if len(maps) != 1:
            raise Mismatch(f"the {what} comes from {len(maps)} projections", node)
    sources = (maps_q[0], maps_k[0], maps_v[0])
    return _plain_site(anchor, context, call, sources, mask, fqn, _share(anchor, earlier), probe)


def _share(anchor: fx.Node, earlier: Mapping[fx.Node, AttentionSite]) -> ShareSpec | None:
    """What a layer takes from an earlier one that computes its own: the very same tensors are read."""
    for node, site in earlier.items():
        q, k, v = (mine is theirs for mine, theirs in zip(anchor.args[:3], node.args[:3], strict=True))
        if site.share is None and k and q != v:
            if v:
                return ShareSpec(site.fqn, "kv")
            if anchor.args[3:10] == node.args[3:10]:
                return ShareSpec(site.fqn, "map")
    return None


def _plain_site(
    anchor: fx.Node,
    context: fx.Node,
    call: Mapping[str, Any],
    maps: tuple[LinearMap, LinearMap, LinearMap],
    mask: MaskSpec,
    fqn: str,
    share: ShareSpec | None,
    probe: Probe,
) -> AttentionSite:
    own = _OWN[share.edge if share else None]
    if len({maps[i].x for i in own}) > 1:
        raise Mismatch("queries, keys and values are projected from different tensors (cross-attention)", anchor)
    heads, d_qk = _sizes(call["q"])
    d_k, d_v = _sizes(call["k"])[1], _sizes(call["v"])[1]
    if d_k != d_qk:
        raise Mismatch(f"queries have {d_qk} dims and keys {d_k}", anchor)
    paths = [Path.trace(probe, m, arg) for m, arg in zip(maps, (call["q"], call["k"], call["v"]), strict=True)]
    choices = [read_choice(path, spread) for path, spread in zip(paths, (False, True, True), strict=True)]
    kv_heads, kv_of = len(choices[1].rows), choices[1].of
    if kv_of != choices[2].of:
        raise Mismatch("query heads read keys and values of different heads", anchor)
    for what, path, choice in zip(("query", "key", "value"), paths, choices, strict=True):
        if any(row < 0 for head in choice.rows for row in head):
            raise Mismatch(f"part of the {what} does not come from its projection", path.arg)
    if paths[2].norm is not None:
        raise Mismatch("the value is normalised", paths[2].norm.y)
    if choices[2].permutation() != list(range(d_v)) or bool((choices[2].factor != 1).any()):
        raise Mismatch("the value is scaled or reordered", call["v"])
    rotations = [read_rotation(path, choice) for path, choice in zip(paths[:2], choices[:2], strict=True)]
    rope, factor = combine(rotations[0], rotations[1], choices[0].factor, choices[1].factor, anchor)
    if choices[0].permutation() != choices[1].permutation():
        raise Mismatch("queries and keys order their dims differently", anchor)
    if rope is None and choices[0].permutation() != list(range(d_qk)):
        raise Mismatch("the query reorders its dims", call["q"])
    o, output = output_map(context, probe)
    projections = [m.projection(r for head in c.in_order() for r in head) for m, c in zip(maps, choices, strict=True)]
    kind: Kind = "mha" if kv_heads == heads else "mqa" if kv_heads == 1 else "gqa"
    entries = (CacheEntry("key", kv_heads, d_qk), CacheEntry("value", kv_heads, d_v)) if mask.causal else ()
    layer = int(call["layer"])
    site = AttentionSite(
        fqn=fqn,
        layer=layer,
        kind=kind,
        heads=heads,
        kv_heads=kv_heads,
        d_qk=d_qk,
        d_v=d_v,
        q=projections[0],
        k=projections[1],
        v=projections[2],
        o=o.projection(),
        q_norm=paths[0].norm.spec if paths[0].norm else None,
        k_norm=paths[1].norm.spec if paths[1].norm else None,
        rope=_named(rope, probe.program, fqn, layer),
        mask=mask,
        cache=CacheSpec(entries),
        scale=float(call["scale"]) * factor,
        latent=None,
        nodes=SiteNodes(maps[own[0]].x.name, anchor.name, output.name),
        kv_of=kv_of,
    )
    return site if share is None else _without_lent(site, share)


def _without_lent(site: AttentionSite, share: ShareSpec) -> AttentionSite:
    """The facts of a layer without what it takes from another."""
    site = replace(site, share=share, k=None, k_norm=None)
    if share.edge == "kv":
        return replace(site, v=None, cache=CacheSpec())
    entries = tuple(entry for entry in site.cache.entries if entry.name == "value")
    return replace(site, q=None, q_norm=None, rope=None, cache=CacheSpec(entries))


def _sizes(arg: fx.Node) -> tuple[int, int]:
    shape = arg.meta["val"].shape
    return int(shape[1]), int(shape[3])


def combine(
    q: Rotation | None, k: Rotation | None, q_factor: torch.Tensor, k_factor: torch.Tensor, anchor: fx.Node
) -> tuple[RopeSpec | None, float]:
    """One RopeSpec for queries and keys, and the factor that must go into the scale.

    Args:
        q_factor, k_factor: [N, d], what projection channels are multiplied by at position 0 (cos 0 = 1 times YaRN's
            attention scaling on rotary dims, a scaling of the query on all dims).

    Raises:
        Mismatch: if queries and keys turn differently, or factors differ within the turned or unturned dims.
    """
    if (q is None) != (k is None):
        raise Mismatch("only one of query and key is rotated", anchor)
    if q is None or k is None:
        factors = []
        for factor in (q_factor, k_factor):
            if not torch.equal(factor, factor.flatten()[0].expand_as(factor)):
                raise Mismatch("dims of a head are scaled differently", anchor)
            factors.append(float(factor.flatten()[0]))
        return None, factors[0] * factors[1]
    if (q.style, q.inv_freq) != (k.style, k.inv_freq):
        raise Mismatch("queries and keys turn differently", anchor)
    turned_k, still_k = _split_factor(k_factor, k, anchor)
    turned_q, still_q = _split_factor(q_factor, q, anchor)
    scaling = turned_k if still_k is None else turned_k / still_k
    outside = (turned_q / scaling) * (turned_k / scaling)
    if still_q is not None and abs(still_q - turned_q / scaling) > 1e-5:
        raise Mismatch("dims of a head are scaled differently", anchor)
    scaling = round(scaling, 12)
    return RopeSpec(q.inv_freq, q.style, q.offset, scaling), 1.0 if abs(outside - 1) < 1e-6 else outside


def _split_factor(factor: torch.Tensor, rotation: Rotation, anchor: fx.Node) -> tuple[float, float | None]:
    """The factor on turned dims and on the others (None if there are none)."""
    values = sorted(set(factor.flatten().tolist()))
    if len(values) == 1:
        whole = 2 * len(rotation.inv_freq) == factor.shape[1]
        return values[0], None if whole else values[0]
    if len(values) > 2:
        raise Mismatch("dims of a head are scaled differently", anchor)
    at = set(factor[:, rotation.offset : rotation.offset + 2 * len(rotation.inv_freq)].flatten().tolist())
    rest = set(values) - at
    if len(at) != 1 or len(rest) != 1:
        raise Mismatch("dims of a head are scaled differently", anchor)
    return at.pop(), rest.pop()


def _named(rope: RopeSpec | None, program: Program, fqn: str, layer: int) -> RopeSpec | None:
    """The same with the config's name of the scaling rule."""
    if rope is None:
        return None
    table = program.config.get("rope_parameters") or {}
    if table and all(isinstance(v, Mapping) for v in table.values()):
        kinds = program.config.get("layer_types") or []
        table = table.get(kinds[layer], {}) if layer < len(kinds) else {}
    return replace(rope, rope_type=str(table.get("rope_type", "default")))


def _mask(call: Mapping[str, Any]) -> MaskSpec:
    sinks = call["sinks"]
    if sinks is not None and sinks.op != "get_attr":
        raise Mismatch("attention sinks are computed, not stored", sinks)
    names: list[str] = []
    padding = False
    if call["bias"] is not None:
        sources = list(walk_back(call["bias"], through_sizes=False))
        names = sorted({str(n.target) for n in sources if n.op == "get_attr" and n.meta["val"].is_floating_point()})
        padding = any(n.op == "placeholder" and n.target == "attention_mask" for n in sources)
        inputs = [n for n in sources if n.op == "placeholder" and n.target != "attention_mask"]
        if inputs or not (names or padding):
            raise Mismatch("a bias of unknown origin is added to the scores", call["bias"], *inputs)
    return MaskSpec(
        causal=bool(call["causal"]),
        window=int(call["window"]) or None,
        softcap=float(call["softcap"]) or None,
        sinks=str(sinks.target) if sinks is not None else None,
        bias=tuple(names),
        padding=padding,
    )
