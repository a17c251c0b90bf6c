"""The closed form of a layer: exact where it must be, better with more, equal to its stored weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.passes.mla.layer import LatentLayer, closed_form, rotation_of, turned
from attnopt.passes.mla.slots import choose_table, phase_coefficients, slot_energies
from attnopt.passes.mla.source_layer import SourceLayer, causal_attention, paired_order, turns
from attnopt.passes.mla.statistics import LayerStatistics
from attnopt.passes.mla.weights import from_weights, to_weights
from attnopt.rewriter.ops.latent import latent_attention_reference
from tests.passes.mla.layers import GRIDS, apart, relative, source, statistics, text, weights_of


def every_slot(layer: SourceLayer) -> tuple[int, ...]:
    turning = [f for f in range(layer.d // 2) if float(layer.inv_freq[f]) != 0]
    return tuple(f for f in turning for _ in range(layer.groups))


def convert(layer: SourceLayer, slots: int, rank: int, stats: LayerStatistics | None = None) -> LatentLayer:
    stats = stats or statistics(layer)
    return closed_form(stats, choose_table([slot_energies(stats)], slots), rank)[0]


@pytest.mark.parametrize(("heads", "groups"), GRIDS)
@pytest.mark.parametrize("form", ["plain", "bias", "norms", "inputs"])
def test_full_width_is_exact(heads: int, groups: int, form: str) -> None:
    """Identity 3: with d_r = G d and r = G d nothing is lost (float64; identities 1, 4 and 6 on the way)."""
    width = groups * 4 if form == "inputs" else heads * 4
    layer = source(heads, groups, 4, width=width, bias=form == "bias", norms=form == "norms")
    result, predicted = closed_form(statistics(layer), every_slot(layer), groups * 4)
    x = text(layer, batch=2, length=13, seed=5)
    assert relative(result.attend(layer, x), layer.attend(x)) < 1e-9
    far = apart(2, 13, 11)
    assert relative(layer.attend(x, far), layer.attend(x)) > 1e-3
    assert relative(result.attend(layer, x, positions=far), layer.attend(x, far)) < 1e-9
    assert relative(result.attend(layer, x, 5, far), layer.attend(x, far)[:, 5:]) < 1e-9
    assert relative(layer.attend(x, far + 5), layer.attend(x, far)) < 1e-9  # differences alone matter
    assert predicted.slots + predicted.low_rank < 1e-9 * max(1.0, float(statistics(layer).phase_weight.sum()))


@pytest.mark.parametrize("options", [{"rotary": 4}, {"turn": 1.4}, {"d_v": 6}, {"d_v": 12}], ids=str)
def test_full_width_is_exact_for_unusual_heads(options: dict) -> None:
    layer = source(4, 2, 8, width=64, **options)
    unturned = layer.groups * int((layer.inv_freq == 0).sum()) * 2
    result, _ = closed_form(statistics(layer), every_slot(layer), layer.groups * layer.d_v + unturned)
    x = text(layer, batch=1, length=9, seed=6)
    assert relative(result.attend(layer, x), layer.attend(x)) < 1e-9


def test_key_mean_is_free_and_value_mean_is_a_constant() -> None:
    """Identity 4: the latent is centred, and nothing is lost by it though the text's mean is large."""
    layer = source(4, 2, 4, width=32)
    x = text(layer, mean=5.0)
    stats = statistics(layer, x)
    result, _ = closed_form(stats, every_slot(layer), 8)
    latent = x @ result.encoder.mT + result.encoder_bias
    assert float(latent.flatten(0, 1).mean(0).norm()) < 0.2 * float(latent.flatten(0, 1).norm(dim=-1).mean())
    assert float(result.value_mean.norm()) > 1
    assert relative(result.attend(layer, x), layer.attend(x)) < 1e-9


def test_scale_is_that_of_the_new_width() -> None:
    """Identity 6: queries carry sqrt(d_n + d_r) / sqrt(d), the class divides by sqrt(d_n + d_r)."""
    layer = source(4, 2, 4, width=32)
    result, _ = closed_form(statistics(layer), every_slot(layer), 8)
    assert result.d_nope + result.d_rope == 4 + 8
    rows = layer.w_q * (layer.scale * math.sqrt(12))
    phases = phase_coefficients(statistics(layer))
    expected = rotation_of(phases) @ rows
    assert relative(result.query[:, :4], expected) < 1e-12


def test_absorbed_and_expanded_attention_agree() -> None:
    """Identity 7, for a converted layer as the dialect op reads it."""
    layer = source(4, 2, 8)
    result = convert(layer, 3, 9)
    x = text(layer, batch=2, length=11)
    code = x @ torch.cat([result.encoder, result.rope]).mT + torch.cat([result.encoder_bias, result.rope_bias])
    q = torch.einsum("hmd,bsd->bhsm", result.query, x)
    angles = turns(result.inv_freq, q)
    q_nope, q_rope = q[..., : result.d_nope], turned(q[..., result.d_nope :], *angles)
    key = turned(code[:, None, :, result.rank :], *angles)[:, 0]
    outs = [
        latent_attention_reference(
            q_nope, q_rope, code[..., : result.rank], key, result.w_uk, result.w_uv, None,
            1 / math.sqrt(q.shape[-1]), True, 0, 0.0, 0, absorb=absorb,
        )
        for absorb in (True, False)
    ]  # fmt: skip
    assert relative(outs[0], outs[1]) < 1e-12
    expected = result.mixed(layer, x).unflatten(-1, (4, -1)) - result.value_mean
    assert relative(outs[0], expected) < 1e-9


@settings(max_examples=12, deadline=None)
@given(
    grid=st.sampled_from(((4, 2), (6, 3), (2, 1), (3, 3))),
    d=st.sampled_from((2, 4, 6)),
    rank=st.integers(1, 14),
    form=st.sampled_from(("plain", "bias", "norms")),
    data=st.data(),
)
def test_any_size_gives_a_finite_layer_of_that_size(
    grid: tuple[int, int], d: int, rank: int, form: str, data: st.DataObject
) -> None:
    layer = source(*grid, d, bias=form == "bias", norms=form == "norms")
    slots = data.draw(st.integers(1, grid[1] * d // 2))
    x = text(layer, batch=2, length=8)
    result = convert(layer, slots, rank, statistics(layer, x))
    assert (result.rank, result.d_rope) == (rank, 2 * slots)
    assert result.attend(layer, x).shape == x.shape
    assert bool(torch.isfinite(result.attend(layer, x)).all())


def test_error_on_other_text_falls_with_rank_and_slots() -> None:
    layer = source(8, 4, 8, width=64)
    stats = statistics(layer, text(layer, batch=16))
    x = text(layer, batch=4, seed=7)

    def error(slots: int, rank: int) -> float:
        return relative(convert(layer, slots, rank, stats).attend(layer, x), layer.attend(x))

    by_rank = [error(8, rank) for rank in (4, 12, 24, 48)]
    by_slots = [error(slots, 48) for slots in (1, 4, 8, 16)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_slots == sorted(by_slots, reverse=True)


def test_low_rank_prediction_is_what_values_lose() -> None:
    """With all slots only values are approximated; with a head to a group the predicted error is the measured one."""
    layer = source(3, 3, 4, width=32)
    x = text(layer, batch=16)
    stats = statistics(layer, x)
    result, predicted = closed_form(stats, every_slot(layer), 5)
    mixed = causal_attention(
        layer.rotate(layer.queries(x)), layer.rotate(layer.keys(x)), layer.values(x), layer.scale
    ).transpose(1, 2)
    difference = torch.einsum("bshv,Dhv->bshD", result.mixed(layer, x).view(mixed.shape) - mixed, layer.w_o)
    measured = float((weights_of(x)[..., None, None] * difference**2).sum())
    assert measured == pytest.approx(predicted.low_rank, rel=1e-3)


@pytest.mark.parametrize("lane", [True, False])
@pytest.mark.parametrize("form", ["plain", "bias", "norms"])
def test_stored_weights_compute_the_same(form: str, lane: bool) -> None:
    layer = source(4, 2, 8, bias=form == "bias", norms=form == "norms", turn=1.25 if form == "norms" else 1.0)
    layer = replace(layer, order=paired_order(8, 8, 0, "interleaved"))
    result = convert(layer, 3, 9)
    weights = to_weights(result, layer, lane)
    x = text(layer, batch=1, length=9)
    again = from_weights({n: w.double() for n, w in weights.items()}, layer, result.inv_freq, lane)
    assert relative(again.attend(layer, x), result.attend(layer, x)) < 1e-5
    assert weights["kv_a_proj.weight"].shape[0] == 9 + lane + 6
    if lane:
        assert float(weights["kv_a_proj.weight"][9].abs().max()) == 0
        assert float(weights["kv_a_proj.bias"][9]) == 1
    assert ("q_proj.bias" in weights) == (form == "bias")
    assert ("q_map.weight" in weights) == (form == "norms")


def test_latent_norm_is_the_largest_seen() -> None:
    layer = source(4, 2, 8)
    result = convert(layer, 3, 9)
    x = text(layer)
    expected = (x @ result.encoder.mT + result.encoder_bias).norm(dim=-1).max()
    assert result.latent_norm(layer, x) == pytest.approx(float(expected))
