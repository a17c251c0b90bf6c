"""Records and tensors of layers that are no latent attention: pruned, shared, routed, or resized beside attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnopt.codegen.hf.emission import bias_of, canonical, weight_of
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, Projection
from attnopt.rewriter.weights import Value, meta_of


def lenders(program: Program) -> set[str]:
    """Layers that others read."""
    return {site.share.source for site in program.site_list if site.share is not None}


def grouped_obstacles(program: Program, site: AttentionSite, window: int | None) -> Iterator[str]:
    """Why our class cannot hold a layer.

    Args:
        program: whose.
        site: a layer that is no latent attention.
        window: what the backbone's own mask has in this layer.
    """
    where, mask = f"layer {site.layer}", site.mask
    if mask.softcap or mask.sinks or mask.alibi or (mask.bias and program.model_type != "swin"):
        yield f"{where}: a softcap, sinks or a bias on the logits"
    if mask.window != window:
        yield f"{where}: window {mask.window} is not the one the source architecture applies"
    for norm in (site.q_norm, site.k_norm):
        if norm is not None and (
            norm.kind != "rms" or norm.scope != "head" or norm.weight is None or norm.bias or norm.unit_offset
        ):
            yield f"{where}: q/k norms other than an RMS norm per head"
    if site.rope is not None and (site.rope.style != "half" or site.rope.offset):
        yield f"{where}: rotary dims that are not the first ones, in halves"
    if site.share is not None and program.model_type == "swin":
        yield f"{where}: shared maps of shifted windows"


def grouped_layer(program: Program, site: AttentionSite) -> tuple[dict[str, Value], dict[str, Any]]:
    """Tensors of a layer by their names below its module, and its record."""
    from attnopt.codegen.hf.configuration_attnopt import ENCODERS

    store = program.weights
    parts: dict[str, Projection | None] = {"q_proj": site.q, "k_proj": site.k, "v_proj": site.v, "o_proj": site.o}
    tensors: dict[str, Value] = {}
    for name, projection in parts.items():
        if projection is not None:
            tensors[f"{name}.weight"] = weight_of(store, projection)
            bias = bias_of(store, projection)
            if bias is not None:
                tensors[f"{name}.bias"] = bias
    for name, norm in (("q_norm", site.q_norm), ("k_norm", site.k_norm)):
        if norm is not None:
            tensors[f"{name}.weight"] = store[str(norm.weight)]
    norms = [norm.eps for norm in (site.q_norm, site.k_norm) if norm is not None]
    beside = ENCODERS.get(program.model_type)
    record: dict[str, Any] = {
        "kind": "grouped",
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "d_qk": site.d_qk,
        "d_v": site.d_v,
        "width": site.o.out_features,
        "kv_of": list(site.kv_of),
        "scale": site.scale,
        "causal": site.mask.causal,
        "window": site.mask.window,
        "norm_eps": norms[0] if norms else None,
        "bias_window": None,
        "instead_of": f"{site.fqn.removeprefix('model.').rpartition('.')[0]}.{beside}" if beside else None,
        "share": None,
        "route": None,
    }
    if site.mask.bias:
        (table,) = site.mask.bias
        tensors["bias.table"] = store[table]
        record["bias_window"] = (round(store.meta(table).shape[0] ** 0.5) + 1) // 2
    if site.share is not None:
        record["share"] = {"edge": site.share.edge, "source": program.sites[site.share.source].layer}
    if site.route is not None:
        record["route"], routed = route_record(program, site)
        tensors |= routed
    return tensors, record | {f"{short}_bias": f"{short}_proj.bias" in tensors for short in ("q", "k", "v", "o")}


def route_record(program: Program, site: AttentionSite) -> tuple[dict[str, Any], dict[str, Value]]:
    """The record of a layer's router, and its tensors by their names below the layer's module."""
    route = site.route
    assert route is not None
    names = {"router.score.weight": route.weight, "router.score.bias": route.bias, "router.fill": route.fill}
    names |= {"router.share.weight": route.shared_weight, "router.balance.weight": route.balance}
    tensors = {name: program.weights[own] for name, own in names.items() if own is not None}
    record = {
        "router": route.router,
        "units": [list(unit) for unit in site.routed_units],
        "active": route.active,
        "gate": route.gate,
        "bias": route.bias is not None,
        "fill": route.fill is not None,
    }
    return record, tensors


def resized_maps(program: Program) -> dict[str, list[int]]:
    """Linear maps outside attention that passes have shrunk, by their path: [out, in]."""
    inside = tuple(f"{fqn}." for fqn in program.sites)
    found = {}
    before = {str(n.target) for n in program.graph.nodes if n.op == "get_attr" and n.meta.get("resized")}
    for name in program.weight_names:
        bare = canonical(name)
        if not bare.endswith(".weight") or bare not in program.weights or bare.startswith(inside):
            continue
        shape = meta_of(program.weights[name]).shape
        if name in before or (bare != name and len(shape) == 2 and shape != meta_of(program.weights[bare]).shape):
            found[bare.removesuffix(".weight")] = list(shape)
    return found
