"""How much to keep: from a fraction of the cache to a rope width and a rank, by measured error on held-out windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from attnopt.errors import OptionError, UnsupportedError
from attnopt.passes.mla.layer import LatentLayer, closed_form
from attnopt.passes.mla.slots import choose_table, slot_energies
from attnopt.passes.mla.statistics import LayerStatistics
from attnopt.rewriter import parallel
from attnopt.rewriter.site import AttentionSite

#: Shares of the budget that are tried as rope width.
ROPE_SHARES = (0.22, 0.29, 0.36, 0.43)
#: Sizes at which the loss of a layer is measured, as multiples of the mean size.
SIZE_SHARES = (0.5, 1.0, 2.0)


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
    step = step_of(before)
    return max(2 * step, round(before * keep / step) * step)


def step_of(numbers: int) -> int:
    """What sizes are rounded to a multiple of."""
    return 8 if numbers >= 64 else 2


def turning_pairs(site: AttentionSite) -> int:
    """Rotary pairs of all KV heads: no layer needs more slots."""
    return 0 if site.rope is None else site.kv_heads * len(site.rope.inv_freq)


def split_at(site: AttentionSite, total: int, share: float, lane: bool) -> Split:
    """The split of a budget with about a share of it as rope width, as far as there are pairs that turn."""
    step = step_of(total)
    most = min(2 * turning_pairs(site), total - 1 - int(lane))
    width = min(max(2, round(total * share / step) * step), most // 2 * 2)
    return Split(width, total - width)


def candidates(site: AttentionSite, total: int, lane: bool) -> tuple[Split, ...]:
    """Splits of a budget worth trying, rope width ascending."""
    splits = {split_at(site, total, share, lane) for share in ROPE_SHARES}
    return tuple(sorted((split for split in splits if split.rope), key=lambda split: split.rope))


def sizes_to_try(site: AttentionSite, total: int) -> tuple[int, ...]:
    """Budgets of one layer worth measuring where layers have `total` on average, ascending.

    They differ from it by multiples of the step of budgets, and larger ones are still less than the layer keeps now.
    """
    before = site.cached_numbers_per_token
    step = step_of(before)
    fewest, most = -((total - 2 * step) // step), max(0, (before - 1 - total) // step)
    steps = {min(max(round((share - 1) * total / step), fewest), most) for share in SIZE_SHARES}
    return tuple(sorted(total + count * step for count in steps))


def allocate(losses: Sequence[Mapping[int, float]], total: int, step: int) -> tuple[int, ...]:
    """Budgets of layers whose losses add up to the least.

    Between the sizes measured, a layer's loss is taken to fall by equal factors, and of all sizes those on the lower
    convex hull count. Then the layer that gains most by it gets the next numbers, until all are given away: for convex
    losses no division is better.

    Args:
        losses: what the model loses when the layer alone has a size, by size; of each layer.
        total: numbers to divide; at least the sum of the smallest sizes.
        step: sizes measured differ by multiples of it, and budgets will.

    Returns:
        a budget for each layer; together `total`, or less where more would gain nothing.

    Raises:
        UnsupportedError: a loss is not finite.
    """
    if not all(math.isfinite(loss) for layer in losses for loss in layer.values()):
        raise UnsupportedError("a layer's loss is not finite", "check the model and the calibration text")
    sizes = [min(layer) for layer in losses]
    left = total - sum(sizes)
    gains = [(gain, -index, width) for index, layer in enumerate(losses) for gain, width in _gains(layer, step)]
    for gain, index, width in sorted(gains, reverse=True):
        if gain > 0:
            given = min(width, left)
            sizes[-index] += given
            left -= given
    return tuple(sizes)


def _gains(losses: Mapping[int, float], step: int) -> list[tuple[float, int]]:
    """(fall of the loss per number, numbers) of each edge of the lower convex hull, steepest first."""
    hull: list[tuple[int, float]] = []
    for point in _interpolated(losses, step):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(-_slope(a, b), b[0] - a[0]) for a, b in pairwise(hull)]


def _interpolated(losses: Mapping[int, float], step: int) -> list[tuple[int, float]]:
    """The loss at every multiple of a step from the smallest size on, ascending."""
    known = sorted((size, max(loss, 1e-12)) for size, loss in losses.items())
    found = known[:1]
    for (a, first), (b, last) in pairwise(known):
        found += [(size, first * (last / first) ** ((size - a) / (b - a))) for size in range(a + step, b + 1, step)]
    return found


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


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


def quick_form(stats: LayerStatistics, energies: Tensor, split: Split, lane: bool) -> LatentLayer:
    """A layer converted to be tried: by a quick closed form, with a rope table of its own.

    Args:
        stats: of the layer.
        energies: its slot energies.
        split: its sizes.
        lane: whether one latent channel is the constant.
    """
    table = choose_table([energies], split.rope // 2)
    layer, _ = closed_form(stats, table, split.rank - int(lane), sweeps=1)
    return layer.to(stats.layer.w_q.dtype)


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
        layer = quick_form(stats, energies, split, lane)
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
