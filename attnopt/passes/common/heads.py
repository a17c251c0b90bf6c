"""Facts and weights of a layer with some of its heads, in any order: what removing and moving heads come down to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from attnopt.passes.common.weights import channels, columns, matrix, pick, vector
from attnopt.rewriter.edit import Editor
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite, CacheEntry, CacheSpec, Kind, LatentSpec, Projection
from attnopt.rewriter.weights import Derived, Value, meta_of


def take_heads(editor: Editor, program: Program, site: AttentionSite, kept: Sequence[int]) -> AttentionSite:
    """Facts of a layer that has only some of its heads, its weights set.

    Key/value heads that no head reads any more are removed with their projections' rows; the others keep their order.

    Args:
        editor: takes the new weights.
        program: before the edit.
        site: the layer.
        kept: its heads by their present numbers, those that read one key/value head side by side.

    Returns:
        the facts, with the nodes of `site`.
    """
    taker = _Taker(editor, program, site)
    if site.latent is not None:
        return taker.latent(site.latent, list(kept))
    return taker.plain(list(kept))


class _Taker:
    def __init__(self, editor: Editor, program: Program, site: AttentionSite) -> None:
        self.editor, self.store, self.site = editor, program.weights, site

    def plain(self, kept: list[int]) -> AttentionSite:
        site = self.site
        read = [site.kv_head_of[h] for h in kept]
        groups = list(dict.fromkeys(read))
        of = tuple(groups.index(g) for g in read)
        even = tuple(i * len(groups) // len(kept) for i in range(len(kept)))
        counts = {len(groups), len(kept)}
        kind: Kind = "mha" if len(counts) == 1 else "mqa" if len(groups) == 1 else "gqa"
        widths = {"key": site.d_qk, "value": site.d_v}
        entries = tuple(CacheEntry(e.name, len(groups), widths[e.name]) for e in site.cache.entries)
        return self._common(
            kept,
            kind=kind,
            kv_heads=len(groups),
            kv_of=() if of == even and len(kept) % len(groups) == 0 else of,
            q=self._outputs("q_proj", site.q, channels(kept, site.d_qk)),
            k=self._outputs("k_proj", site.k, channels(groups, site.d_qk)),
            v=self._outputs("v_proj", site.v, channels(groups, site.d_v)),
            cache=CacheSpec(entries),
        )

    def latent(self, latent: LatentSpec, kept: list[int]) -> AttentionSite:
        site = self.site
        query = latent.q or site.q
        assert query is not None
        q = self._outputs("q_proj", query, channels(kept, query.out_features // site.heads))
        kv_b = self._outputs("kv_b_proj", latent.kv_b, channels(kept, latent.d_nope + site.d_v))
        assert kv_b is not None
        q_map = latent.q_map
        if q_map is not None:
            q_map = self._set("q_map.weight", pick(self.store[q_map], kept, 0))
        new = replace(latent, q=q, kv_b=kv_b, q_map=q_map)
        kept_q = {"q": q} if site.q is not None else {}
        return self._common(kept, kv_heads=len(kept), latent=new, **kept_q)

    def _common(self, kept: list[int], **changes: object) -> AttentionSite:
        site = self.site
        bias = self.store[site.o.bias] if site.o.bias is not None else None
        o = self._projection("o_proj", columns(self.store, site.o, channels(kept, site.d_v)), bias)
        ids = tuple(site.original_heads[h] for h in kept)
        mask = site.mask
        if mask.sinks is not None:
            mask = replace(mask, sinks=self._set("sinks", pick(self.store[mask.sinks], kept, 0)))
        tables = tuple(self._table(name, kept) for name in mask.bias)
        mask = replace(mask, bias=tables)
        whole = ids == tuple(range(max(ids) + 1)) and len(ids) == site.heads and not site.head_ids
        return replace(site, heads=len(kept), o=o, mask=mask, head_ids=() if whole else ids, **changes)  # type: ignore[arg-type]  # field names and types are those of AttentionSite

    def _table(self, name: str, kept: list[int]) -> str:
        """A bias table with a column for each head (Swin), with the columns left; other tensors stay as they are."""
        shape = self.store.meta(name).shape
        if len(shape) != 2 or shape[1] != self.site.heads:
            return name
        return self._set(name.removeprefix(f"{self.site.fqn}."), pick(self.store[name], kept, 1))

    def _outputs(self, name: str, projection: Projection | None, outputs: list[int]) -> Projection | None:
        if projection is None:
            return None
        return self._projection(name, matrix(self.store, projection, outputs), vector(self.store, projection, outputs))

    def _projection(self, name: str, weight: Value, bias: Value | None) -> Projection:
        return make_projection(self.editor, self.site.fqn, name, weight, bias)

    def _set(self, name: str, value: Value) -> str:
        return set_fresh(self.editor, self.site.fqn, name, value)


def set_fresh(editor: Editor, fqn: str, name: str, value: Value) -> str:
    """Define a weight of a layer under a name of its own and return that."""
    fresh = editor.fresh_name(f"{fqn}.{name}")
    with editor.at(fqn):
        editor.set_weight(fresh, value)
    return fresh


def make_projection(editor: Editor, fqn: str, name: str, weight: Value, bias: Value | None) -> Projection:
    """A projection of a layer with a weight [out, in] and bias [out] of its own."""
    out, inside = meta_of(weight).shape
    bias_name = None if bias is None else set_fresh(editor, fqn, f"{name}.bias", bias)
    return Projection(set_fresh(editor, fqn, f"{name}.weight", weight), bias_name, ((0, out),), inside)


def with_output_bias(editor: Editor, site: AttentionSite) -> AttentionSite:
    """The facts with an output bias, of zeros if there was none."""
    if site.o.bias is not None:
        return site
    zeros = Derived.of("zeros", shape=(site.o.out_features,), dtype=torch.float32)
    return replace(site, o=replace(site.o, bias=set_fresh(editor, site.fqn, "o_proj.bias", zeros)))
