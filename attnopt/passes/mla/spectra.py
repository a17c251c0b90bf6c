"""Spectra of keys and values in the error metrics of the conversion: what rank costs, before converting.

    energy left after rank r = sum of the eigenvalues from the r-th on / sum of all

The eigenvalues are those of the closed form on one second moment (`lowrank.joint`): squared output error, to first
order, that each direction of the latent removes. `spectrum_key` and `spectrum_value` are of keys and values alone,
`spectrum_joint` of both in one latent. `spectrum_joint_rope` is what is left of the latent when the rotary slots that
the pass would take for half the cache hold their part of the keys. Keys without a slot keep the mean phase they are
seen at.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnopt.passes.common.stream import token_weights
from attnopt.passes.mla.budget import ROPE_SHARES, kept_numbers, turning_pairs
from attnopt.passes.mla.layer import closed_form_blocks, common_moment, moments_of
from attnopt.passes.mla.lowrank import Block, joint
from attnopt.passes.mla.slots import choose_table, normalised, phase_coefficients, slot_energies, take_slots
from attnopt.passes.mla.source_layer import read_source
from attnopt.passes.mla.statistics import LayerStatistics
from attnopt.passes.mla.support import obstacle
from attnopt.profiles.metric import SiteMetric
from attnopt.profiles.profile import MetricInfo
from attnopt.profiles.view import LayerView
from attnopt.rewriter.site import AttentionSite

#: Every so-many-th query is looked at: the spectrum is of one pool, and moments of a few thousand queries are enough.
STRIDE = 8

#: Tokens of each prompt, from its start. The statistics pair queries with keys: longer windows would take memory
#: with the square of their length.
LENGTH = 1024


class Spectra(SiteMetric):
    """Spectra of one layer."""

    def __init__(self, site: AttentionSite, read: Callable[[str], Tensor]) -> None:
        super().__init__(site, read)
        self.statistics = LayerStatistics(read_source(site, read), STRIDE)

    @classmethod
    def describe(cls) -> dict[str, MetricInfo]:
        axes = ("site", "rank")
        source = "metric of to-mla, docs/mla.md"
        return {
            "spectrum_key": MetricInfo(1, axes, "", "energy of the keys left after a rank", source),
            "spectrum_value": MetricInfo(1, axes, "", "energy of the values left after a rank", source),
            "spectrum_joint": MetricInfo(1, axes, "", "energy of keys and values left after a rank", source),
            "spectrum_joint_rope": MetricInfo(
                1, axes, "", "energy left beside rotary slots for half the cache", source
            ),
        }

    @classmethod
    def obstacle(cls, site: AttentionSite) -> str | None:
        return obstacle(site)

    def update(self, x: Tensor, view: LayerView) -> None:
        after = view.output if view.stream is None else view.stream + view.output
        self.statistics.update(x[:, :LENGTH], token_weights(after[:, :LENGTH]))

    def result(self) -> dict[str, Tensor]:
        stats = self.statistics
        if stats.tokens < stats.layer.d:
            return {}
        groups = stats.layer.groups
        blocks = self._blocks(())
        slots = self._half_cache_table()
        common = common_moment(moments_of(stats))
        return {
            "spectrum_key": _left(blocks[:groups], common),
            "spectrum_value": _left(blocks[groups:], common),
            "spectrum_joint": _left(blocks, common),
            "spectrum_joint_rope": _left(self._blocks(slots), common),
        }

    def _half_cache_table(self) -> tuple[int, ...]:
        share = ROPE_SHARES[len(ROPE_SHARES) // 2]
        width = round(kept_numbers(self.site, 0.5) * share / 8) * 8
        pairs = min(max(1, width // 2), turning_pairs(self.site))
        return choose_table([slot_energies(self.statistics)], pairs)

    def _blocks(self, table: tuple[int, ...]) -> list[Block]:
        slots = normalised(take_slots(self.statistics, table), self.statistics)
        return closed_form_blocks(self.statistics, slots, phase_coefficients(self.statistics))


def _left(blocks: list[Block], common: Tensor) -> Tensor:
    """Share of the energy left after each rank."""
    _, values = joint(blocks, common, 1)
    total = values.sum().clamp(min=1e-300)
    left = (1 - values.cumsum(0) / total).clamp(min=0)
    return torch.cat([torch.ones(1, dtype=left.dtype), left])
