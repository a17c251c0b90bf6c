"""Puts a converted layer into the graph: weights, nodes and site facts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnopt.rewriter.edit import Editor
from attnopt.rewriter.site import (
    AttentionSite,
    CacheEntry,
    CacheSpec,
    LatentSpec,
    NormSpec,
    Projection,
    RopeSpec,
    SiteNodes,
)
from attnopt.rewriter.weights import Derived, Value, derived_op, meta_of

_ATEN = torch.ops.aten


@derived_op
def vector(*, values: tuple[float, ...]) -> torch.Tensor:
    """A vector of constants in float32."""
    return torch.tensor(values, dtype=torch.float32)


@dataclass(frozen=True)
class Shape:
    """Sizes of a converted layer.

    Attributes:
        rank: of the latent, the lane included.
        d_nope, d_rope: unrotated and rotary width of a query head.
        lane: whether the last latent channel is the constant 1.
        table: angle per position of each rotary pair.
        peak: largest norm of the latent, without the lane, seen on calibration text.
    """

    rank: int
    d_nope: int
    d_rope: int
    lane: bool
    table: tuple[float, ...]
    peak: float


def splice(editor: Editor, site: AttentionSite, shape: Shape, weights: Mapping[str, Value]) -> None:
    """Replace the attention of `site` by latent attention.

    Args:
        editor: of the program.
        site: its facts before.
        shape: the sizes.
        weights: by their names below the attention module, as `weights.to_weights` names them.
    """
    with editor.at(site.fqn, before=site.nodes.output):
        names: dict[str, str] = {}
        for name, value in weights.items():
            names[name] = editor.fresh_name(f"{site.fqn}.{name}")
            editor.set_weight(names[name], value)
        build = _Builder(editor, site, shape, names)
        output, anchor = build.attention()
        editor.redirect(site.nodes.output, output)
        nodes = SiteNodes(site.nodes.input, anchor.name, output.name)
        editor.set_site(_facts(site, shape, weights, names, nodes))


class _Builder:
    """Makes the nodes of one layer."""

    def __init__(self, editor: Editor, site: AttentionSite, shape: Shape, names: Mapping[str, str]) -> None:
        self.editor, self.site, self.shape, self.names = editor, site, shape, names
        self.x = editor.node(site.nodes.input)
        self.batch, self.length = (editor.call(_ATEN.sym_size.int, self.x, i) for i in (0, 1))
        self.positions = editor.node("position_ids")

    def attention(self) -> tuple[fx.Node, fx.Node]:
        """(output of the layer, the attention op)."""
        site, shape, call = self.site, self.shape, self.editor.call
        q = self._query()
        code = self._linear(self._encoder_input(), "kv_a_proj")
        latent = self._slice(code, 2, 0, shape.rank)
        key = call(_ATEN.unsqueeze.default, self._slice(code, 2, shape.rank, shape.rank + shape.d_rope), 1)
        d_q = shape.d_nope + shape.d_rope
        key = call(_ATEN.squeeze.dim, self._turn(key), 1)
        q_nope, q_rope = self._slice(q, 3, 0, shape.d_nope), self._turn(self._slice(q, 3, shape.d_nope, d_q))
        up = self._weight("kv_b_proj.weight")
        up = call(_ATEN.view.default, up, [site.heads, shape.d_nope + site.d_v, shape.rank])
        w_uk = self._slice(up, 1, 0, shape.d_nope)
        w_uv = self._slice(up, 1, shape.d_nope, shape.d_nope + site.d_v)
        anchor = call(
            torch.ops.attnopt.latent_attention.default,
            *(q_nope, q_rope, latent, key, w_uk, w_uv, None, 1 / math.sqrt(d_q), True, 0, 0.0, site.layer),
            name="latent_attention",
        )
        flat = call(_ATEN.view.default, anchor, [self.batch, self.length, site.heads * site.d_v])
        return self._linear(flat, "o_proj"), anchor

    def _query(self) -> fx.Node:
        site, call = self.site, self.editor.call
        if "q_map.weight" not in self.names:
            width = self.shape.d_nope + self.shape.d_rope
            q = call(_ATEN.view.default, self._linear(self.x, "q_proj"), [self.batch, self.length, site.heads, width])
            return call(_ATEN.transpose.int, q, 1, 2)
        q = self._normed(site.q, site.q_norm, site.heads)
        turned = call(_ATEN.transpose.int, self._weight("q_map.weight"), 1, 2)
        return call(_ATEN.matmul.default, call(_ATEN.transpose.int, q, 1, 2), turned)

    def _encoder_input(self) -> fx.Node:
        site, call = self.site, self.editor.call
        if "q_map.weight" not in self.names:
            return self.x
        assert site.v is not None
        keys = self._normed(site.k, site.k_norm, site.kv_heads)
        flat = call(_ATEN.view.default, keys, [self.batch, self.length, site.kv_heads * site.d_qk])
        return call(_ATEN.cat.default, [flat, self._source(site.v)], -1)

    def _normed(self, projection: Projection | None, norm: NormSpec | None, heads: int) -> fx.Node:
        """A source projection by heads, [B, S, heads, d], each normalised."""
        assert projection is not None
        assert norm is not None
        assert norm.weight is not None
        call = self.editor.call
        x = call(_ATEN.view.default, self._source(projection), [self.batch, self.length, heads, self.site.d_qk])
        mean = call(_ATEN.mean.dim, call(_ATEN.pow.Tensor_Scalar, x, 2), [-1], True)
        scale = call(_ATEN.rsqrt.default, call(_ATEN.add.Tensor, mean, norm.eps))
        return call(_ATEN.mul.Tensor, self.editor.weight(norm.weight), call(_ATEN.mul.Tensor, x, scale))

    def _source(self, projection: Projection) -> fx.Node:
        """A projection of the source, whose matrix may hold others, too."""
        weight = self.editor.weight(projection.weight)
        bias = None if projection.bias is None else self.editor.weight(projection.bias)
        stored = self.editor.node(weight.name).meta["val"].shape[0]
        if projection.rows != ((0, stored),):
            weight = self._rows(weight, projection.rows)
            bias = None if bias is None else self._rows(bias, projection.rows)
        return self.editor.call(_ATEN.linear.default, self.x, weight, bias)

    def _rows(self, weight: fx.Node, rows: tuple[tuple[int, int], ...]) -> fx.Node:
        return self.editor.call(_ATEN.cat.default, [self._slice(weight, 0, *span) for span in rows], 0)

    def _linear(self, x: fx.Node, name: str) -> fx.Node:
        bias = self._weight(f"{name}.bias") if f"{name}.bias" in self.names else None
        return self.editor.call(_ATEN.linear.default, x, self._weight(f"{name}.weight"), bias)

    def _weight(self, name: str) -> fx.Node:
        return self.editor.weight(self.names[name])

    def _slice(self, x: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
        return self.editor.call(_ATEN.slice.Tensor, x, dim, start, stop)

    def _turn(self, x: fx.Node) -> fx.Node:
        name = _table_name(self.shape.table)
        table = self.editor.weight(name, Derived.of("vector", values=self.shape.table))
        return self.editor.call(torch.ops.attnopt.rope.default, x, self.positions, table, "interleaved", 0, 1.0)


def _table_name(table: tuple[float, ...]) -> str:
    return f"attnopt.rope.{hashlib.sha256(repr(table).encode()).hexdigest()[:12]}.inv_freq"


def _facts(
    site: AttentionSite, shape: Shape, weights: Mapping[str, Value], names: Mapping[str, str], nodes: SiteNodes
) -> AttentionSite:
    def projection(name: str) -> Projection:
        out, width = meta_of(weights[f"{name}.weight"]).shape
        return Projection(names[f"{name}.weight"], names.get(f"{name}.bias"), ((0, out),), width)

    normed = "q_map.weight" in names
    latent = LatentSpec(
        kv_lora_rank=shape.rank,
        d_nope=shape.d_nope,
        d_rope=shape.d_rope,
        kv_a=projection("kv_a_proj"),
        kv_b=projection("kv_b_proj"),
        q=site.q if normed else projection("q_proj"),
        q_map=names.get("q_map.weight"),
        encoder="normed_kv" if normed else "hidden",
        lane=shape.lane,
        peak=shape.peak,
    )
    kept: dict[str, Any] = {} if normed else {"q": None, "k": None, "v": None}
    return replace(
        site,
        kind="mla",
        kv_heads=site.heads,
        d_qk=shape.d_nope + shape.d_rope,
        o=projection("o_proj"),
        rope=RopeSpec(shape.table, "interleaved", shape.d_nope),
        cache=CacheSpec((CacheEntry("latent", 1, shape.rank), CacheEntry("key_rope", 1, shape.d_rope))),
        scale=1 / math.sqrt(shape.d_nope + shape.d_rope),
        latent=latent,
        nodes=nodes,
        **kept,
    )
