"""How much to keep: from a fraction of the cache to a rope width and a rank, by measured error on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.mla.layer import closed_form
from attnopt.passes.mla.slots import choose_table, slot_energies
from attnopt.passes.mla.statistics import LayerStatistics
from attnopt.rewriter import parallel
from attnopt.rewriter.site import AttentionSite

#: Shares of the budget that are tried as rope width.
ROPE_SHARES = (0.22, 0.29, 0.36, 0.43)


@dataclass(frozen=True)
class Split:
    """How the cached numbers of a token are divided.

    Attributes:
        rope: width of the rotary key.
        rank: width of the latent, the lane included.
    """

    rope: int
    rank: int

    @property
    def total(self) -> int:
        """Cached numbers per token and layer."""
        return self.rope + self.rank


def kept_numbers(site: AttentionSite, keep: float) -> int:
    """Cached numbers of a converted layer for a fraction of the source's: the nearest multiple of 8 (of 2 below 64)."""
    before = site.cached_numbers_per_token
    step = 8 if before >= 64 else 2
    return max(2 * step, round(before * keep / step) * step)


def turning_pairs(site: AttentionSite) -> int:
    """Rotary pairs of all KV heads: no layer needs more slots."""
    return 0 if site.rope is None else site.kv_heads * len(site.rope.inv_freq)


def candidates(site: AttentionSite, total: int, lane: bool) -> tuple[Split, ...]:
    """Splits of a budget worth trying, rope width ascending."""
    step = 8 if total >= 64 else 2
    widths = {max(2, round(total * share / step) * step) for share in ROPE_SHARES}
    most = min(2 * turning_pairs(site), total - 1 - int(lane))
    return tuple(Split(width, total - width) for width in sorted({min(w, most // 2 * 2) for w in widths}) if width)


def check_split(site: AttentionSite, split: Split, lane: bool, force: bool) -> None:
    """Refuse sizes that make no sense.

    Raises:
        OptionError: if the rope width is odd, there are not that many pairs, or no rank is left beside the lane.
        UnsupportedError: if the cache would not shrink and `force` is not given.
    """
    if split.rope < 2 or split.rope % 2:
        raise OptionError(
            f"a rope width of {split.rope} is not an even number of at least 2", "give an even --qk-rope-head-dim"
        )
    if split.rope > 2 * turning_pairs(site):
        raise OptionError(
            f"a rope width of {split.rope} is more than the {2 * turning_pairs(site)} rotary channels of all key heads",
            "give a smaller --qk-rope-head-dim",
        )
    if split.rank < 1 + int(lane):
        raise OptionError(
            f"a rank of {split.rank} leaves nothing for keys and values" + (" beside the lane" if lane else ""),
            "give a larger --kv-lora-rank or --kv-keep, or a smaller --qk-rope-head-dim",
        )
    before = site.cached_numbers_per_token
    if split.total >= before and not force:
        raise UnsupportedError(
            f"{split.rank} + {split.rope} = {split.total} cached numbers per token and layer are no fewer than the "
            f"{before} that {site.fqn} keeps now",
            "ask for less (--kv-keep), or give --force if a larger cache is wanted",
        )


@dataclass(frozen=True)
class HeldOut:
    """Held-out text at one layer of the source model.

    Attributes:
        x: attention input [B, S, D].
        target: the source layer's output, [B, S, D].
        weights: token weights [B, S].
        count: how many tokens each stands for.
        positions: of the tokens [B, S]; None for 0 ... S-1.
    """

    x: Tensor
    target: Tensor
    weights: Tensor
    count: float
    positions: Tensor | None = None


def split_errors(
    stats: LayerStatistics, held_out: Sequence[HeldOut], splits: Sequence[Split], lane: bool
) -> dict[Split, float]:
    """Output error of a layer's closed form on held-out text, for each split.

    It is the mean of e / (1 + e) over the tokens, with e the squared error relative to the residual stream's mean
    square, so that errors of different layers can be added, and a token that is lost anyway does not outweigh all
    others.

    Args:
        stats: of the layer, on other text.
        held_out: the text to measure on.
        splits: what to try.
        lane: whether one latent channel is the constant.
    """
    energies = slot_energies(stats)
    source = stats.layer
    (tokens,) = parallel.sum_of(sum(sample.weights.numel() * sample.count for sample in held_out))
    result = {}
    for split in splits:
        table = choose_table([energies], split.rope // 2)
        layer, _ = closed_form(stats, table, split.rank - int(lane), sweeps=1)
        layer = layer.to(source.w_q.dtype)
        error = 0.0
        for sample in held_out:
            found = layer.attend(source, sample.x, positions=sample.positions)
            relative = (found - sample.target).pow(2).mean(-1) * sample.weights / sample.count
            error += sample.count * float((relative / (1 + relative)).sum())
        result[split] = parallel.sum_of(error)[0] / tokens
    return result


def best_split(errors: Mapping[Split, float]) -> Split:
    """The split with the smallest error; the narrower rope if two are equal.

    Raises:
        UnsupportedError: if no error is finite.
    """
    finite = {split: error for split, error in errors.items() if math.isfinite(error)}
    if not finite:
        raise UnsupportedError("no split of the cache gives finite outputs", "check the calibration text")
    return min(finite, key=lambda split: (finite[split], split.rope))
