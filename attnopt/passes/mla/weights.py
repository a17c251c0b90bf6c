"""A LatentLayer as the named weights of a converted site, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnopt.passes.mla.layer import LatentLayer
from attnopt.passes.mla.source_layer import SourceLayer


def to_weights(layer: LatentLayer, source: SourceLayer, lane: bool) -> dict[str, Tensor]:
    """Weights in float32, by their names below the attention module.

    Args:
        layer: the converted layer.
        source: what it was made from.
        lane: append the constant channel to the latent and let its decoder column carry the value mean; otherwise the
            mean goes through the output projection into its bias.
    """
    encoder, rope, b_o = _to_source_order(layer.encoder, source), _to_source_order(layer.rope, source), layer.b_o
    up_k, up_v = layer.w_uk, layer.w_uv
    rows, offsets = [encoder], [layer.encoder_bias]
    if lane:
        rows.append(encoder.new_zeros(1, encoder.shape[1]))
        offsets.append(encoder.new_ones(1))
        up_k = torch.cat([up_k, up_k.new_zeros(*up_k.shape[:2], 1)], 2)
        up_v = torch.cat([up_v, layer.value_mean[..., None]], 2)
    else:
        b_o = b_o + layer.w_o @ layer.value_mean.flatten()
    result = {
        "kv_a_proj.weight": torch.cat([*rows, rope]),
        "kv_a_proj.bias": torch.cat([*offsets, layer.rope_bias]),
        "kv_b_proj.weight": torch.cat([up_k, up_v], 1).flatten(0, 1),
        "o_proj.weight": layer.w_o,
        "o_proj.bias": b_o,
    }
    if source.normed:
        result["q_map.weight"] = _query_columns(layer.query, source)
    else:
        result["q_proj.weight"] = layer.query.flatten(0, 1)
        if source.b_q is not None:
            result["q_proj.bias"] = layer.query_bias.flatten()
    return {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in result.items()}


def from_weights(weights: Mapping[str, Tensor], source: SourceLayer, inv_freq: Tensor, lane: bool) -> LatentLayer:
    """The layer that `to_weights` wrote; runs compute with this one, so that a resumed run computes the same.

    Args:
        weights: by their names below the attention module.
        source: what it was made from.
        inv_freq: [d_r / 2] angles of the rotary slots.
        lane: whether the last latent channel is the constant.
    """
    d_rope = 2 * inv_freq.shape[0]
    code, offset = weights["kv_a_proj.weight"], weights["kv_a_proj.bias"]
    rank = code.shape[0] - d_rope - int(lane)
    encoder, rope = _from_source_order(code[:rank], source), _from_source_order(code[code.shape[0] - d_rope :], source)
    up = weights["kv_b_proj.weight"].unflatten(0, (source.heads, -1))
    d_n = up.shape[1] - source.d_v
    if source.normed:
        query = _from_query_columns(weights["q_map.weight"], source)
    else:
        query = weights["q_proj.weight"].unflatten(0, (source.heads, -1))
    nothing = torch.zeros(query.shape[:2], dtype=query.dtype)
    query_bias = weights["q_proj.bias"].view(query.shape[:2]) if "q_proj.bias" in weights else nothing
    return LatentLayer(
        query=query,
        query_bias=query_bias,
        encoder=encoder,
        encoder_bias=offset[:rank],
        rope=rope,
        rope_bias=offset[code.shape[0] - d_rope :],
        w_uk=up[:, :d_n, :rank],
        w_uv=up[:, d_n:, :rank],
        value_mean=up[:, d_n:, rank] if lane else torch.zeros(source.heads, source.d_v, dtype=up.dtype),
        w_o=weights["o_proj.weight"],
        b_o=weights["o_proj.bias"],
        inv_freq=inv_freq,
    )


def _column_order(source: SourceLayer) -> Tensor:
    """Where each entry of the paired-order encoder input comes from in the source's [keys; values]."""
    keys = torch.arange(source.groups * source.d).view(source.groups, source.d)[:, source.order].flatten()
    return torch.cat([keys, torch.arange(source.groups * source.d, source.input_width)])


def _column_factor(source: SourceLayer, like: Tensor) -> Tensor:
    keys = source.turn.to(like).repeat(source.groups)
    return torch.cat([keys, torch.ones(source.groups * source.d_v).to(like)])


def _to_source_order(rows: Tensor, source: SourceLayer) -> Tensor:
    """Encoder rows that read the source's own keys and values, of models with q/k norms."""
    if not source.normed:
        return rows
    result = torch.empty_like(rows)
    result[:, _column_order(source)] = rows * _column_factor(source, rows)
    return result


def _from_source_order(rows: Tensor, source: SourceLayer) -> Tensor:
    if not source.normed:
        return rows
    return rows[:, _column_order(source)] / _column_factor(source, rows)


def _query_columns(query: Tensor, source: SourceLayer) -> Tensor:
    result = torch.empty_like(query)
    result[..., source.order] = query * source.turn.to(query)
    return result


def _from_query_columns(query: Tensor, source: SourceLayer) -> Tensor:
    return query[..., source.order] / source.turn.to(query)
