"""Rotary slots: which frequencies keep a rotary key, and what of the KV heads' pairs each of them carries.

Pair f of all KV heads is a complex vector K_f u (K_f: G x p complex). One slot keeps a complex number z = e K_f u,
shared by all heads (mla-conversion identity 1). A pair without a slot keeps only its mean phase

    c_hf = E_omega[ e^{i theta_f (j - i)} ],

and loses the share 1 - |c_hf|^2 of its logit energy. Slots go where that loss, weighted by query energy, is largest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.errors import OptionError
from attnopt.passes.mla.source_layer import SourceLayer
from attnopt.passes.mla.statistics import LayerStatistics


@dataclass(frozen=True)
class Slots:
    """The rotary part of a layer.

    Attributes:
        table: frequency index of each slot, with repetition.
        encoder: [s, p] complex, z = encoder u.
        decoder: [s, G] complex, pair f of head g is approximated by decoder[., g] z.
        residual: [G, F, p] complex, what the slots leave of the pairs.
        energies: as `slot_energies` of the layer.
    """

    table: tuple[int, ...]
    encoder: Tensor
    decoder: Tensor
    residual: Tensor
    energies: Tensor


def phase_coefficients(stats: LayerStatistics) -> Tensor:
    """c_hf, [H, F] complex, |c| <= 1."""
    return stats.phase / stats.phase_weight.clamp(min=1e-300)[:, None]


def pair_rows(layer: SourceLayer) -> Tensor:
    """K_f of all frequencies: [G, F, p] complex."""
    rows = layer.key_rows()
    half = layer.d // 2
    return torch.complex(rows[:, :half], rows[:, half:])


def losses(stats: LayerStatistics) -> Tensor:
    """omega^2_gf, [G, F]: expected squared output error per squared error of pair f of KV head g without a slot.

    Half of the sum over the group's heads of (1 - |c_hf|^2) E||q_hf||^2, with the queries' moment under omega_ij, which
    holds the sensitivity. Pairs that never turn get 0, the others at least 1e-6 of the mean.
    """
    layer, half = stats.layer, stats.layer.d // 2
    energy = torch.diagonal(stats.queries, dim1=1, dim2=2)
    energy = energy[:, :half] + energy[:, half:]
    lost = 0.5 * layer.scale**2 * (1 - phase_coefficients(stats).abs() ** 2).clamp(min=0) * energy
    result = torch.zeros(layer.groups, half, dtype=torch.float64).index_add_(0, layer.group_of, lost)
    turning = layer.inv_freq != 0
    floor = float(result[:, turning].mean()) * 1e-6 if bool(turning.any()) else 0.0
    return torch.where(turning, result.clamp(min=max(floor, 1e-300)), 0.0)


def _spectra(stats: LayerStatistics) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [F, G] ascending, vectors [F, G, G] of diag(omega_f) K_f C K_fᴴ diag(omega_f), and omega [G, F]."""
    omega = losses(stats).sqrt()
    pairs = pair_rows(stats.layer)
    scaled = (pairs * omega[:, :, None]).movedim(1, 0)
    gram = _times(scaled, _key_moment(stats)) @ scaled.mH
    values, vectors = torch.linalg.eigh((gram + gram.mH) / 2)
    return values.clamp(min=0), vectors, omega


def _key_moment(stats: LayerStatistics) -> Tensor:
    """E[u uᵀ] under the keys' weights, of all groups together, [p, p]."""
    return stats.keys.second.sum(0).div_(stats.keys.weight.sum().clamp(min=1e-300))


def _times(rows: Tensor, moment: Tensor) -> Tensor:
    """Complex rows [.., p] times a real matrix, at half the price of a complex one."""
    return torch.complex(rows.real @ moment, rows.imag @ moment)


def slot_energies(stats: LayerStatistics) -> Tensor:
    """e_fm, [F, G] descending in m: expected squared output error that the m-th slot of frequency f removes."""
    return _spectra(stats)[0].flip(-1)


def choose_table(energies: Sequence[Tensor], slots: int) -> tuple[int, ...]:
    """The frequencies, with repetition, of the slots that remove most over several layers.

    Args:
        energies: `slot_energies` of each layer; each layer counts the same in total.
        slots: how many.

    Raises:
        OptionError: if there are fewer turning pairs than slots.
    """
    total = torch.stack([e / e.sum().clamp(min=1e-300) for e in energies]).mean(0)
    if int((total > 0).sum()) < slots:
        raise OptionError(
            f"{slots} rotary slots were asked for, but there are only {int((total > 0).sum())} pairs that turn",
            f"ask for a rope width of at most {2 * int((total > 0).sum())}",
        )
    best = total.flatten().topk(slots).indices // total.shape[1]
    return tuple(sorted(best.tolist()))


def take_slots(stats: LayerStatistics, table: Sequence[int]) -> Slots:
    """The best components of a layer for a list of frequencies, and what they leave.

    Args:
        stats: the layer's statistics.
        table: frequency index of each slot; one that occurs m times gets the m largest components.
    """
    values, vectors, omega = _spectra(stats)
    energies = values.flip(-1)
    pairs = pair_rows(stats.layer)
    residual = pairs.clone()
    encoders, decoders = [], []
    for f, count in sorted(Counter(table).items()):
        for m in range(count):
            u, gain = vectors[f, :, -1 - m], omega[:, f].to(torch.complex128)
            encoder, decoder = (u.conj() * gain) @ pairs[:, f], u / gain
            residual[:, f] -= decoder[:, None] * encoder
            encoders.append(encoder)
            decoders.append(decoder)
    size = stats.layer.input_width
    if not encoders:
        return Slots((), torch.zeros(0, size, dtype=torch.complex128), _no_decoders(stats), residual, energies)
    return Slots(tuple(sorted(table)), torch.stack(encoders), torch.stack(decoders), residual, energies)


def _no_decoders(stats: LayerStatistics) -> Tensor:
    """Decoders of no slot, [0, G]."""
    return torch.zeros(0, stats.layer.groups, dtype=torch.complex128)


def left_by(energies: Tensor, table: Sequence[int]) -> float:
    """Sum of the slot energies that a table leaves: predicted squared output error of the missing slots."""
    taken = sum(float(energies[f, :count].sum()) for f, count in Counter(table).items())
    return max(0.0, float(energies.sum()) - taken)


def normalised(slots: Slots, stats: LayerStatistics) -> Slots:
    """The same with rotary keys of unit mean square, which rounds and trains better (their scale is free)."""
    if not slots.table:
        return slots
    energy = (_times(slots.encoder, _key_moment(stats)) * slots.encoder.conj()).real.sum(1)
    power = energy.clamp(min=1e-300).sqrt()
    return replace(slots, encoder=slots.encoder / power[:, None], decoder=slots.decoder * power[:, None])
