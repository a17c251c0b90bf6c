"""Puts Multi-head Latent Attention that a model spells with expanded keys and values into the dialect's own op.

A captured DeepSeek layer expands its latent into keys and values per head and calls ordinary attention. The site knows
the latent; this gives the graph `attnopt::latent_attention`, which reads the latent itself, so that code generation
can keep the latent and nothing else.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from attnopt.rewriter.edit import Editor
from attnopt.rewriter.normalize import ATTENTION
from attnopt.rewriter.probe import Mismatch, Probe
from attnopt.rewriter.program import Program, walk_back
from attnopt.rewriter.projections import LinearMap, feeding_maps
from attnopt.rewriter.site import AttentionSite, LatentSpec

aten = torch.ops.aten
LATENT_ATTENTION = torch.ops.attnopt.latent_attention.default


def obstacle(program: Program, site: AttentionSite) -> str | None:
    """Why a site of kind "mla" cannot be said with `latent_attention`; None if it can, or already is."""
    if site.latent is None:
        return f"its kind is {site.kind}, not mla"
    anchor = program.node(site.nodes.attention)
    if anchor.target is LATENT_ATTENTION:
        return None
    if anchor.target is not ATTENTION:
        return f"its attention is {anchor.target}"
    bias, q_pos, sinks = anchor.args[3], anchor.args[4], anchor.args[9]
    if bias is not None or q_pos is not None or sinks is not None:
        return "its attention takes a bias, positions or sinks"
    if site.latent.kv_b.bias is not None:
        return "the latent's decoder has a bias, which does not commute with absorption"
    return None


def to_latent_form(program: Program) -> Program:
    """The same program with `latent_attention` wherever a site is MLA and `obstacle` finds nothing.

    The result computes the same function; sites keep their names and facts.
    """
    editor = Editor(program, by="latent-form")
    probe = Probe(program)
    changed = False
    for site in program.site_list:
        anchor = program.node(site.nodes.attention)
        if site.latent is None or anchor.target is LATENT_ATTENTION or obstacle(program, site) is not None:
            continue
        _absorb(editor, probe, site, site.latent, anchor)
        changed = True
    return editor.finish() if changed else program


def _absorb(editor: Editor, probe: Probe, site: AttentionSite, spec: LatentSpec, anchor: fx.Node) -> None:
    queries, keys, values = anchor.args[:3]
    assert isinstance(queries, fx.Node)
    assert isinstance(keys, fx.Node)
    assert isinstance(values, fx.Node)
    maps = feeding_maps(values)
    decoder = next(m for m in maps if m.weight == spec.kv_b.weight)
    rotary = _rotary_key(probe, decoder, anchor, spec)
    scale, causal, window, softcap = anchor.args[5:9]
    with editor.at(site.fqn, before=anchor.name):
        call, node = editor.call, editor.node
        q = node(queries.name)
        batch, length = call(aten.sym_size.int, q, 0), call(aten.sym_size.int, q, 2)
        latent = node(decoder.x.name)
        if decoder.x.meta["val"].ndim != 3:
            latent = call(aten.reshape.default, latent, [batch, length, spec.kv_lora_rank])
        if rotary is not None:
            key = call(aten.squeeze.dim, node(rotary.name), 1)
        else:
            k = node(keys.name)
            key = call(aten.slice.Tensor, call(aten.select.int, k, 1, 0), 2, spec.d_nope, spec.d_nope + spec.d_rope)
        d_q = spec.d_nope + spec.d_rope
        q_nope = call(aten.slice.Tensor, q, 3, 0, spec.d_nope)
        q_rope = call(aten.slice.Tensor, q, 3, spec.d_nope, d_q)
        up = editor.weight(spec.kv_b.weight)
        up = call(aten.view.default, up, [site.heads, spec.d_nope + site.d_v, spec.kv_lora_rank])
        w_uk = call(aten.slice.Tensor, up, 1, 0, spec.d_nope)
        w_uv = call(aten.slice.Tensor, up, 1, spec.d_nope, spec.d_nope + site.d_v)
        new = call(
            LATENT_ATTENTION,
            *(q_nope, q_rope, latent, key, w_uk, w_uv, None, scale, causal, window, softcap, site.layer),
            name="latent_attention",
        )
        editor.redirect(anchor.name, new)
        editor.set_site(replace(site, nodes=replace(site.nodes, attention=new.name)))


def _rotary_key(probe: Probe, decoder: LinearMap, anchor: fx.Node, spec: LatentSpec) -> fx.Node | None:
    """The turned rotary key [B, 1, S, d_rope] before it is repeated for every head, or None if it is not a node.

    It is looked for by shape and accepted by measurement: the rotary part of every head's key must equal it.
    """
    keys = anchor.args[1]
    assert isinstance(keys, fx.Node)
    encoder = next(m for m in feeding_maps(keys) if m.node is not decoder.node)
    for node in walk_back(keys, stop=(decoder.node, encoder.node)):
        if node.target is not aten.expand.default or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        shape = source.meta["val"].shape
        if len(shape) != 4 or shape[1] != 1 or shape[3] != spec.d_rope:
            continue
        generator = torch.Generator().manual_seed(0)
        given = {m.node: torch.randn(probe.shape(m.node, 2, 3), generator=generator) for m in (decoder, encoder)}
        positions = torch.tensor([[3, 4, 5], [0, 1, 2]])
        try:
            whole, part = probe.evaluate([keys, source], given, 2, 3, positions)
        except Mismatch:
            continue
        if torch.equal(whole[..., spec.d_nope :], part.expand_as(whole[..., spec.d_nope :])):
            return source
    return None
