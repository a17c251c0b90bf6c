"""Recognises Multi-head Latent Attention as models write it: keys and values expanded from a latent (DeepSeek)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from attnopt.rewriter.norms import NormMatch, find_norm
from attnopt.rewriter.paths import Path, Rotation, read_choice, read_rotation
from attnopt.rewriter.probe import Mismatch, Probe
from attnopt.rewriter.projections import LinearMap, feeding_maps, output_map
from attnopt.rewriter.site import (
    AttentionSite,
    CacheEntry,
    CacheSpec,
    LatentSpec,
    MaskSpec,
    RopeSpec,
    SiteNodes,
)


def latent_site(
    anchor: fx.Node,
    call: Mapping[str, Any],
    maps_q: list[LinearMap],
    maps_k: list[LinearMap],
    kv_b: LinearMap,
    mask: MaskSpec,
    fqn: str,
    probe: Probe,
) -> AttentionSite:
    """The site of an attention op whose keys come from a decoder `kv_b` and from one shared rotary key.

    Raises:
        Mismatch: if the layer is not of DeepSeek's form.
    """
    others = [m for m in maps_k if m.node is not kv_b.node]
    if len(others) != 1 or len(maps_q) != 1:
        raise Mismatch("keys come from two projections, but not from a latent and a rotary key", call["k"])
    kv_a, q_map = others[0], maps_q[0]
    rank, latent_norm = _encoder(kv_a, kv_b, probe)

    heads, d_qk = int(call["q"].meta["val"].shape[1]), int(call["q"].meta["val"].shape[3])
    d_v = int(call["v"].meta["val"].shape[3])
    nope_path = Path.trace(probe, kv_b, call["k"], zero=[kv_a])
    nope = read_choice(nope_path)
    d_nope = len(nope.in_order()[0])
    d_rope = d_qk - d_nope
    value = read_choice(Path.trace(probe, kv_b, call["v"]))
    expected = [[h * (d_nope + d_v) + i for i in range(d_nope)] for h in range(heads)]
    if nope.in_order() != expected or value.rows != [
        [h * (d_nope + d_v) + d_nope + i for i in range(d_v)] for h in range(heads)
    ]:
        raise Mismatch("the latent's decoder does not hold, per head, key rows and then value rows", kv_b.node)
    if bool((value.factor != 1).any()):
        raise Mismatch("the value is scaled", call["v"])

    k_turn = _rotary_key(kv_a, kv_b, call["k"], probe, rank, d_rope)
    q_path = Path.trace(probe, q_map, call["q"])
    q_choice = read_choice(q_path)
    if q_choice.in_order() != [[h * d_qk + i for i in range(d_qk)] for h in range(heads)]:
        raise Mismatch("the query projection does not hold whole heads in order", q_map.node)
    q_turn = read_rotation(q_path, q_choice)
    if q_turn is None or k_turn is None:
        raise Mismatch("the rotary part of queries or keys does not turn", anchor)
    if q_turn.offset != d_nope or (q_turn.style, q_turn.inv_freq) != (k_turn.style, k_turn.inv_freq):
        raise Mismatch("queries and the rotary key turn differently", anchor)
    rope = RopeSpec(q_turn.inv_freq, q_turn.style, 0, k_turn.attention_scaling)

    q, q_a, q_a_norm = _query(q_map, kv_a.x, probe)
    o, output = output_map(anchor, probe)
    latent = LatentSpec(
        kv_lora_rank=rank,
        d_nope=d_nope,
        d_rope=d_rope,
        kv_a=kv_a.projection(),
        kv_b=kv_b.projection(),
        kv_a_norm=latent_norm.spec if latent_norm else None,
        q=q_map.projection() if q else None,
        q_a=q_a.projection() if q_a else None,
        q_a_norm=q_a_norm,
        q_b=None if q else q_map.projection(),
    )
    entries = (CacheEntry("latent", 1, rank), CacheEntry("key_rope", 1, d_rope)) if mask.causal else ()
    return AttentionSite(
        fqn=fqn,
        layer=int(call["layer"]),
        kind="mla",
        heads=heads,
        kv_heads=heads,
        d_qk=d_qk,
        d_v=d_v,
        q=None,
        k=None,
        v=None,
        o=o.projection(),
        q_norm=None,
        k_norm=None,
        rope=rope,
        mask=mask,
        cache=CacheSpec(entries),
        scale=float(call["scale"]),
        latent=latent,
        nodes=SiteNodes(kv_a.x.name, anchor.name, output.name),
    )


def _encoder(kv_a: LinearMap, kv_b: LinearMap, probe: Probe) -> tuple[int, NormMatch | None]:
    """The latent's width and norm, checking that it is the first channels of kv_a, normalised."""
    feeding = feeding_maps(kv_b.x)
    if len(feeding) != 1 or feeding[0].node is not kv_a.node:
        raise Mismatch("the latent does not come from the projection that makes the rotary key", kv_b.x)
    rank = kv_b.in_features
    norm = find_norm(kv_a.node, kv_b.x, probe, None)
    batch, length = 2, 3
    shape = probe.shape(kv_a.node, batch, length)
    counting = torch.arange(shape[-1], dtype=torch.float32).expand(shape).contiguous()
    seen = counting
    if norm is not None:
        (seen,) = probe.evaluate([norm.x], {kv_a.node: counting}, batch, length)
    (seen,) = probe.evaluate([kv_b.x], {norm.y if norm else kv_a.node: seen}, batch, length)
    if seen.shape[-1] != rank or not torch.equal(seen, torch.arange(rank, dtype=seen.dtype).expand(seen.shape)):
        raise Mismatch("the latent is not the first channels of its projection", kv_b.x)
    return rank, norm


def _rotary_key(
    kv_a: LinearMap, kv_b: LinearMap, key: fx.Node, probe: Probe, rank: int, d_rope: int
) -> Rotation | None:
    """How the shared rotary key turns. Every head must hold the same one."""
    shared = _FirstHead(probe, kv_a, key, None, (kv_b.node,))
    choice = read_choice(shared)
    if sorted(r for r in choice.rows[0] if r >= 0) != list(range(rank, rank + d_rope)):
        raise Mismatch("the rotary key is not the last channels of the latent's projection", kv_a.node)
    rotation = read_rotation(shared, choice)
    if rotation is not None:
        factors = {float(f) for f, row in zip(choice.factor[0], choice.rows[0], strict=True) if row >= 0}
        if len(factors) != 1:
            raise Mismatch("dims of the rotary key are scaled differently", key)
        rotation = Rotation(rotation.inv_freq, rotation.style, rotation.offset, round(factors.pop(), 12))
    return rotation


class _FirstHead(Path):
    """A path to the first head only, after checking that all heads hold the same."""

    def feed(self, value: torch.Tensor, batch: int, length: int, positions: torch.Tensor | None = None) -> torch.Tensor:
        out = super().feed(value, batch, length, positions)
        if not torch.equal(out, out[:, :1].expand_as(out)):
            raise Mismatch("heads hold different rotary keys", self.arg)
        return out[:, :1]


def _query(q_map: LinearMap, x: fx.Node, probe: Probe) -> tuple[bool, LinearMap | None, Any]:
    """(queries are one projection, or else the compressing projection and its norm)."""
    if q_map.x is x:
        return True, None, None
    feeding = feeding_maps(q_map.x)
    if len(feeding) != 1 or feeding[0].x is not x:
        raise Mismatch("the query path is not one projection, nor a compression and an expansion", q_map.node)
    norm = find_norm(feeding[0].node, q_map.x, probe, None)
    return False, feeding[0], norm.spec if norm else None
