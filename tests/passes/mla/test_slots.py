"""Rotary slots: the identities they rest on, and that they go where they are worth most."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from attnopt.errors import OptionError
from attnopt.passes.mla import slots
from tests.passes.mla.layers import GRIDS, relative, source, statistics


def test_unitary_mixing_of_key_heads_commutes_with_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, 16, dtype=torch.complex128, generator=generator)  # G x p, pair f of all key heads
    x = torch.randn(16, 2, dtype=torch.complex128, generator=generator)
    query = torch.randn(3, dtype=torch.complex128, generator=generator)
    mix = torch.randn(3, 3, dtype=torch.complex128, generator=generator)
    turn = torch.exp(torch.tensor(0.7j, dtype=torch.complex128))
    before = (query.conj() @ (keys @ x) * turn).real
    mixed_keys, mixed_query = mix.mH @ (keys @ x), torch.linalg.solve(mix, query)
    assert relative((mixed_query.conj() @ mixed_keys * turn).real, before) < 1e-12


@pytest.mark.parametrize(("heads", "groups"), GRIDS)
def test_all_slots_leave_nothing(heads: int, groups: int) -> None:
    stats = statistics(source(heads, groups, 4, width=32))
    full = tuple(f for f in range(2) for _ in range(groups))
    taken = slots.take_slots(stats, full)
    assert float(taken.residual.abs().max()) < 1e-12
    rebuilt = torch.zeros_like(taken.residual)
    for place, f in enumerate(taken.table):
        rebuilt[:, f] += taken.decoder[place][:, None] * taken.encoder[place]
    assert relative(rebuilt, slots.pair_rows(stats.layer)) < 1e-12
    assert slots.left_by(slots.slot_energies(stats), full) < 1e-9 * float(slots.slot_energies(stats).sum())


def test_what_slots_leave_is_what_their_energies_say() -> None:
    stats = statistics(source())
    energies = slots.slot_energies(stats)
    table = slots.choose_table([energies], 3)
    residual = slots.take_slots(stats, table).residual
    moment = (stats.keys.second.sum(0) / stats.keys.weight.sum()).to(torch.complex128)
    power = torch.einsum("gfp,pq,gfq->gf", residual, moment, residual.conj()).real
    assert float((slots.losses(stats) * power).sum()) == pytest.approx(slots.left_by(energies, table), rel=1e-9)


def test_more_slots_leave_less_and_the_best_come_first() -> None:
    stats = statistics(source(8, 4, 8))
    energies = slots.slot_energies(stats)
    left = [slots.left_by(energies, slots.choose_table([energies], n)) for n in range(1, 17)]
    assert all(b <= a for a, b in pairwise(left))
    worst = sorted(energies.flatten().tolist())
    assert left[2] == pytest.approx(sum(worst[:-3]), rel=1e-9)


def test_phase_coefficient_is_one_for_pairs_that_do_not_turn_and_they_are_no_candidates() -> None:
    layer = source(4, 2, 8, rotary=4)
    stats = statistics(layer)
    coefficients = slots.phase_coefficients(stats)
    assert torch.allclose(coefficients[:, 2:], torch.ones_like(coefficients[:, 2:]))
    assert float(coefficients.abs().max()) <= 1 + 1e-9
    assert float(slots.slot_energies(stats)[2:].abs().max()) == 0
    assert set(slots.choose_table([slots.slot_energies(stats)], 4)) == {0, 1}
    with pytest.raises(OptionError, match="only 4 pairs"):
        slots.choose_table([slots.slot_energies(stats)], 5)


def test_layers_count_the_same_in_a_shared_table() -> None:
    loud = torch.tensor([[100.0, 0.0], [90.0, 0.0], [1e-9, 0.0]])
    quiet = torch.tensor([[1e-9, 0.0], [0.2, 0.0], [0.8, 0.0]])
    assert slots.choose_table([loud, quiet], 1) == (2,)
    assert slots.choose_table([loud], 1) == (0,)


def test_normalised_slots_have_unit_power_and_mean_the_same() -> None:
    stats = statistics(source())
    raw = slots.take_slots(stats, (0, 0, 2))
    unit = slots.normalised(raw, stats)
    for place in range(3):
        assert relative(unit.decoder[place][:, None] * unit.encoder[place],
                        raw.decoder[place][:, None] * raw.encoder[place]) < 1e-12  # fmt: skip
    moment = (stats.keys.second.sum(0) / stats.keys.weight.sum()).to(torch.complex128)
    power = torch.einsum("sp,pq,sq->s", unit.encoder, moment, unit.encoder.conj()).real
    assert torch.allclose(power, torch.ones(3, dtype=torch.float64))


def test_no_slots_are_no_slots() -> None:
    stats = statistics(source())
    none = slots.normalised(slots.take_slots(stats, ()), stats)
    assert none.table == ()
    assert none.encoder.shape[0] == 0
    assert torch.equal(none.residual, slots.pair_rows(stats.layer))
