"""Graph -> attention sites. What cannot be understood is a Miss that says why and names the nodes to blame.

Facts are measured on the graph (see `paths`), not read off names or the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

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
    SiteNodes,
)

_ARGUMENTS = ("q", "k", "v", "bias", "q_pos", "scale", "causal", "window", "softcap", "sinks", "layer")


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
    sites: list[AttentionSite] = []
    misses: list[Miss] = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            misses.append(Miss("the model builds or changes its attention mask itself (ALiBi does so)", (node.name,)))
        if node.target is not ATTENTION:
            continue
        try:
            sites.append(_site(node, probe))
        except Mismatch as problem:
            owner = ([*module_paths(node)] or ["?"])[-1]
            misses.append(Miss(f"{owner}: {problem.reason}", problem.nodes))
    return sites, misses


def _site(anchor: fx.Node, probe: Probe) -> AttentionSite:
    call: dict[str, Any] = dict(zip(_ARGUMENTS, anchor.args, strict=True))
    fqn = ([*module_paths(anchor)] or [""])[-1]
    q, k, v = call["q"], call["k"], call["v"]
    maps_q, maps_k, maps_v = feeding_maps(q), feeding_maps(k), feeding_maps(v)
    mask = _mask(call)
    if len(maps_k) == 2 and len(maps_v) == 1:
        base = latent_site(anchor, call, maps_q, maps_k, maps_v[0], mask, fqn, probe)
        return replace(base, rope=_named(base.rope, probe.program, fqn, base.layer))
    for what, maps, node in (("query", maps_q, q), ("key", maps_k, k), ("value", maps_v, v)):
        if len(maps) != 1:
            raise Mismatch(f"the {what} comes from {len(maps)} projections", node)
    return _plain_site(anchor, call, (maps_q[0], maps_k[0], maps_v[0]), mask, fqn, probe)


def _plain_site(
    anchor: fx.Node,
    call: Mapping[str, Any],
    maps: tuple[LinearMap, LinearMap, LinearMap],
    mask: MaskSpec,
    fqn: str,
    probe: Probe,
) -> AttentionSite:
    if not maps[0].x is maps[1].x is maps[2].x:
        raise Mismatch("queries, keys and values are projected from different tensors (cross-attention)", anchor)
    heads, d_qk = _sizes(call["q"])
    kv_heads, d_k = _sizes(call["k"])
    d_v = _sizes(call["v"])[1]
    if d_k != d_qk:
        raise Mismatch(f"queries have {d_qk} dims and keys {d_k}", anchor)
    paths = [Path.trace(probe, m, arg) for m, arg in zip(maps, (call["q"], call["k"], call["v"]), strict=True)]
    choices = [read_choice(path) for path in paths]
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
    o, output = output_map(anchor, probe)
    projections = [m.projection(r for head in c.in_order() for r in head) for m, c in zip(maps, choices, strict=True)]
    kind: Kind = "mha" if kv_heads == heads else "mqa" if kv_heads == 1 else "gqa"
    entries = (CacheEntry("key", kv_heads, d_qk), CacheEntry("value", kv_heads, d_v)) if mask.causal else ()
    layer = int(call["layer"])
    return AttentionSite(
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
        nodes=SiteNodes(maps[0].x.name, anchor.name, output.name),
    )


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
