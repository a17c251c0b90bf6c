"""How ONNX computes attention: which form a site takes on a target, and the ATen or ONNX operations it becomes.

Two forms. "matmul" spells attention as MatMul, Softmax, MatMul with all query heads that share keys as rows of one
product; on CPUs this reads the cache at memory speed, where onnxruntime's Attention operator works head by head
(docs/codegen.md has the timings). "operator" is the ONNX operator Attention of opset 23/24, for providers with a fused
kernel. Latent attention is always absorbed: queries go to the latent space, so the cache is read as it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.codegen.decoding import LATENT, ROUTED, SHARED, SiteCall
from attnopt.codegen.target import Claim, Refusal, Target, Verdict
from attnopt.rewriter.absorb import obstacle
from attnopt.rewriter.program import Program
from attnopt.rewriter.site import AttentionSite

#: Widest head for which onnxruntime's CUDA provider has a fused kernel (its flash attention).
FUSED_HEAD = 256


@torch.library.custom_op("attnopt::onnx_attention", mutates_args=())
def onnx_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """ONNX Attention (opset 23) without a cache of its own and without causality: what is hidden is in `bias`.

    Args:
        q, k, v: [B, H, S, d], [B, G, T, d], [B, G, T, d_v].
        bias: additive, broadcastable to [B, H, S, T], or None.

    Returns:
        [B, H, S, d_v].
    """
    weights = attention_weights(q, k, bias, scale, softcap, None)
    return attend(weights, q, v).transpose(1, 2).contiguous()


@onnx_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("attnopt::onnx_rotary", mutates_args=())
def onnx_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """ONNX RotaryEmbedding (opset 23): every dim of x [B, N, S, d] turns by cos, sin [B, S, d/2]."""
    c, s = cos[:, None], sin[:, None]
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = a * c - b * s, b * c + a * s
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


@onnx_rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


def rotary_table(positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, n] of positions [B, S] times inv_freq [n], times a factor."""
    angle = positions[..., None].to(torch.float32) * inv_freq.to(torch.float32)
    return angle.cos() * scaling, angle.sin() * scaling


def attention_weights(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention maps [B, G, (H/G)·S, T]: heads that share keys are rows of one product.

    Args:
        q, k: [B, H, S, d] and [B, G, T, d].
        bias: additive, [B|1, 1|H, S, T], or None.
        sinks: [H] logits of a virtual key, or None.
    """
    batch, heads, length, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    rows = heads // groups * length
    logits = torch.matmul((q * scale).reshape(batch, groups, rows, width), k.transpose(2, 3))
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = (logits.reshape(batch, heads, length, keys) + bias).reshape(batch, groups, rows, keys)
    if sinks is None:
        return torch.softmax(logits, dim=-1)
    sink = sinks[None, :, None, None].expand(batch, heads, length, 1).reshape(batch, groups, rows, 1)
    return torch.softmax(torch.cat([logits, sink], dim=-1), dim=-1)[..., :keys]


def attend(weights: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """Values under maps: [B, S, H, d_v] from the maps of `attention_weights` and v [B, G, T, d_v]."""
    batch, heads, length = q.shape[:3]
    return torch.matmul(weights, v).reshape(batch, heads, length, v.shape[3]).transpose(1, 2)


def query_rows(bias: Tensor, q: Tensor) -> Tensor:
    """A bias [.., 1|S, T] with a row for each of the S queries: onnxruntime's Attention wants all of them."""
    return bias.expand(-1, -1, q.shape[2], -1) if bias.shape[2] == 1 else bias


def latent_query(q_nope: Tensor, q_rope: Tensor, w_uk: Tensor, scale: float) -> Tensor:
    """Queries in the space of the cached vectors [latent, rotary key]: [B, H, S, r + d_rope], scaled."""
    return torch.cat([torch.matmul(q_nope, w_uk), q_rope], dim=-1) * scale


def latent_attend(q: Tensor, cache: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """Absorbed attention: [B, H, S, w] from q [B, H, S, w] and the cached vectors [B, T, w].

    Heads are rows of one product. The sum runs over all w columns, because a slice of the cache would be a copy of
    it; the columns of the rotary key meet zeros afterwards (`padded_values`).
    """
    batch, heads, length, width = q.shape
    keys = cache.shape[1]
    logits = torch.matmul(q.reshape(batch, heads * length, width), cache.transpose(1, 2))
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    if bias is not None:
        logits = (logits.reshape(batch, heads, length, keys) + bias).reshape(batch, heads * length, keys)
    return torch.matmul(torch.softmax(logits, dim=-1), cache).reshape(batch, heads, length, width)


def padded_values(w_uv: Tensor, width: int) -> Tensor:
    """[H, w, d_v] from w_uv [H, d_v, r]: transposed, with zero rows for the rotary key."""
    return torch.nn.functional.pad(w_uv.transpose(1, 2), (0, 0, 0, width - w_uv.shape[2]))


def values_out(mixed: Tensor, w_uv: Tensor) -> Tensor:
    """[B, S, H, d_v] from mixed latents [B, H, S, w] and `padded_values`."""
    return torch.matmul(mixed, w_uv).transpose(1, 2)


@dataclass(frozen=True)
class OnnxLane:
    """Lowers attention for onnxruntime; see `decoding.Lane`.

    Attributes:
        forms: form by fqn, "matmul" or "operator".
    """

    forms: dict[str, str]

    def attention(self, graph: fx.Graph, call: SiteCall) -> tuple[fx.Node, Any]:
        """See `decoding.Lane.attention`."""
        a, node = call.args, graph.call_function
        operator = self.forms[call.site.fqn] == "operator"
        if call.op is LATENT:
            q = node(latent_query, (a["q_nope"], a["q_rope"], a["w_uk"], a["scale"]))
            cache = call.cache["latent"] if call.cache else node(torch.cat, ([a["latent"], a["k_rope"]], -1))
            if operator:
                shared = node(torch.unsqueeze, (cache, 1))
                mixed = node(
                    torch.ops.attnopt.onnx_attention.default, (q, shared, shared, call.mask, 1.0, a["softcap"])
                )
            else:
                mixed = node(latent_attend, (q, cache, call.mask, a["softcap"]))
            assert call.site.latent is not None
            width = call.site.latent.kv_lora_rank + call.site.latent.d_rope
            return node(values_out, (mixed, node(padded_values, (a["w_uv"], width)))), None
        bias = self._bias(graph, call)
        k, v = call.cache.get("key", a["k"]), call.cache.get("value", a["v"])
        if operator:
            bias = None if bias is None else node(query_rows, (bias, a["q"]))
            out = node(torch.ops.attnopt.onnx_attention.default, (a["q"], k, v, bias, a["scale"], a["softcap"]))
            return node(torch.transpose, (out, 1, 2)), None
        weights = call.owner if call.op is SHARED else None
        if weights is None:
            weights = node(attention_weights, (a["q"], k, bias, a["scale"], a["softcap"], a["sinks"]))
        out = node(attend, (weights, a["q"], v))
        if call.op is ROUTED:
            out = node(torch.mul, (out, node(torch.unsqueeze, (a["gates"], -1))))
        return out, weights

    def _bias(self, graph: fx.Graph, call: SiteCall) -> fx.Node | None:
        bias = call.args["bias"]
        if bias is None or call.mask is None:
            return call.mask if bias is None else bias
        return graph.call_function(torch.add, (bias, call.mask))

    def rope(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """RotaryEmbedding with tables that all layers with these frequencies share."""
        x, positions, inv_freq, style, offset, scaling = node.args
        assert isinstance(x, fx.Node)
        width = x.meta["val"].shape[-1]
        assert isinstance(inv_freq, fx.Node)
        if offset or width != 2 * inv_freq.meta["val"].shape[0]:
            return node
        made = next(
            (n for n in graph.nodes if n.target is rotary_table and n.args == (positions, inv_freq, scaling)), None
        )
        table = made or graph.call_function(rotary_table, (positions, inv_freq, scaling))
        cos, sin = (graph.call_function(_pick, (table, i)) for i in (0, 1))
        return graph.call_function(torch.ops.attnopt.onnx_rotary.default, (x, cos, sin, style == "interleaved"))


def _pick(pair: Sequence[Tensor], place: int) -> Tensor:
    return pair[place]


def claim(program: Program, site: AttentionSite, target: Target, form: str) -> Verdict:
    """Which form a site takes.

    Args:
        form: "auto", "matmul" or "operator".
    """
    anchor = program.node(site.nodes.attention)
    if site.latent is not None and obstacle(program, site) is not None:
        return Refusal(site.fqn, f"it is MLA that cannot be absorbed: {obstacle(program, site)}")
    if site.latent is None and anchor.target not in (SHARED, ROUTED):
        blocked = "sinks" if site.mask.sinks else None
        if form == "operator" and blocked:
            return Refusal(site.fqn, f"ONNX Attention has no {blocked}")
        fused = target.is_gpu and site.d_qk == site.d_v <= FUSED_HEAD and not blocked
        if form == "operator" or (form == "auto" and fused):
            return Claim(site.fqn, "operator")
        return Claim(site.fqn, "matmul", _window_note(site))
    if anchor.target in (SHARED, ROUTED):
        if form == "operator":
            return Refusal(site.fqn, "ONNX Attention neither takes a map of another layer nor skips heads")
        note = "all heads are computed and gated: routing saves nothing in ONNX" if anchor.target is ROUTED else ""
        return Claim(site.fqn, "matmul", note)
    return Claim(site.fqn, "operator" if form == "operator" else "matmul")


def _window_note(site: AttentionSite) -> str:
    return "slots outside its window are kept and hidden" if site.mask.causal and site.mask.window else ""
