"""Recognises Multi-head Latent Attention as models write it: keys and values expanded from a latent (DeepSeek)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.rewriter.norms import NormMatch, find_norm
from attnopt.rewriter.paths import Path, Rotation, read_choice, read_rotation
from attnopt.rewriter.probe import Mismatch, Probe, between
from attnopt.rewriter.projections import HeadMap, LinearMap, feeding_maps, head_map, output_map
from attnopt.rewriter.site import (
    AttentionSite,
    CacheEntry,
    CacheSpec,
    LatentSpec,
    MaskSpec,
    NormSpec,
    RopeSpec,
    SiteNodes,
)


def latent_site(
    anchor: fx.Node,
    context: fx.Node,
    call: Mapping[str, Any],
    maps_q: list[LinearMap],
    maps_k: list[LinearMap],
    kv_b: LinearMap,
    mask: MaskSpec,
    fqn: str,
    probe: Probe,
) -> AttentionSite:
    """The site of an attention op whose keys come from a decoder `kv_b` and from one shared rotary key.

    Its output projection reads `context`: the op's result, or that times gates.

    Raises:
        Mismatch: if the layer is not of DeepSeek's form.
    """
    others = [m for m in maps_k if m.node is not kv_b.node]
    if len(others) != 1 or len(maps_q) != 1:
        raise Mismatch("keys come from two projections, but not from a latent and a rotary key", call["k"])
    kv_a, q_map = others[0], maps_q[0]
    rank, latent_norm = _encoder(kv_a, kv_b, probe)
    normed = _normed_inputs(q_map, kv_a, call["q"], probe)
    x = kv_a.x if normed is None else q_map.x

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
    q_path = Path.trace(probe, q_map if normed is None else normed.source(), call["q"])
    q_choice = read_choice(q_path)
    if q_choice.in_order() != [[h * d_qk + i for i in range(d_qk)] for h in range(heads)]:
        raise Mismatch("the query projection does not hold whole heads in order", q_map.node)
    q_turn = read_rotation(q_path, q_choice)
    if q_turn is None or k_turn is None:
        raise Mismatch("the rotary part of queries or keys does not turn", anchor)
    if q_turn.offset != d_nope or (q_turn.style, q_turn.inv_freq) != (k_turn.style, k_turn.inv_freq):
        raise Mismatch("queries and the rotary key turn differently", anchor)
    rope = RopeSpec(q_turn.inv_freq, q_turn.style, 0, k_turn.attention_scaling)

    q, q_a, q_a_norm = _query(q_map, x, probe)
    o, output = output_map(context, probe)
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
        q_map=normed.heads.weight if normed else None,
        encoder="normed_kv" if normed else "hidden",
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
        q=q_map.projection() if normed else None,
        k=normed.k.projection() if normed else None,
        v=normed.v.projection() if normed else None,
        o=o.projection(),
        q_norm=normed.q_norm if normed else None,
        k_norm=normed.k_norm if normed else None,
        rope=rope,
        mask=mask,
        cache=CacheSpec(entries),
        scale=float(call["scale"]),
        latent=latent,
        nodes=SiteNodes(x.name, anchor.name, output.name),
    )


@dataclass(frozen=True)
class _Normed:
    """How a latent that encodes normalised keys and values is fed, as attnopt's own class writes it.

    Attributes:
        heads: the map from normalised queries to the heads' queries.
        q_norm, k_norm: per head.
        k, v: the projections that the latent encodes.
    """

    heads: HeadMap
    q_norm: NormSpec
    k_norm: NormSpec
    k: LinearMap
    v: LinearMap

    def source(self) -> LinearMap:
        """The queries by head as if a projection had made them."""
        _, _, heads, width = self.heads.node.meta["val"].shape
        return LinearMap(self.heads.node, self.heads.x, self.heads.weight, None, "linear", 0, int(heads) * int(width))


def _normed_inputs(q_map: LinearMap, kv_a: LinearMap, query: fx.Node, probe: Probe) -> _Normed | None:
    """Read the form for models with query and key norms, or None if the layer has no matrix per query head.

    Raises:
        Mismatch: if it has one, but is not of that form.
    """
    mapped = head_map(between(q_map.node, query))
    if mapped is None:
        return None
    path = Path.trace(probe, q_map, mapped.x)
    heads, width = int(mapped.x.meta["val"].shape[1]), int(mapped.x.meta["val"].shape[3])
    choice = read_choice(path)
    if path.norm is None or choice.rows != [[h * width + i for i in range(width)] for h in range(heads)]:
        raise Mismatch("queries with a matrix per head are not whole heads, each normalised", mapped.x)
    inputs = {m.node.name: m for m in feeding_maps(kv_a.x)}
    normed = {name: find_norm(m.node, kv_a.x, probe, None) for name, m in inputs.items()}
    k = next((m for name, m in inputs.items() if normed[name] is not None), None)
    v = next((m for name, m in inputs.items() if normed[name] is None), None)
    if len(inputs) != 2 or k is None or v is None or not k.x is v.x is q_map.x:
        raise Mismatch("the latent does not encode normalised keys and values", kv_a.x)
    norm = normed[k.node.name]
    assert norm is not None
    keys, values = (torch.arange(m.out_features, dtype=torch.float32) for m in (k, v))
    given = {
        norm.y: keys.expand(2, 3, -1).reshape(probe.shape(norm.y, 2, 3)),
        v.node: values.expand(2, 3, -1).reshape(probe.shape(v.node, 2, 3)),
    }
    (seen,) = probe.evaluate([kv_a.x], given, 2, 3)
    if not torch.equal(seen, torch.cat([keys, values]).expand_as(seen)):
        raise Mismatch("the latent does not encode keys and then values", kv_a.x)
    return _Normed(mapped, path.norm.spec, norm.spec, k, v)


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
