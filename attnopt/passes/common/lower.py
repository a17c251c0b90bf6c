"""Makes the nodes of an attention layer from its facts: passes decide on facts and weights, this writes them down.

The nodes of a layer as captured are replaced as a whole, from its input to the output of its output projection. Layers
that take something from it are made again behind it, so that they read the new nodes.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from attnopt.passes.mla.splice import vector
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, NormSpec, Projection, RouteSpec, SiteNodes
from attnopt.rewriter.weights import Derived

_ATEN = torch.ops.aten
_DIALECT = torch.ops.attnopt


def lower(editor: Editor, program: Program, facts: Mapping[str, AttentionSite]) -> None:
    """Give layers new facts and the nodes that these call for.

    Args:
        editor: of the program; the weights that the facts name are set already.
        program: before the edit.
        facts: new facts by fqn; their `nodes` are those of the layer before.
    """
    made: dict[str, AttentionSite] = {}
    for fqn, before in program.sites.items():
        site = facts.get(fqn)
        if site is None and before.share is not None and before.share.source in made:
            site = before
        if site is None:
            continue
        source = None
        if site.share is not None:
            source = made.get(site.share.source) or program.sites[site.share.source]
        with editor.at(fqn, before=before.nodes.output):
            nodes = _Layer(editor, before, site, source).make()
            editor.redirect(before.nodes.output, editor.node(nodes.output))
            made[fqn] = replace(site, nodes=nodes)
            editor.set_site(made[fqn])


def obstacle(site: AttentionSite) -> str | None:
    """Why a layer cannot be made from its facts, in one clause; None if it can."""
    if site.mask.alibi:
        return "a linear distance bias is added to its logits"
    if site.latent is not None:
        latent = site.latent
        if latent.q_a is not None or latent.kv_a_norm is not None or (latent.encoder != "hidden" and not latent.q_map):
            return "its latent attention was not made by to-mla"
        return None
    for norm, what in ((site.q_norm, "queries"), (site.k_norm, "keys")):
        if norm is not None and norm.scope != "head":
            return f"the norm of its {what} spans all heads"
        if norm is not None and (norm.kind != "rms" or norm.bias is not None or norm.weight is None):
            return f"the norm of its {what} is not a plain RMS norm"
    return None


class _Layer:
    """Makes the nodes of one layer; `before` is what stands in the graph, `site` what is wanted."""

    def __init__(
        self, editor: Editor, before: AttentionSite, site: AttentionSite, source: AttentionSite | None
    ) -> None:
        self.editor, self.before, self.site, self.source = editor, before, site, source
        self.x = editor.node(site.nodes.input)
        self.batch, self.length = (editor.call(_ATEN.sym_size.int, self.x, i) for i in (0, 1))

    def make(self) -> SiteNodes:
        anchor, context, gates = self._latent() if self.site.latent is not None else self._plain()
        call, site = self.editor.call, self.site
        flat = call(_ATEN.view.default, context, [self.batch, self.length, site.heads * site.d_v])
        output = self._linear(flat, site.o)
        route = site.route
        if route is not None and route.fill is not None and gates is not None:
            idle = call(_ATEN.rsub.Scalar, gates, 1)
            output = call(_ATEN.add.Tensor, output, call(_ATEN.matmul.default, idle, self.editor.weight(route.fill)))
        return SiteNodes(site.nodes.input, anchor.name, output.name)

    def _plain(self) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """(attention op, what the output projection reads, gates of the units)."""
        site, call = self.site, self.editor.call
        edge = site.share.edge if site.share else None
        lent = self._operands(self.source) if self.source is not None else None
        q = lent[0] if lent and edge == "map" else self._query()
        k = lent[1] if lent else self._spread(self._key())
        v = (
            lent[2]
            if lent and edge == "kv"
            else self._spread(self._heads(self._source(site.v), site.kv_heads, site.d_v))
        )
        old = self.editor.node(self.before.nodes.attention)
        rest = list(lent[3:]) if lent and edge == "map" else self._rest(old)
        if edge == "map":
            assert self.source is not None
            anchor = call(
                _DIALECT.shared_attention.default,
                q,
                k,
                v,
                *rest,
                self.source.layer,
                site.layer,
                name="shared_attention",
            )
        elif site.route is not None:
            gates, full = self._gates(site.route, q)
            anchor = call(_DIALECT.routed_attention.default, q, k, v, full, *rest, site.layer, name="routed_attention")
            return anchor, anchor, gates
        else:
            anchor = call(_DIALECT.attention.default, q, k, v, *rest, site.layer, name="attention")
        return self._switched(anchor, q)

    def _latent(self) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        site, latent, call = self.site, self.site.latent, self.editor.call
        assert latent is not None
        q = self._latent_query()
        code = self._linear(self._encoder_input(), latent.kv_a)
        compressed = self._slice(code, 2, 0, latent.kv_lora_rank)
        key = self._slice(code, 2, latent.kv_lora_rank, latent.kv_lora_rank + latent.d_rope)
        key = call(_ATEN.squeeze.dim, self._turn(call(_ATEN.unsqueeze.default, key, 1)), 1)
        nope, rotary = self._slice(q, 3, 0, latent.d_nope), self._turn(self._slice(q, 3, latent.d_nope, site.d_qk))
        up = self.editor.weight(latent.kv_b.weight)
        up = call(_ATEN.view.default, up, [site.heads, latent.d_nope + site.d_v, latent.kv_lora_rank])
        w_uk = self._slice(up, 1, 0, latent.d_nope)
        w_uv = self._slice(up, 1, latent.d_nope, latent.d_nope + site.d_v)
        anchor = call(
            _DIALECT.latent_attention.default,
            *(
                nope,
                rotary,
                compressed,
                key,
                w_uk,
                w_uv,
                None,
                site.scale,
                True,
                site.mask.window or 0,
                0.0,
                site.layer,
            ),
            name="latent_attention",
        )
        return self._switched(anchor, q)

    def _switched(self, anchor: fx.Node, q: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
        """The outputs of the heads, times their gates if the layer routes."""
        if self.site.route is None:
            return anchor, anchor, None
        gates, full = self._gates(self.site.route, q)
        full = self.editor.call(_ATEN.unsqueeze.default, full, -1)
        return anchor, self.editor.call(_ATEN.mul.Tensor, anchor, full), gates

    def _gates(self, route: RouteSpec, q: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(which units work [B, S, units], 0 or 1; gates of the heads [B, S, H]); ties go to the lower number."""
        call, units = self.editor.call, self.site.routed_units
        if route.router == "linear":
            assert route.weight is not None
            bias = None if route.bias is None else self.editor.weight(route.bias)
            scores = call(_ATEN.linear.default, self.x, self.editor.weight(route.weight), bias)
        else:
            square = call(_ATEN.sum.dim_IntList, call(_ATEN.mul.Tensor, q, q), [-1])
            square = call(_ATEN.transpose.int, square, 1, 2)  # [B, S, H]
            parts = [call(_ATEN.sum.dim_IntList, self._pick(square, 2, unit), [2], True) for unit in units]
            scores = call(_ATEN.cat.default, parts, -1)
        order = call(_ATEN.sort.stable, scores, stable=True, dim=-1, descending=True)
        chosen = self._slice(self.editor.call(operator.getitem, order, 1), 2, 0, route.active)
        works = call(_ATEN.scatter.value, call(_ATEN.zeros_like.default, scores), -1, chosen, 1.0)
        gates, always = works, call(_ATEN.ones_like.default, self._slice(scores, 2, 0, 1))
        if route.gate == "weighted":
            gates, always = self._weighted(route, scores, works, always)
        common = len(route.shared) if route.shared_weight else 1
        place = dict(zip(route.shared, range(common), strict=True)) if route.shared_weight else {}
        place |= {h: common + u for u, unit in enumerate(units) for h in unit}
        both = call(_ATEN.cat.default, [always, gates], -1)
        return works, self._pick(both, 2, [place.get(h, 0) for h in range(self.site.heads)])

    def _weighted(self, route: RouteSpec, scores: fx.Node, works: fx.Node, always: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(gates of the units [B, S, units], of the shared heads [B, S, |shared| or 1]), see RouteSpec."""
        call = self.editor.call
        working = call(_ATEN.mul.Tensor, self._softmax(scores), works)
        gates = call(_ATEN.div.Tensor, working, call(_ATEN.sum.dim_IntList, working, [-1], True))
        gates = call(_ATEN.mul.Tensor, gates, route.active)
        if route.shared_weight is not None:
            share = self._softmax(call(_ATEN.linear.default, self.x, self.editor.weight(route.shared_weight)))
            always = call(_ATEN.mul.Tensor, share, len(route.shared))
        if route.balance is not None:
            both = self._softmax(call(_ATEN.linear.default, self.x, self.editor.weight(route.balance)))
            both = call(_ATEN.mul.Tensor, both, 2)
            always = call(_ATEN.mul.Tensor, always, self._slice(both, 2, 0, 1))
            gates = call(_ATEN.mul.Tensor, gates, self._slice(both, 2, 1, 2))
        return gates, always

    def _softmax(self, scores: fx.Node) -> fx.Node:
        return self.editor.call(_ATEN._softmax.default, scores, -1, False)

    def _operands(self, source: AttentionSite) -> tuple[Any, ...]:
        """(q, k, v, bias, q_pos, scale, causal, window, softcap, sinks) of the attention of another layer."""
        node = self.editor.node(source.nodes.attention)
        args = list(node.args)
        if node.target is _DIALECT.routed_attention.default:
            del args[3]
        return tuple(args[:10])

    def _rest(self, old: fx.Node) -> list[Any]:
        """bias, q_pos, scale, causal, window, softcap, sinks: as before, for the heads that are left."""
        args = list(old.args)
        if old.target is _DIALECT.routed_attention.default:
            del args[3]
        rest: list[Any] = args[3:10]
        kept = [self.before.original_heads.index(h) for h in self.site.original_heads]
        if rest[0] is not None and kept != list(range(self.before.heads)):
            rest[0] = self._bias_of(rest[0], kept)
        rest[2] = self.site.scale  # a factor that the captured graph had in its queries is in the facts
        rest[6] = None if self.site.mask.sinks is None else self.editor.weight(self.site.mask.sinks)
        return rest

    def _bias_of(self, bias: fx.Node, kept: list[int]) -> fx.Node:
        """The bias of some heads; where it comes from tables with a column for each head, from the columns left."""
        tables = dict(zip(self.before.mask.bias, self.site.mask.bias, strict=True))
        new: dict[fx.Node, fx.Node] = {}
        for node in _between(bias, {old for old, name in tables.items() if name != old}):
            if node.op == "get_attr":
                new[node] = self.editor.weight(tables[str(node.target)])
            else:
                new[node] = copy_call(self.editor, node, new)
        if bias in new:
            return new[bias]
        heads = bias.meta["val"].shape[1]
        return bias if heads == 1 else self._pick(bias, 1, kept)

    def _query(self) -> fx.Node:
        site = self.site
        return self._turn(self._normed(self._source(site.q), site.heads, site.q_norm))

    def _key(self) -> fx.Node:
        site = self.site
        return self._turn(self._normed(self._source(site.k), site.kv_heads, site.k_norm))

    def _latent_query(self) -> fx.Node:
        """[B, H, S, d_nope + d_rope], unrotated."""
        site, latent, call = self.site, self.site.latent, self.editor.call
        assert latent is not None
        projection = latent.q or site.q
        if latent.q_map is None:
            return self._heads(self._source(projection), site.heads, site.d_qk)
        assert projection is not None
        q = self._normed(self._source(projection), site.heads, site.q_norm, projection.out_features // site.heads)
        return call(_ATEN.matmul.default, q, call(_ATEN.transpose.int, self.editor.weight(latent.q_map), 1, 2))

    def _encoder_input(self) -> fx.Node:
        site, latent, call = self.site, self.site.latent, self.editor.call
        assert latent is not None
        if latent.encoder == "hidden":
            return self.x
        assert site.k is not None
        assert site.k_norm is not None
        assert site.k_norm.weight is not None
        (width,) = self.editor.weight(site.k_norm.weight).meta["val"].shape
        keys = self._normed(self._source(site.k), site.k.out_features // width, site.k_norm, width)
        keys = call(_ATEN.transpose.int, keys, 1, 2)
        flat = call(_ATEN.reshape.default, keys, [self.batch, self.length, site.k.out_features])
        return call(_ATEN.cat.default, [flat, self._source(site.v)], -1)

    def _spread(self, heads: fx.Node) -> fx.Node:
        """Keys or values, one for each query head if those are not evenly divided."""
        return self._pick(heads, 1, self.site.kv_of) if self.site.kv_of else heads

    def _normed(self, flat: fx.Node, heads: int, norm: NormSpec | None, width: int | None = None) -> fx.Node:
        """[B, S, heads width] as [B, heads, S, width], each head normalised."""
        call = self.editor.call
        x = self._heads(flat, heads, width or self.site.d_qk)
        if norm is None:
            return x
        assert norm.weight is not None
        gain = self.editor.weight(norm.weight)
        if norm.unit_offset:
            gain = call(_ATEN.add.Tensor, gain, 1.0)
        mean = call(_ATEN.mean.dim, call(_ATEN.pow.Tensor_Scalar, x, 2), [-1], True)
        scale = call(_ATEN.rsqrt.default, call(_ATEN.add.Tensor, mean, norm.eps))
        return call(_ATEN.mul.Tensor, gain, call(_ATEN.mul.Tensor, x, scale))

    def _heads(self, flat: fx.Node, heads: int, width: int) -> fx.Node:
        call = self.editor.call
        return call(_ATEN.transpose.int, call(_ATEN.view.default, flat, [self.batch, self.length, heads, width]), 1, 2)

    def _turn(self, x: fx.Node) -> fx.Node:
        rope = self.site.rope
        if rope is None:
            return x
        table = self.editor.weight(table_name(rope.inv_freq), Derived.of(vector.__name__, values=rope.inv_freq), True)
        # Latent queries hold the rotary dims last, and only those come here.
        offset = 0 if self.site.latent is not None else rope.offset
        positions = self.editor.node("position_ids")
        return self.editor.call(_DIALECT.rope.default, x, positions, table, rope.style, offset, rope.attention_scaling)

    def _source(self, projection: Projection | None) -> fx.Node:
        assert projection is not None
        return self._linear(self.x, projection)

    def _linear(self, x: fx.Node, projection: Projection) -> fx.Node:
        """A projection, whose matrix may be stored transposed or hold others, too."""
        call = self.editor.call
        weight = self.editor.weight(projection.weight)
        bias = None if projection.bias is None else self.editor.weight(projection.bias)
        if projection.layout == "conv1d":
            weight = call(_ATEN.transpose.int, weight, 0, 1)
        if projection.rows != ((0, weight.meta["val"].shape[0]),):
            weight, bias = self._rows(weight, projection.rows), bias and self._rows(bias, projection.rows)
        return call(_ATEN.linear.default, x, weight, bias)

    def _rows(self, weight: fx.Node, rows: tuple[tuple[int, int], ...]) -> fx.Node:
        return self.editor.call(_ATEN.cat.default, [self._slice(weight, 0, *span) for span in rows], 0)

    def _pick(self, x: fx.Node, dim: int, index: Any) -> fx.Node:
        """Entries of a dimension, one by one."""
        parts = [self._slice(x, dim, i, i + 1) for i in index]
        return parts[0] if len(parts) == 1 else self.editor.call(_ATEN.cat.default, parts, dim)

    def _slice(self, x: fx.Node, dim: int, start: int, stop: int) -> fx.Node:
        return self.editor.call(_ATEN.slice.Tensor, x, dim, start, stop)


def copy_call(editor: Editor, node: fx.Node, new: Mapping[fx.Node, fx.Node], resize: Any = None) -> fx.Node:
    """A call like that of a node, with some operands replaced.

    Args:
        editor: takes the new node.
        node: what to copy.
        new: operands by those they replace.
        resize: applied to the positional arguments, or None.
    """
    args: Any = fx.map_arg(node.args, lambda n: new.get(n, n))
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: new.get(n, n))
    target: Any = node.target
    return editor.call(target, *(args if resize is None else resize(args)), **kwargs)


def _between(node: fx.Node, names: set[str]) -> list[fx.Node]:
    """The nodes on the way from the weights of these names to a node, in order, both ends included."""
    memo: dict[fx.Node, bool] = {}
    order: list[fx.Node] = []

    def reaches(current: fx.Node) -> bool:
        if current not in memo:
            own = current.op == "get_attr" and str(current.target) in names
            found = [reaches(source) for source in current.all_input_nodes]  # all of them: each may be on the way
            memo[current] = own or any(found)
            if memo[current]:
                order.append(current)
        return memo[current]

    return order if names and reaches(node) else []


def table_name(table: tuple[float, ...]) -> str:
    """Name of the weight that holds a rotary table; equal tables have one name."""
    return f"attnopt.rope.{hashlib.sha256(repr(table).encode()).hexdigest()[:12]}.inv_freq"
