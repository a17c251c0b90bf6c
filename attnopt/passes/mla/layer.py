"""LatentLayer: one converted layer, and its closed form from a source layer and its statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.passes.mla.lowrank import Block, fit
from attnopt.passes.mla.slots import Slots, left_by, normalised, phase_coefficients, take_slots
from attnopt.passes.mla.source_layer import SourceLayer, causal_attention, turns
from attnopt.passes.mla.statistics import LayerStatistics


@dataclass(frozen=True)
class LatentLayer:
    """Weights of a converted layer. Latent of r channels without the lane, rotary key of d_r, d_n unrotated query dims.

    The encoder reads the attention input. If the source has q/k norms it reads y = [keys; values] after the norm, and
    the query rows act on the source's normalised query.

    Attributes:
        query: [H, d_n + d_r, D], or with q/k norms [H, d_n + d_r, d]; rotary rows last, interleaved (Re, Im, Re, ...).
        query_bias: [H, d_n + d_r]; zero without biases.
        encoder, encoder_bias: [r, p'] and [r].
        rope, rope_bias: [d_r, p'] and [d_r], interleaved.
        w_uk, w_uv: [H, d_n, r] and [H, d_v, r].
        value_mean: [H, d_v], added to every value.
        w_o, b_o: [D, H d_v] and [D].
        inv_freq: [d_r / 2] float64, not trained.
    """

    query: Tensor
    query_bias: Tensor
    encoder: Tensor
    encoder_bias: Tensor
    rope: Tensor
    rope_bias: Tensor
    w_uk: Tensor
    w_uv: Tensor
    value_mean: Tensor
    w_o: Tensor
    b_o: Tensor
    inv_freq: Tensor

    @property
    def rank(self) -> int:
        """r, without the lane."""
        return self.encoder.shape[0]

    @property
    def d_rope(self) -> int:
        """Width of the rotary key."""
        return self.rope.shape[0]

    @property
    def d_nope(self) -> int:
        """Width of the unrotated part of a query."""
        return self.w_uk.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """All weights by the name of their field."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> LatentLayer:
        """The same with some weights replaced."""
        return replace(self, **tensors)

    def to(self, dtype: torch.dtype) -> LatentLayer:
        """The same in another floating-point type; the angles stay float64."""
        return self.with_tensors({n: t.to(dtype) for n, t in self.tensors().items() if n != "inv_freq"})

    def mixed(self, source: SourceLayer, x: Tensor, start: int = 0, positions: Tensor | None = None) -> Tensor:
        """Heads' outputs before the output projection, [B, S - start, H d_v], for the tokens from `start` on.

        Args:
            source: the layer it was made from.
            x: attention input [B, S, D].
            start: index of the first query.
            positions: [B, S], rising; by default 0 ... S-1.
        """
        asking = x[:, start:]
        if source.normed:
            read = source.encoder_input(x, source.keys(x), source.values(x))
            q = torch.einsum("hmd,bhsd->bhsm", self.query, source.queries(asking))
        else:
            read = x
            q = F.linear(asking, self.query.flatten(0, 1), self.query_bias.flatten())
            q = q.unflatten(-1, self.query.shape[:2]).transpose(1, 2)
        code = F.linear(read, torch.cat([self.encoder, self.rope]), torch.cat([self.encoder_bias, self.rope_bias]))
        latent, key = code.split([self.rank, self.d_rope], dim=-1)
        heads, d_n = self.w_uk.shape[:2]
        up = torch.cat([self.w_uk, self.w_uv], dim=1)
        expanded = F.linear(latent, up.flatten(0, 1)).unflatten(-1, (heads, -1)).transpose(1, 2)
        cos, sin = turns(self.inv_freq, key[:, None], positions)
        rotary = turned(key[:, None], cos, sin).expand(-1, heads, -1, -1)
        k = torch.cat([expanded[..., :d_n], rotary], dim=-1)
        asked = turned(q[..., d_n:], cos[..., start:, :], sin[..., start:, :])
        q = torch.cat([q[..., :d_n], asked], dim=-1)
        out = causal_attention(q, k, expanded[..., d_n:], 1 / math.sqrt(q.shape[-1]))
        return (out + self.value_mean[:, None]).transpose(1, 2).flatten(2)

    def project(self, mixed: Tensor) -> Tensor:
        """Output projection of `mixed`, [B, S, D]."""
        return F.linear(mixed, self.w_o, self.b_o)

    def attend(self, source: SourceLayer, x: Tensor, start: int = 0, positions: Tensor | None = None) -> Tensor:
        """The layer's output before the residual addition, [B, S - start, D]; arguments as of `mixed`."""
        return self.project(self.mixed(source, x, start, positions))

    def latent_norm(self, source: SourceLayer, x: Tensor) -> float:
        """Largest norm of the latent over the tokens of x."""
        read = source.encoder_input(x, source.keys(x), source.values(x)) if source.normed else x
        return float(F.linear(read, self.encoder, self.encoder_bias).norm(dim=-1).max())


def turned(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels [B, N, S, 2 F] by the angles of `turns`."""
    a, b = pairs[..., 0::2], pairs[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


@dataclass(frozen=True)
class Predicted:
    """Squared output error the closed form predicts for a layer, in one currency.

    Attributes:
        slots: from rotary pairs that keep only their mean phase.
        low_rank: from the latent's rank.
        low_rank_share: the latter as a share of what rank 0 would lose.
        total: what a layer without slots and with rank 0 would lose.
    """

    slots: float
    low_rank: float
    low_rank_share: float
    total: float

    @property
    def exact(self) -> bool:
        """True if nothing is lost but rounding."""
        return self.slots + self.low_rank <= 1e-12 * self.total


def closed_form(
    stats: LayerStatistics, table: tuple[int, ...], rank: int, *, sweeps: int = 3
) -> tuple[LatentLayer, Predicted]:
    """Convert a layer.

    Args:
        stats: of the layer.
        table: frequency index of each rotary slot.
        rank: r, without the lane.
        sweeps: of alternating least squares in the low rank.

    Returns:
        the layer in float64, and the predicted error.
    """
    layer = stats.layer
    slots = normalised(take_slots(stats, table), stats)
    phases = phase_coefficients(stats)
    blocks = closed_form_blocks(stats, slots, phases)
    query, query_bias = _queries(layer, phases, slots)
    rope = _interleave(slots.encoder)
    energies = slots.energies
    del slots  # what they leave of the keys is in the blocks; it is large, and the fit needs the room
    moments = moments_of(stats)
    low = fit(blocks, moments, common_moment(moments), rank, sweeps)
    groups, group = layer.groups, layer.group_of
    w_uk, w_uv = torch.stack(low.decoders[:groups])[group], torch.stack(low.decoders[groups:])[group]

    mean = stats.input_mean / stats.input_weight
    means = stats.values.mean()[stats.class_of]
    own = torch.einsum("gvp,gp->gv", layer.value_rows(), means)
    coded = torch.einsum("gvr,gr->gv", torch.stack(low.decoders[groups:]), (means - mean) @ low.encoder.mT)
    if layer.normed:
        encoder, encoder_bias, rope_bias = low.encoder, -low.encoder @ mean, rope.new_zeros(rope.shape[0])
    else:
        rows, offset = layer.output_map()
        encoder, encoder_bias, rope_bias = low.encoder @ rows, low.encoder @ (offset - mean), rope @ offset
        rope = rope @ rows
    result = LatentLayer(
        query=query,
        query_bias=query_bias,
        encoder=encoder,
        encoder_bias=encoder_bias,
        rope=rope,
        rope_bias=rope_bias,
        w_uk=w_uk,
        w_uv=w_uv,
        value_mean=(own - coded)[group],
        w_o=layer.w_o.double().flatten(1),
        b_o=torch.zeros(layer.width, dtype=torch.float64) if layer.b_o is None else layer.b_o.double(),
        inv_freq=layer.inv_freq[sorted(table)],
    )
    share = low.loss / low.total if low.total > 0 else 0.0
    return result, Predicted(left_by(energies, table), low.loss, share, float(energies.sum()) + low.total)


def moments_of(stats: LayerStatistics) -> Tensor:
    """Centred second moments of what the encoder reads [classes, p, p]: for the keys, then for the values."""
    return torch.cat([stats.keys.covariance(), stats.values.covariance()])


def rotation_of(phases: Tensor) -> Tensor:
    """R_h [H, d, d]: what multiplies pair f of a query by conj(c_hf), so that unrotated keys score as on average."""
    real, imag = torch.diag_embed(phases.real), torch.diag_embed(-phases.imag)
    return torch.cat([torch.cat([real, -imag], 2), torch.cat([imag, real], 2)], 1)


def closed_form_blocks(stats: LayerStatistics, slots: Slots, phases: Tensor) -> list[Block]:
    """Keys of every group, then values of every group, with their metrics in one currency."""
    layer = stats.layer
    rotation = rotation_of(phases)
    per_head = layer.scale**2 * rotation @ stats.queries @ rotation.mT
    key_metric = _per_group(layer, per_head)
    w_o = layer.w_o.double()
    # Every head saw the same queries: the weights' sum is the same for all.
    weight = stats.values.weight.sum() / layer.heads
    value_metric = _per_group(layer, weight * torch.einsum("Dhv,Dhw->hvw", w_o, w_o))
    residual = torch.cat([slots.residual.real, slots.residual.imag], 1)
    classes = stats.keys.weight.shape[0]
    keys = [Block(residual[g], key_metric[g], int(stats.class_of[g])) for g in range(layer.groups)]
    rows = layer.value_rows()
    values = [Block(rows[g], value_metric[g], classes + int(stats.class_of[g])) for g in range(layer.groups)]
    return keys + values


def _per_group(layer: SourceLayer, per_head: Tensor) -> Tensor:
    result = torch.zeros(layer.groups, *per_head.shape[1:], dtype=per_head.dtype)
    return result.index_add_(0, layer.group_of, per_head)


def common_moment(moments: Tensor) -> Tensor:
    """One second moment between those of keys and values, each with equal weight; of `moments_of`."""
    parts = [part.mean(0) for part in moments.chunk(2)]
    return sum((part / part.diagonal().mean().clamp(min=1e-300) for part in parts), torch.zeros_like(parts[0])) / 2


def _queries(layer: SourceLayer, phases: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """Unrotated and rotary query rows [H, d + d_r, D] (or [.., d] with norms) and bias, for scale 1/sqrt(d + d_r)."""
    d, half = layer.d, layer.d // 2
    d_rope = 2 * len(slots.table)
    if layer.normed:
        rows = torch.eye(d, dtype=torch.float64).expand(layer.heads, d, d)
        bias = torch.zeros(layer.heads, d, dtype=torch.float64)
    else:
        turn = layer.turn.double()
        rows = layer.w_q.double() * turn[:, None]
        bias = torch.zeros(layer.heads, d, dtype=torch.float64) if layer.b_q is None else layer.b_q.double() * turn
    rows = torch.cat([rows, bias[..., None]], 2)
    pairs = torch.complex(rows[:, :half], rows[:, half:])
    plain = pairs * phases.conj()[:, :, None]
    decoder = slots.decoder[:, layer.group_of]  # [s, H]
    turned = pairs[:, list(slots.table)] * decoder.conj().T[:, :, None]
    turned = torch.stack([turned.real, turned.imag], 2).flatten(1, 2)
    result = torch.cat([plain.real, plain.imag, turned], 1) * (layer.scale * math.sqrt(d + d_rope))
    return result[..., :-1], result[..., -1]


def _interleave(encoder: Tensor) -> Tensor:
    """[s, p] complex -> [2s, p] real rows Re, Im, Re, Im, ..."""
    return torch.stack([encoder.real, encoder.imag], 1).flatten(0, 1)
