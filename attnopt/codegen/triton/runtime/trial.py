"""Runs kernels on requests whose unused slots hold NaN, and compares them with float64. Copied into packages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch, reference
from .select import PAGE, Config

#: Largest relative difference, by element size: rounding of the inputs of the second product, and of the sum.
BOUNDS = {2: 2e-2, 4: 2e-3}
LENGTHS = (1, 20, 64, 65, 700, 0)


class Requests:
    """Requests of some lengths, their pages in random order."""

    def __init__(self, dtype: torch.dtype, device: torch.device, lengths: Sequence[int] = LENGTHS) -> None:
        self.dtype, self.device = dtype, device
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.pages = max(1, -(-max(lengths) // PAGE))
        self._generator = torch.Generator(device=device).manual_seed(0)
        table = torch.randperm(len(lengths) * self.pages, generator=torch.Generator().manual_seed(0))
        self.table = table.view(len(lengths), self.pages).to(torch.int32).to(device)

    def normal(self, *size: int) -> Tensor:
        """Random numbers."""
        return torch.randn(size, generator=self._generator, device=self.device).to(self.dtype)

    def cache(self, *shape: int) -> Tensor:
        """[pages, *shape] of random numbers, `shape` ends in (PAGE, width); slots behind a request's last are NaN."""
        cache = self.normal(self.table.numel(), *shape)
        slot = torch.arange(self.pages * PAGE, device=self.device).view(1, self.pages, PAGE)
        unused = torch.empty(cache.shape[0], PAGE, dtype=torch.bool, device=self.device)
        unused[self.table.long()] = slot >= self.lengths[:, None, None]
        unused = unused.view(cache.shape[0], *[1] * (len(shape) - 2), PAGE, 1)
        return cache.masked_fill_(unused, float("nan"))


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


def latent_error(
    heads: int, rank: int, rope: int, tokens: int, scale: float, dtype: torch.dtype, device: torch.device,
    config: Config | None = None, parts: int | None = None,
) -> float:  # fmt: skip
    """Relative error of absorbed decoding; design and division as for `launch.latent_decode`."""
    requests = Requests(dtype, device, [n if n >= tokens else 0 for n in LENGTHS])
    cache = requests.cache(PAGE, rank + rope)
    q = requests.normal(len(LENGTHS), tokens, heads, rank + rope)
    rest = (requests.table, requests.lengths, rank, scale)
    out, _ = launch.latent_decode(q, cache, *rest, config, parts)
    want, _ = reference.latent_decode(q.double(), cache.double(), *rest)
    return difference(out, want)
