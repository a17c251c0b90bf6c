"""How far apart a query and a key are: along a text, or on the grid of an image's patches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def distance_bins(length: int) -> int:
    """Number of bins 0, 1, 2-3, 4-7, ... that distances below `length` fall into."""
    return 1 + max(0, length - 1).bit_length()


def bin_labels(count: int) -> tuple[str, ...]:
    """What the bins hold: ("0", "1", "2-3", "4-7", ...)."""
    labels = ["0", "1", *(f"{1 << b}-{(2 << b) - 1}" for b in range(1, count))]
    return tuple(labels[:count])


def bin_of(distance: Tensor) -> Tensor:
    """Bin of each distance: 0 for 0, else 1 + floor(log2)."""
    exponent = torch.frexp(distance.to(torch.float64)).exponent  # distance = m * 2^e with m in [0.5, 1)
    return torch.where(distance > 0, exponent, 0).long()


def power_of_two_below(value: float) -> int:
    """Largest power of two that is at most `value`, at least 1."""
    return 1 << max(0, math.floor(math.log2(max(1.0, value))))


@dataclass(frozen=True)
class Geometry:
    """Positions of the T tokens that attend to each other.

    Attributes:
        length: T.
        causal: queries see only keys at or before them.
        side: patches on a side of the image (0 for text). Distances are then Chebyshev distances between patches, and
            0 to and from the prefix.
        prefix: tokens before the patches that stand for no place (CLS); the first `prefix` keys. 0 for text.
    """

    length: int
    causal: bool
    side: int = 0
    prefix: int = 0
    _cache: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of_image(cls, tokens: int) -> Geometry:
        """The square grid that `tokens` tokens make up, with at most 5 prefix tokens; a line if they make none."""
        for prefix in (0, 1, 2, 5):
            side = math.isqrt(max(0, tokens - prefix))
            if side > 1 and side * side == tokens - prefix:
                return cls(tokens, False, side, prefix)
        return cls(tokens, False)

    @property
    def planar(self) -> bool:
        """True for a grid, whose distances are not a function of the difference of indices."""
        return self.side > 0

    @property
    def reach(self) -> int:
        """All distances are below this."""
        return self.side if self.planar else self.length

    def distances(self, queries: Tensor, keys: int) -> Tensor:
        """Distance of each query to each of the first `keys` keys, int64 [R, keys]; negative for future keys."""
        if not self.planar:
            difference = queries[:, None] - torch.arange(keys, device=queries.device)
            return difference if self.causal else difference.abs()
        if "grid" not in self._cache:
            place = torch.arange(self.length - self.prefix)
            row, column = place // self.side, place % self.side
            apart = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs())
            self._cache["grid"] = torch.nn.functional.pad(apart, (self.prefix, 0, self.prefix, 0))
        return self._cache["grid"].to(queries.device)[queries][:, :keys]

    def visible(self, queries: Tensor) -> Tensor:
        """How many keys each query may see, [R]."""
        return queries + 1 if self.causal else torch.full_like(queries, self.length)
